"""One lock among tasks, threads and processes.

Promises: never two holders at once; grants come in the order in which the lock was asked for, over tasks and
over processes; each holder's fencing token is larger than every earlier one, also over a server that lost its
data; a lock that is not to be had in time says so in time; `extend` sets the length anew; a lease without
renewal ends by itself; a lock can be given back by another task, but not twice; a holder whose task has ended
still holds, and a new task is never taken for it.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.errors import DeadlockDetected, InvalidArgument, LockLost, LockNotOwned, LockTimeout
from support.locks import Partition, manager_at, python, until

if TYPE_CHECKING:
    from dotmac.platform.connection.embedded import EmbeddedValkey


async def test_a_hundred_tasks_exclude_each_other(locks: DistributedLockManager) -> None:
    inside, counter = 0, 0

    async def work() -> None:
        nonlocal inside, counter
        async with locks.acquire_lock("counter") as lock:
            inside += 1
            assert inside == 1
            assert lock.held
            seen = counter
            await asyncio.sleep(0)
            counter = seen + 1
            inside -= 1

    await asyncio.gather(*(work() for _ in range(100)))
    assert counter == 100


async def test_threads_and_tasks_exclude_each_other(locks: DistributedLockManager) -> None:
    counter = 0

    def blocking() -> None:
        nonlocal counter
        for _ in range(20):
            with locks.acquire_lock("counter"):
                seen = counter
                time.sleep(0.0001)
                counter = seen + 1

    async def waiting() -> None:
        nonlocal counter
        for _ in range(20):
            async with locks.acquire_lock("counter"):
                seen = counter
                await asyncio.sleep(0)
                counter = seen + 1

    async with asyncio.timeout(30):
        await asyncio.gather(*(asyncio.to_thread(blocking) for _ in range(3)), *(waiting() for _ in range(3)))
    assert counter == 120


async def test_different_names_and_namespaces_do_not_wait(
    locks: DistributedLockManager, valkey_url: str, unique: str
) -> None:
    async with (
        manager_at(valkey_url, unique + "-other") as elsewhere,
        asyncio.timeout(5),
        locks.acquire_lock("a"),
        locks.acquire_lock("b"),
        locks.acquire_lock("a\n"),
        elsewhere.acquire_lock("a"),
    ):
        assert {info.name for info in await locks.list_locks()} == {"a", "b", "a\n"}


async def test_tasks_are_served_in_the_order_in_which_they_asked(
    locks: DistributedLockManager, partition: Partition
) -> None:
    order: list[int] = []

    async def work(number: int) -> None:
        async with locks.acquire_lock("queue"):
            order.append(number)

    async with locks.acquire_lock("queue"):
        tasks = []
        for number in range(30):
            tasks.append(asyncio.create_task(work(number)))
            await until(lambda: partition.queued() == len(tasks))
    await asyncio.gather(*tasks)
    assert order == list(range(30))


WAITER = """
import sys, time
from support.locks import manager_at
locks = manager_at(sys.argv[1], sys.argv[2])
with locks.acquire_lock("queue") as lock:
    print(lock.fencing_token)
    time.sleep(0.05)
