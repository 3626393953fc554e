"""Retention and legal holds on a real server.

Promises:
- months that are old enough go whole, younger ones stay; a dry run changes nothing; what went is told in the
  trail, once; the daily sums forget it; a month that comes back (an import) is made anew;
- a run that stops after any step, or is killed at any moment, is finished by the next one, with no event lost
  and none twice, and the drop told once; two runs at once do not harm one another;
- writers log and readers read all the while; a long transaction delays a drop, and bounds how long it is
  waited for; the next run finishes it;
- a month with a held event stays, whatever the hold names; a hold that comes between two steps brings the
  month back; holds are on record for ever, and placed and released once, however often that is asked;
- partitions are made ahead, with a warning where they should have been there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
import sys
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator, retention
from dotmac.platform.errors import AuditUnavailable, HoldNotFound, InvalidArgument, ServerRefused
from support.look_through import TOTALS_THAT_DIFFER
from support.roles import address_of, made_roles

MONTHS = [datetime(2023, month, 5, tzinfo=UTC) for month in (1, 2, 3)]
BEGUN = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()
"""
CODE = "from dotmac.platform.cli.main import run; run()"


@pytest.fixture
async def audit(postgres_database):
    async with AuditAggregator(postgres_database, timeout=20) as aggregator:
        await aggregator.migrate()
        for moment in MONTHS:
            await asyncio.gather(
                *(
                    aggregator.log_event(
                        "DATA_ACCESS", "read", user_id=f"u{place % 5}",
                        tenant_id=("acme", "globex")[place % 2],
                        resource_type="record", resource_id=place % 7,
                        occurred_at=moment + timedelta(hours=place),
                    )
                    for place in range(40)
                )
            )  # fmt: skip
        yield aggregator


@pytest.fixture
async def owner(postgres_database, audit):
    connection = await asyncpg.connect(postgres_database)
    yield connection
    await connection.close()


