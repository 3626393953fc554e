"""Redaction.

Promises: a secret under a key that names one, or in a text that shows it to be one, survives nowhere in what
is kept (Hypothesis, anywhere in a tree); what is no secret stays as it is, the same object; keys match whatever
their case and separators, by name, wildcard and path; every action does what it says, and equal values hash
alike under one key only; card numbers and IBANs are known by their check digits; redacting again changes
nothing; what was redacted is told; the time it takes grows no faster than the text; wrong rules are refused.
"""

# ruff: noqa: E501 (tables read best by the line)

from __future__ import annotations

import json
import string
import time
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dotmac.platform.audit_trail.entry import make_encoder, make_entry
from dotmac.platform.audit_trail.patterns import BUILT_IN, SECRETS
from dotmac.platform.audit_trail.privacy import Given, protect, redact
from dotmac.platform.audit_trail.redaction import NOTE, RedactionRule, Redactor, rules_from_json
from dotmac.platform.errors import InvalidArgument, InvalidEvent

KEY = b"k" * 32
PLAIN = Redactor()
ENCODER = make_encoder(hashed=False)
CARD = "4111111111111111"
IBAN = "DE89370400440532013000"


def redacted(metadata, *rules, category="security", **more):
    return redact(Redactor(rules, **more), category, Given("x", metadata=metadata)).metadata


def flagged(redactor, **given):
    """Does the screen ask for a look at the event?"""
    return ENCODER.flagged(redactor.screens, [{"category": "security", "action": "x", **given}]) == [0]


def without_note(metadata):
    return {key: value for key, value in metadata.items() if key != NOTE}


# --- nothing survives

secret = st.text(string.ascii_letters + string.digits, min_size=24, max_size=40).filter(
    lambda text: any(one.isdigit() for one in text)
)
harmless = st.text(max_size=12) | st.integers() | st.floats(allow_nan=False) | st.none() | st.booleans()
SECRET_KEYS = [
    *("password", "Password", "PASSWORD", "user_password", "userPassword", "user-password", "new.password"),
    *("token", "accessToken", "refresh_token", "X-Auth-Token", "client_secret", "clientSecret", "apiKey"),
    *("API-Key", "x_api_key", "Authorization", "proxy-authorization", "Cookie", "Set-Cookie", "private_key"),
    *(
        "aws_secret_access_key",
        "passwd",
        "pwd",
        "passphrase",
        "credentials",
        "cvv",
        "pin",
        "otp",
        "pa\uff53\uff53word",
    ),
]
TEXTS = [
    "Bearer {}", "say bearer {} please", "Authorization: Custom {}", "cookie: a={}; b={}", "password={}",
    "db_password = '{}'", '{{"password": "{}"}}', "https://user:{}@host/path", "https://h/?access_token={}&x=1",
    "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\n{}",
    "eyJhbGciOiJIUzI1NiJ9.{}.{}", 'escaped {{\\"token\\": \\"{}\\"}}', "client-secret: {}", "userPassword={}",
]  # fmt: skip


def placed(value):
    """A tree with the value somewhere in it."""
    return st.recursive(
        st.just(value),
        lambda inner: (
            st.tuples(harmless, inner, harmless).map(list)
            | st.tuples(st.text(max_size=8).filter(lambda key: key != NOTE), inner, harmless).map(
                lambda pair: {pair[0]: pair[1], f"{pair[0]}2": pair[2]}
            )
        ),
        max_leaves=3,
    )


@st.composite
def secrets_somewhere(draw):
    hidden = draw(secret)
    if draw(st.booleans()):
        value = draw(placed({draw(st.sampled_from(SECRET_KEYS)): draw(placed(hidden))}))
    else:
        text = draw(st.sampled_from(TEXTS)).replace("{{", "{").replace("}}", "}").replace("{}", hidden)
        value = draw(placed(draw(st.sampled_from(["", "before "])) + text))
        if draw(st.booleans()):
            value = {json.dumps(value) if not isinstance(value, str) else value: 1}
    return hidden, {"outer": value}


