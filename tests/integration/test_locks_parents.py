"""Tasks that await one another while they wait for locks.

Promises: a task that waits for a lock of one that awaits it, directly or through tasks in between, by
whatever way asyncio has for that, learns that this is a deadlock, also where the awaiting begins later, and
where the cycle goes through another process; a task that nobody's lock depends on just waits, and so does one
beside which another will do; the cycle says where in the code each lock was asked for.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.errors import DeadlockDetected
from support.locks import LIMIT, Partition, python, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from dotmac.platform.distributed_locks import DistributedLockManager

    Way = Callable[[Coroutine[Any, Any, None]], Awaitable[object]]


async def by_await(child: Coroutine[Any, Any, None]) -> None:
    await asyncio.create_task(child)


async def by_gather(child: Coroutine[Any, Any, None]) -> None:
    await asyncio.gather(child, asyncio.sleep(0))


async def by_group(child: Coroutine[Any, Any, None]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(child)


async def by_wait(child: Coroutine[Any, Any, None]) -> None:
    (done,), _ = await asyncio.wait([asyncio.create_task(child)])
    await done


async def by_wait_for(child: Coroutine[Any, Any, None]) -> None:
    await asyncio.wait_for(child, LIMIT)


async def by_wait_for_a_task(child: Coroutine[Any, Any, None]) -> None:
    await asyncio.wait_for(asyncio.create_task(child), LIMIT)


async def by_shield(child: Coroutine[Any, Any, None]) -> None:
    await asyncio.shield(child)


async def by_tasks_between(child: Coroutine[Any, Any, None]) -> None:
    async def between() -> None:
        await by_gather(by_group(child))

    await asyncio.create_task(between())


WAYS = pytest.mark.parametrize(
    "way",
    [by_await, by_gather, by_group, by_wait, by_wait_for, by_wait_for_a_task, by_shield, by_tasks_between],
    ids=lambda way: way.__name__,
)


def line() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


@WAYS
async def test_a_child_that_wants_its_parents_lock(
    locks: DistributedLockManager, partition: Partition, way: Way
) -> None:
    caught: list[DeadlockDetected] = []
    asked_at = 0

    async def child() -> None:
        nonlocal asked_at
        with pytest.raises(DeadlockDetected, match="already held by a task that awaits this one") as error:
            asked_at = line() + 1
            async with locks.acquire_lock("a"):
                pytest.fail("two holders")
        caught.append(error.value)

    async with asyncio.timeout(LIMIT):
        acquired_at = line() + 1
        async with locks.acquire_lock("a"):
            await way(child())
    assert partition.empty()
    (error,) = caught
    assert error.cycle == ("a",)
    (edge,) = error.edges
    assert edge.waiting_at == f"{__file__}:{asked_at}"
    assert edge.acquired_at == f"{__file__}:{acquired_at}"
    assert edge.waiter != edge.holder
    assert edge.process["pid"] == os.getpid()
    assert f"acquired at {__file__}:{acquired_at}" in str(error)


@WAYS
async def test_the_parent_begins_to_await_later(
    locks: DistributedLockManager, partition: Partition, way: Way
) -> None:
    waiting = asyncio.Event()

    async def child() -> None:
        waiting.set()
        with pytest.raises(DeadlockDetected):
            async with locks.acquire_lock("a"):
                pytest.fail("two holders")

    async with asyncio.timeout(LIMIT), locks.acquire_lock("a"):
        task = asyncio.create_task(child())
        await until(lambda: partition.queued() == 1)
        # It waits for nobody's end yet, so it is left alone however often it is looked at.
        for _ in range(20):
            async with locks.acquire_lock("b"):
                await asyncio.sleep(0)
        assert not task.done()
        assert partition.queued() == 1

        async def end() -> None:
            await task

        await way(end())
    assert partition.empty()


async def test_a_child_that_nobody_awaits_just_waits(
    locks: DistributedLockManager, partition: Partition
) -> None:
    got = False

    async def child() -> None:
        nonlocal got
        async with locks.acquire_lock("a"):
            got = True

    async with locks.acquire_lock("a"):
        task = asyncio.create_task(child())
        await until(lambda: partition.queued() == 1)
        assert not got
    await asyncio.wait_for(task, LIMIT)
    assert got
    assert partition.empty()


async def test_awaited_where_another_one_will_do(locks: DistributedLockManager, partition: Partition) -> None:
    """The first of two that ends lets the parent go on: no deadlock, although it awaits the child."""
    looked = asyncio.Event()

    async def child() -> None:
        async with locks.acquire_lock("a"):
            pass

    async def other() -> None:
        await until(lambda: partition.queued() == 1)
        # The child is looked at meanwhile, every second at last.
        for _ in range(40):
            async with locks.acquire_lock("b"):
                await asyncio.sleep(0.01)
        looked.set()

    async with locks.acquire_lock("a"):
        tasks = [asyncio.create_task(child()), asyncio.create_task(other())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=LIMIT)
        assert looked.is_set()
        assert not tasks[0].done()
    await asyncio.wait_for(asyncio.gather(*tasks), LIMIT)
    assert partition.empty()


@WAYS
async def test_grandparents(locks: DistributedLockManager, partition: Partition, way: Way) -> None:
    """Each holds a lock of its own; the youngest wants the oldest's."""

    async def grandchild() -> None:
        async with locks.acquire_lock("c"):
            with pytest.raises(DeadlockDetected, match="a task that awaits this one") as caught:
                async with locks.acquire_lock("a"):
                    pytest.fail("two holders")
            assert caught.value.cycle == ("a",)

    async def child() -> None:
        async with locks.acquire_lock("b"):
            await way(grandchild())

    async with asyncio.timeout(LIMIT), locks.acquire_lock("a"):
        await way(child())
    assert partition.empty()


