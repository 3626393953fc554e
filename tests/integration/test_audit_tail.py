"""Following the trail.

Promises:
- every event comes once, in the order of storing, while several processes' worth of writers store and the
  connection is cut again and again; also over a restart of the server, and through a follower that goes on
  from the position of the one before after each few events;
- an event is told of well before the next look where its writer rings; where nobody rings (another writer,
  NOTIFY refused), the look finds it;
- a commit does not carry the NOTIFY: the writer's transaction takes no lock for it, and rings are few;
- a follower that waits is cancelled without loss; two followers do not disturb one another; what an idle one
  asks does not touch the table of events;
- a follower or forwarder that lags reads the events that come next, not all that it has to catch up with;
- a damaged position is refused; a position of a server that was ahead of this one is refused, and stays;
- a follower ends with its aggregator; the listening connection is closed with its loop.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from contextlib import suppress
from dataclasses import replace

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator, tail
from dotmac.platform.audit_trail.bell import CHANNEL, Bell
from dotmac.platform.audit_trail.database import Database
from dotmac.platform.audit_trail.filters import Filters
from dotmac.platform.audit_trail.forward import positions
from dotmac.platform.audit_trail.storing_order import Window
from dotmac.platform.audit_trail.tail import Position
from dotmac.platform.errors import AuditUnavailable, InvalidArgument, InvalidCursor, TransactionsRewound
from support.postgres import PostgresProxy

INSERT = (
    "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, tenant_id) "
    "VALUES (now(), gen_random_uuid(), 'security', $1, 'info', 'success', $2)"
)

MANY = """
    INSERT INTO audit_events (occurred_at, id, category, action, level, outcome)
    SELECT now() + place * interval '1 microsecond', gen_random_uuid(), 'security', 'x', 'info', 'success'
    FROM generate_series(1, 500) AS place
"""
READ = """
    SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables
    WHERE relid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_events'::regclass)