@given(secrets_somewhere())
@settings(max_examples=500, deadline=None)
def test_no_secret_survives(found):
    hidden, metadata = found
    once = redact(PLAIN, "security", Given("x", metadata=metadata)).metadata
    assert hidden not in json.dumps(once)
    assert flagged(PLAIN, metadata=metadata), "though all that is harmless in it has been learnt by now"
    assert once[NOTE]
    again = redact(PLAIN, "security", Given("x", metadata=once)).metadata
    assert again == once, "redacting again changes nothing"


@given(
    secrets_somewhere(),
    st.sampled_from(["", "\x00", "\ud800"]),
    st.sampled_from([float("nan"), object(), {1}]),
)
@settings(max_examples=100, deadline=None)
def test_errors_tell_no_secret(found, letters, nonsense):
    hidden, metadata = found
    given_ = protect(
        PLAIN,
        "security",
        Given(
            "x",
            user_id=f"{letters}password={hidden}{letters}",
            resource_id=f"Bearer {hidden} " * 40,
            ip_address=f"token={hidden}",
            metadata={**metadata, "nested": {hidden[:4]: nonsense, "more": [nonsense, hidden]}},
        ),
    )
    fields = ("user_id", "resource_id", "ip_address", "metadata")
    for name in fields:
        try:
            entry = make_entry(ENCODER, category="security", action="x", **{name: getattr(given_, name)})
        except InvalidEvent as error:
            assert hidden not in str(error)
        else:
            assert name == "metadata" or hidden not in repr(entry.fields())


# Letters could spell the name of a secret: hypothesis tries words that it finds in the code under test.
names = st.text(st.characters(exclude_categories=["L", "Cs"]), max_size=5).map(lambda key: f"k {key}")


@given(st.dictionaries(names, st.text("abcdefghij @/", max_size=20) | harmless))
def test_what_is_no_secret_stays_the_same_object(metadata):
    assert redact(PLAIN, "security", Given("x", metadata=metadata)).metadata is metadata


@given(
    st.dictionaries(st.text(max_size=5), st.recursive(harmless, lambda inner: st.lists(inner, max_size=2)))
)
def test_what_the_screen_lets_pass_is_left_alone(metadata):
    redactor = Redactor()
    for _ in range(2):
        found = redact(redactor, "security", Given("x", metadata=metadata)).metadata
        if not flagged(redactor, metadata=metadata):
            assert found is metadata


def test_keys_that_are_no_unicode_are_left_to_the_checks():
    redactor = Redactor()
    found = redact(redactor, "security", Given("x", metadata={"a\ud800": 1}))
    assert flagged(redactor, metadata={"a\ud800": 1})
    with pytest.raises(InvalidEvent, match="surrogate"):
        make_entry(ENCODER, category="security", **found._asdict())


def test_screens_know_categories_apart():
    redactor = Redactor([RedactionRule(keys=["note"], categories=["SECURITY"])], secrets=False)
    metadata = {"note": "x", "other": 1}
    for category in ("SYSTEM", "SECURITY"):
        redact(redactor, category, Given("x", metadata=metadata))
    item = {"action": "x", "metadata": metadata}
    items = [{"category": name, **item} for name in ("security", "SYSTEM", "SECURITY", "nonsense")]
    assert ENCODER.flagged(redactor.screens, items) == [0, 2, 3]
    assert redact(redactor, "security", Given("x", metadata=metadata)).metadata["note"] == "***"
    own = Redactor([RedactionRule(patterns=["card"])])  # which has no hint
    assert ENCODER.flagged(own.screens, items) == [0, 1, 2, 3]


HARMLESS = {
    "fencing_token": 7, "tokens": 5, "password_changed_at": "2026-01-01", "is_secret": True, "secret": None,
    "time": "2026-01-01T10:20:30.000+00:00", "text": "bearer authentication failed", "basic": "basic training",
    "agent": "Mozilla/5.0 (X11; Linux x86_64)", "url": "https://host:8080/path?page=2", "compass": "compass: north",
    "empty": {"password": ""}, "bypass": "yes",
}  # fmt: skip