def age(moment):
    """Days, so that the month of that moment is just old enough."""
    end = (moment.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (datetime.now(UTC) - end).days


async def reads(audit, **arguments):
    return [event async for event in audit.iter_events(actions="read", **arguments)]


async def partitions(owner):
    rows = await owner.fetch(
        "SELECT relname FROM pg_class WHERE relname ~ '^audit_events_2023' AND relkind = 'r'"
    )
    return sorted(row["relname"][-2:] for row in rows)


async def test_months_go_whole_and_younger_ones_stay(audit, owner):
    due = await audit.apply_retention(age(MONTHS[1]), dry_run=True)
    assert [(one.partition[-7:], one.outcome, one.events) for one in due] == [
        ("2023_01", "due", 40), ("2023_02", "due", 40),
    ]  # fmt: skip
    assert len(await reads(audit)) == 120
    assert await audit.list_archives() == []
    await owner.execute("SELECT audit_compact_rollup()")
    done = await audit.apply_retention(age(MONTHS[1]))
    assert [(one.outcome, one.events, one.archive) for one in done] == [("dropped", 40, None)] * 2
    assert {event.occurred_at.month for event in await reads(audit)} == {3}
    assert await audit.count_events(categories="DATA_ACCESS") == 40  # by the daily sums
    assert await owner.fetch(TOTALS_THAT_DIFFER) == []
    assert await partitions(owner) == ["03"]
    told = await audit.query_events(actions="audit.partition.dropped", order="asc")
    assert [(event.resource_id, event.metadata["events"]) for event in told] == [
        ("audit_events_2023_01", 40), ("audit_events_2023_02", 40),
    ]  # fmt: skip
    assert await audit.apply_retention(age(MONTHS[1])) == []
    assert await audit.count_events(actions="audit.partition.dropped", text="partition") == 2
    assert await owner.fetchval("SELECT count(*) FROM audit_segments WHERE first_at < '2023-03-01Z'") > 0


async def test_a_month_that_comes_back_is_made_anew(audit, owner):
    await audit.apply_retention(age(MONTHS[0]))
    await audit.log_event("DATA_ACCESS", "read", occurred_at=MONTHS[0])
    assert len(await reads(audit)) == 81
    (again,) = await audit.apply_retention(age(MONTHS[0]))
    assert again.events == 1


class Stopped(BaseException):
    """The process ends here."""


STEPS = ["_seal", "_write", "_decide", "_detach", "_drop"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_run_that_stops_is_finished_by_the_next(audit, owner, tmp_path, monkeypatch, step, when):
    expected = await reads(audit)
    real = getattr(retention.Retirement, step)

    async def stop(self, *arguments):
        if when == "after":
            await real(self, *arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(retention.Retirement, step, stop)
        with pytest.raises(Stopped):
            await audit.apply_retention(age(MONTHS[1]), archive_url=str(tmp_path))
    seen = await reads(audit, include_archive=True)
    assert seen == expected
    done = await audit.apply_retention(age(MONTHS[1]), archive_url=str(tmp_path))
    assert [one.events for one in done] == ([40] if (step, when) == ("_drop", "after") else [40, 40])
    assert await reads(audit, include_archive=True) == expected
    assert await partitions(owner) == ["03"]
    assert await audit.count_events(actions="audit.partition.dropped", text="audit") == 2
    assert await owner.fetchval("SELECT count(*) FROM pg_trigger WHERE tgname = 'audit_sealed'") == 0


async def test_a_lost_archive_of_a_stopped_run_is_written_anew(audit, owner, tmp_path, monkeypatch):
    expected = await reads(audit)

    async def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(retention.Retirement, "_drop", stop)
        with pytest.raises(Stopped):
            await audit.apply_retention(age(MONTHS[0]), archive_url=str(tmp_path))
    for file in tmp_path.rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-100])
    (done,) = await audit.apply_retention(age(MONTHS[0]), archive_url=str(tmp_path))
    assert done.outcome == "dropped"
    assert await reads(audit, include_archive=True) == expected


@pytest.mark.slow
async def test_a_run_that_is_killed_at_any_moment_loses_nothing(audit, owner, postgres_database, tmp_path):
    expected = await reads(audit)
    chance = random.Random(5)
    for _ in range(8):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CODE, "audit", "retention", "--days", str(age(MONTHS[2])),
            "--archive-url", str(tmp_path), "--url", postgres_database,
            env={**os.environ, "ENVIRONMENT": "test"},
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        while not await owner.fetchval(BEGUN) and process.returncode is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(chance.uniform(0, 0.6))
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()
        assert await reads(audit, include_archive=True) == expected
    await audit.apply_retention(age(MONTHS[2]), archive_url=str(tmp_path))
    assert await reads(audit, include_archive=True) == expected
    assert await partitions(owner) == []
    told = await audit.query_events(actions="audit.partition.dropped", limit=100)
    assert sorted(event.resource_id[-2:] for event in told) == ["01", "02", "03"]


async def test_two_runs_at_once_share_the_work(audit, owner, tmp_path):
    expected = await reads(audit)
    both = await asyncio.gather(
        *(audit.apply_retention(age(MONTHS[2]), archive_url=str(tmp_path)) for _ in range(2))
    )
    assert sorted(len(done) for done in both) == [0, 3]
    assert await reads(audit, include_archive=True) == expected


async def test_writers_and_readers_go_on(audit, owner):
    finished = asyncio.Event()
    slowest = 0.0
    logged = 0

    async def log():
        nonlocal slowest, logged
        while not finished.is_set():
            began = asyncio.get_running_loop().time()
            await audit.log_event("DATA_ACCESS", "beside")
            slowest, logged = max(slowest, asyncio.get_running_loop().time() - began), logged + 1

    async def read():
        while not finished.is_set():
            await audit.query_events(limit=10)

    tasks = [asyncio.create_task(log()) for _ in range(5)] + [asyncio.create_task(read())]
    done = await audit.apply_retention(age(MONTHS[2]))
    finished.set()
    await asyncio.gather(*tasks)
    assert len(done) == 3
    assert slowest < 1.5
    assert await audit.count_events(actions="beside", text="beside") == logged


async def test_a_long_transaction_delays_a_drop_and_no_writer(audit, owner, postgres_database, monkeypatch):
    monkeypatch.setattr("dotmac.platform.audit_trail.maintenance.LOCK_TIMEOUT", "200ms")
    monkeypatch.setattr("dotmac.platform.audit_trail.maintenance.TRIES", 3)
    monkeypatch.setattr(retention.patiently, "__defaults__", (3,))
    reader = await asyncpg.connect(postgres_database)
    transaction = reader.transaction()
    await transaction.start()
    await reader.fetch("SELECT count(*) FROM audit_events")
    with pytest.raises(AuditUnavailable, match="long transactions|Long transactions"):
        await audit.apply_retention(age(MONTHS[0]))
    async with asyncio.timeout(2):
        await audit.log_event("DATA_ACCESS", "beside")
    await transaction.rollback()
    await reader.close()
    (done,) = await audit.apply_retention(age(MONTHS[0]))
    assert (done.outcome, done.events) == ("dropped", 40)
    assert await partitions(owner) == ["02", "03"]


HOLDS = [
    {
        "tenant_id": "acme",
        "start_time": MONTHS[1] - timedelta(days=4),
        "end_time": MONTHS[1] + timedelta(days=9),
    },
    {"start_time": MONTHS[1], "end_time": MONTHS[1] + timedelta(hours=1)},
    {"user_id": "u3", "end_time": MONTHS[2], "start_time": MONTHS[1]},
    {"resource_type": "record", "resource_id": 6, "start_time": MONTHS[1], "end_time": MONTHS[2]},
]


@pytest.mark.parametrize("held", HOLDS, ids="-".join)
async def test_a_month_with_a_held_event_stays(audit, owner, tmp_path, held):
    hold = await audit.legal_hold("case 7", placed_by="legal", **held)
    nothing = await audit.legal_hold("case 8", placed_by="legal", user_id="nobody")
    done = await audit.apply_retention(age(MONTHS[2]), archive_url=str(tmp_path))
    assert [(one.outcome, one.holds) for one in done] == [
        ("dropped", ()), ("held", (hold.id,)), ("dropped", ()),
    ]  # fmt: skip
    assert {event.occurred_at.month for event in await reads(audit)} == {2}
    await audit.release_hold(hold.id, released_by="legal", reason="settled")
    (done,) = await audit.apply_retention(age(MONTHS[2]))
    assert done.outcome == "dropped"
    assert [one.id for one in await audit.list_holds()] == [nothing.id]


@pytest.mark.parametrize("step", ["_write", "_detach", "_drop"])
async def test_a_hold_between_two_steps_brings_the_month_back(audit, owner, tmp_path, monkeypatch, step):
    expected = await reads(audit)
    real = getattr(retention.Retirement, step)
    hold = None

    async def place(self, *arguments):
        nonlocal hold
        if hold is None:
            hold = await audit.legal_hold("urgent", placed_by="legal", user_id="u1")
        return await real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(retention.Retirement, step, place)
        done = await audit.apply_retention(age(MONTHS[1]), archive_url=str(tmp_path))
    assert [(one.outcome, one.holds) for one in done] == [("held", (hold.id,))] * 2
    assert await reads(audit) == await reads(audit, include_archive=True) == expected
    await audit.log_event("DATA_ACCESS", "late", occurred_at=MONTHS[0])
    for statement in ("UPDATE audit_events_2023_01 SET action = 'x'", "DELETE FROM audit_events_2023_01"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await owner.execute(statement)
    await audit.release_hold(hold.id, released_by="legal", reason="done")
    assert len(await audit.apply_retention(age(MONTHS[1]), archive_url=str(tmp_path))) == 2
    assert await reads(audit, include_archive=True) == expected


async def test_holds_stay_on_record(audit, owner):
    identity = uuid.uuid4()
    for _ in range(2):
        hold = await audit.legal_hold("case 9", placed_by="legal", tenant_id="acme", hold_id=identity)
    assert hold.id == identity
    for _ in range(2):
        hold = await audit.release_hold(str(identity), released_by="court", reason="dismissed")
    assert (hold.released_by, hold.release_reason) == ("court", "dismissed")
    assert await audit.list_holds() == []
    assert await audit.list_holds(released=True) == [hold]
    assert hold.to_dict()["tenant_id"] == "acme"
    told = await audit.query_events(actions="audit.hold.*", order="asc")
    assert [(event.action, event.user_id, event.tenant_id) for event in told] == [
        ("audit.hold.placed", "legal", "acme"), ("audit.hold.released", "court", "acme"),
    ]  # fmt: skip
    for statement in (
        "DELETE FROM audit_holds",
        "UPDATE audit_holds SET reason = 'x'",
        "UPDATE audit_holds SET released_at = NULL",
        "TRUNCATE audit_holds",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="on record"):
            await owner.execute(statement)
    with pytest.raises(HoldNotFound):
        await audit.release_hold(uuid.uuid4(), released_by="x", reason="y")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"reason": "x", "placed_by": "y"}, "say what is held"),
        ({"reason": " ", "placed_by": "y", "user_id": "u"}, "reason"),
        (
            {"reason": "x", "placed_by": "y", "start_time": MONTHS[1], "end_time": MONTHS[0]},
            "after start_time",
        ),
        ({"reason": "x", "placed_by": "y", "start_time": "yesterday"}, "datetime"),
    ],
)
async def test_a_hold_that_says_nothing_is_refused(audit, arguments, text):
    with pytest.raises(InvalidArgument, match=text):
        await audit.legal_hold(**arguments)


