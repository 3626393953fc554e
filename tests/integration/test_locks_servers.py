"""The lock's promises on each kind of server: Valkey from its wheel, Redis where it is installed.

Promises: holders exclude each other, over engines and processes; waiters are served in order; trying, leaving
the queue, extending, ends of leases, killed holders, cycles and lists work alike; scripts that the server
forgets, by SCRIPT FLUSH or by a restart, while locks are used and waited for, are sent anew, and fencing
tokens go on increasing.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import redis

from dotmac.platform.errors import DeadlockDetected, LockLost, LockNotOwned
from support.locks import Partition, killed_holder_is_succeeded, manager_at, until
from support.registry import make

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from dotmac.platform.connection.embedded import EmbeddedValkey
    from dotmac.platform.distributed_locks import DistributedLockManager


@pytest.fixture
async def locks(each_server: EmbeddedValkey, unique: str) -> AsyncIterator[DistributedLockManager]:
    async with manager_at(each_server.url, unique) as manager:
        yield manager


@pytest.fixture
async def rival(each_server: EmbeddedValkey, unique: str) -> AsyncIterator[DistributedLockManager]:
    """Another session on the same server: its address differs, so it has an engine of its own."""
    async with manager_at(f"{each_server.url}?connect_timeout=4", unique) as manager:
        yield manager


@pytest.fixture
def partition(each_server: EmbeddedValkey, unique: str) -> Iterator[Partition]:
    view = Partition(each_server.url, unique)
    yield view
    view.client.close()


async def test_the_queue(
    locks: DistributedLockManager, rival: DistributedLockManager, partition: Partition
) -> None:
    served: list[int] = []
    tokens: list[int] = []

    async def wait(number: int) -> None:
        async with (locks, rival)[number % 2].acquire_lock("a") as lock:
            served.append(number)
            tokens.append(lock.fencing_token)

    async with locks.acquire_lock("a") as lock:
        tokens.append(lock.fencing_token)
        assert not await rival.acquire_lock("a").acquire(blocking=False)
        assert not await rival.acquire_lock("a").acquire(blocking_timeout=0.05)
        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(wait(number)))
            await until(lambda: partition.queued() == len(tasks))
        (info,) = await rival.list_locks()
        assert (info.name, info.waiters) == ("a", 6)
        tasks.pop(3).cancel()
        await until(lambda: partition.queued() == 5)
    await asyncio.gather(*tasks)
    assert served == [0, 1, 2, 4, 5]
    assert tokens == sorted(set(tokens))
    await until(partition.empty)


async def test_leases(
    locks: DistributedLockManager, rival: DistributedLockManager, partition: Partition
) -> None:
    renewed, fixed = (
        locks.acquire_lock("renewed", timeout=0.6),
        locks.acquire_lock("fixed", auto_renewal=False, timeout=0.6),
    )
    assert await renewed.acquire()
    assert await fixed.acquire()
    await renewed.extend(0.8)
    # It ends by itself, while the other one, of the same session, is renewed.
    async with rival.acquire_lock("fixed") as lock:
        assert lock.held
        assert fixed.lost
        with pytest.raises(LockLost):
            await fixed.release()
    assert not await rival.acquire_lock("renewed").acquire(blocking=False)
    await renewed.release()
    with pytest.raises(LockNotOwned):
        await renewed.release()
    assert partition.empty()


async def test_a_killed_holder_is_succeeded(
    each_server: EmbeddedValkey, locks: DistributedLockManager, unique: str
) -> None:
    await killed_holder_is_succeeded(locks, each_server.url, unique)


async def test_a_cycle_is_refused(
    locks: DistributedLockManager, rival: DistributedLockManager, partition: Partition
) -> None:
    async def other() -> None:
        async with rival.acquire_lock("b"):
            ready.set()
            async with rival.acquire_lock("a"):
                pass

    ready = asyncio.Event()
    async with locks.acquire_lock("a"):
        task = asyncio.create_task(other())
        await ready.wait()
        await until(lambda: partition.queued() == 1)
        async with locks.acquire_lock("b"):
            with pytest.raises(DeadlockDetected):  # the one who got its lock last
                await task
    await until(partition.empty)


@pytest.mark.parametrize("trouble", ["script flush", "restart"])
async def test_scripts_that_are_forgotten(
    each_server: EmbeddedValkey,
    locks: DistributedLockManager,
    rival: DistributedLockManager,
    partition: Partition,
    unique: str,
    trouble: str,
) -> None:
    tokens: list[int] = []
    done = asyncio.Event()

    async def work(manager: DistributedLockManager) -> None:
        while not done.is_set():
            # A restart without persistence may cost the lock, and then the body.
            with suppress(LockLost):
                async with manager.acquire_lock("a", blocking_timeout=30) as lock:
                    tokens.append(lock.fencing_token)
                    await asyncio.sleep(0)

    async with make(each_server.url, unique) as registry:
        await registry.register_service("api", "1.0", "127.0.0.1", 1)
        workers = [asyncio.create_task(work(manager)) for manager in (locks, rival) * 3]
        for _ in range(3):
            before = len(tokens)
            await until(lambda: len(tokens) > before + 50)  # noqa: B023 - awaited in this turn
            if trouble == "restart":
                await asyncio.to_thread(each_server.restart)
            else:
                partition.client.script_flush()
        before = len(tokens)
        await until(lambda: len(tokens) > before + 50)
        done.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*workers)
        assert [instance.port for instance in await registry.discover_services("api")] == [1]
    assert tokens == sorted(set(tokens))
    await until(partition.empty)


def test_redis_is_redis(redis_program: str) -> None:
    """What these tests take for Redis is not Valkey under its name."""
    from dotmac.platform.connection.embedded import EmbeddedValkey

    with EmbeddedValkey(program=redis_program) as server, redis.Redis(port=server.port) as client:
        assert "valkey_version" not in client.info("server")
