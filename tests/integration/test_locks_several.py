"""Several locks as one.

Promises: all of them are held, or none: where one can't be had in the time that is given for all together, or
the wait is cancelled, or closes a cycle, those acquired before it are given back; two that want the same ones
in whatever order never wait for one another; whoever holds one of them alone keeps the others out, and the
other way round; the loss of one ends the body and gives the others back; in tasks and in threads, as a
context and by hand.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from dotmac.platform._native import LockCall
from dotmac.platform.errors import DeadlockDetected, InvalidArgument, LockLost, LockNotOwned, LockTimeout
from support.locks import LIMIT, Partition, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.distributed_locks import DistributedLockManager
    from support.owners import Owner

    Owners = Callable[..., Owner]


async def test_all_are_held(locks: DistributedLockManager, owner: Owners, partition: Partition) -> None:
    other = owner()
    several = locks.acquire_locks(["c", "a", "b", "a"], 5.0)
    assert several.names == ("a", "b", "c")
    assert not several.held
    async with several as held:
        assert held is several
        assert held.held
        assert list(held.fencing_tokens) == ["a", "b", "c"]
        assert sorted(held.fencing_tokens.values()) == list(held.fencing_tokens.values()), "in that order"
        assert all(lock.timeout == 5.0 for lock in held.locks.values())
        for name in "abc":
            assert not await other.acquire("try_lock", name)
        with pytest.raises(LockNotOwned, match="held already"):
            await several.acquire()
    assert not several.held
    assert not several.locks
    with pytest.raises(LockNotOwned):
        _ = several.fencing_tokens
    assert partition.empty()


async def test_in_a_thread(locks: DistributedLockManager, partition: Partition) -> None:
    def work() -> None:
        several = locks.acquire_locks(["b", "a"])
        with several as held:
            assert held.held
            assert partition.held() == 2
        assert partition.empty()
        assert several.acquire_sync()
        assert partition.held() == 2
        several.release_sync()
        assert partition.empty()
        with pytest.raises(LockNotOwned):
            several.release_sync()

    await asyncio.to_thread(work)


async def test_by_hand(locks: DistributedLockManager, partition: Partition) -> None:
    several = locks.acquire_locks(["b", "a"])
    assert await several.acquire()
    assert partition.held() == 2
    with pytest.raises(InvalidArgument, match=r"await release\(\)|release\(\)"):
        several.release_sync()
    assert several.held, "the wrong call gives nothing back"
    await several.release()
    assert partition.empty()
    with pytest.raises(LockNotOwned):
        await several.release()


@pytest.mark.parametrize("taken", ["a", "b", "c"])
async def test_none_where_one_is_held(
    locks: DistributedLockManager, owner: Owners, partition: Partition, taken: str
) -> None:
    holder = owner()
    assert await holder.acquire("acquire_lock", taken)
    several = locks.acquire_locks(["a", "b", "c"])
    assert not await several.acquire(blocking=False)
    assert not await several.acquire(blocking_timeout=0.1)
    assert not several.held
    assert partition.held() == 1
    with pytest.raises(InvalidArgument, match="leave it out"):
        await several.acquire(blocking=False, blocking_timeout=1)
    for patience in (0, 0.1):
        with pytest.raises(LockTimeout, match=repr(taken)):
            async with locks.acquire_locks(["a", "b", "c"], blocking_timeout=patience):
                pytest.fail("one is held by another")
        assert partition.held() == 1
        assert not partition.queued()

    def thread() -> None:
        several = locks.acquire_locks(["a", "b", "c"], blocking_timeout=0.1)
        assert not several.acquire_sync()
        assert not several.acquire_sync(blocking=False)
        with pytest.raises(LockTimeout), several:
            pytest.fail("one is held by another")
        assert not several.held

    await asyncio.to_thread(thread)
    assert partition.held() == 1
    await holder.release(taken)
    assert await several.acquire(blocking=False)
    await several.release()
    assert partition.empty()


@pytest.mark.parametrize("how", ["by hand", "by hand in a thread", "in a thread"])
async def test_one_that_ends_while_the_others_are_waited_for(
    locks: DistributedLockManager, owner: Owners, partition: Partition, how: str
) -> None:
    holder = owner()
    assert await holder.acquire("acquire_lock", "b")
    several = locks.acquire_locks(["a", "b"], 0.3, auto_renewal=False)

    def in_a_thread() -> None:
        with several:
            pytest.fail("one of them is no longer held")

    wait = {
        "by hand": several.acquire,
        "by hand in a thread": lambda: asyncio.to_thread(several.acquire_sync),
        "in a thread": lambda: asyncio.to_thread(in_a_thread),
    }[how]
    waiting = asyncio.ensure_future(wait())
    await until(lambda: partition.queued() == 1)
    await asyncio.sleep(0.5)
    await holder.release("b")
    with pytest.raises(LockLost, match="'a'"):
        await waiting
    assert not several.locks
    await until(partition.empty)


@pytest.mark.parametrize("ends", ["time is up", "time is up in a thread", "cancelled", "timeout"])
async def test_what_ended_meanwhile_is_not_what_the_caller_asked(
    locks: DistributedLockManager, owner: Owners, partition: Partition, ends: str
) -> None:
    """Where the others can't be had, nobody wants to hear that the first would have ended by now."""
    holder = owner()
    assert await holder.acquire("acquire_lock", "b")
    several = locks.acquire_locks(["a", "b"], 0.2, auto_renewal=False)
    if ends == "time is up":
        assert not await several.acquire(blocking_timeout=0.5)
    elif ends == "time is up in a thread":
        assert not await asyncio.to_thread(several.acquire_sync, blocking_timeout=0.5)
    elif ends == "timeout":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await several.acquire()
    else:
        waiting = asyncio.create_task(several.acquire())
        await until(lambda: partition.queued() == 1)
        assert not several.held, "not all of them"
        await asyncio.sleep(0.4)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert not several.held
    await holder.release("b")
    await until(partition.empty)


