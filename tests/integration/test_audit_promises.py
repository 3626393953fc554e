"""The audit trail where several processes, poor servers and odd callers meet it.

Promises:
- processes that need the same new month at once all store their events;
- queries and reports end within their timeout on a server that has stopped, so does the look at the tables;
- an event whose acknowledgement is lost is stored once and counts as new; an error says which id makes
  another try safe; an own id without a time of its own is refused;
- a role that may insert, and see ids, is enough, also where the fate of an event is unknown;
- acknowledged means durable where the database does not wait for the disk by default, also behind a pooler
  that forgets a session's settings;
- what waits is bounded in bytes too; aclose() serves callers that wait for room and leaves no connection;
- a partition dropped after a lost connection is made again;
- a stored value that this version does not know hides neither its event nor others;
- a callback that hangs does not hold log_event up; aclose() waits for one that goes on beside;
- an event loop that has ended is let go;
- a report's naive times are in its zone, and it counts anomalies from the threshold that is set;
- settings that are wrong are told as such; a configuration without an address leads to the environment's.
"""

from __future__ import annotations

import asyncio
import gc
import time
import traceback
import uuid
import weakref
from datetime import UTC, date, datetime
from urllib.parse import urlsplit

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator, AuditCategory, AuditTrailConfig, schema, writer
from dotmac.platform.audit_trail.anomaly import Anomaly
from dotmac.platform.audit_trail.batch import Batch, Item
from dotmac.platform.audit_trail.database import meaning
from dotmac.platform.audit_trail.entry import make_encoder, make_entry
from dotmac.platform.audit_trail.lane import Lane
from dotmac.platform.audit_trail.partitions import Targets
from dotmac.platform.audit_trail.telling import Teller
from dotmac.platform.core.unified_config import reload_config
from dotmac.platform.errors import (
    AuditUnavailable,
    ConfigurationError,
    InvalidArgument,
    InvalidEvent,
)
from support.postgres import PostgresProxy

ANOMALOUS = {"outcome": "failure", "ip_address": "203.0.113.9"}


@pytest.fixture
async def owner(migrated_server):
    connection = await asyncpg.connect(migrated_server.url)
    yield connection
    await connection.close()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_new_months_of_several_writers_at_once(migrated_server, unique):
    trails = [AuditAggregator(migrated_server.url) for _ in range(4)]
    for trail in trails:
        await trail.log_event("SECURITY", "x")
    for month in range(1, 13):
        moment = datetime(2003, month, 3, tzinfo=UTC)
        await asyncio.gather(
            *(
                trail.log_event("SECURITY", "x", tenant_id=unique, occurred_at=moment)
                for trail in trails
                for _ in range(3)
            )
        )
    assert await trails[0].count_events(tenant_id=unique) == 144
    for trail in trails:
        await trail.aclose()


async def test_a_stopped_server_ends_reads_in_time(migrated_server):
    async with AuditAggregator(migrated_server.url, timeout=0.3) as audit:
        await audit.log_event("SECURITY", "x")
        await audit.count_events()
        await asyncio.to_thread(migrated_server.pause)
        try:
            for read, bound in (
                (audit.query_events, 2),
                (audit.query_events, 2),  # on a new connection
                (
                    lambda: audit.generate_compliance_report(date(2024, 1, 1), date(2024, 1, 2), timeout=1.0),
                    5,
                ),
                (audit.schema_status, 5),
                (audit.migrate, 5),
            ):
                began = time.monotonic()
                with pytest.raises(AuditUnavailable):
                    await read()
                assert time.monotonic() - began < bound, read
        finally:
            await asyncio.to_thread(migrated_server.resume)


async def test_a_server_that_stops_in_the_middle_of_a_report(migrated_server, owner):
    async with AuditAggregator(migrated_server.url, timeout=0.3) as audit:
        await audit.count_events()
        async with owner.transaction():
            await owner.execute("LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE")
            report = asyncio.create_task(
                audit.generate_compliance_report(date(2024, 1, 1), date(2024, 1, 2), timeout=3.0)
            )
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            while not await owner.fetchval(waits):
                await asyncio.sleep(0.01)
            await asyncio.to_thread(migrated_server.pause)
            began = time.monotonic()
            try:
                with pytest.raises(AuditUnavailable):
                    await report
                assert time.monotonic() - began < 5
            finally:
                await asyncio.to_thread(migrated_server.resume)


