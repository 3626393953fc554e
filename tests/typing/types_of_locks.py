"""Checked by mypy, never run: what callers see of decorated functions and of locks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

locks = DistributedLockManager("redis://localhost:6379/0")


@locks.with_lock("user:{user_id}", timeout=10.0)
async def update(user_id: str, data: dict[str, int], *, force: bool = False) -> list[int]:
    return list(data.values())


@locks.with_lock("report")
def report(day: int) -> str:
    return str(day)


class Service:
    @locks.with_lock("{self}:{item}")
    async def method(self, item: int) -> bytes:
        return b""


async def use() -> None:
    assert_type(await update("7", {"a": 1}, force=True), list[int])
    assert_type(report(3), str)
    assert_type(await Service().method(1), bytes)
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


async def misuse() -> None:
    await update(7, {"a": 1})  # type: ignore[arg-type]
    await update("7", {"a": 1}, wrong=1)  # type: ignore[call-arg]
    report("x")  # type: ignore[arg-type]
    locks.acquire_lock("a", on_lost="explode")  # type: ignore[arg-type]
