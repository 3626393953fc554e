"""Verifying a trail on a real PostgreSQL.

Promises:
- what a second, plain implementation of the stored format writes verifies without a finding, and so does what
  the library's own writers store, odd numbers and addresses included;
- verification goes on while others write, tells how far it is, and can be cancelled;
- rows that no constraint would let in are found, and do not end the verification or its process;
- several connections that read at once find what one finds, in the same order, and need not all be granted.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.integrity import events
from dotmac.platform.audit_trail.integrity.anchors import FileAnchor
from dotmac.platform.audit_trail.integrity.checkpoints import Signer
from dotmac.platform.audit_trail.integrity.log import seal
from dotmac.platform.audit_trail.integrity.notes import open_note
from dotmac.platform.audit_trail.integrity.verify import verify
from dotmac.platform.errors import (
    InvalidArgument,
)
from support.segments import PlainWriter, event
from support.trails import KEY, checked, free, kinds, sealed


@pytest.mark.parametrize("keep_leaves", [True, False])
async def test_an_untouched_trail_has_no_finding(connection, keep_leaves):
    assert (await checked(connection)).ok
    await sealed(connection, keep_leaves=keep_leaves)
    report = await checked(connection)
    assert report.to_dict()["findings"] == []
    assert report.ok
    assert (report.events, report.segments, report.log_entries) == (40, 30, 30)
    assert (report.checkpoints, report.unsealed, report.legacy, report.origin) == (
        3,
        0,
        0,
        "example.com/audit",
    )
    assert json.dumps(report.to_dict())


async def test_only_a_tenant_or_a_stretch_of_time(connection):
    await sealed(connection)
    one = await checked(connection, tenant_id="a")
    assert one.ok
    assert (one.segments, one.log_entries, one.checkpoints) == (10, 10, 1)
    row = await connection.fetchrow("SELECT min(first_at), max(last_at) FROM audit_segments")
    assert (await checked(connection, start=row["max"] + timedelta(microseconds=1))).segments == 0
    late = await checked(connection, start=row["max"])
    assert late.ok
    assert 0 < late.segments < 30
    assert (await checked(connection, end=row["min"])).events == 0


async def test_progress_is_told_and_a_verification_can_be_cancelled(trail_url, connection):
    await sealed(connection)
    stages = []
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        await audit.verify_integrity(progress=stages.append)
        assert [one.stage for one in stages] == sorted(
            (one.stage for one in stages), key=["anchors", "events", "log", "writers"].index
        )
        assert stages[-1] == ("writers", 30, 30)
        assert ("events", 40, 40) in stages

        class StopNowError(Exception):
            pass

        def refuse(progress):
            if progress.stage == "log":
                raise StopNowError

        with pytest.raises(StopNowError):
            await audit.verify_integrity(progress=refuse)
        chance = random.Random(7)
        for _ in range(20):
            task = asyncio.create_task(audit.verify_integrity())
            await asyncio.sleep(chance.uniform(0, 0.03))
            if not task.cancel():
                continue  # it was quicker
            with pytest.raises(asyncio.CancelledError):
                await task
            if task.done() and not task.cancelled():
                assert task.result().ok
        assert (await audit.verify_integrity()).ok


async def test_more_events_than_one_stretch_and_large_segments(connection):
    writer = await PlainWriter(connection).begin()
    await writer.store([event(number) for number in range(700)])
    await seal(connection, 0, durably=False)
    report = await checked(connection)
    assert (report.events, kinds(report)) == (700, {"no_checkpoint"})


async def test_checkpoints_are_held_against_the_logs_in_several_turns(connection, monkeypatch):
    signer = Signer(KEY, "example.com/audit")
    for _ in range(4):
        await sealed(connection, 24, signer=signer)

    async def seen(claims):
        monkeypatch.setattr("dotmac.platform.audit_trail.integrity.logs._CLAIMS", claims)
        report = await checked(connection)
        found = sorted((one.kind, one.tenant_id, one.place, one.text, one.found) for one in report.findings)
        return report.log_entries, report.checkpoints, found

    whole = await seen(2_000)
    assert (whole[1], whole[2]) == (12, [])
    for claims in (1, 2, 5, 12):
        assert await seen(claims) == whole
    await connection.execute("SET session_replication_role = replica")
    for change in (
        "DELETE FROM audit_log WHERE tenant_id = 'a' AND position = 7",
        "DELETE FROM audit_log WHERE tenant_id = 'b' AND position > 9",
        "DELETE FROM audit_log WHERE tenant_id = ''",
        "UPDATE audit_checkpoints SET size = size + 3 WHERE tenant_id = 'b' AND size < 9",
        "UPDATE audit_checkpoints SET size = 100 - size WHERE tenant_id = 'b'",
    ):
        await connection.execute(change)
        wrong = await seen(2_000)
        assert wrong[2]
        for claims in (1, 2, 5, 12):
            assert await seen(claims) == wrong


@pytest.fixture
def small_stretches(monkeypatch):
    """Few events are as many as otherwise a hundred thousand."""
    monkeypatch.setattr("dotmac.platform.audit_trail.integrity.events._STRETCH_EVENTS", 8)


@pytest.mark.usefixtures("small_stretches")
async def test_several_connections_find_what_one_finds(trail_url, connection, caplog):
    await sealed(connection, 200)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("UPDATE audit_events SET action = 'other' WHERE leaf = 0 AND tenant_id = 'a'")
    await connection.execute("DELETE FROM audit_events WHERE leaf = 0 AND tenant_id = 'b'")
    await connection.execute(
        "INSERT INTO audit_events SELECT (jsonb_populate_record(event, jsonb_build_object("
        "'id', gen_random_uuid(), 'segment', gen_random_uuid()))).* FROM audit_events event WHERE leaf = 0"
    )
    opened = []

    def opening():
        opened.append(1)
        return asyncpg.connect(trail_url)

    alone = (await checked(connection)).to_dict()
    assert len(alone["findings"]) > 60
    for many in (2, 5):
        opened.clear()
        found = (await checked(connection, opening=opening, connections=many)).to_dict()
        assert len(opened) == many - 1
        for key in ("findings", "counts", "events", "segments", "checkpoints"):
            assert found[key] == alone[key]

    def refused():
        return opening() if len(opened) < 2 else asyncpg.connect("postgresql://127.0.0.1:1/none")

    opened.clear()
    found = (await checked(connection, opening=refused, connections=5)).to_dict()
    assert found["findings"] == alone["findings"]
    assert "3 of 5 connections read the audit trail" in caplog.text

    # Within a transaction of the caller's nobody else sees what it sees.
    async with connection.transaction():
        await connection.execute("DELETE FROM audit_events")
        opened.clear()
        found = await checked(connection, opening=opening, connections=4)
        assert (opened, found.events) == ([], 0)


@pytest.mark.usefixtures("small_stretches")
async def test_who_changes_a_table_and_who_verifies_do_not_wait_for_one_another(
    trail_url, connection, caplog
):
    """The server sees no deadlock in it: the first reader waits for the others, not for a lock."""
    await sealed(connection, 200)
    changing = []

    async def change():
        async with asyncpg.create_pool(trail_url, min_size=1, max_size=1) as pool:
            await pool.execute("BEGIN; LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE; COMMIT")

    async def opening():
        if not changing:
            changing.append(asyncio.create_task(change()))
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
            other = await asyncpg.connect(trail_url)
            while not await other.fetchval(waits):
                await asyncio.sleep(0.01)
            return other
        return await asyncpg.connect(trail_url)

    async with asyncio.timeout(20):
        report = await checked(connection, opening=opening, connections=3)
        await changing[0]
    assert (report.ok, report.events) == (True, 200)
    assert "1 of 3 connections read the audit trail" in caplog.text


@pytest.mark.usefixtures("small_stretches")
async def test_a_reader_may_be_idle_for_longer_than_others(trail_url, connection):
    await sealed(connection, 200)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET idle_in_transaction_session_timeout = '50ms'")
    slow = iter([0.2] * 5)
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        report = await audit.verify_integrity(connections=3, progress=lambda _: time.sleep(next(slow, 0)))
    assert (report.ok, report.events) == (True, 200)


@pytest.mark.usefixtures("small_stretches")
async def test_no_connection_outlives_a_verification(trail_url, connection):
    await sealed(connection, 200)
    ours = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> $1"
    chance = random.Random(8)
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        for wrong in (0, True, 1.5):
            with pytest.raises(InvalidArgument, match="connections"):
                await audit.verify_integrity(connections=wrong)
        with pytest.raises(InvalidArgument, match="leave it out"):
            await audit.verify_integrity(connection=connection, connections=2)
        assert (await audit.verify_integrity(connections=3)).events == 200
        for _ in range(30):
            task = asyncio.create_task(audit.verify_integrity(connections=3))
            await asyncio.sleep(chance.uniform(0, 0.06))
            task.cancel()
            await asyncio.wait([task])

        def refuse(progress):
            if progress.stage == "events" and progress.done:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await audit.verify_integrity(connections=3, progress=refuse)
    async with asyncio.timeout(10):
        while await connection.fetchval(ours, connection.get_server_pid()):
            await asyncio.sleep(0.05)


async def test_verification_goes_on_while_others_write(trail_url, monkeypatch):
    monkeypatch.setattr("dotmac.platform.audit_trail.integrity.events._STRETCH_EVENTS", 1_000)
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=True) as audit:
        stop = asyncio.Event()

        async def write():
            while not stop.is_set():
                await audit.log_event("SYSTEM", "x", tenant_id="a")

        writers = [asyncio.create_task(write()) for _ in range(4)]
        for _ in range(5):
            report = await audit.verify_integrity()
            assert report.problems == []
            await asyncio.sleep(0.3)
        stop.set()
        await asyncio.gather(*writers)
        assert report.log_entries


async def test_the_librarys_own_writers_verify(trail_url, connection):
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        odd = [
            {
                "n": 9007199254740993,
                "m": 1e300,
                "k": -0.0,
                "z": 1.50,
                "deep": [{"\ue000": 1, "😀": "\u2028"}],
            },
            {},
            {"text": '\x7f \x01 \\ " / é', "numbers": [0.1, 1e-7, 123456789012345678901234567890, 5e-324]},
        ]
        many = (
            audit.log_event(
                "DATA_CHANGE",
                f"change.{number}",
                tenant_id=(None, "a", "ü/b")[number % 3],
                ip_address=(None, "::ffff:10.0.0.1", "::1.2.3.4", "2001:db8::", "fe80::1%eth0")[number % 5],
                metadata=odd[number % 3],
            )
            for number in range(300)
        )
        await asyncio.gather(*many)
        done = await audit.checkpoint()
        assert len(done.checkpoints) == 3
        report = await audit.verify_integrity()
        assert report.findings == []
        assert (report.events, report.unsealed) == (300, 0)
    assert (await checked(connection)).findings == []


async def test_a_transaction_that_sees_more_as_it_goes(trail_url, connection, monkeypatch):
    """A caller's own, which is read committed by default, while others write."""
    await sealed(connection)
    compare = events._compare

    async def later(*given):
        async with AuditAggregator(trail_url, sealing=False) as audit:
            await audit.log_event("SECURITY", "x")
        return await compare(*given)

    monkeypatch.setattr(events, "_compare", later)
    async with connection.transaction():
        report = await checked(connection)
    assert report.ok, report.problems
    assert report.events == 41


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "20000-01-01Z", "4000-01-01Z BC"])
async def test_times_that_python_has_no_name_for_do_not_end_a_verification(connection, moment):
    await sealed(connection)
    await connection.execute("ALTER TABLE audit_writers DISABLE TRIGGER USER")
    await connection.execute("ALTER TABLE audit_log DISABLE TRIGGER USER")
    await connection.execute("ALTER TABLE audit_writer_ends DISABLE TRIGGER USER")
    await connection.execute("DELETE FROM audit_writer_ends")
    await connection.execute(f"UPDATE audit_writers SET started_at = '{moment}'")
    assert (await checked(connection)).ok
    await connection.execute(f"UPDATE audit_log SET sealed_at = '{moment}' WHERE position = 3")
    assert not (await checked(connection)).ok