async def test_siblings_wait_for_one_another(locks: DistributedLockManager, partition: Partition) -> None:
    order: list[int] = []

    async def child(number: int) -> None:
        async with locks.acquire_lock("b"):
            order.append(number)
            await asyncio.sleep(0)

    async with asyncio.timeout(LIMIT), locks.acquire_lock("a"):
        await asyncio.gather(*(child(number) for number in range(10)))
    assert sorted(order) == list(range(10))
    assert partition.empty()


async def test_a_cycle_of_two_families(locks: DistributedLockManager, partition: Partition) -> None:
    """Each parent holds what the other's child wants."""
    refused: list[tuple[str, ...]] = []
    ready = asyncio.Barrier(2)

    async def child(wanted: str) -> None:
        async with locks.acquire_lock(wanted):
            pass

    async def parent(mine: str, wanted: str) -> None:
        async with locks.acquire_lock(mine):
            await ready.wait()
            try:
                await asyncio.create_task(child(wanted))
            except DeadlockDetected as error:
                refused.append(error.cycle)

    async with asyncio.timeout(LIMIT):
        await asyncio.gather(parent("a", "b"), parent("b", "a"))
    (cycle,) = refused
    assert sorted(cycle) == ["a", "b"]
    assert partition.empty()


PARTNER = """
import sys
from dotmac.platform.errors import DeadlockDetected
from support.locks import manager_at
locks = manager_at(sys.argv[1], sys.argv[2])
with locks.acquire_lock("b"):
    print("holding")
    sys.stdin.readline()
    try:
        with locks.acquire_lock("a"):
            print("both")
    except DeadlockDetected as error:
        print("refused", *error.cycle)
"""


@pytest.mark.parametrize("first", ["child", "partner"])
async def test_over_two_processes(
    locks: DistributedLockManager, partition: Partition, valkey_url: str, unique: str, first: str
) -> None:
    """A parent holds `a` and awaits a child that waits for `b`, whose holder waits for `a`."""
    partner = python(PARTNER, valkey_url, unique)
    refused: list[tuple[str, ...]] = []

    async def child() -> None:
        try:
            async with locks.acquire_lock("b"):
                pass
        except DeadlockDetected as error:
            refused.append(error.cycle)
            here, there = error.edges
            assert (here.process["pid"], there.process["pid"]) == (os.getpid(), partner.pid)
            assert here.waiting_at.startswith(f"{__file__}:")
            assert here.acquired_at == "<string>:6"
            assert there.waiting_at == "<string>:10"
            assert there.acquired_at.startswith(f"{__file__}:")

    def go() -> None:
        partner.stdin.write("go\n")
        partner.stdin.flush()

    async with asyncio.timeout(LIMIT), locks.acquire_lock("a"):
        assert await asyncio.to_thread(partner.stdout.readline) == "holding\n"
        if first == "partner":
            go()
            await until(lambda: partition.queued() == 1)
        task = asyncio.create_task(child())
        if first == "child":
            await until(lambda: partition.queued() == 1)
            go()
        await task
    out, err = await asyncio.to_thread(partner.communicate)
    assert partner.returncode == 0, err
    # Whoever got its lock last gives up, and the other one gets what it waited for.
    assert [*refused, *([] if out == "both\n" else [tuple(out.split()[1:])])] in ([("b", "a")], [("a", "b")])
    assert partition.empty()


async def test_places_of_several_locks(locks: DistributedLockManager, partition: Partition) -> None:
    """What is acquired together is acquired where that is written."""
    async with locks.acquire_locks(["a", "b"]):
        acquired_at = line() - 1
        with pytest.raises(DeadlockDetected) as caught:
            async with locks.acquire_locks(["b"]):
                pytest.fail("two holders")
        assert caught.value.edges[0].acquired_at == f"{__file__}:{acquired_at}"
        assert caught.value.edges[0].waiting_at == f"{__file__}:{acquired_at + 3}"
