"""What has come for a loop's tasks reaches them in one go.

Promises: each task goes on in its own context, as the current task; one that ends the loop keeps nothing from
the others, should the loop go on; a callback that fails neither; what comes for a cancelled task is given
back; futures that several tasks, or none, wait for are completed like any other.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from typing import TYPE_CHECKING

import pytest
import uvloop

from support.locks import manager_at, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.distributed_locks import DistributedLockManager
    from support.locks import Partition

LOOPS = pytest.mark.parametrize(
    "make", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
TASKS = 5
mine: contextvars.ContextVar[int] = contextvars.ContextVar("mine")


async def in_one_batch() -> None:
    """Lets everybody ask, then stands still until all answers have come."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(0.3)


@LOOPS
def test_each_task_goes_on_in_its_own_context(
    valkey_url: str, unique: str, make: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def one(number: int) -> asyncio.Task[None] | None:
        mine.set(number)
        for _ in range(3):
            async with manager.acquire_lock(f"a{number}"):
                assert mine.get() == number
        return asyncio.current_task()

    async def main() -> None:
        tasks = [asyncio.create_task(one(number)) for number in range(TASKS)]
        await in_one_batch()
        assert await asyncio.gather(*tasks) == tasks

    with manager_at(valkey_url, unique) as manager, asyncio.Runner(loop_factory=make) as runner:
        runner.run(main())


@LOOPS
@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
def test_who_ends_the_loop_keeps_nothing_from_the_others(
    valkey_url: str, unique: str, make: Callable[[], asyncio.AbstractEventLoop], ending: type[BaseException]
) -> None:
    async def one(number: int) -> int:
        async with manager.acquire_lock(f"a{number}", 5.0):
            if number == 0:
                raise ending
            return number

    async def opened() -> None:
        async with manager.acquire_lock("a"):
            pass

    loop = make()
    with manager_at(valkey_url, unique) as manager:
        loop.run_until_complete(opened())
        tasks = [loop.create_task(one(number)) for number in range(TASKS)]
        blocked = loop.create_task(in_one_batch())
        with pytest.raises(ending):
            loop.run_until_complete(asyncio.wait([*tasks, blocked]))
        assert loop.run_until_complete(asyncio.wait_for(asyncio.gather(*tasks[1:]), 5.0)) == [1, 2, 3, 4]
        assert isinstance(tasks[0].exception(), ending)
        loop.run_until_complete(blocked)
    loop.close()


async def test_a_callback_that_fails_keeps_nothing_from_the_others(
    locks: DistributedLockManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with locks.acquire_lock("a"):
        pass
    bridge = (await locks._link.side()).bridge
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", told.append)
    futures = [bridge.echo() for _ in range(3)]

    class Odd:
        """Looks like a context, and fails."""

        def run(self, *_: object) -> None:
            raise ValueError("odd")

    done = asyncio.get_running_loop().create_future()
    futures[0].add_done_callback(done.set_result, context=Odd())  # type: ignore[arg-type]
    assert await asyncio.wait_for(asyncio.gather(*futures[1:]), 5.0) == [None, None]
    assert futures[0].done()
    assert len(told) == 1


async def test_what_comes_for_a_cancelled_task_is_given_back(
    locks: DistributedLockManager, partition: Partition
) -> None:
    async with locks.acquire_lock("a"):
        pass
    tasks = [asyncio.create_task(locks.acquire_lock(f"a{number}").acquire()) for number in range(TASKS)]
    await in_one_batch()
    # The answers are here, and nobody has been told.
    for task in tasks:
        task.cancel()
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(partition.empty)


async def test_several_and_nobody_may_wait_for_one_answer(locks: DistributedLockManager) -> None:
    bridge = (await locks._link.side()).bridge
    shared = bridge.echo()

    async def wait() -> None:
        await shared

    waiting = [asyncio.create_task(wait()) for _ in range(3)]
    alone = bridge.echo()
    await asyncio.wait_for(asyncio.gather(*waiting), 5.0)
    await until(alone.done)