async def test_wrong_arguments_are_named(audit):
    for days in (0, -1, 1.5, True, 99_999):
        with pytest.raises(InvalidArgument, match="days"):
            await audit.apply_retention(days)
    with pytest.raises(InvalidArgument, match="archive_url"):
        await audit.apply_retention(10, archive_url="/tmp", archive=False)
    with pytest.raises(InvalidArgument, match="1 to 3"):
        await audit.ensure_partitions(4)
    with pytest.raises(InvalidArgument, match="every"):
        await audit.keep_up(every=0)


async def test_only_the_owner_drops(audit, postgres_database, unique):
    async with made_roles(postgres_database, unique):
        await audit.grant_role("writer", unique)
        async with AuditAggregator(address_of(postgres_database, unique)) as writer:
            with pytest.raises(ServerRefused):
                await writer.apply_retention(30)
    assert len(await reads(audit)) == 120


async def test_partitions_are_made_ahead_by_a_writer(audit, owner, postgres_database, unique, caplog):
    ahead = await owner.fetch(
        "SELECT relname FROM pg_class JOIN pg_inherits ON inhrelid = pg_class.oid "
        "WHERE inhparent = 'audit_events'::regclass AND relname > 'audit_events_2024' ORDER BY 1"
    )
    for row in ahead[1:]:
        await owner.execute(f"DROP TABLE {row['relname']}")
    async with made_roles(postgres_database, unique):
        await audit.grant_role("writer", unique)
        async with AuditAggregator(address_of(postgres_database, unique)) as writer:
            with caplog.at_level(logging.WARNING):
                made = await writer.ensure_partitions()
            assert [row["relname"] for row in ahead[1:]] == made[: len(ahead) - 1]
            assert caplog.text.count("should have been made ahead") == 1
            assert await writer.ensure_partitions() == []


async def test_upkeep_goes_on_after_a_failure(audit, owner, caplog):
    async with asyncio.timeout(60):
        keeping = asyncio.create_task(
            audit.keep_up(every=1, retention=True, days=age(MONTHS[0]), archive_url="memory://upkeep")
        )
        for number in itertools.count():
            if await partitions(owner) == ["02", "03"]:
                break
            assert number < 500
            await asyncio.sleep(0.1)
        await owner.execute("ALTER TABLE audit_archives RENAME TO away")
        while "upkeep of the audit tables failed" not in caplog.text:
            await asyncio.sleep(0.1)
        await owner.execute("ALTER TABLE away RENAME TO audit_archives")
        assert not keeping.done()
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
