"""Cycles of waiters.

Promises: in a cycle of one or more owners the youngest, who got its lock of the cycle last, is refused at
once and told the locks of the cycle, whoever closed it, also over processes; the others go on when the
refused one gives its locks back; a wait that closes no cycle is never refused; without detection a lock of
one's own is waited for until the timeout.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.errors import DeadlockDetected, LockTimeout
from support.locks import Partition, manager_at, python, until

if TYPE_CHECKING:
    from dotmac.platform.distributed_locks import DistributedLockManager


@pytest.mark.parametrize("size", [1, 2, 3, 8])
async def test_a_cycle_is_refused_and_named(
    locks: DistributedLockManager, partition: Partition, size: int
) -> None:
    names = [f"l{n}" for n in range(size)]
    holding = 0
    refused: list[tuple[str, ...]] = []
    done = 0

    async def work(number: int) -> None:
        nonlocal holding, done
        try:
            async with locks.acquire_lock(names[number]):
                holding += 1
                await until(lambda: holding == size)
                # One after another, so that the last one closes the cycle.
                await until(lambda: partition.queued() == number)
                async with locks.acquire_lock(names[(number + 1) % size]):
                    done += 1
        except DeadlockDetected as error:
            assert error.retryable
            assert number == size - 1
            refused.append(error.cycle)

    started = time.monotonic()
    async with asyncio.timeout(20):
        await asyncio.gather(*(work(number) for number in range(size)))
    assert time.monotonic() - started < 15
    assert done == size - 1
    (cycle,) = refused
    assert cycle[0] == names[0], "the lock that was asked for comes first"
    assert sorted(cycle) == names
    assert partition.empty()


async def test_threads_and_one_object(locks: DistributedLockManager) -> None:
    lock = locks.acquire_lock("a")

    def twice() -> None:
        with (
            lock,
            pytest.raises(DeadlockDetected, match="already held by this task or thread") as caught,
        ):
            lock.acquire_sync()
        assert caught.value.cycle == ("a",)

    await asyncio.to_thread(twice)
    async with lock:
        with pytest.raises(DeadlockDetected):
            await locks.acquire_lock("a").acquire()
        assert await lock.acquire(blocking=False) is False


async def test_a_named_owner(locks: DistributedLockManager) -> None:
    async with locks.acquire_lock("a", owner="order-7"):
        with pytest.raises(DeadlockDetected):
            await asyncio.create_task(locks.acquire_lock("a", owner="order-7").acquire())
        assert not await asyncio.create_task(
            locks.acquire_lock("a", owner="order-8").acquire(blocking_timeout=0.05)
        )


async def test_no_cycle_no_refusal(locks: DistributedLockManager, partition: Partition) -> None:
    """Chains and shared waits, asked for in an order that never closes a ring."""

    async def work(number: int) -> None:
        names = sorted({f"n{number % 5}", f"n{(number * 7 + 1) % 5}", f"n{(number * 3 + 2) % 5}"})
        async with locks.acquire_lock(names[0]):
            await asyncio.sleep(0)
            for name in names[1:2]:
                async with locks.acquire_lock(name):
                    await asyncio.sleep(0)

    async with asyncio.timeout(30):
        await asyncio.gather(*(work(number) for number in range(60)))
    assert partition.empty()


async def test_without_detection_the_timeout_ends_it(valkey_url: str, unique: str) -> None:
    async with manager_at(valkey_url, unique, deadlock_detection=False) as locks, locks.acquire_lock("a"):
        with pytest.raises(LockTimeout):
            async with locks.acquire_lock("a", blocking_timeout=0.1):
                pytest.fail("two holders")


@pytest.mark.parametrize("closer", [0, 1, 2])
async def test_the_youngest_gives_up_whoever_closes_the_cycle(
    locks: DistributedLockManager, partition: Partition, closer: int
) -> None:
    names = ["l0", "l1", "l2"]
    ready = [asyncio.Event() for _ in names]
    refused: list[int] = []

    async def work(number: int) -> None:
        if number:
            await ready[number - 1].wait()
        try:
            async with locks.acquire_lock(names[number]):
                ready[number].set()
                await ready[-1].wait()
                await until(lambda: partition.queued() == (number - closer - 1) % 3)
                async with locks.acquire_lock(names[(number + 1) % 3]):
                    pass
        except DeadlockDetected as error:
            assert sorted(error.cycle) == names
            refused.append(number)

    async with asyncio.timeout(20):
        await asyncio.gather(*map(work, range(3)))
    assert refused == [2]
    assert partition.empty()


PARTNER = """
import sys
from dotmac.platform.errors import DeadlockDetected
from support.locks import manager_at
locks = manager_at(sys.argv[1], sys.argv[2])
with locks.acquire_lock("b"):
    print("holding")
    try:
        locks.acquire_lock("a").acquire_sync()
    except DeadlockDetected as error:
        print(*sorted(error.cycle))
"""


async def test_over_two_processes(
    locks: DistributedLockManager, partition: Partition, valkey_url: str, unique: str
) -> None:
    async with locks.acquire_lock("a"):
        partner = python(PARTNER, valkey_url, unique)
        assert partner.stdout is not None
        assert await asyncio.to_thread(partner.stdout.readline) == "holding\n"
        await until(lambda: partition.queued() == 1)
        async with locks.acquire_lock("b"):
            pass
    out, err = await asyncio.to_thread(partner.communicate)
    assert (partner.returncode, out) == (0, "a b\n"), err
