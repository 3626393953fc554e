"""`with_lock` around generators and asynchronous generators.

Promises: the lock is held from the first item until the generator is exhausted, closed, dropped, has raised
or was thrown into, and not before; what is sent, thrown in and returned passes through; the decorated
function is of the same kind; a consumer may change its task or thread between two items; a loss between two
items never cancels the consumer, but raises LockLost in the body and to the consumer; a loss while the body
runs ends it as LockLost, even where it goes on in spite of that; a loop or an interpreter that ends gives the
lock of an unfinished generator back without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.errors import DeadlockDetected, InvalidArgument, LockLost, LockTimeout
from support.locks import manager_at, python, until, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from dotmac.platform.connection.embedded import EmbeddedValkey
    from dotmac.platform.distributed_locks import DistributedLockManager
    from support.locks import Partition

ECHO = ["echo"]


def names(locks: DistributedLockManager) -> list[str]:
    return sorted(info.name for info in locks.list_locks_sync())


async def anames(locks: DistributedLockManager) -> list[str]:
    return sorted(info.name for info in await locks.list_locks())


async def lost_by_now(locks: DistributedLockManager) -> None:
    await until(lambda: all(held.loss() for held in list(locks._link.held)))


def echoes(locks: DistributedLockManager, log: list[Any]) -> Any:
    @locks.with_lock("echo")
    def echo(count: int) -> Iterator[Any]:
        log.append("started")
        got: Any = "first"
        try:
            for _ in range(count):
                try:
                    got = yield got
                except KeyError as error:
                    got = f"caught {error.args[0]}"
        finally:
            log.append(names(locks))
        return "end"

    return echo


def aechoes(locks: DistributedLockManager, log: list[Any]) -> Any:
    @locks.with_lock("echo")
    async def echo(count: int) -> AsyncIterator[Any]:
        log.append("started")
        got: Any = "first"
        try:
            for _ in range(count):
                try:
                    got = yield got
                except KeyError as error:
                    got = f"caught {error.args[0]}"
        finally:
            log.append(await anames(locks))

    return echo


def in_thread(test: Any) -> None:
    """Runs where no event loop runs; failures are the test's."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(test).result()


# ---- generators


async def test_a_generator_holds_from_first_item_to_last(locks: DistributedLockManager) -> None:
    log: list[Any] = []
    echo = echoes(locks, log)
    assert inspect.isgeneratorfunction(echo)
    assert echo.__name__ == "echo"
    assert str(inspect.signature(echo)) == "(count: 'int') -> 'Iterator[Any]'"

    def use() -> None:
        items = echo(4)
        assert (names(locks), log) == ([], [])
        assert next(items) == "first"
        assert (names(locks), log) == (ECHO, ["started"])
        assert items.send("sent") == "sent"
        assert items.throw(KeyError("k")) == "caught k"
        assert next(items) is None
        with pytest.raises(StopIteration) as end:
            next(items)
        assert end.value.value == "end"
        assert log == ["started", ECHO]
        assert names(locks) == []
        with pytest.raises(StopIteration):
            next(items)

        def outer() -> Iterator[Any]:
            returned.append((yield from echo(1)))

        returned: list[Any] = []
        assert list(outer()) == ["first"]
        assert returned == ["end"]

    await asyncio.to_thread(use)


async def test_a_generator_that_ends_early(locks: DistributedLockManager) -> None:
    log: list[Any] = []
    echo = echoes(locks, log)

    def closed() -> None:
        items = echo(2)
        next(items)
        items.close()

    def never_begun() -> None:
        echo(2).close()

    def dropped() -> None:
        for _ in echo(2):
            break
        gc.collect()

    def thrown() -> None:
        items = echo(2)
        next(items)
        with pytest.raises(ZeroDivisionError):
            items.throw(ZeroDivisionError())

    def body_fails() -> None:
        @locks.with_lock("echo")
        def failing() -> Iterator[int]:
            yield 1
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            list(failing())

    def consumer_fails() -> None:
        with pytest.raises(ZeroDivisionError):  # noqa: SIM117 - the frame that holds the generator has to go
            with contextlib.closing(echo(2)) as items:
                for _ in items:
                    1 / 0  # noqa: B018

    for way in (closed, never_begun, dropped, thrown, body_fails, consumer_fails):
        log.clear()
        await asyncio.to_thread(way)
        assert log in ([], ["started", ECHO]), way
        assert await anames(locks) == [], way


async def test_a_generator_that_ignores_its_end(locks: DistributedLockManager) -> None:
    @locks.with_lock("stubborn")
    def stubborn() -> Iterator[int]:
        try:
            yield 1
        finally:
            yield 2

    def use() -> None:
        items = stubborn()
        next(items)
        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            items.close()
        assert names(locks) == []

    await asyncio.to_thread(use)