def test_what_only_looks_like_a_secret_stays():
    assert redacted(HARMLESS) is HARMLESS
    assert redacted({"page_token": "x", "PageToken": "y"}, keep=["page_token"]) == {
        "page_token": "x",
        "PageToken": "y",
    }
    assert redacted({"password": "x"}, secrets=False) == {"password": "x"}


# --- rules


def test_names_wildcards_and_paths():
    rule = RedactionRule(keys=["ssn", "x_*_id", "customer.*.zip", "a.**.z", "**.deep"])
    tree = {
        "SSN": 1, "list": [{"s-s-n": 2}], "xBigId": 3, "y_id": 4,
        "customer": {"home": {"zip": 5, "city": 6}, "zip": 7, "lines": [{"zip": 8}]},
        "other": {"customer": {"home": {"zip": 9}}},
        "a": {"z": 10, "b": {"c": {"z": 11}}}, "z": 12, "one": {"two": {"deep": 13}}, "dotted.ssn": 14,
    }  # fmt: skip
    found = redacted(tree, rule)
    assert without_note(found) == {
        "SSN": "***", "list": [{"s-s-n": "***"}], "xBigId": "***", "y_id": 4,
        "customer": {"home": {"zip": "***", "city": 6}, "zip": 7, "lines": [{"zip": "***"}]},
        "other": {"customer": {"home": {"zip": 9}}},
        "a": {"z": "***", "b": {"c": {"z": "***"}}}, "z": 12, "one": {"two": {"deep": "***"}}, "dotted.ssn": "***",
    }  # fmt: skip
    assert found[NOTE]["metadata.list[0].s-s-n"] == "mask:key"


def test_actions():
    tree = {"a": "abcdefgh", "b": "abcdefgh", "c": {"x": 1}, "d": "abcdefgh", "n": 123456789, "s": "ab"}
    rules = [
        RedactionRule(keys=["a", "n"], action="mask", keep=4),
        RedactionRule(keys=["b", "c"], action="hash"),
        RedactionRule(keys=["d", "s"], action="truncate", keep=2),
    ]
    found = redacted(tree, *rules, hash_key=KEY)
    assert (found["a"], found["n"], found["d"], found["s"]) == ("***efgh", "***6789", "ab…", "…")
    assert found["b"].startswith("hmac:")
    assert found["c"] != found["b"]
    again, other = redacted(tree, *rules, hash_key=KEY), redacted(tree, *rules, hash_key=b"o" * 32)
    assert (again["b"], again["c"]) == (found["b"], found["c"])
    assert other["b"] != found["b"]
    assert "a" not in redacted({"a": 1, "b": 2}, RedactionRule(keys="a", action="drop"))
    text = redacted({"t": f"x {CARD} y", "l": [1, CARD]}, RedactionRule(patterns="card", action="drop"))
    assert without_note(text) == {"t": "x  y", "l": [1]}


def test_categories_and_order():
    rules = [
        RedactionRule(keys=["x"], action="drop", categories=["DATA_CHANGE"]),
        RedactionRule(keys=["x", "password"], keep=1, name="mine"),
    ]
    assert redacted({"x": "abc"}, *rules)["x"] == "***c"
    assert "x" not in redacted({"x": "abc"}, *rules, category="data_change")
    assert "x" not in redacted({"x": "abc"}, *rules, category="DATA_CHANGE")
    found = redacted({"password": "abc"}, *rules)
    assert (found["password"], found[NOTE]) == ("***c", {"metadata.password": "mask:mine"})