@pytest.mark.parametrize(
    "change",
    [
        "root = '\\x0102'",
        "root = ''",
        "link = ''",
        "leaves = '\\x01'",
        "size = 2147483647",
        "size = -5",
        "seq = -9223372036854775808",
        "seq = 9223372036854775807",
        "first_at = 'infinity'",
        "last_at = '-infinity'",
        "recorded_at = 'infinity'",
        "recorded_at = '20000-01-01Z'",
        "recorded_at = '4000-01-01Z BC'",
        "first_at = '20000-01-01Z'",
        "root = NULL, leaves = NULL",
        "tenant_id = E'\\x01\"\\\\'",
        "id = '00000000-0000-0000-0000-000000000000'",
    ],
)
async def test_what_no_constraint_would_let_in_is_found(connection, change):
    """By somebody who may drop constraints, too."""
    await sealed(connection)
    await free(connection, "audit_segments", "root")
    (segment,) = await connection.fetchrow("SELECT id FROM audit_segments ORDER BY id OFFSET 7 LIMIT 1")
    await connection.execute(f"UPDATE audit_segments SET {change} WHERE id = $1", segment)
    report = await checked(connection)
    assert not report.ok
    assert all(report.counts.values())
    assert any(segment in (one.segment, *_named(one)) for one in report.problems), report.problems