async def test_a_generator_through_several_threads(locks: DistributedLockManager) -> None:
    echo = echoes(locks, [])
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        items = echo(2)
        assert one.submit(next, items).result() == "first"
        assert await anames(locks) == ECHO
        assert other.submit(items.send, "x").result() == "x"
        assert other.submit(next, items, None).result() is None
        assert await anames(locks) == []


async def test_a_second_consumer_waits(locks: DistributedLockManager) -> None:
    async with locks.acquire_lock("first"):
        pass  # a server that has just started may keep a newcomer waiting

    @locks.with_lock("one:{key}", blocking_timeout=0.05)
    def impatient(key: str) -> Iterator[str]:
        yield key

    def use() -> None:
        first = impatient("a")
        next(first)
        assert list(impatient("b")) == ["b"]
        with pytest.raises(DeadlockDetected):  # this thread would have to go on with the first meanwhile
            next(impatient("a"))
        with pytest.raises(LockTimeout):
            in_thread(lambda: next(impatient("a")))
        first.close()
        assert list(impatient("a")) == ["a"]

    await asyncio.to_thread(use)


async def test_a_generator_in_a_loop_is_refused(locks: DistributedLockManager) -> None:
    with pytest.raises(InvalidArgument, match="async with"):
        next(echoes(locks, [])(1))


async def test_arguments_of_generators(locks: DistributedLockManager) -> None:
    class Service:
        @locks.with_lock(lambda item: f"item:{item}")
        def method(self, item: int) -> Iterator[list[str]]:
            yield names(locks)

        @locks.with_lock("{item}")
        @staticmethod
        async def static(item: int) -> AsyncIterator[list[str]]:
            yield await anames(locks)

    assert await asyncio.to_thread(lambda: list(Service().method(7))) == [["item:7"]]
    assert [found async for found in Service.static(8)] == [["8"]]
    with pytest.raises(TypeError, match="item"):
        next(Service().method())  # type: ignore[call-arg]

    class Callable:
        async def __call__(self, n: int) -> AsyncIterator[list[str]]:
            yield await anames(locks)

    decorated = locks.with_lock("object:{n}")(Callable())
    assert inspect.isasyncgenfunction(decorated)
    assert [found async for found in decorated(2)] == [["object:2"]]


async def test_an_unfinished_generator_at_the_end_of_the_interpreter(
    valkey_url: str, unique: str, partition: Partition
) -> None:
    """Nothing is printed, and the lock is free."""
    script = """
import sys
from support.locks import manager_at
locks = manager_at(sys.argv[1], sys.argv[2])
@locks.with_lock("a")
def numbers():
    yield 1
kept = numbers()
print(next(kept))
"""
    process = python(script, valkey_url, unique)
    out, err = await asyncio.to_thread(process.communicate)
    assert (out, err, process.returncode) == ("1\n", "", 0)
    assert partition.empty()


# ---- asynchronous generators


async def test_an_asynchronous_generator_holds_from_first_item_to_last(locks: DistributedLockManager) -> None:
    log: list[Any] = []
    echo = aechoes(locks, log)
    assert inspect.isasyncgenfunction(echo)
    items = echo(4)
    assert (await anames(locks), log) == ([], [])
    assert await anext(items) == "first"
    assert (await anames(locks), log) == (ECHO, ["started"])
    assert await items.asend("sent") == "sent"
    assert await items.athrow(KeyError("k")) == "caught k"
    assert await anext(items) is None
    with pytest.raises(StopAsyncIteration):
        await anext(items)
    assert log == ["started", ECHO]
    assert await anames(locks) == []
    with pytest.raises(StopAsyncIteration):
        await anext(items)


async def test_an_asynchronous_generator_that_ends_early(locks: DistributedLockManager) -> None:
    log: list[Any] = []
    echo = aechoes(locks, log)

    async def closed() -> None:
        items = echo(2)
        await anext(items)
        await items.aclose()

    async def never_begun() -> None:
        await echo(2).aclose()

    async def dropped() -> None:
        async for _ in echo(2):
            break

    async def thrown() -> None:
        items = echo(2)
        await anext(items)
        with pytest.raises(ZeroDivisionError):
            await items.athrow(ZeroDivisionError())

    async def body_fails() -> None:
        @locks.with_lock("echo")
        async def failing() -> AsyncIterator[int]:
            yield 1
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            [_ async for _ in failing()]

    async def consumer_cancelled() -> None:
        async def consume() -> None:
            async for _ in echo(2):
                entered.set()
                await asyncio.sleep(30)

        entered = asyncio.Event()
        task = asyncio.create_task(consume())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def body_cancelled() -> None:
        @locks.with_lock("echo")
        async def waiting() -> AsyncIterator[int]:
            entered.set()
            await asyncio.sleep(30)
            yield 1

        entered = asyncio.Event()
        task = asyncio.create_task(anext(waiting()))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for way in (closed, never_begun, dropped, thrown, body_fails, consumer_cancelled, body_cancelled):
        log.clear()
        await way()
        # The loop closes what was dropped in a task of its own.
        for _ in range(1000):
            gc.collect()
            if not await anames(locks):
                break
        assert await anames(locks) == [], way
        assert log in ([], ["started", ECHO]), way


