"""Rows, ids and choices, without a database.

Promises: the id of an event gives back its time to the microsecond; ids and times of one process increase;
a clock that steps back far is followed; what a caller gives is copied; addresses take one plain form.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dotmac.platform.audit_trail.entry import make_row, parse_address
from dotmac.platform.audit_trail.ids import IdSource, from_micros, micros, time_of, uuid7
from dotmac.platform.audit_trail.models import AuditCategory, AuditLevel, AuditOutcome, parse_choice
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


def test_times_of_one_process_increase_and_a_step_back_is_followed(monkeypatch):
    source = IdSource()
    clock = iter([10**15, 10**15, 10**15 - 5_000_000, 10**15 - 3_600_000_000_000, 10**15 + 1])
    monkeypatch.setattr("dotmac.platform.audit_trail.ids.time.time_ns", lambda: next(clock))
    assert [source.now() for _ in range(4)] == [10**12, 10**12 + 1, 10**12 + 2, 10**12 - 3_600_000_000]


def test_a_million_ids_would_not_meet():
    source = IdSource()
    moment = source.now()
    assert len({source.new(moment) for _ in range(10_000)}) == 10_000


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


def row(**fields):
    usual = dict.fromkeys(
        ("user_id", "tenant_id", "resource_type", "resource_id", "ip_address", "correlation_id", "metadata",
         "occurred_at", "event_id")
    )  # fmt: skip
    basic = {"category": "SECURITY", "action": "x", "level": "INFO", "outcome": "success"}
    return make_row(IdSource(), **{**usual, **basic, **fields})


def test_metadata_is_copied_and_a_broken_repr_does_not_hide_what_is_wrong():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    given_metadata = {"a": [1]}
    made = row(metadata=given_metadata)
    given_metadata["a"].append(2)
    assert json.loads(made.metadata) == {"a": [1]}
    with pytest.raises(InvalidEvent, match="Broken"):
        row(metadata={"a": Broken()})


def test_the_time_is_that_of_the_id():
    made = row(occurred_at=datetime(2020, 1, 1, tzinfo=UTC) + timedelta(microseconds=7))
    assert time_of(made.id) == made.occurred_at
    assert row(event_id=made.id).occurred_at == made.occurred_at
