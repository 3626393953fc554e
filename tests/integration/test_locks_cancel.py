"""Cancellation at every await.

Promises: a task that is cancelled while it acquires, holds or gives back, after any number of turns of the
loop, leaves nothing held, nobody in the queue and no request behind, and the next one gets the lock at once;
cancelled waiters in the middle of a queue do not disturb those behind them; an interrupted thread neither.
Many tasks that acquire, wait, time out and are cancelled in any order never hold together.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.errors import LockTimeout
from support.locks import Partition, manager_at, python, until

if TYPE_CHECKING:
    from dotmac.platform.distributed_locks import DistributedLockManager


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def is_clean(locks: DistributedLockManager, partition: Partition) -> None:
    """What was sent before is done in order, so that one more lock's release comes after all of it."""
    async with asyncio.timeout(5):
        async with locks.acquire_lock("a"):
            assert partition.held() == 1
    await until(partition.empty, 5)
    assert locks.stats()["held"] == 0


@pytest.mark.parametrize("k", range(12))
async def test_a_free_lock(locks: DistributedLockManager, partition: Partition, k: int) -> None:
    for first in (True, False):  # the first time the connection is opened, too

        async def work() -> None:
            async with locks.acquire_lock("a"):
                pass

        task = asyncio.create_task(work())
        await turns(k)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done, f"hangs after {k} turns, first={first}"
        await is_clean(locks, partition)


@pytest.mark.parametrize("k", range(5))
async def test_entering_in_a_task_of_its_own(
    locks: DistributedLockManager, partition: Partition, k: int
) -> None:
    async with locks.acquire_lock("a"):
        pass
    lock = locks.acquire_lock("a")
    task = asyncio.create_task(lock.__aenter__())
    await turns(k)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    if not task.cancelled():
        await lock.release()
    await is_clean(locks, partition)
    async with locks.acquire_lock("a"):
        waiting = locks.acquire_lock("a", owner="other")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting.__aenter__(), 0.01)
        await until(lambda: partition.queued() == 0)
    assert await asyncio.wait_for(lock.__aenter__(), 5) is lock
    await asyncio.wait_for(lock.__aexit__(None, None, None), 5)
    await is_clean(locks, partition)


async def test_entering_that_nobody_awaits(locks: DistributedLockManager, partition: Partition) -> None:
    async with locks.acquire_lock("a"):
        pass
    entering = locks.acquire_lock("a").__aenter__()
    await turns(3)
    await until(lambda: partition.held() == 1)
    entering.close()
    await is_clean(locks, partition)
    # It asks all the same, and gives back what it is granted.
    locks.acquire_lock("a").__aenter__()
    async with asyncio.timeout(5), locks.acquire_lock("a", owner="next"):
        pass
    await is_clean(locks, partition)
    entering = locks.acquire_lock("a").__aenter__()
    lock = await entering
    with pytest.raises(RuntimeError, match="await"):
        await entering
    await lock.__aexit__(None, None, None)
    await is_clean(locks, partition)


@pytest.mark.parametrize("k", range(0, 40, 3))
async def test_by_hand_and_in_real_time(locks: DistributedLockManager, partition: Partition, k: int) -> None:
    """Cancelled after k hundreds of microseconds, so that the answer is on its way at some of them."""
    async with locks.acquire_lock("a"):
        pass

    async def work() -> None:
        lock = locks.acquire_lock("a")
        await lock.acquire()
        await lock.release()

    task = asyncio.create_task(work())
    deadline = time.perf_counter() + k * 1e-4
    while time.perf_counter() < deadline:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    del task
    await is_clean(locks, partition)


@pytest.mark.parametrize("k", range(10))
async def test_while_it_is_handed_over(locks: DistributedLockManager, partition: Partition, k: int) -> None:
    holder = locks.acquire_lock("a")
    await holder.acquire()

    async def wait() -> None:
        async with locks.acquire_lock("a"):
            pass

    task = asyncio.create_task(wait())
    await until(lambda: partition.queued() == 1)
    release = asyncio.create_task(holder.release())
    await turns(k)
    task.cancel()
    await release
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    await is_clean(locks, partition)