async def test_an_asynchronous_generator_through_several_tasks(locks: DistributedLockManager) -> None:
    items = aechoes(locks, [])(2)
    assert await asyncio.create_task(anext(items)) == "first"
    assert await asyncio.create_task(items.asend("x")) == "x"
    assert await anames(locks) == ECHO
    assert await asyncio.create_task(anext(items, None)) is None
    assert await anames(locks) == []


@pytest.mark.parametrize("kept", [True, False])
def test_a_loop_that_ends_closes_unfinished_ones(
    valkey_url: str, unique: str, partition: Partition, caplog: pytest.LogCaptureFixture, kept: bool
) -> None:
    """The body's own clean-up awaits; the loop must not begin it twice."""
    locks = manager_at(valkey_url, unique)
    log: list[Any] = []
    items: list[Any] = []

    async def main() -> None:
        iterator = aechoes(locks, log)(2)
        assert await anext(iterator) == "first"
        if kept:
            items.append(iterator)

    asyncio.run(main())
    # What was dropped in its last moments a loop begins to close and does not wait for.
    assert log == ["started", ECHO][: 1 + kept]
    assert [record for record in caplog.records if record.name == "asyncio"] == []
    wait_until(partition.empty)
    locks.close()


# ---- losses


async def test_lost_between_two_items(own_valkey: EmbeddedValkey, unique: str) -> None:
    locks = manager_at(own_valkey.url, unique, default_timeout=0.5)
    seen: list[str] = []

    @locks.with_lock("a")
    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        except LockLost:
            seen.append("body")
            raise
        pytest.fail("it went on")

    @locks.with_lock("b")
    def blocking() -> Iterator[int]:
        try:
            yield 1
        except LockLost:
            seen.append("blocking body")
            raise
        pytest.fail("it went on")

    @locks.with_lock("c", on_lost="flag")
    async def told() -> AsyncIterator[int]:
        yield 1
        yield 2

    items, flagged, iterator = numbers(), told(), blocking()
    assert await anext(items) == await anext(flagged) == await asyncio.to_thread(next, iterator) == 1
    own_valkey.kill()
    await lost_by_now(locks)
    await asyncio.sleep(0)  # the consumer is not cancelled here, nor while it waited
    with pytest.raises(LockLost, match="'a' .* was lost: its lease ran out"):
        await anext(items)
    with pytest.raises(LockLost, match="'b' .* was lost: its lease ran out"):
        await asyncio.to_thread(next, iterator)
    assert seen == ["body", "blocking body"]
    assert await anext(flagged) == 2
    assert await anext(flagged, None) is None
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await locks.aclose()


@pytest.mark.parametrize("swallows", [True, False])
async def test_lost_while_the_body_runs(own_valkey: EmbeddedValkey, unique: str, swallows: bool) -> None:
    locks = manager_at(own_valkey.url, unique, default_timeout=0.5)
    cleaned = []

    @locks.with_lock("a")
    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                if not swallows:
                    raise
            yield 2
        finally:
            cleaned.append(True)

    items = numbers()
    assert await anext(items) == 1
    own_valkey.kill()
    with pytest.raises(LockLost, match="its lease ran out"):
        await anext(items)
    assert cleaned == [True]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await locks.aclose()


async def test_lost_and_closed(own_valkey: EmbeddedValkey, unique: str) -> None:
    """Nothing is left to raise it into."""
    locks = manager_at(own_valkey.url, unique, default_timeout=0.5)
    items, iterator = aechoes(locks, [])(2), locks.with_lock("b")(lambda: (yield 1))()
    await anext(items)
    await asyncio.to_thread(next, iterator)
    own_valkey.kill()
    await lost_by_now(locks)
    await asyncio.to_thread(iterator.close)
    with contextlib.suppress(Exception):  # the body asks the dead server
        await items.aclose()
    await locks.aclose()


# ---- as context managers


async def test_context_managers(locks: DistributedLockManager) -> None:
    @contextlib.asynccontextmanager
    @locks.with_lock("held:{n}")
    async def held(n: int) -> AsyncIterator[int]:
        with contextlib.suppress(KeyError):
            yield n

    async with held(3) as n:
        assert (n, await anames(locks)) == (3, ["held:3"])
    async with held(3):
        raise KeyError
    with pytest.raises(ZeroDivisionError):
        async with held(3):
            1 / 0  # noqa: B018
    assert await anames(locks) == []

    @contextlib.contextmanager
    @locks.with_lock("held")
    def blocking() -> Iterator[list[str]]:
        yield names(locks)

    def use() -> None:
        with blocking() as found:
            assert found == ["held"]
        assert names(locks) == []

    await asyncio.to_thread(use)