"""


async def test_processes_are_served_in_order_with_increasing_tokens(
    locks: DistributedLockManager, partition: Partition, valkey_url: str, unique: str
) -> None:
    processes = []
    async with locks.acquire_lock("queue") as lock:
        first = lock.fencing_token
        for number in range(4):
            processes.append(python(WAITER, valkey_url, unique))
            await until(lambda number=number: partition.queued() == number + 1)
    outputs = await asyncio.gather(*(asyncio.to_thread(process.communicate) for process in processes))
    assert [process.returncode for process in processes] == [0] * 4, outputs
    tokens = [first, *(int(out) for out, _ in outputs)]
    assert tokens == sorted(set(tokens))


async def test_tokens_increase_over_a_server_that_lost_its_data(
    own_valkey: EmbeddedValkey, unique: str
) -> None:
    tokens = []
    async with manager_at(own_valkey.url, unique) as locks:

        async def take() -> None:
            async with locks.acquire_lock("a") as lock:
                tokens.append(lock.fencing_token)

        view = Partition(own_valkey.url, unique)
        for _ in range(3):
            await take()
            view.client.flushall()
            await take()
            own_valkey.restart()
            await take()
        view.client.close()
    assert tokens == sorted(set(tokens))


async def test_waiting_ends_after_blocking_timeout(
    locks: DistributedLockManager, partition: Partition
) -> None:
    async with locks.acquire_lock("a", owner="somebody"):

        async def other() -> None:
            started = time.monotonic()
            with pytest.raises(LockTimeout, match="blocking_timeout") as caught:
                async with locks.acquire_lock("a", blocking_timeout=0.3):
                    pytest.fail("two holders")
            assert isinstance(caught.value, TimeoutError)
            assert caught.value.retryable
            assert 0.29 <= time.monotonic() - started < 2
            assert await locks.acquire_lock("a").acquire(blocking_timeout=0.05) is False

        await asyncio.create_task(other())
        await until(lambda: partition.queued() == 0)


async def test_only_trying_answers_at_once(locks: DistributedLockManager, partition: Partition) -> None:
    mine = locks.acquire_lock("a")
    assert await mine.acquire(blocking=False) is True

    async def other() -> None:
        started = time.monotonic()
        lock = locks.acquire_lock("a")
        assert await lock.acquire(blocking=False) is False
        assert await lock.acquire(blocking_timeout=0) is False
        with pytest.raises(LockTimeout, match="held by another"):
            async with locks.acquire_lock("a", blocking_timeout=0):
                pytest.fail("two holders")
        with pytest.raises(InvalidArgument, match="blocking_timeout"):
            await lock.acquire(blocking=False, blocking_timeout=1)
        assert not lock.held
        assert time.monotonic() - started < 2

    await asyncio.create_task(other())
    await mine.release()
    await asyncio.to_thread(mine.acquire_sync)
    assert await asyncio.create_task(locks.acquire_lock("a").acquire(blocking=False)) is False
    await mine.release()
    assert partition.empty()


async def test_an_extension_counts_from_now_not_from_the_last_heartbeat(
    locks: DistributedLockManager,
) -> None:
    async with locks.acquire_lock("a", timeout=9) as lock:
        await asyncio.sleep(0.6)  # heartbeats are one second apart
        await lock.extend(0.4)
        assert lock.held
        await asyncio.sleep(1)
        assert lock.held


async def test_extend_sets_the_length_anew(locks: DistributedLockManager) -> None:
    async with locks.acquire_lock("a", timeout=1.0) as lock:
        assert 0.5 < lock.remaining < 1.0
        await lock.extend(30)
        assert 28 < lock.remaining < 30
        await lock.extend()
        assert lock.remaining < 1.0
        with pytest.raises(InvalidArgument, match="timeout"):
            await lock.extend(0)
    with pytest.raises(LockNotOwned):
        await lock.extend(5)
    fixed = locks.acquire_lock("b", timeout=0.3, auto_renewal=False)
    assert await fixed.acquire()
    await fixed.extend(1.0)
    await asyncio.sleep(0.5)
    assert fixed.held
    await asyncio.to_thread(fixed.extend_sync, 2)
    assert fixed.remaining > 1.5
    await fixed.release()


async def test_a_lease_without_renewal_ends_by_itself(locks: DistributedLockManager) -> None:
    lock = locks.acquire_lock("a", timeout=0.5, auto_renewal=False, owner="somebody")
    started = time.monotonic()
    assert await lock.acquire()
    token = lock.fencing_token
    async with locks.acquire_lock("b"):  # another lease, which is renewed, keeps the session alive meanwhile

        async def next_one() -> int:
            async with locks.acquire_lock("a") as other:
                return other.fencing_token

        assert await asyncio.create_task(next_one()) > token
        assert 0.45 < time.monotonic() - started < 3
    assert not lock.held
    assert lock.lost
    with pytest.raises(LockLost):
        _ = lock.fencing_token
    with pytest.raises(LockLost):
        await lock.release()


async def test_a_renewed_lease_outlives_its_length_many_times(locks: DistributedLockManager) -> None:
    async with locks.acquire_lock("a", timeout=0.2) as lock:
        token = lock.fencing_token
        await asyncio.sleep(1.5)
        assert lock.fencing_token == token
        assert await asyncio.create_task(locks.acquire_lock("a").acquire(blocking=False)) is False


async def test_released_by_another_task_or_thread(
    locks: DistributedLockManager, partition: Partition
) -> None:
    lock = locks.acquire_lock("a")
    for release in (
        lambda: asyncio.create_task(lock.release()),
        lambda: asyncio.to_thread(lock.release_sync),
    ):
        await asyncio.create_task(lock.acquire())
        assert lock.held
        await release()
        assert partition.empty()
    await asyncio.to_thread(lock.acquire_sync)
    await lock.release()
    assert partition.empty()
    assert not lock.held


async def test_not_owned(locks: DistributedLockManager) -> None:
    lock = locks.acquire_lock("a")
    for use in (lock.release, lock.extend, lock.lost._wait):
        with pytest.raises(LockNotOwned):
            await use()
    for use in (lock.release_sync, lock.extend_sync, lambda: lock.fencing_token, lambda: lock.remaining):
        with pytest.raises(LockNotOwned):
            use()
    await lock.acquire()
    await lock.release()
    with pytest.raises(LockNotOwned):
        await lock.release()
    assert not lock.lost


async def test_a_holder_whose_task_has_ended_is_not_taken_for_a_new_task(
    locks: DistributedLockManager,
) -> None:
    """The memory of an ended task, and so its id, is soon another task's."""
    held = locks.acquire_lock("a")
    await asyncio.create_task(held.acquire())
    for _ in range(10):
        gc.collect()
        other = locks.acquire_lock("a")
        try:
            assert await asyncio.create_task(other.acquire(blocking_timeout=0.01)) is False
        except DeadlockDetected:
            pytest.fail("a new task was taken for the one that holds the lock")
    await held.release()


