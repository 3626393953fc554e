"""Verifying what retention left.

Promises: what was dropped is no tampering, if an event of the trail says so; events from before the proofs
are counted, and none can join them.
"""

from __future__ import annotations

import asyncio
import io
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from alembic import command

from dotmac.platform.audit_trail import schema
from dotmac.platform.audit_trail.integrity import FindingKind, drops
from dotmac.platform.audit_trail.integrity.log import seal
from support.segments import PlainWriter, event
from support.trails import checked, kinds, sealed


async def drop_month(connection, month, told, *, events=4, gone=None):
    """What retention leaves of a month."""
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS audit_archives (id uuid PRIMARY KEY, partition text NOT NULL, "
        "from_time timestamptz NOT NULL, to_time timestamptz NOT NULL, state text NOT NULL, events bigint, "
        "started_at timestamptz NOT NULL DEFAULT now(), dropped_at timestamptz, event_id uuid)"
    )
    partition = f"audit_events_{month:%Y_%m}"
    start = month.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    end = (start + timedelta(days=32)).replace(day=1)
    note = event(
        7,
        action="audit.partition.dropped",
        resource_id=partition,
        at=datetime.now(UTC),
        metadata={"from_time": start.isoformat(), "to_time": end.isoformat(), "events": events},
    )
    await connection.execute(f"DROP TABLE {partition}" if gone is None else gone)
    await connection.execute(
        "INSERT INTO audit_archives (id, partition, from_time, to_time, state, dropped_at, event_id, "
        "events) VALUES (gen_random_uuid(), $1, $2, $3, 'dropped', $4, $5, $6)",
        partition,
        start,
        end,
        note["occurred_at"],
        note["id"],
        events,
    )
    if told:
        writer = await PlainWriter(connection).begin()
        await writer.store([note])
        await writer.end()


async def store_month(connection):
    """A month that is over, with a segment of its own and half of one, whose other half is still checked."""
    month = datetime.now(UTC) - timedelta(days=70)
    await connection.execute("SELECT audit_ensure_partition($1)", month)
    writer = await PlainWriter(connection).begin()
    await writer.store([event(1, at=month), event(2, at=month)])
    await writer.store([event(3, at=month), event(4), event(5, at=month), event(6)])
    await writer.end()
    await sealed(connection, 4)
    return month


async def test_drops_at_times_that_cannot_be(connection):
    month = await store_month(connection)
    await drop_month(connection, month, told=True)
    assert (await checked(connection)).ok
    for column in ("from_time", "to_time", "dropped_at"):
        await connection.execute(f"ALTER TABLE audit_archives ALTER {column} DROP NOT NULL")
        for value in ("NULL", "'infinity'", "'-infinity'", "'20000-01-01Z'", "'4000-01-01Z BC'"):
            change = connection.transaction()
            await change.start()
            await connection.execute(f"UPDATE audit_archives SET {column} = {value}")
            report = await checked(connection)
            assert not report.ok, (column, value)
            if (column, value) != ("dropped_at", "NULL"):  # which says nothing of a drop
                assert FindingKind.DROP_WRONG.value in kinds(report), (column, value)
            await change.rollback()


@pytest.mark.parametrize("value", ["'infinity'", "'20000-01-01Z'"])
async def test_what_was_recorded_in_a_dropped_month_at_times_that_cannot_be(connection, value):
    month = await store_month(connection)
    await drop_month(connection, month, told=True)
    await connection.execute("SELECT audit_ensure_partition($1)", month)
    await (await PlainWriter(connection).begin()).store([event(9, at=month)])
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(f"UPDATE audit_events SET recorded_at = {value}")
    assert FindingKind.CLOCK_REWOUND.value in kinds(await checked(connection))


@pytest.mark.parametrize("told", [True, False])
async def test_what_retention_dropped_is_no_tampering_if_the_trail_says_so(connection, told):
    month = await store_month(connection)
    await drop_month(connection, month, told)
    await seal(connection, 0, durably=False)
    report = await checked(connection)
    assert kinds(report) == ({"events_dropped"} if told else {"drop_untold"})
    assert report.ok is told
    assert report.dropped == 4
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("UPDATE audit_events SET level = 'debug' WHERE action = 'record.read.6'")
    await connection.execute("DELETE FROM audit_events WHERE action = 'record.read.1'")
    found = {(one.kind.value, one.place) for one in (await checked(connection)).problems}
    assert found >= {("event_changed", 3), ("segment_emptied", None)}