async def test_a_lost_acknowledgement(migrated_server, unique):
    told = []
    async with (
        PostgresProxy(migrated_server.url) as proxy,
        AuditAggregator(proxy.url, anomaly_threshold=1e-9, on_anomaly=told.append) as audit,
    ):
        for number in range(30):
            await audit.log_event("AUTHENTICATION", "login", tenant_id=f"{unique}{number}", **ANOMALOUS)
        told.clear()
        proxy.lose_answer(b"INSERT 0 1")
        event_id = await audit.log_event("AUTHENTICATION", "login", tenant_id=unique, **ANOMALOUS)
        assert proxy.lost == 1
        assert [one.event_id for one in told] == [event_id]
        assert await audit.count_events(tenant_id=unique) == 1


async def test_the_error_says_which_id_to_try_again_with(migrated_server, unique):
    async with AuditAggregator(migrated_server.url, timeout=1) as audit:
        await audit.log_event("SECURITY", "x")
        await asyncio.to_thread(migrated_server.pause)
        try:
            lost = await asyncio.gather(
                *(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(3)),
                return_exceptions=True,
            )
        finally:
            await asyncio.to_thread(migrated_server.resume)
        ids = [error.event_id for error in lost]
        for event_id in ids * 2:
            assert await audit.log_event("SECURITY", "x", tenant_id=unique, id=event_id) == event_id
        assert {event.id for event in await audit.query_events(tenant_id=unique)} == set(ids)
        assert await audit.count_events(tenant_id=unique) == len(set(ids)) == 3
        with pytest.raises(InvalidEvent, match=r"id: .*version 7.*occurred_at"):
            await audit.log_event("SECURITY", "x", id=uuid.uuid4())


async def test_what_is_told_not_stored_is_not_stored(migrated_server, unique, monkeypatch):
    ensure, tries = Targets.ensure, []

    async def slow_at_first(targets, fetch, days):
        tries.append(days)
        if len(tries) == 1:
            await asyncio.sleep(10)
        await ensure(targets, fetch, days)

    monkeypatch.setattr(Targets, "ensure", slow_at_first)
    async with AuditAggregator(migrated_server.url) as audit:
        database = (await audit._state()).database
        lane = Lane(database, Targets(), lambda _: None)
        encoder, loop = make_encoder(hashed=True), asyncio.get_running_loop()
        items = [
            Item(
                make_entry(encoder, category="SECURITY", action=action, tenant_id=unique),
                loop.create_future(),
                loop.time() + seconds,
                own_id=False,
            )
            for action, seconds in (("hasty", 0.5), ("patient", 20))
        ]
        await lane.store(Batch(items))
        with pytest.raises(AuditUnavailable, match="was not stored"):
            await items[0].done
        assert await items[1].done is True
        assert [event.action for event in await audit.query_events(tenant_id=unique)] == ["patient"]
        await lane.aclose()


async def test_a_refusal_shows_no_row(postgres_database, unique, caplog):
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
        connection = await asyncpg.connect(postgres_database)
        await connection.execute("ALTER TABLE audit_events ADD CONSTRAINT mine CHECK (action <> 'refused')")
        await connection.close()
        with pytest.raises(InvalidEvent, match=r"SQLSTATE 23514, constraint \w*mine") as caught:
            await audit.log_event("SECURITY", "refused", user_id="ada", metadata={"what": f"hidden{unique}"})
        assert f"hidden{unique}" not in str(caught.value) + caplog.text
        # What is raised from it, as errors of reading are, shows it in no traceback either.
        error = asyncpg.CheckViolationError("refused")
        error.detail = "Failing row contains (hidden)."
        made = meaning(error)
        made.__cause__ = error
        assert "hidden" not in "".join(traceback.format_exception(made))


async def test_a_role_that_may_insert_and_see_ids(migrated_server, owner, unique):
    for statement in (
        f"CREATE ROLE {unique} LOGIN PASSWORD 'p'",
        f"GRANT INSERT ON audit_events TO {unique}",
        f"GRANT SELECT (occurred_at, id) ON audit_events TO {unique}",
        f"GRANT INSERT, SELECT ON audit_writers, audit_writer_ends, audit_segments, audit_rollup TO {unique}",
        f"GRANT SELECT ON {schema.VERSION_TABLE} TO {unique}",
    ):
        await owner.execute(statement)
    parts = urlsplit(migrated_server.url)
    poor = parts._replace(netloc=f"{unique}:p@{parts.netloc.rpartition('@')[2]}").geturl()
    async with PostgresProxy(poor) as proxy, AuditAggregator(proxy.url) as audit:
        await audit.log_event("SECURITY", "x", tenant_id=unique)
        proxy.lose_answer(b"INSERT 0 1")
        await audit.log_event("SECURITY", "x", tenant_id=unique)
        assert proxy.lost == 1
    assert await owner.fetchval("SELECT count(*) FROM audit_events WHERE tenant_id = $1", unique) == 2
    await owner.execute(f"DROP OWNED BY {unique}; DROP ROLE {unique}")


