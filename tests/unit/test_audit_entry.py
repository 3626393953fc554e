"""Events, ids and choices, without a database.

Promises: the id of an event gives back its time to the microsecond; ids and times of one process increase;
a clock that steps back far is followed; what a caller gives is copied; addresses take one plain form;
plain arguments, which Rust takes, and unusual ones, which Python looks at, mean the same; an event survives
its row; an event made of stored values is one that its constructor made.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dotmac.platform._native import AuditChain, AuditEntry
from dotmac.platform.audit_trail.entry import make_encoder, make_entry, parse_address
from dotmac.platform.audit_trail.ids import from_micros, micros, time_of, uuid7, uuid_of
from dotmac.platform.audit_trail.models import (
    AuditCategory,
    AuditEvent,
    AuditLevel,
    AuditOutcome,
    parse_choice,
    stored_event,
)
from dotmac.platform.errors import InvalidEvent

LAST = 253_402_300_799_999_999


@given(time_us=st.integers(0, LAST), chance=st.integers(0, 2**62 - 1))
def test_an_id_gives_back_its_time(time_us, chance):
    made = uuid7(time_us, chance)
    assert made.version == 7
    assert made.variant == "specified in RFC 4122"
    assert time_of(made) == from_micros(time_us)
    assert micros(from_micros(time_us)) == time_us


@given(first=st.integers(0, LAST), second=st.integers(0, LAST))
def test_ids_sort_as_their_times(first, second):
    if first < second:
        assert uuid7(first, 2**62 - 1) < uuid7(second, 0)


def test_times_of_one_process_increase_and_a_step_back_is_followed():
    clock = iter([10**12, 10**12, 10**12 - 5_000, 10**12 - 3_600_000_000])
    encoder = make_encoder(hashed=True, clock=lambda: next(clock))
    made = [make_entry(encoder, category="SECURITY", action="x") for _ in range(4)]
    assert [entry.occurred_at for entry in made] == [10**12, 10**12 + 1, 10**12 + 2, 10**12 - 3_600_000_000]


def test_ids_of_one_moment_do_not_meet():
    moment = datetime(2020, 1, 1, tzinfo=UTC)
    encoder = make_encoder(hashed=False)
    ids = {make_entry(encoder, category="SECURITY", action="x", occurred_at=moment).id for _ in range(10_000)}
    assert len(ids) == 10_000


@pytest.mark.parametrize("kind", [AuditCategory, AuditLevel, AuditOutcome])
def test_every_member_is_known_by_name_and_value_in_any_case(kind):
    for member in kind:
        for told in (member, member.name, member.value, member.name.title()):
            assert parse_choice(kind, "x", told) is member
        assert member.value == member.name.lower()
    for wrong in (None, 5, "", "nope", b"info"):
        with pytest.raises(InvalidEvent, match=next(iter(kind)).name):
            parse_choice(kind, "x", wrong)


@pytest.mark.parametrize(
    ("given_as", "plain"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::FFFF:10.0.0.7", "10.0.0.7"),
        ("fe80::1%eth0", "fe80::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("testclient", None),
        ("10.0.0.7:80", None),
        (None, None),
        (5, None),
    ],
)
def test_addresses_have_one_form(given_as, plain):
    assert parse_address(given_as) == plain


def entry(**fields):
    return make_entry(make_encoder(hashed=True), **{"category": "SECURITY", "action": "x", **fields})


def test_metadata_is_copied_and_a_broken_repr_does_not_hide_what_is_wrong():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    given_metadata = {"a": [1]}
    made = entry(metadata=given_metadata)
    given_metadata["a"].append(2)
    assert json.loads(made.fields()["metadata"]) == {"a": [1]}
    with pytest.raises(InvalidEvent, match="Broken"):
        entry(metadata={"a": Broken()})


def test_the_time_is_that_of_the_id():
    moment = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(microseconds=7)
    made = entry(occurred_at=moment)
    assert from_micros(made.occurred_at) == time_of(UUID(int=made.id)) == moment
    assert entry(event_id=UUID(int=made.id)).occurred_at == made.occurred_at


class Text(str):
    """Of an unusual type, so that the encoder leaves it to the checks in Python."""

    __slots__ = ()


PLAIN_TEXT = st.text(max_size=20) | st.just("x" * 513) | st.just("a\x00") | st.just("\ud800") | st.just(" ")
PLAIN_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.just(2**10_001)
    | st.just(object),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner),
    max_leaves=6,
)


def made_or_told(**fields):
    try:
        return make_entry(make_encoder(hashed=True, clock=lambda: 10**15), **fields).fields()
    except InvalidEvent as error:
        return str(error).partition(":")[0]


def unusual(value):
    if type(value) is str:
        return Text(value)
    if type(value) is dict:
        return OrderedDict((name, unusual(item)) for name, item in value.items())
    return [unusual(item) for item in value] if type(value) is list else value


@given(
    category=st.sampled_from(["SECURITY", "security", "nope", "", None, AuditCategory.PRIVACY]),
    action=PLAIN_TEXT | st.sampled_from(["user.login", "login.failed", "access denied", ""]),
    user_id=st.none() | PLAIN_TEXT | st.integers(-(2**70), 2**70) | st.booleans(),
    ip_address=st.sampled_from(
        [None, "10.0.0.1", "::ffff:10.0.0.7", "fe80::1%eth0", "10.0.0.256", "010.0.0.1", ""]
    ),
    metadata=st.none() | st.dictionaries(st.text(max_size=5), PLAIN_JSON, max_size=4),
)
def test_plain_and_unusual_arguments_mean_the_same(category, action, user_id, ip_address, metadata):
    """Rust takes plain types, Python the others: both must agree on what is right and what it becomes."""
    identity = uuid7(10**15, 1)
    given_fields = {
        "category": category, "action": action, "user_id": user_id, "ip_address": ip_address,
        "metadata": metadata, "event_id": identity,
    }  # fmt: skip
    odd = {name: unusual(value) for name, value in given_fields.items()}
    assert made_or_told(**given_fields) == made_or_told(**odd)


@pytest.mark.parametrize("number", [2**10_000 - 1, 2**10_000, -(2**10_000), 10**3_010 - 1, 10**3_010])
def test_integers_have_one_bound(number):
    found = made_or_told(category="SECURITY", action="x", metadata={"n": number}, event_id=uuid7(10**15, 1))
    assert (found == "metadata.n") == (number.bit_length() > 10_000)


@given(micros_=st.integers(10**12, 1_767_225_600_000_000), naive=st.booleans())
def test_times_keep_their_microseconds(micros_, naive):
    moment = from_micros(micros_)
    moment = moment.replace(tzinfo=None) if naive else moment  # local time then
    assert from_micros(entry(occurred_at=moment).occurred_at) == moment.astimezone(UTC)


def test_an_event_survives_its_row():
    made = entry(
        metadata={"a": 1.0, "b": 2**70}, ip_address="2001:db8::1", user_id=7, subject_id="s", tenant_id="t"
    )
    again = AuditEntry.from_row(made.row(), hashed=True)
    assert again.fields() == made.fields()
    assert (again.id, again.occurred_at, again.size) == (made.id, made.occurred_at, made.size)
    chain = AuditChain(bytes(16), seed=1)
    roots = [json.loads(chain.pack([one], 0).segments)[0]["root"] for one in (made, again)]
    assert roots[0] == roots[1]
    with pytest.raises(ValueError, match="binary row"):
        AuditEntry.from_row(made.row()[:-3], hashed=True)


def test_uuids_are_those_of_the_standard_library():
    number = uuid7(10**15, 5).int
    assert uuid_of(number) == UUID(int=number)
    assert pickle.loads(pickle.dumps(uuid_of(number))) == UUID(int=number)
    assert (str(uuid_of(number)), hash(uuid_of(number))) == (str(UUID(int=number)), hash(UUID(int=number)))
    assert uuid_of(number).is_safe is UUID(int=number).is_safe


def test_a_stored_event_is_what_its_constructor_makes():
    values = {name: f"the {name}" for name in AuditEvent.__slots__}
    made = stored_event(*values.values())
    assert made == AuditEvent(**values)
    assert type(made) is AuditEvent
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(AttributeError):
        made.action = "another"
    with pytest.raises(TypeError):
        stored_event(*list(values.values())[1:])