async def old_month(connection):
    """The same month, for somebody whom no trigger stops."""
    month = await store_month(connection)
    await connection.execute("SET session_replication_role = replica")
    return month


async def test_a_month_that_is_there_was_not_dropped_whatever_is_said(connection, monkeypatch):
    monkeypatch.setattr(drops, "_SLACK", timedelta(0))
    month = await old_month(connection)
    one = "action = 'record.read.1' AND occurred_at < now() - interval '1 day'"
    await drop_month(connection, month, told=True, gone=f"DELETE FROM audit_events WHERE {one}")
    report = await checked(connection)
    assert {one.kind.value for one in report.problems} == {"drop_wrong", "event_missing"}
    assert (report.ok, report.dropped) == (False, 0)


@pytest.mark.parametrize("archive", ["from_time = from_time + interval '1 hour'", "dropped_at = from_time",
                                     "dropped_at = 'tomorrow'"])  # fmt: skip
async def test_a_drop_that_can_not_have_been_excuses_nothing(connection, archive):
    month = await old_month(connection)
    await drop_month(connection, month, told=True)
    await connection.execute(f"UPDATE audit_archives SET {archive}")
    report = await checked(connection)
    assert {one.kind.value for one in report.problems} >= {"drop_wrong", "segment_emptied"}
    assert report.dropped == 0


async def test_more_is_missing_than_was_dropped(connection):
    month = await old_month(connection)
    await drop_month(connection, month, told=True)
    assert (await checked(connection)).problems == []
    await connection.execute("DELETE FROM audit_events WHERE action = 'record.read.4'")
    report = await checked(connection)
    assert [one.kind.value for one in report.problems] == ["drop_wrong"]
    assert "1 events more" in report.problems[0].text


async def test_a_month_made_anew_is_checked_for_what_came_later(connection):
    month = await old_month(connection)
    await drop_month(connection, month, told=True)
    await connection.execute("SELECT audit_ensure_partition($1)", month)
    writer = await PlainWriter(connection).begin()
    await writer.store([event(21, at=month), event(22, at=month)])
    await writer.end()
    await seal(connection, 0, durably=False)
    assert (await checked(connection)).problems == []
    await connection.execute("DELETE FROM audit_events WHERE action = 'record.read.21'")
    report = await checked(connection)
    assert [(one.kind.value, one.place) for one in report.problems] == [("event_missing", 0)]


async def test_what_is_left_of_a_segment_needs_its_leaf_hashes(connection):
    month = await old_month(connection)
    await drop_month(connection, month, told=True)
    await connection.execute("UPDATE audit_segments SET leaves = NULL WHERE size = 4")
    await connection.execute("UPDATE audit_events SET level = 'debug' WHERE action = 'record.read.6'")
    report = await checked(connection)
    assert [one.kind.value for one in report.problems] == ["segment_changed"]


async def test_events_from_before_the_proofs_are_counted_so_that_none_joins_them(postgres_database):
    connection = await asyncpg.connect(postgres_database)
    store = (
        "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome) "
        "SELECT now(), gen_random_uuid(), 'system', 'x', 'info', 'success' FROM generate_series(1, 3)"
    )
    config = schema._config()

    async def upgrade(target):
        sql = io.StringIO()
        config.output_buffer = sql
        await asyncio.to_thread(command.upgrade, config, target, sql=True)
        await connection.execute(sql.getvalue())

    await upgrade("0001")
    await connection.execute(store)
    await upgrade("0001:head")
    report = await checked(connection)
    assert (report.ok, report.legacy, kinds(report)) == (True, 3, {"events_legacy"})
    (notice,) = (await checked(connection, tenant_id="")).notices
    assert "say to be from before" in notice.text
    await sealed(connection, 4)
    assert kinds(await checked(connection)) == {"events_legacy"}
    await connection.execute(f"{store} LIMIT 1")
    report = await checked(connection)
    assert (report.counts[FindingKind.EVENT_UNCOVERED], report.legacy) == (1, 3)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(
        "UPDATE audit_events SET recorded_at = recorded_at - interval '1 year' WHERE segment IS NULL"
    )
    report = await checked(connection)
    assert not report.ok
    assert report.counts[FindingKind.EVENT_UNCOVERED] == 4
    await connection.close()