@pytest.mark.parametrize("k", range(6))
async def test_release(locks: DistributedLockManager, partition: Partition, k: int) -> None:
    lock = locks.acquire_lock("a")
    await lock.acquire()
    task = asyncio.create_task(lock.release())
    await turns(k)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    if lock.held:
        assert k == 0, "only a release that never began may leave the lock held"
        await lock.release()
    await is_clean(locks, partition)


async def test_waiters_leave_the_queue(locks: DistributedLockManager, partition: Partition) -> None:
    order: list[int] = []

    async def wait(number: int) -> None:
        async with locks.acquire_lock("a"):
            order.append(number)

    async with locks.acquire_lock("a"):
        tasks = []
        for number in range(10):
            tasks.append(asyncio.create_task(wait(number)))
            await until(lambda: partition.queued() == len(tasks))
        for task in tasks[::2]:
            task.cancel()
        await until(lambda: partition.queued() == 5)
        assert order == []
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [1, 3, 5, 7, 9]
    await is_clean(locks, partition)


async def test_a_cancelled_body(locks: DistributedLockManager, partition: Partition) -> None:
    async def hold() -> None:
        async with locks.acquire_lock("a"):
            await asyncio.sleep(30)

    for _ in range(3):
        task = asyncio.create_task(hold())
        await until(lambda: partition.held() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert partition.empty(), "the exit waits for the server's word"


async def test_twice_cancelled_while_leaving(locks: DistributedLockManager, partition: Partition) -> None:
    async def hold() -> None:
        async with locks.acquire_lock("a"):
            await asyncio.sleep(30)

    task = asyncio.create_task(hold())
    await until(lambda: partition.held() == 1)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await is_clean(locks, partition)


INTERRUPTED = """
import signal, sys
from support.locks import manager_at
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
locks = manager_at(sys.argv[1], sys.argv[2])
print("waiting")
try:
    with locks.acquire_lock("a"):
        print("held")
except KeyboardInterrupt:
    print("interrupted")
sys.stdin.readline()
"""


async def test_an_interrupted_thread_leaves_the_queue(
    locks: DistributedLockManager, partition: Partition, valkey_url: str, unique: str
) -> None:
    async with locks.acquire_lock("a"):
        process = python(INTERRUPTED, valkey_url, unique)
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "waiting\n"
        await until(lambda: partition.queued() == 1)
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.stdout.readline) == "interrupted\n"
        await until(lambda: partition.queued() == 0)
    _, err = process.communicate("\n")
    assert process.returncode == 0, err
    await is_clean(locks, partition)


@pytest.mark.parametrize("seed", range(3))
async def test_any_mixture(valkey_url: str, unique: str, partition: Partition, seed: int) -> None:
    """Tasks and a thread, each of which may be cancelled or run out of patience."""
    chance = random.Random(seed)
    async with manager_at(valkey_url, unique) as locks:
        await locks.list_locks()  # connected, so that a short patience ends for no other reason
        inside = 0
        guard = threading.Lock()
        granted = 0

        def enter(change: int) -> None:
            nonlocal inside, granted
            with guard:
                inside += change
                granted += change > 0
                assert inside in (0, 1), "two holders"

        async def work() -> None:
            try:
                async with locks.acquire_lock("a", blocking_timeout=chance.choice([None, 0, 0.002, 0.02])):
                    enter(+1)
                    try:
                        await asyncio.sleep(chance.choice([0, 0, 0.001]))
                    finally:
                        enter(-1)
            except LockTimeout:
                pass

        def blocking() -> None:
            for _ in range(10):
                with locks.acquire_lock("a"):
                    enter(+1)
                    enter(-1)

        thread = threading.Thread(target=blocking)
        thread.start()
        tasks: list[asyncio.Task[None]] = []
        for _ in range(400):
            tasks.append(asyncio.create_task(work()))
            if chance.random() < 0.5:
                chance.choice(tasks).cancel()
            if chance.random() < 0.3:
                await asyncio.sleep(chance.choice([0, 0.0005]))
        async with asyncio.timeout(30):
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(thread.join)
        assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
        assert granted > 50
        await is_clean(locks, partition)
