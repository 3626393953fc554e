"""The audit trail while things break.

Promises:
- what was acknowledged is stored, once, with roots, chains and counts that fit: PostgreSQL killed right after
  the acknowledgement, killed and restarted under load, and the connection cut in the middle of the stream
  again and again;
- a database that is away gives a typed error within the timeout, at the start and later, and the trail goes
  on by itself once it is back; the back-pressure bound gives a typed error too;
- cancelled callers neither lose the events of others nor leave them waiting;
- one aggregator works in several event loops one after another without aclose(), in two threads at once, and
  in a forked child, which leaves the parent's connections alone.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time

import asyncpg
import pytest
import uvloop

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.errors import AuditUnavailable, ServerRefused
from support.look_through import look_through
from support.postgres import PostgresProxy
from support.threads import in_threads


async def stored_ids(url, tenant):
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT id FROM audit_events WHERE tenant_id = $1", tenant)
        return [row["id"] for row in rows]
    finally:
        await connection.close()


async def test_acknowledged_means_durable(migrated_server, unique):
    async with AuditAggregator(migrated_server.url) as audit:
        event_id = await audit.log_event("SECURITY", "x", tenant_id=unique)
        await asyncio.to_thread(migrated_server.kill)
        await asyncio.to_thread(migrated_server.restart)
        assert await stored_ids(migrated_server.url, unique) == [event_id]
        assert (await audit.get_event(event_id)).id == event_id


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def until_grown(items, by=500):
    aim = len(items) + by
    await until(lambda: len(items) >= aim)


async def load(audit, tenant, stop, acknowledged, refused):
    while not stop.is_set():
        try:
            acknowledged.append(await audit.log_event("SECURITY", "x", tenant_id=tenant))
        except AuditUnavailable as error:
            refused.append(error)


async def test_killed_and_restarted_under_load(migrated_server, unique):
    acknowledged, refused, stop = [], [], asyncio.Event()
    async with AuditAggregator(migrated_server.url, timeout=20) as audit:
        tasks = [asyncio.create_task(load(audit, unique, stop, acknowledged, refused)) for _ in range(50)]
        for _ in range(3):
            await until_grown(acknowledged)
            await asyncio.to_thread(migrated_server.kill)
            await asyncio.to_thread(migrated_server.restart)
        await until_grown(acknowledged)
        stop.set()
        await asyncio.gather(*tasks)
    stored = await stored_ids(migrated_server.url, unique)
    assert len(stored) == len(set(stored))
    assert not refused
    assert sorted(stored) == sorted(acknowledged)
    await look_through(migrated_server.url)


async def test_connections_cut_in_the_middle_of_copy(migrated_server, unique):
    chance = random.Random(3)
    acknowledged, refused, stop = [], [], asyncio.Event()
    async with (
        PostgresProxy(migrated_server.url, chance) as proxy,
        AuditAggregator(proxy.url, timeout=20) as audit,
    ):
        tasks = [asyncio.create_task(load(audit, unique, stop, acknowledged, refused)) for _ in range(100)]
        await until(lambda: proxy.cuts >= 20)
        proxy.cutting = False
        stop.set()
        await asyncio.gather(*tasks)
    stored = await stored_ids(migrated_server.url, unique)
    assert len(stored) == len(set(stored))
    assert not refused
    assert sorted(stored) == sorted(acknowledged)
    await look_through(migrated_server.url)


async def test_a_database_that_is_away_at_the_start_is_told_in_time(unused_tcp_port):
    async with AuditAggregator(f"postgresql://u:p@127.0.0.1:{unused_tcp_port}/d", timeout=1) as audit:
        for call in (
            lambda: audit.log_event("SECURITY", "x"),
            audit.query_events,
            lambda: audit.count_events(user_id="x"),
        ):
            began = time.monotonic()
            with pytest.raises(AuditUnavailable, match="1 s"):
                await call()
            assert 0.3 < time.monotonic() - began < 3  # a pause that would end too late is not begun


async def test_a_server_that_does_not_answer_is_told_in_time():
    with socket.socket() as silent:  # the kernel takes connections; nobody ever reads from them
        silent.bind(("127.0.0.1", 0))
        silent.listen(100)
        url = f"postgresql://u:p@127.0.0.1:{silent.getsockname()[1]}/d?sslmode=disable"
        async with AuditAggregator(url, timeout=1) as audit:
            began = time.monotonic()
            with pytest.raises(AuditUnavailable):
                await audit.log_event("SECURITY", "x")
            with pytest.raises(AuditUnavailable):
                await audit.query_events()
            assert time.monotonic() - began < 5


async def test_a_stopped_server_is_told_in_time_and_the_trail_goes_on(migrated_server, unique):
    async with AuditAggregator(migrated_server.url, timeout=1) as audit:
        event = {"category": "SECURITY", "action": "x", "tenant_id": unique}
        await audit.log_events([event] * 20)
        await asyncio.to_thread(migrated_server.pause)
        try:
            began = time.monotonic()
            lost = await asyncio.gather(
                *(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(20)),
                return_exceptions=True,
            )
            assert time.monotonic() - began < 3
            assert all(isinstance(error, AuditUnavailable) for error in lost), lost
            assert "may or may not" in str(lost[0])
        finally:
            await asyncio.to_thread(migrated_server.resume)
        event_id = await audit.log_event("SECURITY", "y", tenant_id=unique)
    assert event_id in await stored_ids(migrated_server.url, unique)


async def test_a_missing_database_is_refused_at_once(migrated_server):
    async with AuditAggregator(migrated_server.url_of("no_such"), timeout=20) as audit:
        began = time.monotonic()
        with pytest.raises(ServerRefused, match="no_such"):
            await audit.log_event("SECURITY", "x")
        with pytest.raises(ServerRefused, match="no_such"):
            await audit.query_events()
        assert time.monotonic() - began < 5


async def test_the_bound_of_waiting_events_is_kept(migrated_server, unique):
    async with AuditAggregator(migrated_server.url, timeout=1, max_pending=10) as audit:
        await audit.log_event("SECURITY", "x", tenant_id=unique)
        await asyncio.to_thread(migrated_server.pause)
        try:
            answers = await asyncio.gather(
                *(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(30)),
                return_exceptions=True,
            )
        finally:
            await asyncio.to_thread(migrated_server.resume)
        assert all(isinstance(answer, AuditUnavailable) for answer in answers)
        # Only those that had room were sent; who got some in the last moment was too late for more.
        assert sum("may or may not" in str(answer) for answer in answers) == 10
        assert sum("was not stored" in str(answer) for answer in answers) == 20
        await asyncio.gather(*(audit.log_event("SECURITY", "y", tenant_id=unique) for _ in range(30)))


async def test_a_close_that_is_cancelled_or_fails_closes_all(migrated_server, unique, monkeypatch):
    audit = AuditAggregator(migrated_server.url)
    await audit.log_event("SECURITY", "x", tenant_id=unique)
    await audit.count_events(tenant_id=unique)
    state = await audit._state()
    go_on, closed = asyncio.Event(), []

    async def slow_then_fails():
        closed.append("spool")
        await go_on.wait()
        raise ValueError("spool")

    monkeypatch.setattr(state.spool, "aclose", slow_then_fails)
    for name in ("writer", "teller", "database"):
        part = getattr(state, name)

        async def close(name=name, aclose=part.aclose):
            await aclose()
            closed.append(name)

        monkeypatch.setattr(part, "aclose", close)
    first = asyncio.create_task(audit.aclose())
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    second = asyncio.create_task(audit.aclose())
    await asyncio.sleep(0.05)
    assert not second.done()
    go_on.set()
    with pytest.raises(ValueError, match="spool"):
        await second
    assert closed == ["spool", "writer", "teller", "database"]
    assert state.database._pool is None
    await audit.aclose()


async def test_a_start_that_failed_is_nothing_to_close(migrated_server, monkeypatch):
    audit = AuditAggregator(migrated_server.url)

    async def fails():
        raise OSError("no settings")

    monkeypatch.setattr(audit, "_settings", fails)
    with pytest.raises(OSError, match="no settings"):
        await audit.count_events()
    await audit.aclose()


async def test_cancelled_callers_hurt_nobody(migrated_server, unique):
    chance = random.Random(5)
    async with AuditAggregator(migrated_server.url) as audit:
        calls = [asyncio.create_task(audit.log_event("SECURITY", "x", tenant_id=unique)) for _ in range(300)]
        acknowledged = []
        for turn in range(40):
            await asyncio.sleep(0)
            calls[chance.randrange(300)].cancel()
            if turn % 10 == 0:
                await asyncio.sleep(0.002)
        for call in calls:
            try:
                acknowledged.append(await asyncio.wait_for(call, 20))
            except asyncio.CancelledError:
                assert call.cancelled()
        assert len(acknowledged) >= 260
        acknowledged.append(await audit.log_event("SECURITY", "x", tenant_id=unique))
    stored = await stored_ids(migrated_server.url, unique)
    assert set(acknowledged) <= set(stored)
    assert len(stored) == len(set(stored))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_several_loops_one_after_another_without_closing(migrated_server, unique, new_loop):
    audit = AuditAggregator(migrated_server.url)

    async def once():
        await asyncio.gather(*(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(5)))
        return await audit.count_events(tenant_id=unique)

    counts = []
    for _ in range(4):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            counts.append(runner.run(once()))
    assert counts == [5, 10, 15, 20]


def test_two_threads_with_loops_at_once(migrated_server, unique):
    audit = AuditAggregator(migrated_server.url)

    async def many():
        for _ in range(50):
            await asyncio.gather(*(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(10)))

    assert in_threads(2, many) == []
    assert len(asyncio.run(stored_ids(migrated_server.url, unique))) == 1000


@pytest.mark.parametrize("what", ["_here", "_vault"])
def test_threads_that_begin_at_once_share_what_a_process_has_once(what, monkeypatch):
    audit = AuditAggregator("postgresql://u:p@127.0.0.1:1/d", personal_key=bytes(32))
    begin, found = threading.Barrier(8), []
    for name in ("make_encoder", "_make_ring"):
        make = getattr(audit, name)
        monkeypatch.setattr(audit, name, lambda make=make: (time.sleep(0.05), make())[1], raising=False)

    def use():
        begin.wait()
        found.append(getattr(audit, what)())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in found}) == 1


def test_a_child_forked_while_a_thread_holds_the_locks():
    program = """
        import os, threading
        from dotmac.platform.audit_trail import AuditAggregator, service, spool_file

        held, done = threading.Event(), threading.Event()

        def hold():
            with service.making(), spool_file._ours_guard:
                held.set()
                done.wait()

        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        child = os.fork()
        if child == 0:
            import signal
            signal.alarm(5)
            AuditAggregator("postgresql://u:p@127.0.0.1:1/d")._here()
            with spool_file._ours_guard:
                os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        done.set()
    """
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert answer.stdout.strip() == "7"


def test_a_forked_child_starts_anew(migrated_server, unique):
    audit = AuditAggregator(migrated_server.url)

    async def log(action):
        return await audit.log_event("SECURITY", action, tenant_id=unique)

    with asyncio.Runner() as runner:
        runner.run(log("before"))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # The parent's loop is half a loop here; a child makes its own, as a worker does.
                asyncio.events._set_running_loop(None)
                asyncio.run(log("child"))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        runner.run(log("after"))
        assert runner.run(audit.count_events(tenant_id=unique)) == 3


async def test_a_lane_recovers_where_only_half_of_its_statements_were_prepared(migrated_server, unique):
    owner = await asyncpg.connect(migrated_server.url)
    try:
        await owner.execute("ALTER ROLE CURRENT_USER SET lock_timeout = '200ms'")
        async with AuditAggregator(migrated_server.url, timeout=5) as audit:
            async with owner.transaction():
                await owner.execute("LOCK TABLE audit_rollup IN SHARE ROW EXCLUSIVE MODE")
                waiting = asyncio.gather(
                    *(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(40))
                )
                await asyncio.sleep(1)
            ids = await waiting
            ids += await audit.log_events([{"category": "SECURITY", "action": "x", "tenant_id": unique}] * 40)
        assert sorted(ids) == sorted(await stored_ids(migrated_server.url, unique))
    finally:
        await owner.execute("ALTER ROLE CURRENT_USER RESET lock_timeout")
        await owner.close()