"""


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url) as aggregator:
        yield aggregator


async def take(events, count, seconds=30):
    async with asyncio.timeout(seconds):
        return [await anext(events) for _ in range(count)]


async def nothing_more(events, seconds=0.5):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await anext(events)


async def test_every_event_comes_once_while_connections_are_cut(migrated_url, unique):
    chance = random.Random(5)
    async with PostgresProxy(migrated_url) as proxy:
        stored, seen = [], []
        going, cuts = True, 0

        async def cut_all():
            nonlocal cuts
            while going:
                await asyncio.sleep(chance.uniform(0.02, 0.3))
                for task in list(proxy._tasks):
                    cuts += 1
                    task.cancel()

        async def write(audit):
            for number in itertools.count():
                if not going:
                    return
                with suppress(AuditUnavailable):
                    stored.append(await audit.log_event("SYSTEM", f"n{number}", tenant_id=unique))
                await asyncio.sleep(0.002)

        async def follow(audit):
            position = None
            while True:
                # Few at a time, and then a new follower from there.
                async with audit.tail(after=position, poll=0.1, tenant_id=unique) as events:
                    position = events.position
                    for _ in range(7):
                        try:
                            event = await anext(events)
                        except AuditUnavailable:
                            break
                        position = events.position
                        if event.action == "end":
                            return
                        seen.append(event.id)

        async with AuditAggregator(proxy.url) as cut, AuditAggregator(migrated_url) as sound:
            await sound.ping()
            async with sound.tail(tenant_id=unique) as begun:
                following = asyncio.create_task(follow(cut))
                await asyncio.sleep(0.5)
                writers = [asyncio.create_task(write(sound)) for _ in range(6)]
                writers.append(asyncio.create_task(cut_all()))
                await asyncio.sleep(4)
                going = False
                await asyncio.gather(*writers)
                await sound.log_event("SYSTEM", "end", tenant_id=unique)
                await asyncio.wait_for(following, 60)
                control = [event.id for event in await take(begun, len(stored) + 1)][:-1]
        assert cuts > 10
        assert len(stored) > 100
        assert sorted(seen) == sorted(stored)
        assert seen == control


async def test_it_goes_on_after_a_restart_of_the_server(migrated_server, unique):
    audit = AuditAggregator(migrated_server.url, timeout=20)
    async with audit, audit.tail(tenant_id=unique, poll=0.2) as events:
        first = await audit.log_event("SYSTEM", "a", tenant_id=unique)
        assert [event.id for event in await take(events, 1)] == [first]
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(migrated_server.kill)
        await asyncio.to_thread(migrated_server.restart)
        second = await audit.log_event("SYSTEM", "b", tenant_id=unique)
        assert (await asyncio.wait_for(waiting, 30)).id == second
        await nothing_more(events)


async def test_a_database_that_stays_away_is_told_of_and_nothing_is_lost(migrated_url, unique):
    async with PostgresProxy(migrated_url) as proxy:
        far, audit = AuditAggregator(proxy.url, timeout=0.7), AuditAggregator(migrated_url)
        async with far, audit:
            events = far.tail(tenant_id=unique, poll=0.1)
            await events.start()
            real, proxy._parts = proxy._parts, proxy._parts._replace(netloc="x@127.0.0.1:1")
            proxy._query.clear()
            for task in list(proxy._tasks):
                task.cancel()
            with pytest.raises(AuditUnavailable):
                await asyncio.wait_for(anext(events), 20)
            stored = [await audit.log_event("SYSTEM", "x", tenant_id=unique) for _ in range(3)]
            proxy._parts = real
            proxy._query.update(PostgresProxy(migrated_url)._query)
            assert sorted(event.id for event in await take(events, 3)) == sorted(stored)


async def test_a_ring_comes_before_the_next_look(audit, unique):
    async with audit.tail(tenant_id=unique, poll=30) as events:
        delays = []
        for number in range(5):
            waiting = asyncio.create_task(anext(events))
            await asyncio.sleep(0.5)  # it looks, finds nothing, and waits for the bell
            began = time.monotonic()
            await audit.log_event("SYSTEM", f"n{number}", tenant_id=unique)
            assert (await asyncio.wait_for(waiting, 10)).action == f"n{number}"
            delays.append(time.monotonic() - began)
        assert sorted(delays)[2] < 5, delays


async def test_what_nobody_rings_for_is_found_by_looking(audit, migrated_url, unique):
    connection = await asyncpg.connect(migrated_url)
    async with audit.tail(tenant_id=unique, poll=0.1) as events:
        await connection.execute(INSERT, "quiet", unique)
        assert [event.action for event in await take(events, 1)] == ["quiet"]
    await connection.close()


async def test_rings_are_few_and_apart_from_the_commits(audit, migrated_url, unique):
    heard = []
    connection = await asyncpg.connect(migrated_url)
    await connection.add_listener(CHANNEL, lambda *_: heard.append(time.monotonic()))
    began = time.monotonic()
    for _ in range(20):
        await asyncio.gather(*(audit.log_event("SYSTEM", "x", tenant_id=unique) for _ in range(50)))
    await audit.aclose()  # the last ring is out
    seconds = time.monotonic() - began
    await connection.execute("SELECT 1")
    await asyncio.sleep(0.1)
    await connection.close()
    assert 1 <= len(heard) <= seconds / 0.1 + 3
    # What was rung for was there already.
    assert await audit.count_events(tenant_id=unique) == 1_000


async def test_a_cancelled_wait_loses_nothing(audit, unique):
    async with audit.tail(tenant_id=unique, poll=0.05) as events:
        stored, seen = [], []

        async def write():
            for number in range(200):
                event_id = await audit.log_event("SYSTEM", f"n{number}", tenant_id=unique)
                stored.append(event_id)

        writing = asyncio.create_task(write())
        chance = random.Random(1)
        while not writing.done() or len(seen) < 200:
            task = asyncio.create_task(anext(events))
            await asyncio.wait([task], timeout=chance.random() * 0.02)
            if task.done():
                seen.append(task.result().id)
            else:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    seen.append(task.result().id)
        assert seen == stored


async def test_followers_do_not_disturb_one_another(audit, unique):
    tails = [audit.tail(tenant_id=unique, actions=pattern, poll=0.2) for pattern in ("*", "a*", "b*")]
    for events in tails:
        await events.start()
    for number in range(40):
        await audit.log_event("SYSTEM", "ab"[number % 2], tenant_id=unique)
    everything, some, others = [
        await take(events, count) for events, count in zip(tails, (40, 20, 20), strict=True)
    ]
    assert everything[::2] == some
    assert everything[1::2] == others


async def test_a_position_leads_on_in_another_process_of_work(audit, migrated_url, unique):
    for number in range(25):
        await audit.log_event("SYSTEM", f"n{number:02}", tenant_id=unique)
    seen, position = [], Position(0).token()
    for _ in range(5):
        async with (
            AuditAggregator(migrated_url) as other,
            other.tail(after=position, tenant_id=unique) as events,
        ):
            seen += [event.action for event in await take(events, 5)]
            position = events.position
    assert seen == [f"n{number:02}" for number in range(25)]
    async with audit.tail(since_start=True, tenant_id=unique) as events:
        assert [event.action for event in await take(events, 25)] == seen
        assert events.position is not None


async def test_an_idle_follower_does_not_touch_the_events(migrated_server, unique):
    """A server of its own: on the shared one, others write."""
    audit = AuditAggregator(migrated_server.url)
    async with audit, audit.tail(tenant_id=unique, poll=0.05) as events:
        await nothing_more(events, 1.0)
        connection = await asyncpg.connect(migrated_server.url)
        scans = (
            "SELECT coalesce(sum(seq_scan + coalesce(idx_scan, 0)), 0) FROM pg_stat_all_tables "
            "WHERE relname LIKE 'audit_events%'"
        )
        await connection.execute("SELECT pg_stat_force_next_flush()")
        before = await connection.fetchval(scans)
        await nothing_more(events, 1.5)
        await asyncio.sleep(1.5)
        assert await connection.fetchval(scans) == before
        await connection.close()


async def test_a_position_of_a_server_that_was_ahead_is_told(audit, unique):
    place = Position(1 << 50).token()
    async with audit.tail(after=place, tenant_id=unique, poll=0.01) as tail:
        await audit.log_event("SYSTEM", "x", tenant_id=unique)
        for _ in range(2):
            with pytest.raises(TransactionsRewound, match="without `after`") as caught:
                await anext(tail)
            assert caught.value.horizon < caught.value.stood == 1 << 50
        assert tail.position == place


async def test_wrong_arguments_are_refused(audit):
    token = Position(5).token()
    assert Position.of(token) == Position(5)
    for wrong in ("", "x", token[:-2], "B" + token[1:], token + "AAAA", 5, b"x", "ü"):
        with pytest.raises(InvalidCursor, match="after"):
            audit.tail(after=wrong)
    with pytest.raises(InvalidArgument, match="after"):
        audit.tail(after=token, since_start=True)
    for poll in (0, 61, "1", None):
        with pytest.raises(InvalidArgument, match="poll"):
            audit.tail(poll=poll)
    with pytest.raises(InvalidArgument, match="usr_id"):
        audit.tail(usr_id="x")


async def test_a_closed_follower_ends(audit, unique):
    events = audit.tail(tenant_id=unique, poll=0.05)
    await events.start()
    await events.aclose()
    assert [event async for event in events] == []


async def test_a_follower_ends_with_its_aggregator(migrated_url, unique):
    audit = AuditAggregator(migrated_url)
    async with audit.tail(tenant_id=unique, poll=30) as events:
        waiting = asyncio.create_task(take(events, 1))
        await asyncio.sleep(0.5)
        await audit.aclose()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, 10)
    assert audit._here().loops == {}, "nothing was opened again"


def test_listening_ends_with_the_loop(migrated_url, unique):
    async def follow():
        audit = AuditAggregator(migrated_url)
        events = audit.tail(tenant_id=unique, poll=0.05)
        await nothing_more(events, 0.5)
        connection = await asyncpg.connect(migrated_url)
        listening = "SELECT count(*) FROM pg_stat_activity WHERE query ILIKE $1"
        assert await connection.fetchval(listening, f"%LISTEN%{CHANNEL}%") + await connection.fetchval(
            listening, "SELECT 1"
        )
        await connection.close()
        # Neither follower nor aggregator is closed: the loop's end does it, without a word of warning.

    asyncio.run(follow())


async def test_who_lags_reads_what_comes_next(postgres_database):
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
    connection = await asyncpg.connect(postgres_database)
    bell = Bell(Database(await audit._settings()))

    async def reading(work):
        return await work(connection)

    async def quiet():
        return bell

    async def kept(events):
        return events

    try:
        begin = await connection.fetchval("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
        for _ in range(40):
            await connection.execute(MANY)
        for analyzed in (False, True):
            # Counts of a connection are shown at once within its transaction.
            async with connection.transaction():
                before = await connection.fetchval(READ)
                events = tail.Tail(reading, quiet, Filters(), Position(begin), 1.0, kept)
                followed = [(await anext(events)).id for _ in range(5_000)]
                between = await connection.fetchval(READ)
                position, window, forwarded = positions.Position(begin), Window(), []
                while len(forwarded) < 5_000:
                    batch = await positions.next_batch(connection, Filters(), position, 200, window)
                    forwarded += [one.event.id for one in batch.events]
                    if batch.events:
                        position = positions.advanced(position, batch.events[-1].place)
                    else:
                        position = replace(position, line=batch.line)
                after = await connection.fetchval(READ)
            assert forwarded == followed
            assert len(set(followed)) == 5_000
            assert between - before < 25_000, analyzed
            assert after - between < 60_000, analyzed
            await connection.execute("ANALYZE audit_events")
    finally:
        await connection.close()