# What nothing covers: when a row came, as whoever wrote it says, and whose it is.
_TOLD_ONLY = {
    ("audit_writers", "started_at"),
    ("audit_writers", "owner_role"),
    ("audit_writer_ends", "ended_at"),
    ("audit_checkpoints", "signed_at"),
}


async def test_nulls_where_none_can_be_and_times_out_of_reach_are_found(connection, tmp_path):
    """By somebody who may drop any constraint; none of it ends the verification."""
    await sealed(connection)
    anchor = FileAnchor(tmp_path / "checkpoints")
    for (note,) in await connection.fetch("SELECT note FROM audit_checkpoints"):
        await anchor.put(open_note(note, [KEY.public_key])[0], note)
    tables = ("events", "segments", "log", "checkpoints", "writers", "writer_ends", "trail", "legacy")
    columns = await connection.fetch(
        "SELECT relname, attname, atttypid = 'timestamptz'::regtype AS is_time, attnotnull "
        "FROM pg_attribute JOIN pg_class c ON c.oid = attrelid WHERE attnum > 0 AND NOT attisdropped "
        "AND c.oid = ANY($1::text[]::regclass[]) AND (relname, attname) != ('audit_events', 'occurred_at')",
        [f"audit_{table}" for table in tables],
    )
    times = ("'infinity'", "'-infinity'", "'20000-01-01Z'", "'4000-01-01Z BC'")
    found = 0
    for table, column, is_time, not_null in columns:
        middle = f"FROM {table} ORDER BY ctid OFFSET (SELECT count(*) / 2 FROM {table}) LIMIT 1"
        for value in (("NULL",) if not_null else ()) + (times if is_time else ()):
            for rows in ("true", f"(tableoid, ctid) = (SELECT tableoid, ctid {middle})"):
                change = connection.transaction()
                await change.start()
                await free(connection, table, column)
                await connection.execute(f"UPDATE {table} SET {column} = {value} WHERE {rows}")
                report = await checked(connection)
                told_only = (table, column) in _TOLD_ONLY or table in ("audit_trail", "audit_legacy")
                if column == "sealed_at" and rows == "true" and value in times[0::2]:
                    told_only = True  # late ones agree among themselves
                assert told_only or not report.ok, (table, column, value, rows)
                assert json.dumps(report.to_dict())
                assert told_only or not (await verify(connection)).ok, "by whatever keys are there"
                assert told_only or not (await checked(connection, anchors=[anchor])).ok
                found += not report.ok
                await change.rollback()
    assert found > 80


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            (
                "events SET recorded_tx = NULL",
                "segments SET recorded_tx = NULL",
                "log SET recorded_tx = NULL",
            ),
            {"event_changed", "segment_changed"},
        ),
        (
            ("events SET recorded_at = NULL", "segments SET recorded_at = NULL", "log SET leaf = NULL"),
            {"event_changed", "segment_changed"},
        ),
        (("segments SET first_at = NULL, last_at = NULL", "log SET leaf = NULL"), {"segment_changed"}),
        (("events SET action = NULL", "segments SET leaves = NULL"), {"event_changed"}),
    ],
)
async def test_null_in_several_places_does_not_agree_with_itself(connection, changes, wanted):
    await sealed(connection)
    for change in changes:
        table, _, columns = change.partition(" SET ")
        names = [part.split(" = ")[0] for part in columns.split(", ") if not part.startswith("leaves")]
        await free(connection, f"audit_{table}", *names)
        await connection.execute(f"UPDATE audit_{change}")
    # So that no checkpoint says what the logs were.
    await connection.execute("ALTER TABLE audit_checkpoints DISABLE TRIGGER USER")
    await connection.execute("DELETE FROM audit_checkpoints")
    assert wanted <= kinds(await checked(connection))


async def test_an_event_without_a_segment_and_a_time(connection):
    await sealed(connection)
    await free(connection, "audit_events", "recorded_at")
    await connection.execute(
        "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, recorded_at) "
        "VALUES (now(), gen_random_uuid(), 'system', 'x', 'info', 'success', NULL)"
    )
    assert "event_uncovered" in kinds(await checked(connection))


@pytest.mark.parametrize("style", ["Postgres, DMY", "SQL, MDY", "German"])
async def test_sessions_that_write_times_in_their_own_way(connection, style):
    await sealed(connection)
    await connection.execute(f"SET DateStyle = '{style}'; SET TimeZone = 'Asia/Jakarta'")
    report = await checked(connection, start=datetime.now(UTC) - timedelta(days=1))
    assert report.findings == []
    assert report.events == 40


def _named(finding):
    """Ids that a finding's text names."""
    return [UUID(word) for word in re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", finding.text)]
