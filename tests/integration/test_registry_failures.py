"""Promises of the registry where something fails half-way, on a real server:

- a change of a registration that fails or is cancelled leaves the earlier one registered; a first one
  that fails is not made later;
- a lookup that fails after a change does not make the change fail;
- closing takes no longer for many instances than for one, and ends the engine even when it is cancelled.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
import redis

from dotmac.platform.errors import InstanceConflict, InstanceNotFound, ServerUnavailable
from support.registry import make, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.connection.embedded import EmbeddedValkey
    from dotmac.platform.service_registry import ServiceRegistry


async def versions(registry: ServiceRegistry) -> list[str] | None:
    """What the server says; None while it doesn't."""
    try:
        return [one.version for one in (await registry.list_services()).get("api", [])]
    except ServerUnavailable:
        return None


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_change_that_fails_leaves_the_earlier_registration(
    own_valkey: EmbeddedValkey, unique: str, cancelled: bool
) -> None:
    async with make(own_valkey.url, unique, request_timeout=0.5) as registry:
        first = await registry.register_service("api", "1", "h", 1)
        assert await registry.discover_services("api") == [first]
        own_valkey.pause()
        change = asyncio.create_task(registry.register_service("api", "2", "h", 1))
        if cancelled:
            await asyncio.sleep(0.05)  # it is on its way
            change.cancel()
            with pytest.raises(asyncio.CancelledError):
                await change
        else:
            with pytest.raises(ServerUnavailable):
                await change
        own_valkey.resume()

        async def settled() -> bool:
            return await versions(registry) == ["1"] and not registry.is_stale("api")

        await until(settled)
        assert [one.version for one in await registry.discover_services("api")] == ["1"]
        changed = await registry.register_service("api", "3", "h", 1)
        assert changed.id == first.id
        assert await registry.deregister_service(first), "by whichever object of the instance"
        assert await versions(registry) == []


async def test_a_first_registration_that_is_cancelled_is_not_made(
    own_valkey: EmbeddedValkey, unique: str
) -> None:
    async with make(own_valkey.url, unique) as registry:
        assert await versions(registry) == []
        own_valkey.pause()
        first = asyncio.create_task(registry.register_service("api", "1", "h", 1, instance_id="i"))
        await asyncio.sleep(0.05)  # it is on its way
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        own_valkey.resume()

        async def answered() -> bool:
            return await versions(registry) == [] and registry.stats()["registered"] == 0

        await until(answered)
        with pytest.raises(InstanceNotFound):
            await registry.deregister_service("i")


async def test_what_was_taken_over_is_not_changed_any_more(valkey_url: str, unique: str) -> None:
    async with (
        make(valkey_url, unique) as one,
        make(valkey_url, unique, request_timeout=9.0) as two,
    ):
        await one.register_service("api", "1", "h", 1, instance_id="i")
        await two.register_service("api", "2", "h", 2, instance_id="i", replace=True)
        with pytest.raises(InstanceConflict):
            await one.register_service("api", "3", "h", 1)
        with pytest.raises(InstanceNotFound):
            await one.deregister_service("i")
        again = await one.register_service("api", "3", "h", 1)
        assert again.id != "i"


async def test_a_reading_that_fails_does_not_make_the_change_fail(
    valkey_url: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with make(valkey_url, unique) as registry:
        assert await registry.discover_services("api") == []
        with redis.Redis.from_url(valkey_url) as client:
            # Registering does not look at the other instances; reading them fails here.
            client.hset(f"{{{unique}:0}}:ri", "api\0z", "nothing of ours")
            client.zadd(f"{{{unique}:0}}:rn", {"api\0z": 0})
            instance = await registry.register_service("api", "1", "h", 1)
            assert "can't be read after a change" in caplog.text
            assert await registry.deregister_service(instance)
            client.delete(f"{{{unique}:0}}:ri", f"{{{unique}:0}}:rn")


async def _close(registry: ServiceRegistry) -> None:
    await registry.aclose()


async def _close_blocking(registry: ServiceRegistry) -> None:
    await asyncio.to_thread(registry.close)


@pytest.mark.parametrize("close", [_close, _close_blocking])
async def test_closing_is_bounded_however_much_is_registered(
    own_valkey: EmbeddedValkey, unique: str, close: Callable[[ServiceRegistry], Any]
) -> None:
    registry = make(own_valkey.url, unique, request_timeout=0.5)
    async with make(own_valkey.url, unique, request_timeout=0.5) as other:  # the engine goes on
        for port in range(1, 9):
            await registry.register_service("api", "1", "h", port)
        own_valkey.pause()
        began = time.monotonic()
        await close(registry)
        assert time.monotonic() - began < 1.5
        own_valkey.resume()

        async def gone() -> bool:
            return await versions(other) == []

        await until(gone)


async def test_closing_that_is_cancelled_ends_the_engine_all_the_same(
    own_valkey: EmbeddedValkey, unique: str
) -> None:
    registry = make(own_valkey.url, unique, request_timeout=0.5)
    await registry.register_service("api", "1", "h", 1)
    await registry.start_health_monitoring()
    own_valkey.pause()
    closing = asyncio.create_task(registry.aclose())
    await asyncio.sleep(0.05)  # it is under way
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    own_valkey.resume()
    assert registry._link.closed
    async with make(own_valkey.url, unique, request_timeout=0.5) as other:

        async def gone() -> bool:
            return await versions(other) == []

        await until(gone)