def test_texts_of_the_event():
    mail = RedactionRule(patterns=["email"], action="hash")
    who = Given(
        "login of bob@example.com", user_id="bob@example.com", resource_id="bob@example.com", metadata=None
    )
    found = redact(Redactor([mail], hash_key=KEY), "security", who)
    assert found.user_id == "bob@example.com", "identities only where a rule says so"
    assert found.resource_id.startswith("hmac:")
    assert found.action == f"login of {found.resource_id}"
    assert found.metadata[NOTE] == {"action": "hash:email", "resource_id": "hash:email"}
    everywhere = Redactor([RedactionRule(patterns=["email"], identities=True)])
    assert redact(everywhere, "security", who).user_id == "***"
    assert redact(PLAIN, "security", Given("x", user_id="Bearer abc123def456")).user_id == "Bearer ***"


class Markup(str):
    """A str as template engines and SQLAlchemy have them: its own slices and sums."""

    __slots__ = ()

    def __str__(self):
        return "something else"

    def __radd__(self, other):
        return Markup(other.replace("*", "&ast;") + str.__str__(self))

    def __getitem__(self, key):
        return Markup(str.__getitem__(self, key))


@pytest.mark.parametrize("field", ["action", "user_id", "resource_id", "correlation_id"])
def test_texts_of_other_types_are_looked_at_too(field):
    given = {"action": "x", field: Markup("token=hunter2hunter2 here")}
    assert flagged(PLAIN, **given)
    found = protect(PLAIN, "security", Given(**given))
    assert getattr(found, field) == "token=*** here"
    entry = make_entry(ENCODER, category="security", **found._asdict())
    assert "hunter2" not in str(entry.fields())
    assert redacted({"a": Markup("token=hunter2hunter2 here")})["a"] == "token=*** here"


def test_numbers_in_the_places_of_texts_are_looked_at():
    redactor = Redactor([RedactionRule(patterns=["card"], identities=True)])
    for field in ("user_id", "resource_id", "correlation_id"):
        found = redact(redactor, "security", Given("x", **{field: int(CARD)}))
        assert (getattr(found, field), found.metadata) == ("***", {NOTE: {field: "mask:card"}})
        assert redact(redactor, "security", Given("x", **{field: 7})) == Given("x", **{field: 7})
        assert redact(redactor, "security", Given("x", **{field: 10**900})) == Given("x", **{field: 10**900})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user_id", {"password": "hunter2"}),
        ("resource_id", b"hunter2"),
        ("tenant_id", ["hunter2"]),
        ("correlation_id", 10**900),
        ("action", ["hunter2"]),
        ("ip_address", ["hunter2"]),
        ("category", {"password": "hunter2"}),
        ("event_id", "hunter2"),
        ("event_id", b"hunter2"),
        ("occurred_at", "hunter2"),
    ],
)
def test_errors_show_texts_that_were_redacted_and_nothing_else(field, value):
    given_ = {"category": "security", "action": "x", field: value}
    with pytest.raises(InvalidEvent, match=rf"of type {type(value).__name__} is not") as caught:
        make_entry(ENCODER, **given_)
    assert "hunter2" not in str(caught.value)


def test_plain_types_are_left_alone():
    plain = {"user_id": 7, "resource_id": uuid.uuid4(), "correlation_id": None, "tenant_id": "acme"}
    assert not flagged(PLAIN, **plain)


def test_personal_data_are_redacted_too():
    found = redact(PLAIN, "security", Given("x", personal={"email": "a@b.c", "password": "x"}))
    assert found.personal == {"email": "a@b.c", "password": "***"}
    assert found.metadata == {NOTE: {"personal.password": "mask:secret"}}


@pytest.mark.parametrize(
    "metadata", [{NOTE: 7}, {NOTE: {"a": "free text"}}, {NOTE: {"a": {"password": "x"}}}]
)
def test_the_key_of_the_notes_is_the_trails_own(metadata):
    with pytest.raises(InvalidEvent, match=NOTE):
        redacted(metadata)


