"""A server that is paused, or whose wall clock is stepped, while locks are held.

Promises: neither ends a lease early nor gives a lock to two; a lease that outlasts the pause is still held
after it; one that could not be renewed in time is lost to its holder before another gets it; a dead holder's
lock goes on when its lease has ended, by however much the clock was set back; the clock of the server really
moves.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
import redis

from dotmac.platform.errors import LockLost
from support.clock import LIBRARY, MISSING, ClockedValkey
from support.locks import Partition, manager_at, python, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dotmac.platform.connection.embedded import EmbeddedValkey
    from dotmac.platform.distributed_locks import DistributedLock

HOUR = 3600
clocked = pytest.mark.skipif(LIBRARY is None, reason=MISSING)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClockedValkey]:
    with ClockedValkey(tmp_path / "valkey") as server:
        yield server


def step(server: ClockedValkey, seconds: int) -> None:
    """Steps the clock, and sees to it that the server's time is off by that much."""
    server.clock.step(seconds)
    with redis.Redis.from_url(server.url) as client:
        deadline = time.monotonic() + 5
        while abs(client.time()[0] - time.time() - seconds) > 5:
            assert time.monotonic() < deadline, "the server's clock does not move"


async def watch(lock: DistributedLock, others: list[asyncio.Task[None]], seconds: float) -> None:
    """For so long the lock stays held, and nobody else gets anything."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert lock.held
        assert not any(task.done() for task in others)
        await asyncio.sleep(0.02)


@clocked
@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
async def test_a_stepped_clock_ends_no_lease(server: ClockedValkey, unique: str, seconds: int) -> None:
    async with manager_at(server.url, unique) as locks, manager_at(server.url, unique) as rivals:
        renewed = locks.acquire_lock("renewed", timeout=1.0)
        fixed = locks.acquire_lock("fixed", timeout=4.0, auto_renewal=False)
        await renewed.acquire()
        await fixed.acquire()
        token = renewed.fencing_token

        async def rival(name: str) -> None:
            async with rivals.acquire_lock(name, timeout=1.0) as lock:
                if name == "renewed":
                    assert lock.fencing_token > token

        waiting = [asyncio.create_task(rival(name)) for name in ("renewed", "fixed")]
        await watch(renewed, waiting, 0.5)
        step(server, seconds)
        await watch(renewed, waiting, 1.5)
        assert fixed.held
        step(server, 0)
        await watch(renewed, waiting, 0.7)
        assert fixed.held
        # Not by awaiting it: a task that waits for a lock of who awaits it would wait for itself.
        await until(waiting[1].done)
        assert not fixed.held
        await watch(renewed, waiting[:1], 1)
        await renewed.release()
        async with asyncio.timeout(20):
            await waiting[0]


HOLDER = """
import sys
from support.locks import manager_at
lock = manager_at(sys.argv[1], sys.argv[2]).acquire_lock("a", timeout=1.0)
lock.acquire_sync()
print("held")
sys.stdin.readline()
"""


@clocked
@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
async def test_a_stepped_clock_keeps_no_dead_holders_lock(
    server: ClockedValkey, unique: str, seconds: int
) -> None:
    holder = python(HOLDER, server.url, unique)
    assert holder.stdout is not None
    assert await asyncio.to_thread(holder.stdout.readline) == "held\n"
    holder.kill()
    holder.communicate()
    step(server, seconds)
    async with (
        asyncio.timeout(20),
        manager_at(server.url, unique) as locks,
        locks.acquire_lock("a") as lock,
    ):
        assert lock.held


@pytest.mark.slow
async def test_a_server_paused_for_half_a_minute(own_valkey: EmbeddedValkey, unique: str) -> None:
    """Most of what a lock manager may get wrong about time, in one pause."""
    partition = Partition(own_valkey.url, unique)
    partition.used_before()
    async with manager_at(own_valkey.url, unique) as locks, manager_at(own_valkey.url, unique) as rivals:
        long = locks.acquire_lock("long", timeout=90.0)
        short = locks.acquire_lock("short", timeout=2.0, on_lost="flag")
        await long.acquire()
        await short.acquire()
        token = short.fencing_token
        served: list[tuple[str, float, int]] = []

        async def rival(name: str) -> None:
            async with rivals.acquire_lock(name, timeout=2.0) as lock:
                served.append((name, time.monotonic(), lock.fencing_token))

        waiting = [asyncio.create_task(rival(name)) for name in ("long", "short")]
        await until(lambda: partition.queued() == 2)
        partition.client.close()
        own_valkey.pause()
        paused = time.monotonic()
        try:
            async with asyncio.timeout(10):
                assert "ran out" in str(await short.lost)
            lost = time.monotonic()
            assert lost - paused < 5
            await watch(long, waiting, 30 - (time.monotonic() - paused))
        finally:
            own_valkey.resume()
        async with asyncio.timeout(20):
            await waiting[1]
        ((name, when, higher),) = served
        assert (name, higher > token) == ("short", True)
        assert when > lost
        with pytest.raises(LockLost):
            await short.release()
        await watch(long, waiting[:1], 3)
        await long.release()
        async with asyncio.timeout(20):
            await waiting[0]