async def test_the_time_is_for_all_together(
    locks: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    """The wait for the first uses up what the second would have had: it is only tried then."""
    holder, late = owner(), owner()
    assert await holder.acquire("acquire_lock", "a")
    assert await late.acquire("acquire_lock", "b")
    loop = asyncio.get_running_loop()
    begun = loop.time()
    waiting = asyncio.create_task(locks.acquire_locks(["a", "b"]).acquire(blocking_timeout=1.0))
    await until(lambda: partition.queued() == 1)
    await until(lambda: loop.time() - begun > 0.8)
    await holder.release("a")
    assert not await waiting
    # With a second for each of them it would be 1.8 s.
    assert loop.time() - begun < 1.7
    assert partition.held() == 1
    await late.release("b")


@pytest.mark.parametrize("form", ["context", "by hand"])
async def test_cancelled_in_the_middle(
    locks: DistributedLockManager, owner: Owners, partition: Partition, form: str
) -> None:
    holder = owner()
    assert await holder.acquire("acquire_lock", "c")

    async def work() -> None:
        several = locks.acquire_locks(["a", "b", "c"])
        if form == "by hand":
            await several.acquire()
        else:
            async with several:
                pytest.fail("one is held by another")

    task = asyncio.create_task(work())
    await until(lambda: partition.queued() == 1)
    assert partition.held() == 3
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: partition.held() == 1)
    assert not partition.queued()
    await holder.release("c")
    assert partition.empty()


async def test_opposite_orders_never_deadlock(locks: DistributedLockManager, partition: Partition) -> None:
    chance = random.Random(5)
    inside: set[str] = set()
    done = 0

    async def work(number: int) -> None:
        nonlocal done
        for _ in range(4):
            names = chance.sample("abcdef", 3)
            async with locks.acquire_locks(names if number % 2 else reversed(names)):
                assert not inside.intersection(names)
                inside.update(names)
                await asyncio.sleep(0)
                inside.difference_update(names)
                done += 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(work(number) for number in range(50)))
    assert done == 200
    assert partition.empty()