def test_notes_of_personal_data_name_fields_alone():
    personal = {
        "contacts": [{"ada@example.com": {"password": "x", "note": "token=hunter2hunter2"}, "pin": 1}]
    }
    rules = (RedactionRule(keys=["note"], action="drop"),)
    found = redact(Redactor(rules), "security", Given("x", personal=personal, subject_id="ada"))
    assert found.metadata == {NOTE: {"personal.contacts": "mask:secret, drop:key"}}


def test_the_key_of_the_notes_is_never_learnt():
    redactor = Redactor()
    for _ in range(2):
        redact(redactor, "security", Given("x", metadata={"a": {NOTE: 1}, "b": 1}))
    assert not flagged(redactor, metadata={"b": 1})
    assert flagged(redactor, metadata={NOTE: "mine", "b": 1})
    with pytest.raises(InvalidEvent, match="the trail's own"):
        redact(redactor, "security", Given("x", metadata={NOTE: "mine", "a": 1}))


def test_notes_are_bounded():
    found = redacted({f"k{number}": {"password": "x"} for number in range(1000)})
    assert len(found[NOTE]) == 101
    assert redacted(found) == found


# --- patterns

FINDS = [
    ("card", f"pay {CARD} now", [CARD]),
    ("card", "4111 1111 1111 1111 12/27", ["4111 1111 1111 1111"]),
    ("card", "no2 4111-1111-1111-1111, 378282246310005", ["4111-1111-1111-1111", "378282246310005"]),
    ("card", "4111111111111112 1732700000000000 550e8400-e29b-4111-8111-111111111111", []),
    ("email", "to <Bob.Smith+x@mail.example.com>, ü@exämple.de", ["Bob.Smith+x@mail.example.com", "ü@exämple.de"]),
    ("email", "@ a@b not@one. @x.com", []),
    ("iban", "to DE89 3704 0044 0532 0130 00 FOR rent; gb82west12345698765432", ["DE89 3704 0044 0532 0130 00", "gb82west12345698765432"]),
    ("iban", "DE88370400440532013000 XX89370400440532013000 DE8937040044053201300", []),
    ("ip_address", "from 10.0.0.7, 256.1.1.1, 1.2.3.4.5", ["10.0.0.7"]),
    ("jwt", "x=eyJhbGciOi.eyJzdWIi.c2ln; eyJustOne", ["eyJhbGciOi.eyJzdWIi.c2ln"]),
    ("basic", "Basic dXNlcjpwYXNz Basic training", ["dXNlcjpwYXNz"]),
    ("url_password", "redis://:hunter2@h postgresql://u:p@ss@h http://h:80/a@b", ["hunter2", "p@ss"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "wanted"), FINDS)
def test_patterns(name, text, wanted):
    found = [text[slice(*span)] for span in BUILT_IN[name].find(text)]
    assert found == wanted
    hints = BUILT_IN[name].hints
    assert not wanted or not hints or any(hint in text for hint in hints)


def luhn(number):
    total = sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(number)))
    return total % 10 == 0


@given(
    st.integers(2 * 10**11, 7 * 10**17 - 1).map(str).filter(lambda text: text[0] in "23456"),
    st.sampled_from(["", " ", "-", "  "]),
    st.text(" abc,", max_size=3),
)
def test_every_card_number_is_found(start, separator, around):
    number = next(start + str(digit) for digit in range(10) if luhn(start + str(digit)))
    groups = separator.join(number[place : place + 4] for place in range(0, len(number), 4))
    (span,) = BUILT_IN["card"].find(f"{around}{groups}{around}")
    assert f"{around}{groups}{around}"[slice(*span)] == groups


def test_numbers_are_looked_at():
    card = RedactionRule(patterns=["card"], keep=4)
    found = redacted({"i": int(CARD), "f": float(CARD), "n": 7, "b": True, "x": 1.5}, card)
    assert without_note(found) == {"i": "***1111", "f": "***1111", "n": 7, "b": True, "x": 1.5}
    huge = {"h": 10**3000, "nan": float("nan"), "inf": float("inf")}
    assert redacted(huge, card) is huge


