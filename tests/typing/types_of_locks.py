"""Checked by mypy, never run: what callers see of decorated functions and of locks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING, Any, assert_type

from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.distributed_locks.several import SeveralLocks
from dotmac.platform.errors import DeadlockDetected, DeadlockEdge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

locks = DistributedLockManager("redis://localhost:6379/0")


@locks.with_lock("user:{user_id}", timeout=10.0)
async def update(user_id: str, data: dict[str, int], *, force: bool = False) -> list[int]:
    return list(data.values())


@locks.with_lock("report")
def report(day: int) -> str:
    return str(day)


@locks.with_lock(lambda day: f"rows:{day}")
def rows(day: int) -> Generator[int, str, bytes]:
    yield day
    return b""


@locks.with_lock("changes:{since}")
async def changes(since: int) -> AsyncIterator[str]:
    yield str(since)


@locks.with_lock("answers")
async def answers() -> AsyncGenerator[int, str]:
    yield 1


@locks.with_lock("deep:{depth}", reentrant=True, priority=3, max_hold=60.0, owner="o", release="pipelined")
async def deep(depth: int) -> int:
    return depth


class Service:
    @locks.with_lock("{self}:{item}")
    async def method(self, item: int) -> bytes:
        return b""

    @classmethod
    @locks.with_lock("{cls}")
    def of_class(cls, item: int) -> str:
        return ""

    @staticmethod
    @locks.with_lock("{item}")
    def static(item: int) -> str:
        return ""


async def use() -> None:
    assert_type(await update("7", {"a": 1}, force=True), list[int])
    assert_type(report(3), str)
    assert_type(await Service().method(1), bytes)
    assert_type(rows(3), Generator[int, str, bytes])
    assert_type(changes(3), AsyncIterator[str])
    assert_type([item async for item in changes(since=3)], list[str])
    assert_type(await answers().asend("a"), int)
    assert_type(Service.of_class(1), str)
    assert_type(Service.static(1), str)
    functions: list[Callable[[int], str]] = [report]
    coroutines: list[Callable[[str, dict[str, int]], Coroutine[Any, Any, list[int]]]] = [update]
    assert_type(functions[0](1), str)
    assert_type(await coroutines[0]("7", {}), list[int])
    async with locks.acquire_lock("a", timeout=30.0) as lock:
        assert_type(lock, DistributedLock)
        assert_type(lock.fencing_token, int)
        assert_type(await lock.lost, str | None)
    with locks.acquire_lock("a") as lock:
        assert_type(lock.held, bool)
    assert_type(await DistributedLock(object(), "a", timeout=1).acquire(), bool)


async def use_of_kinds() -> None:
    assert_type(await deep(1), int)
    assert_type(locks.read_lock("a", 5.0, priority=1), DistributedLock)
    assert_type(locks.write_lock("a", reentrant=True), DistributedLock)
    assert_type(locks.semaphore("a", 3, 5.0, max_hold=1.0), DistributedLock)
    assert_type(locks.try_lock("a", on_lost="flag"), DistributedLock)
    several = locks.acquire_locks(["a", "b"], 5.0, blocking_timeout=1)
    assert_type(several, SeveralLocks)
    async with several as held:
        assert_type(held, SeveralLocks)
        assert_type(held.fencing_tokens, dict[str, int])
        assert_type(held.locks["a"], DistributedLock)
    with several as held:
        assert_type(held.names, tuple[str, ...])
    assert_type(await several.acquire(blocking=False), bool)
    assert_type(several.acquire_sync(blocking_timeout=1), bool)
    lock = locks.acquire_lock("a")
    assert_type(await lock.offer(), str)
    assert_type(lock.offer_sync(5.0), str)
    assert_type(await locks.adopt("token", 5.0, max_hold=1.0), DistributedLock)
    assert_type(locks.adopt_sync("token"), DistributedLock)
    assert_type(lock.lost.reason, str | None)
    lock.lost.add_callback(print)
    edge = DeadlockDetected("").edges[0]
    assert_type(edge, DeadlockEdge)
    assert_type(edge.waiting_at, str)
    DistributedLockManager(deadlock_victim="self", wait_replicas=1, max_loop_stall=1.0)


async def misuse() -> None:
    await update(7, {"a": 1})  # type: ignore[arg-type]
    await update("7", {"a": 1}, wrong=1)  # type: ignore[call-arg]
    report("x")  # type: ignore[arg-type]
    rows("x")  # type: ignore[arg-type]
    locks.with_lock(lambda: 7)  # type: ignore[arg-type, return-value]
    locks.acquire_lock("a", on_lost="explode")  # type: ignore[arg-type]
    locks.semaphore("a")  # type: ignore[call-arg]
    locks.try_lock("a", blocking_timeout=1.0)  # type: ignore[call-arg]
    locks.acquire_lock("a", priority="high")  # type: ignore[arg-type]
    locks.read_lock("a", patience=1.0)  # type: ignore[call-arg]
    locks.with_lock("a", on_lost="explode")  # type: ignore[arg-type]
    locks.acquire_locks(7)  # type: ignore[arg-type]
    locks.acquire_lock("a").lost.add_callback(lambda: None)  # type: ignore[misc, arg-type]
    DistributedLockManager(deadlock_victim="oldest")  # type: ignore[arg-type]
