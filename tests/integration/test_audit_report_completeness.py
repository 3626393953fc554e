"""The completeness block, over trails whose events stand in segments and logs.

Promises:
- an untouched period is verified: first and last segment, no gaps, roots of the logs at its start and end,
  signed checkpoints around it, with the trusted key's word or the database's;
- a changed, removed or inserted event, a removed segment, a forged checkpoint: each shows, nothing says "ok";
- what comes after the period (events, segments, checkpoints, another writer) changes not one byte;
- one tenant's report tells of its log alone; what is not sealed yet is counted;
- personal fields are named, never shown; redactions are counted by rule;
- without verification the block says so.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.integrity import SigningKey
from dotmac.platform.audit_trail.integrity.checkpoints import Signer
from dotmac.platform.audit_trail.integrity.log import seal
from support.segments import PlainWriter, event, root

KEY = SigningKey.generate()
START, END = date(2024, 3, 1), date(2024, 3, 31)


@pytest.fixture
async def connection(postgres_database):
    """A trail of its own, whose tables a superuser may change."""
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
    connection = await asyncpg.connect(postgres_database)
    for month in (2, 3, 4):
        await connection.execute("SELECT audit_ensure_partition($1)", datetime(2024, month, 2, tzinfo=UTC))
    yield connection
    await connection.close()


class Trail:
    """Writes segments of three events, seals and signs them."""

    def __init__(self, connection):
        self.connection, self.signer, self.number = connection, Signer(KEY, "example.com/audit"), 0
        self.writer = None

    async def month(self, month, segments, *, tenants=("a", "b"), **more):
        self.writer = self.writer or await PlainWriter(self.connection).begin()
        for place in range(segments):
            tenant = tenants[place % len(tenants)]
            events = []
            for _ in range(3):
                self.number += 1
                at = datetime(2024, month, 3, tzinfo=UTC) + timedelta(minutes=self.number)
                events.append(event(self.number, tenant=tenant, at=at, **more))
            await self.writer.store(events)

    async def settle(self):
        await seal(self.connection, 0, durably=False)
        return await self.signer.sign_due(self.connection, timedelta(0), durably=False)

    async def close(self):
        await self.writer.end()


@pytest.fixture
async def trail(connection):
    """Segments before and in March, each settled."""
    made = Trail(connection)
    await made.month(2, 4)
    await made.settle()
    await made.month(3, 10)
    await made.settle()
    return made


async def report(url, tenant=None, **more):
    async with AuditAggregator(url, signing_key=more.pop("key", KEY)) as audit:
        return await audit.generate_compliance_report(START, END, "pci_dss", tenant, **more)


async def changed(connection, sql, *values):
    """As a superuser does it: triggers of the session off."""
    await connection.execute("SET session_replication_role = replica")
    try:
        await connection.execute(sql, *values)
    finally:
        await connection.execute("SET session_replication_role = origin")


async def test_an_untouched_period_is_verified(postgres_database, connection, trail):
    await trail.close()
    found = await report(postgres_database)
    known = found.completeness
    assert known["verification"]["result"] == "ok"
    assert known["verification"]["findings"] == []
    assert "events 30, segments 10" in known["verification"]["said"]
    held = known["segments"]
    assert (held["segments"], held["writers"]) == (10, 1)
    assert (held["events_that_they_hold"], held["events_found_in_them"]) == (30, 30)
    for none in (
        "gaps_in_sequences", "events_missing_from_segments", "events_without_a_segment",
        "segments_without_a_record", "writers_without_a_closing_record",
    ):  # fmt: skip
        assert held[none] == 0
    rows = await connection.fetch("SELECT * FROM audit_segments ORDER BY recorded_tx, id")
    assert held["first_segment"]["root"] == rows[4]["root"].hex()
    assert held["last_segment"]["root"] == rows[-1]["root"].hex()
    assert known["log"]["logs"] == 2
    assert known["log"]["segments_not_yet_in_a_log"] == 0
    for one in known["log"]["each"]:
        leaves = [
            row["leaf"]
            for row in await connection.fetch(
                "SELECT leaf FROM audit_log WHERE tenant_id = $1 ORDER BY position", one["tenant"]
            )
        ]
        assert (one["first_position"], one["last_position"], one["entries_of_the_period"]) == (2, 6, 5)
        assert one["gaps_in_positions"] == 0
        assert one["root_at_start"] == root(leaves[:2]).hex() == one["checkpoint_before"]["root"]
        assert one["root_at_end"] == root(leaves[:7]).hex() == one["checkpoint_after"]["root"]
        assert one["checkpoint_after"]["signature"] == "holds, by a trusted key"
    verdicts = {row[0]: row[3] for row in found.section("log_integrity").rows}
    assert verdicts["10.3.4"] == "ok"
    for form in (".html", ".pdf", ".zip"):
        assert found.to_bytes(form)
    untrusting = (await report(postgres_database, key=SigningKey.generate())).completeness
    assert untrusting["verification"]["result"] == "failed"
    assert "does not hold" in untrusting["log"]["each"][0]["checkpoint_after"]["signature"]


async def test_what_comes_later_changes_not_one_byte(postgres_database, connection, trail):
    first = await report(postgres_database)
    await trail.month(4, 6)
    await trail.settle()
    other = Trail(connection)
    other.number, other.signer = 500, trail.signer
    await other.month(4, 2)
    await other.settle()
    await other.close()
    again = await report(postgres_database)
    for form in (".json", ".zip", ".html", ".pdf"):
        assert first.to_bytes(form) == again.to_bytes(form)


IN_MARCH = (
    "SELECT id FROM audit_events WHERE occurred_at >= '2024-03-01Z' ORDER BY occurred_at LIMIT 1 OFFSET 7"
)
SEGMENT = f"SELECT segment FROM audit_events WHERE id = ({IN_MARCH})"


@pytest.mark.parametrize(
    "sql",
    [
        f"UPDATE audit_events SET action = 'forged' WHERE id = ({IN_MARCH})",
        f"DELETE FROM audit_events WHERE id = ({IN_MARCH})",
        f"DELETE FROM audit_segments WHERE id = ({SEGMENT})",
        f"DELETE FROM audit_log WHERE segment = ({SEGMENT})",
        "UPDATE audit_checkpoints SET note = replace(note, '— example.com', '— example.org')",
        (
            "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, tenant_id) "
            "VALUES ('2024-03-05Z', gen_random_uuid(), 'security', 'x', 'info', 'success', 'a')"
        ),
    ],
    ids=["changed", "removed", "segment", "log", "checkpoint", "inserted"],
)  # fmt: skip
async def test_tampering_shows(postgres_database, connection, trail, sql):
    await changed(connection, sql)
    found = await report(postgres_database)
    known = found.completeness
    assert known["verification"]["result"] == "failed"
    assert known["verification"]["said"].startswith("FAILED")
    assert known["verification"]["findings"]
    assert known["verification"]["findings_by_kind"]
    assert "FAILED" in found.to_html()
    held, log = known["segments"], known["log"]
    if sql.startswith("DELETE FROM audit_events"):
        assert held["events_missing_from_segments"] == 1
    if sql.startswith("DELETE FROM audit_segments"):
        assert (held["gaps_in_sequences"], held["segments_without_a_record"]) == (1, 1)
        assert held["gaps"][0]["sequence"] > 2
    if sql.startswith("DELETE FROM audit_log"):
        assert (log["segments_not_yet_in_a_log"], max(one["gaps_in_positions"] for one in log["each"])) == (
            1,
            1,
        )
    if sql.startswith("INSERT"):
        assert held["events_without_a_segment"] == 1


async def test_one_tenant_and_what_is_not_sealed_yet(postgres_database, connection, trail):
    await trail.month(3, 2)
    known = (await report(postgres_database, "a")).completeness
    assert [one["tenant"] for one in known["log"]["each"]] == ["a"]
    assert known["segments"]["segments"] == 6
    assert known["segments"]["writers_without_a_closing_record"] == 1
    assert known["log"]["segments_not_yet_in_a_log"] == 1
    assert known["log"]["each"][0]["checkpoint_after"]["size"] == 7
    empty = (await report(postgres_database, "nobody")).completeness
    assert empty["verification"]["result"] == "nothing to verify"
    assert empty["segments"]["first_segment"] == "none"


async def test_encrypted_fields_are_named_and_redactions_counted(postgres_database, connection):
    made = Trail(connection)
    await made.month(
        3, 2, subject_id="s1", personal={"key": "k1", "fields": {"email": "c2VjcmV0LWNpcGhlcg=="}},
        metadata={"_redacted": {"metadata.card": "mask:pan", "action": "drop:x"}},
    )  # fmt: skip
    found = await report(postgres_database)
    assert found.completeness["personal_and_redacted"] == {
        "events_with_encrypted_fields": 6,
        "events_redacted_before_storing": 6,
        "encrypted_fields": {"email": 6},
        "redactions": {"drop:x": 6, "mask:pan": 6},
    }
    assert "c2VjcmV0" not in json.dumps(found.to_dict()) + found.to_html()


async def test_without_verification_it_says_so(postgres_database, connection, trail):
    known = (await report(postgres_database, verify=False)).completeness
    assert known["verification"] == {
        "result": "not made",
        "said": "not verified: the report was asked for without verification",
    }