async def test_tasks_of_any_name_may_hold(locks: DistributedLockManager, partition: Partition) -> None:
    for name in ("", "\0", "a\0b\0c", "x" * 100_000, "\ud800", "é 日本"):
        lock = locks.acquire_lock("a")
        assert await asyncio.create_task(lock.acquire(), name=name)
        assert len(await locks.list_locks()) == 1
        await lock.release()
    assert partition.empty()


async def test_a_context_that_is_left_in_another_task_gives_the_lock_back(
    locks: DistributedLockManager, partition: Partition
) -> None:
    lock = locks.acquire_lock("a")
    await asyncio.create_task(lock.__aenter__())
    await asyncio.create_task(lock.__aexit__(None, None, None))
    assert partition.empty()
    await asyncio.to_thread(lock.__enter__)
    thread = threading.Thread(target=lock.__exit__, args=(None, None, None))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert partition.empty()


async def test_released_by_hand_in_its_own_body(locks: DistributedLockManager, partition: Partition) -> None:
    async with locks.acquire_lock("a") as lock:
        await lock.release()
        assert partition.empty()
        taken = asyncio.Event()

        async def other() -> None:
            async with lock:
                taken.set()
                await asyncio.sleep(0.2)
                assert lock.held, "the first holder's exit gave the second one's lock back"

        task = asyncio.create_task(other())
        await taken.wait()
    await task
    assert partition.empty()


async def test_a_lock_object_that_goes_out_of_use_is_given_back(
    locks: DistributedLockManager, partition: Partition
) -> None:
    lock = locks.acquire_lock("a")
    await lock.acquire()
    assert partition.held() == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del lock
        gc.collect()
    assert ["'a' was dropped while it was held" in str(warning.message) for warning in told] == [True]
    await until(partition.empty)


async def test_closing_the_manager_gives_everything_back(
    valkey_url: str, unique: str, partition: Partition
) -> None:
    manager = manager_at(valkey_url, unique)
    held = [manager.acquire_lock(str(n)) for n in range(5)]
    for lock in held:
        await lock.acquire()
    assert partition.held() == 5
    await manager.aclose()
    await manager.aclose()
    assert partition.empty()
    assert partition.sessions() == 0
    assert not any(lock.held for lock in held)


async def test_who_holds_what(locks: DistributedLockManager) -> None:
    import os

    assert await locks.list_locks() == []
    async with locks.acquire_lock("a", timeout=5) as lock:
        (info,) = await locks.list_locks()
        assert (info.name, info.pid, info.waiters) == ("a", os.getpid(), 0)
        assert info.fencing_token == lock.fencing_token
        assert 0 < info.remaining <= 5
        assert await asyncio.to_thread(locks.list_locks_sync)
    many = [locks.acquire_lock(f"many-{n}") for n in range(500)]
    await asyncio.gather(*(lock.acquire() for lock in many))
    assert len(await locks.list_locks()) == 500
    await asyncio.gather(*(lock.release() for lock in many))


async def test_a_direct_lock_meets_the_managers(
    locks: DistributedLockManager, valkey_url: str, unique: str
) -> None:
    lock = DistributedLock(valkey_url, "a", timeout=5, namespace=unique)
    async with locks.acquire_lock("a"):
        assert await asyncio.create_task(lock.acquire(blocking=False)) is False
    assert await lock.acquire()
    await lock.release()