async def test_durable_where_the_database_is_lazy(postgres_database):
    owner = await asyncpg.connect(postgres_database)
    async with AuditAggregator(postgres_database, statement_cache_size=0) as audit:
        await audit.migrate()
        name = urlsplit(postgres_database).path[1:]
        await owner.execute(
            f'ALTER DATABASE "{name}" SET synchronous_commit = off;'
            "ALTER TABLE audit_events ADD mode text DEFAULT current_setting('synchronous_commit')"
        )
        first = await audit.log_event("SECURITY", "x")
        for lane in (await audit._state()).writer._idle:
            if lane._connection is not None:
                await lane._connection.execute("DISCARD ALL")  # as a pooler does between transactions
        await audit.log_event("SECURITY", "x")
        await audit.log_event("SECURITY", "x", id=first)
    assert [row["mode"] for row in await owner.fetch("SELECT mode FROM audit_events")] == ["on", "on"]
    await owner.close()


async def connections(owner):
    sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    return await owner.fetchval(sql)


async def test_what_waits_is_bounded_in_bytes(migrated_server, unique, monkeypatch):
    monkeypatch.setattr(writer, "MAX_PENDING_BYTES", 1 << 20)
    large = {"text": "x" * 400_000}
    async with AuditAggregator(migrated_server.url, timeout=1) as audit:
        await audit.log_event("SECURITY", "x")
        await asyncio.to_thread(migrated_server.pause)
        try:
            lost = await asyncio.gather(
                *(audit.log_event("SECURITY", "x", tenant_id=unique, metadata=large) for _ in range(6)),
                return_exceptions=True,
            )
        finally:
            await asyncio.to_thread(migrated_server.resume)
        assert sum("may or may not" in str(error) for error in lost) == 2, lost  # the others were not sent
        huge = {"text": "x" * 1_048_000}  # more than the bound: alone it may pass
        await asyncio.gather(
            *(audit.log_event("SECURITY", "y", tenant_id=unique, metadata=huge) for _ in range(4))
        )
        assert await audit.count_events(tenant_id=unique, actions="y") == 4


async def test_aclose_serves_those_who_wait_for_room(migrated_server, owner, unique):
    before = await connections(owner)
    audit = AuditAggregator(migrated_server.url, max_pending=2)
    await audit.log_event("SECURITY", "x")
    calls = [asyncio.create_task(audit.log_event("SECURITY", "x", tenant_id=unique)) for _ in range(20)]
    await asyncio.sleep(0)
    await audit.aclose()
    assert len(set(await asyncio.gather(*calls))) == 20
    async with asyncio.timeout(10):
        while await connections(owner) > before:
            await asyncio.sleep(0.01)


async def test_a_partition_dropped_after_a_lost_connection(migrated_server, owner, unique):
    moment = datetime(2005, 5, 5, tzinfo=UTC)
    async with PostgresProxy(migrated_server.url) as proxy, AuditAggregator(proxy.url) as audit:
        await audit.log_event("SECURITY", "x", occurred_at=moment)
        proxy.lose_answer(b"INSERT 0 1")
        proxy.on_lost = lambda: owner.execute("DROP TABLE audit_events_2005_05")
        await audit.log_event("SECURITY", "x", tenant_id=f"{unique}1", occurred_at=moment)  # went with it
        assert proxy.lost == 1
        await audit.log_event("SECURITY", "x", tenant_id=unique, occurred_at=moment)
        assert await audit.count_events(tenant_id=unique) == 1


async def test_a_value_of_a_later_version(migrated_server, owner, unique):
    async with AuditAggregator(migrated_server.url) as audit:
        await audit.log_event("SECURITY", "x", tenant_id=unique)
        await owner.execute(
            "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, tenant_id) "
            f"VALUES (now(), gen_random_uuid(), 'weather', 'rain', 'notice', 'wet', '{unique}')"
        )
        later, known = await audit.query_events(tenant_id=unique)
        assert (later.category.value, later.level.name, later.outcome) == ("weather", "NOTICE", "wet")
        assert later.to_dict()["category"] == "weather"
        assert known.category is AuditCategory.SECURITY
        assert "weather" not in list(AuditCategory)
        async for event in audit.tail(since_start=True, tenant_id=unique, actions="rain"):
            assert event == later
            break