async def test_against_single_locks(
    locks: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    single = owner()
    assert await single.acquire("acquire_lock", "b")
    several = locks.acquire_locks(["a", "b", "c"])
    waiting = asyncio.create_task(several.acquire())
    await until(lambda: partition.queued() == 1)
    assert not await single.acquire("try_lock", "a"), "what comes before is held while it waits"
    assert await single.acquire("try_lock", "c"), "what comes after is not"
    await single.release("c")
    await single.release("b")
    assert await waiting
    asked = single.acquire("acquire_lock", "c")
    await until(lambda: partition.queued() == 1)
    await several.release()
    assert await asked
    await single.release("c")
    assert partition.empty()


async def test_a_cycle_with_single_locks(
    locks: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    single = owner()
    assert await single.acquire("acquire_lock", "b")
    several = locks.acquire_locks(["a", "b"])
    waiting = asyncio.create_task(several.acquire())
    await until(lambda: partition.queued() == 1)
    asked = single.acquire("acquire_lock", "a")
    # It got its first lock later than the other one.
    with pytest.raises(DeadlockDetected) as caught:
        await waiting
    assert sorted(caught.value.cycle) == ["a", "b"]
    assert await asked, "all that it had was given back"
    await single.release("a")
    await single.release("b")
    assert partition.empty()


async def test_the_loss_of_one_ends_the_body(locks: DistributedLockManager, partition: Partition) -> None:
    several = locks.acquire_locks(["a", "b", "c"])
    with pytest.raises(LockLost, match=r"'b' .* was lost: "):
        async with several:
            await locks._link.ready_side().bridge.call(LockCall.force("b", several.fencing_tokens["b"]))
            await asyncio.sleep(LIMIT)
    assert not several.held
    await until(partition.empty)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_limit_ends_them_all(locks: DistributedLockManager, partition: Partition) -> None:
    with pytest.raises(LockLost, match="max_hold"):
        async with locks.acquire_locks(["a", "b"], max_hold=0.3) as several:
            await asyncio.sleep(LIMIT)
    assert not several.held

    def thread() -> None:
        with pytest.raises(LockLost, match="max_hold"), locks.acquire_locks(["a", "b"], max_hold=0.3) as held:
            asyncio.run(asyncio.wait_for(_until_lost(held.locks["b"]), LIMIT))

    async def _until_lost(lock: object) -> None:
        await lock.lost  # type: ignore[attr-defined]

    await asyncio.to_thread(thread)
    await until(partition.empty)
    assert await several.acquire()
    await several.release()


async def test_more_than_one_is_lost_by_hand(locks: DistributedLockManager, partition: Partition) -> None:
    several = locks.acquire_locks(["a", "b"], max_hold=0.3)
    await several.acquire()
    for lock in several.locks.values():
        await asyncio.wait_for(lock.lost, LIMIT)
    assert not several.held
    with pytest.raises(LockLost, match="max_hold"):
        await several.release()
    await until(partition.empty)


@pytest.mark.parametrize("names", ["", [], [""], ["a", 7], [b"a"], b"ab", 7, None, ["a\0"]])
async def test_bad_names(locks: DistributedLockManager, names: object) -> None:
    with pytest.raises(InvalidArgument, match="^names: "):
        locks.acquire_locks(names)  # type: ignore[arg-type]


async def test_bad_arguments_are_found_at_once(locks: DistributedLockManager) -> None:
    with pytest.raises(InvalidArgument, match="^timeout: "):
        locks.acquire_locks(["a"], 0)
    with pytest.raises(InvalidArgument, match="^blocking_timeout: "):
        locks.acquire_locks(["a"], blocking_timeout=-1)
    with pytest.raises(InvalidArgument, match="^priority: "):
        locks.acquire_locks(["a"], priority=5000)
    with pytest.raises(InvalidArgument, match="^owner: "):
        locks.acquire_locks(["a"], owner="")


async def test_again_by_the_same_task(locks: DistributedLockManager, partition: Partition) -> None:
    async with locks.acquire_locks(["a", "b"], reentrant=True) as outer:
        async with locks.acquire_locks(["b", "c"], reentrant=True) as inner:
            assert inner.fencing_tokens["b"] == outer.fencing_tokens["b"]
        assert outer.held
        assert partition.held() == 2
        with pytest.raises(DeadlockDetected):
            await locks.acquire_locks(["b", "c"]).acquire()
        assert partition.held() == 2
    assert partition.empty()