def test_expressions_of_ones_own():
    rule = RedactionRule(regexes=[r"EMP-(\d+)", r"\bzeta\b"], name="staff")
    found = redacted({"t": "EMP-123 of zeta and zetas, EMP-x", "n": 5}, rule)
    assert found == {"t": "EMP-*** of *** and zetas, EMP-x", "n": 5, NOTE: {"metadata.t": "mask:staff"}}
    started = time.perf_counter()
    redacted({"t": "a" * 200_000}, RedactionRule(regexes=["(a|a?)+$b|(a+)+c"]))
    assert time.perf_counter() - started < 5, "RE2 does not go back"


EVIL = [
    "a" * 1000 + "@", "eyJ" * 300, "eyJ." * 250, "://" * 300, "a://a:" * 150, "password=" * 100, "4 " * 500,
    "4111 " * 200, "@a." * 300, "aA1-" * 250, "bearer " * 140, "-----BEGIN PRIVATE KEY" * 40, "DE89 " * 200,
    "1." * 500, "\\" * 1000, 'token:"\\"' * 100, "authorization" * 70, "basic aaaa " * 90, 'token="' * 150,
    "cookie:" * 150, "DE89A" * 200,
]  # fmt: skip


@pytest.mark.parametrize("text", EVIL, ids=lambda text: text[:14])
def test_time_grows_no_faster_than_the_text(text):
    rules = Redactor([RedactionRule(patterns=list(BUILT_IN))]).of("security")

    def seconds(times):
        best = 9.0
        for _ in range(2):
            started = time.process_time()
            rules.mapping({"x": text * times}, "metadata", {})
            best = min(best, time.process_time() - started)
        return best

    seconds(1)
    short, long = seconds(4), seconds(32)
    assert long < 30 * max(short, 0.001), "eight times the text; quadratic would be 64 times"


# --- settings


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, "say what to redact"),
        ({"patterns": ["cards"]}, "the patterns are private_key"),
        ({"keys": ["a"], "action": "burn"}, "mask, drop, hash, truncate"),
        ({"keys": ["a"], "keep": -1}, "0 to 64"),
        ({"keys": ["a"], "categories": ["nonsense"]}, "the categories are"),
        ({"keys": [""]}, "not empty"),
        ({"keys": [7]}, "not empty"),
    ],
)
def test_wrong_rules_are_refused(wrong, told):
    with pytest.raises(InvalidArgument, match=told):
        RedactionRule(**wrong)


@pytest.mark.parametrize("expression", ["(", "(?=x)", r"(a)\1", "a*", ""])
def test_wrong_expressions_are_refused(expression):
    with pytest.raises(InvalidArgument, match="regexes"):
        redacted({}, RedactionRule(regexes=[expression]))


def test_hashing_needs_a_key():
    rule = RedactionRule(keys=["a"], action="hash")
    with pytest.raises(InvalidArgument, match="AUDIT_TRAIL_REDACT_HASH_KEY"):
        Redactor([rule])
    with pytest.raises(InvalidArgument, match="16 bytes"):
        Redactor([rule], hash_key=b"short")


def test_rules_of_a_setting():
    (rule,) = rules_from_json('[{"keys": ["ssn"], "action": "hash", "categories": ["DATA_CHANGE"]}]')
    assert rule == RedactionRule(keys=["ssn"], action="hash", categories=["DATA_CHANGE"])
    for wrong, told in (
        ("password123", "JSON list"),
        ('{"a": 1}', "JSON list"),
        ('[{"key": ["a"]}]', "the fields are keys"),
        ('[{"keys": 7}]', "wrong type"),
        ('[{"keys": ["a"], "action": 7}]', "action"),
    ):
        with pytest.raises(InvalidArgument, match=told) as caught:
            rules_from_json(wrong)
        assert "password123" not in str(caught.value)


def test_every_secret_pattern_is_one_that_there_is():
    assert set(SECRETS) <= set(BUILT_IN)
