"""Locks that their own holder may acquire again.

Promises: with `reentrant=True` a task, a thread or a named owner that holds a lock acquires it again without
asking the server, under the same fencing token, through the same object or another, as a context or by hand;
it is given back with the last release, in whatever order those come; others wait until then, a child task
included; a loss ends all nested bodies as one `LockLost`; without it, whoever acquires what it holds learns
at once that it would wait for itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.errors import DeadlockDetected, LockLost, LockNotOwned
from support.locks import LIMIT, Partition, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.distributed_locks import DistributedLockManager
    from support.owners import Owner

    Owners = Callable[..., Owner]


async def test_nested_contexts(locks: DistributedLockManager, owner: Owners, partition: Partition) -> None:
    other = owner()
    same = locks.acquire_lock("a", reentrant=True)
    another = locks.acquire_lock("a", 5.0, reentrant=True)
    async with same as outer:
        token = outer.fencing_token
        async with same, another as inner:
            assert inner.fencing_token == token
            assert inner.held
            async with same:
                assert partition.held() == 1
        assert not another.held
        assert same.held
        assert not await other.acquire("try_lock", "a")
        async with another:
            pass
        assert outer.fencing_token == token
    assert not same.held
    assert partition.empty()
    async with another as outer:
        assert outer.fencing_token > token


async def test_nested_contexts_in_a_thread(locks: DistributedLockManager, partition: Partition) -> None:
    def work() -> None:
        same = locks.acquire_lock("a", reentrant=True)
        another = locks.acquire_lock("a", reentrant=True)
        with same as outer:
            token = outer.fencing_token
            with same, another as inner:
                assert inner.fencing_token == token
            assert outer.held
            assert partition.held() == 1
        assert partition.empty()

    await asyncio.to_thread(work)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
async def test_by_hand_the_last_release_gives_it_back(
    locks: DistributedLockManager, owner: Owners, partition: Partition, order: tuple[int, ...]
) -> None:
    other = owner()
    entries = [locks.acquire_lock("a", reentrant=True) for _ in range(3)]
    for lock in entries:
        assert await lock.acquire(blocking=False)
    token = entries[0].fencing_token
    waiting = other.acquire("acquire_lock", "a")
    await until(lambda: partition.queued() == 1)
    for number in order[:2]:
        await entries[number].release()
        assert not entries[number].held
        assert entries[order[2]].held
        assert entries[order[2]].fencing_token == token
        assert partition.queued() == 1
    await entries[order[2]].release()
    assert await waiting
    for lock in entries:
        with pytest.raises(LockNotOwned):
            await lock.release()
    await other.release("a")
    assert partition.empty()


async def test_by_hand_in_a_thread(locks: DistributedLockManager, partition: Partition) -> None:
    def work() -> None:
        first, second = (locks.acquire_lock("a", reentrant=True) for _ in range(2))
        assert first.acquire_sync()
        assert first.acquire_sync()
        assert second.acquire_sync()
        first.release_sync()
        first.release_sync()
        assert not first.held
        assert second.held
        assert partition.held() == 1
        second.release_sync()
        assert partition.empty()
        with pytest.raises(LockNotOwned):
            second.release_sync()

    await asyncio.to_thread(work)


async def test_a_body_around_what_was_acquired_by_hand(
    locks: DistributedLockManager, partition: Partition
) -> None:
    lock = locks.acquire_lock("a", reentrant=True)
    await lock.acquire()
    async with lock:
        pass
    assert lock.held
    await lock.release()
    assert partition.empty()
    async with lock:
        await lock.acquire()
        await lock.release()
        assert lock.held
    assert partition.empty()


async def test_a_named_owner_spans_tasks_and_threads(
    locks: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    task, thread, other = owner(), owner("thread"), owner()
    assert await task.acquire("acquire_lock", "a", owner="order-7", reentrant=True)
    assert await thread.acquire("acquire_lock", "a", owner="order-7", reentrant=True, blocking_timeout=0)
    assert not await other.acquire("acquire_lock", "a", owner="order-8", reentrant=True, blocking_timeout=0)
    await task.release("a")
    assert not await other.acquire("try_lock", "a")
    await thread.release("a")
    assert partition.empty()


@pytest.mark.parametrize("kind", ["task", "thread", "process"])
async def test_others_are_kept_out(owner: Owners, partition: Partition, kind: str) -> None:
    holder, other = owner(kind), owner(kind)
    assert await holder.acquire("acquire_lock", "a", reentrant=True)
    assert not await other.acquire("acquire_lock", "a", reentrant=True, blocking_timeout=0.05)
    await holder.release("a")
    assert await other.acquire("acquire_lock", "a", reentrant=True)
    await other.release("a")
    assert partition.empty()


async def test_a_child_task_is_somebody_else(locks: DistributedLockManager, partition: Partition) -> None:
    async def child() -> None:
        async with locks.acquire_lock("a", reentrant=True):
            pytest.fail("two holders")

    async with locks.acquire_lock("a", reentrant=True):
        with pytest.raises(DeadlockDetected):
            await asyncio.wait_for(asyncio.create_task(child()), LIMIT)
    assert partition.empty()


async def test_readers_and_permits_count_once(locks: DistributedLockManager, partition: Partition) -> None:
    for make in (
        lambda: locks.read_lock("a", reentrant=True),
        lambda: locks.semaphore("a", 1, reentrant=True),
    ):
        async with make() as outer, make() as inner:
            assert inner.fencing_token == outer.fencing_token
        assert partition.empty()


async def test_a_loss_ends_all_nested_bodies(locks: DistributedLockManager, partition: Partition) -> None:
    left: list[str] = []
    with pytest.raises(LockLost, match="held for longer than max_hold"):
        async with locks.acquire_lock("a", reentrant=True, max_hold=0.3) as outer:
            try:
                async with locks.acquire_lock("a", reentrant=True) as inner:
                    try:
                        await asyncio.sleep(LIMIT)
                    except asyncio.CancelledError:
                        assert inner.lost
                        left.append("inner")
                        raise
            except asyncio.CancelledError:
                assert outer.lost
                left.append("outer")
                raise
    assert left == ["inner", "outer"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    async with locks.acquire_lock("a", reentrant=True) as lock:
        assert lock.held
    await until(partition.empty)


async def test_a_loss_in_a_thread(locks: DistributedLockManager, partition: Partition) -> None:
    def work() -> None:
        told: list[str] = []
        outer = locks.acquire_lock("a", reentrant=True, max_hold=0.3)
        with (
            pytest.raises(LockLost, match="max_hold"),
            outer,
            locks.acquire_lock("a", reentrant=True) as inner,
        ):
            told.append(asyncio.run(_reason(inner)))
        assert len(told) == 1
        with locks.acquire_lock("a", reentrant=True) as lock:
            assert lock.held

    async def _reason(lock: object) -> str:
        return str(await asyncio.wait_for(lock.lost, LIMIT))  # type: ignore[attr-defined]

    await asyncio.to_thread(work)
    await until(partition.empty)


async def test_a_loss_by_hand(locks: DistributedLockManager, partition: Partition) -> None:
    first, second = (locks.acquire_lock("a", reentrant=True, max_hold=0.3) for _ in range(2))
    await first.acquire()
    await second.acquire()
    await asyncio.wait_for(first.lost, LIMIT)
    assert not second.held
    with pytest.raises(LockLost):
        _ = second.fencing_token
    await first.release()
    with pytest.raises(LockLost, match="max_hold"):
        await second.release()
    async with first:
        assert first.held
    await until(partition.empty)


@pytest.mark.parametrize("inner", [False, True])
async def test_without_it_one_waits_for_oneself(
    locks: DistributedLockManager, owner: Owners, partition: Partition, *, inner: bool
) -> None:
    """Also where only the inner one would be: what is held was not acquired as something to be shared."""
    async with locks.acquire_lock("a"):
        with pytest.raises(DeadlockDetected, match="already held by this task or thread") as caught:
            await locks.acquire_lock("a", reentrant=inner).acquire()
        assert caught.value.cycle == ("a",)
    thread, named = owner("thread"), owner()
    assert await thread.acquire("acquire_lock", "a")
    with pytest.raises(DeadlockDetected, match="already held by this task or thread"):
        await thread.acquire("acquire_lock", "a", reentrant=inner)
    await thread.release("a")
    assert await named.acquire("acquire_lock", "a", owner="x")
    with pytest.raises(DeadlockDetected):
        await thread.acquire("acquire_lock", "a", owner="x", reentrant=inner)
    await named.release("a")
    assert partition.empty()