async def test_a_callback_that_hangs(migrated_server):
    entered = []

    async def callback(anomaly):
        entered.append(anomaly)
        await asyncio.Event().wait()

    async with asyncio.timeout(10):
        async with AuditAggregator(
            migrated_server.url, timeout=0.5, anomaly_threshold=1e-9, on_anomaly=callback
        ) as audit:
            while not entered:
                await audit.log_event("AUTHENTICATION", "login", **ANOMALOUS)


async def test_aclose_waits_for_a_callback_that_goes_on_beside():
    ended, go_on = [], asyncio.Event()

    async def callback(anomaly):
        await go_on.wait()
        ended.append(anomaly)

    teller = Teller(callback, timeout=20)
    anomaly = Anomaly(
        event_id=uuid.uuid4(), occurred_at=datetime.now(UTC), category="security", action="x", user_id=None,
        tenant_id=None, ip_address=None, score=1.0, reasons=(),
    )  # fmt: skip
    await teller.tell(anomaly, asyncio.get_running_loop().time() + 0.01)
    assert ended == []
    go_on.set()
    await teller.aclose()
    assert ended == [anomaly]


def test_a_loop_that_has_ended_is_let_go(migrated_server):
    audit, loops = AuditAggregator(migrated_server.url), []

    async def once():
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await audit.log_event("SECURITY", "x")

    for _ in range(3):
        asyncio.run(once())
    gc.collect()
    assert [ref() is None for ref in loops[:-1]] == [True, True]


async def test_a_report_counts_in_its_zone_and_by_its_threshold(migrated_server, unique):
    noon = datetime(2024, 3, 10, 12, tzinfo=UTC)
    async with AuditAggregator(migrated_server.url, anomaly_threshold=1e-9) as audit:
        for second in range(30):
            await audit.log_event(
                "AUTHENTICATION",
                "login",
                tenant_id=unique,
                occurred_at=noon.replace(second=second),
                **ANOMALOUS,
            )
        scores = [event.anomaly_score for event in await audit.query_events(tenant_id=unique)]
        for threshold in (1e-9, 0.99):
            async with AuditAggregator(migrated_server.url, anomaly_threshold=threshold) as other:
                report = await other.generate_compliance_report(
                    datetime(2024, 3, 10, 21),  # noqa: DTZ001 (naive on purpose)
                    datetime(2024, 3, 10, 21, 1),  # noqa: DTZ001 (naive on purpose)
                    "gdpr",
                    unique,
                    time_zone="Asia/Tokyo",
                )
            assert report.header["period"]["start"] == "2024-03-10T12:00:00+00:00"
            flagged = sum(score >= threshold for score in scores)
            assert report.completeness["anomalies"] == flagged
            (section,) = (one for one in report.sections if one.name == "security_events")
            assert section.total == flagged
        assert sum(score >= 1e-9 for score in scores) > sum(score >= 0.99 for score in scores)


async def test_wrong_settings_are_told(unused_tcp_port):
    for wrong in (
        {"timeout": "5"}, {"timeout": float("nan")}, {"timeout": True}, {"max_pending": "9"},
        {"max_pending": 1.5}, {"statement_cache_size": None, "anomaly_threshold": "x"},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=next(name for name, value in wrong.items() if value)):
            AuditAggregator("postgresql://u@h/d", **wrong)
    url = f"postgresql://u:p@127.0.0.1:{unused_tcp_port}/d?sslmode=sometimes"
    async with AuditAggregator(url, timeout=20) as audit:
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match="sslmode"):
            await audit.log_event("SECURITY", "x")
        assert time.monotonic() - began < 5


async def test_a_configuration_without_an_address(migrated_server, unique, monkeypatch):
    monkeypatch.setenv("AUDIT_TRAIL_POSTGRES_URL", migrated_server.url)
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p@127.0.0.1:1/d")
    reload_config()
    try:
        async with AuditAggregator(config=AuditTrailConfig(timeout=2)) as audit:
            await audit.log_event("SECURITY", "x", tenant_id=unique)
            assert await audit.count_events(tenant_id=unique) == 1
    finally:
        monkeypatch.undo()
        reload_config()
