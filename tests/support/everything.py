"""Locks and registry, used in every way that leads to a call of its own."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from dotmac.platform._native import RegistryRequest
from dotmac.platform.errors import DotmacError
from support.locks import manager_at, works
from support.registry import make

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def use_everything(
    url: str, namespace: str, meanwhile: Callable[[], object] = lambda: None
) -> list[DotmacError]:
    """What is refused where locks and registry are used in every way; nothing else may go wrong."""
    wrong: list[DotmacError] = []

    async def attempt(step: Callable[[], Awaitable[object]]) -> None:
        try:
            async with asyncio.timeout(30):
                await step()
        except DotmacError as error:
            wrong.append(error)
        except ExceptionGroup as errors:
            assert errors.subgroup(lambda error: not isinstance(error, DotmacError | ExceptionGroup)) is None
            wrong.extend(error for error in errors.exceptions if isinstance(error, DotmacError))

    async def wait_and_withdraw() -> None:
        async with locks.acquire_lock("held", timeout=5.0) as lock:
            assert not await asyncio.create_task(locks.acquire_lock("held").acquire(blocking=False))
            await lock.extend(6.0)
            waiting = asyncio.create_task(locks.acquire_lock("held").acquire())
            await asyncio.wait({waiting}, timeout=0.3)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting

    async def hand_over() -> None:
        async with asyncio.TaskGroup() as waiting, locks.acquire_lock("held", timeout=5.0):
            waiting.create_task(works(locks, "held"))
            await asyncio.sleep(0.1)

    async def register() -> None:
        instance = await registry.register_service("api", "1.0", host="127.0.0.1", port=1, ttl=5.0)
        assert [i.id for i in await registry.discover_services("api")] == [instance.id]
        assert [i.id for i in (await registry.list_services())["api"]] == [instance.id]
        await ask(RegistryRequest.status("api", instance.id, instance.epoch, False), "status")
        await registry.deregister_service(instance)

    async with (
        manager_at(url, namespace, blocking_timeout=2.0) as locks,
        make(url, namespace) as registry,
    ):
        ask = registry._directory.ask
        for step in (
            lambda: works(locks),
            wait_and_withdraw,
            hand_over,
            register,
            lambda: ask(RegistryRequest.monitors("m", 1000), "monitors"),
            lambda: ask(RegistryRequest.monitors("m", 0), "monitors"),
        ):
            meanwhile()
            await attempt(step)
    return wrong
