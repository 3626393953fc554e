"""Promises of the registry on a real server, within one process:

- register, discover, choose, use, deregister work as the guide shows; a lookup sees one's own change at once;
- from the second time on a choice sends nothing to the server and is the same object;
- filters mean what they say; least connections follows what is in flight; None and NoInstanceAvailable where
  there is nothing;
- a server that lost its data, or was restarted, is told again at once, and lookups serve all the while;
- while the server is away the snapshot serves, marked stale; what was never read is a typed error, within its
  time;
- what is closed, replaced or taken over is known as such.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import redis

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.errors import (
    EngineClosed,
    InstanceConflict,
    InstanceNotFound,
    NoInstanceAvailable,
    ServerUnavailable,
)
from dotmac.platform.service_registry import ServiceInstance, ServiceRegistry, ServiceRegistryConfig
from support.registry import register_by_hand

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator


def make(url: str, **arguments: Any) -> ServiceRegistry:
    return ServiceRegistry(url, config=ServiceRegistryConfig(), **arguments)


async def until(condition: Callable[[], Awaitable[bool]], within: float = 15.0) -> float:
    """Seconds until the condition held; fails after `within`."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within, "the condition did not come true in time"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture
async def registry(valkey_url: str, unique: str) -> AsyncIterator[ServiceRegistry]:
    async with make(valkey_url, namespace=unique) as registry:
        yield registry


async def test_the_way_of_the_guide(registry: ServiceRegistry) -> None:
    registered = await registry.register_service(
        name="user-service",
        version="1.0.0",
        host="localhost",
        port=8001,
        tags=["user", "auth"],
        health_check_url="http://localhost:8001/health",
    )
    assert await registry.discover_services("user-service") == [registered]
    service = await registry.get_service("user-service")
    assert service == registered
    assert (service.host, service.port, service.tags) == ("localhost", 8001, ("user", "auth"))
    assert registry.pick("user-service") is service
    assert await registry.deregister_service(registered)
    assert await registry.get_service("user-service") is None
    assert await registry.discover_services("user-service") == []
    assert registry.pick("user-service") is None
    with pytest.raises(NoInstanceAvailable, match="user-service"):
        async with registry.use_service("user-service"):
            pass
    with pytest.raises(NoInstanceAvailable), registry.use_service("user-service"):
        pass


async def test_filters(registry: ServiceRegistry) -> None:
    for port, tags, metadata, zone in (
        (1, ["a", "b"], {"gpu": True, "n": 1}, "eu"),
        (2, ["b"], {"gpu": False}, "us"),
        (3, [], None, None),
    ):
        await registry.register_service("api", "1", "h", port, tags, metadata, zone=zone)

    async def ports(**conditions: Any) -> set[int]:
        return {instance.port for instance in await registry.discover_services("api", **conditions)}

    assert await ports() == {1, 2, 3}
    assert await ports(tags=["b"]) == {1, 2}
    assert await ports(tags=("a", "b")) == {1}
    assert await ports(any_tags=["a", "c"]) == {1}
    assert await ports(no_tags=["a"]) == {2, 3}
    assert await ports(metadata={"gpu": True}) == {1}
    assert await ports(metadata={"gpu": True, "n": 2}) == set()
    assert await ports(zone="us") == {2}
    for _ in range(5):
        chosen = await registry.get_service("api", tags=["a"])
        assert chosen is not None
        assert chosen.port == 1
    assert await registry.get_service("api", tags=["zzz"]) is None


async def test_strategies(registry: ServiceRegistry) -> None:
    for port in range(1, 5):
        await registry.register_service("api", "1", "h", port, weight=3 if port == 1 else 1)
    turns = Counter((registry.pick("api") or pytest.fail("none")).port for _ in range(60))
    assert turns == {1: 30, 2: 10, 3: 10, 4: 10}
    for strategy in ("random", "least_connections", "power_of_two", "peak_ewma"):
        seen = {(registry.pick("api", strategy=strategy) or pytest.fail("none")).port for _ in range(300)}
        assert seen == {1, 2, 3, 4}, strategy


async def test_least_connections_follows_what_is_in_flight(registry: ServiceRegistry) -> None:
    for port in range(1, 4):
        await registry.register_service("api", "1", "h", port)
    usages = [registry.use_service("api", strategy="least_connections") for _ in range(30)]
    used = Counter([(await usage.__aenter__()).port for usage in usages])
    assert used == {1: 10, 2: 10, 3: 10}


async def test_outcomes_are_counted_and_cancellation_is_none(registry: ServiceRegistry) -> None:
    instance = await registry.register_service("api", "1", "h", 1)

    def load() -> tuple[int, int, int]:
        counted = registry._directory._services["api"].load(instance.id)
        assert counted is not None
        return counted[:3]

    async with registry.use_service("api") as used:
        assert used == instance
        assert load() == (1, 0, 0)
    with pytest.raises(ValueError, match="own"), registry.use_service("api"):
        raise ValueError("own")
    assert load() == (0, 2, 1)

    async def forever() -> None:
        async with registry.use_service("api"):
            await asyncio.Event().wait()

    task = asyncio.create_task(forever())
    await until(lambda: _now(load()[0] == 1))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert load() == (0, 2, 1)


async def _now(value: bool) -> bool:
    return value


async def test_the_same_address_again_changes_the_registration(registry: ServiceRegistry) -> None:
    first = await registry.register_service("api", "1", "h", 1)
    second = await registry.register_service("api", "2", "h", 1)
    assert second.id == first.id
    assert [i.version for i in await registry.discover_services("api")] == ["2"]


async def test_own_registrations_alone_can_be_taken_out(
    registry: ServiceRegistry, valkey_url: str, unique: str
) -> None:
    instance = await registry.register_service("api", "1", "h", 1)
    async with make(valkey_url, namespace=unique) as other:
        with pytest.raises(InstanceNotFound):
            await other.deregister_service(instance)
    with pytest.raises(InstanceNotFound):
        await registry.deregister_service("nobody")
    assert await registry.deregister_service(instance.id)
    with pytest.raises(InstanceNotFound):
        await registry.deregister_service(instance)


async def test_an_id_of_another_live_process_is_refused_unless_taken_over(
    valkey_url: str, unique: str
) -> None:
    # Different timeouts are different engines, so different sessions, as in two processes.
    async with (
        make(valkey_url, namespace=unique) as one,
        make(valkey_url, namespace=unique, request_timeout=9.0) as two,
    ):
        assert one.stats() is not None
        await one.register_service("api", "1", "h", 1, instance_id="i")
        assert one.stats()["session"] != two.stats()["session"]
        with pytest.raises(InstanceConflict, match="replace=True"):
            await two.register_service("api", "2", "h", 2, instance_id="i")
        assert two.stats()["registered"] == 0
        await two.register_service("api", "2", "h", 2, instance_id="i", replace=True)
        assert [i.version for i in await two.discover_services("api")] == ["2"]


async def test_closing_takes_out_what_was_registered(valkey_url: str, unique: str) -> None:
    async with make(valkey_url, namespace=unique) as watcher:
        registry = make(valkey_url, namespace=unique)
        await registry.register_service("api", "1", "h", 1)
        assert len(await watcher.discover_services("api")) == 1
        await registry.aclose()
        await registry.aclose()
        assert await watcher.list_services() == {}
        for call in (
            registry.get_service("api"),
            registry.discover_services("api"),
            registry.register_service("a", "1", "h", 1),
        ):
            with pytest.raises(EngineClosed):
                await call
        with pytest.raises(EngineClosed):
            registry.pick("api")


async def test_a_choice_sends_nothing_to_the_server(registry: ServiceRegistry, valkey_url: str) -> None:
    await registry.register_service("api", "1", "h", 1)
    await registry.get_service("api")
    with redis.Redis.from_url(valkey_url) as client:

        def calls() -> int:
            stats = client.info("commandstats")
            return sum(value["calls"] for name, value in stats.items() if name != "cmdstat_info")

        before, beats = calls(), registry.stats()["heartbeats"]
        first = await registry.get_service("api")
        picks = registry.stats()["picks"]
        for _ in range(2_000):
            assert await registry.get_service("api") is first
        assert registry.stats()["picks"] == picks + 2_000, "each is counted, where it costs nothing"
        used = calls() - before
        # What the process sends anyway: a heartbeat and a sweep per second, each a dozen commands at most.
        assert used <= 60 * (registry.stats()["heartbeats"] - beats + 1), used


async def test_two_registries_see_each_other(valkey_url: str, unique: str) -> None:
    async with (
        make(valkey_url, namespace=unique) as one,
        make(valkey_url, namespace=unique, request_timeout=9.0) as two,
    ):
        assert await two.get_service("api") is None
        instance = await one.register_service("api", "1", "h", 1)

        async def seen() -> bool:
            return await two.get_service("api") == instance

        took = await until(seen)
        assert took < 2, "by a push, not by polling"
        assert await two.list_services() == {"api": [instance]}


def test_a_dead_session_leaves_the_rotation_after_its_ttl(valkey_url: str, unique: str) -> None:
    """A session that never beats, written by hand."""

    async def body() -> float:
        async with make(valkey_url, namespace=unique) as watcher:
            with redis.Redis.from_url(valkey_url) as client:
                key = f"{{{unique}:0}}:s"
                await watcher.discover_services("api")
                seen = client.hget(key, watcher.stats()["session"])
                assert isinstance(seen, bytes)
                client.hset(key, "dead", seen.rsplit(b" ", 1)[0] + b" 60000")
                record = ServiceInstance("i", "api", "1", "h", 1).to_record()
                register_by_hand(client, unique, "dead", record, ttl=1500)

                async def there() -> bool:
                    return len(await watcher.discover_services("api")) == 1

                await until(there)

                async def gone() -> bool:
                    return await watcher.get_service("api") is None

                return await until(gone)

    assert asyncio.run(body()) < 1.5 + 2.5


async def test_a_flushed_server_is_told_again_at_once(registry: ServiceRegistry, valkey_url: str) -> None:
    instance = await registry.register_service("api", "1", "h", 1)
    assert await registry.get_service("api") == instance
    with redis.Redis.from_url(valkey_url) as client:
        client.flushdb()
    served: list[bool] = []

    async def told_again() -> bool:
        served.append(await registry.get_service("api") == instance)
        return (await registry.list_services()).get("api") == [instance]

    took = await until(told_again)
    assert took < 3
    assert all(served), "the lookup never came up empty"

    async def counted() -> bool:
        return registry.stats()["reregistered"] == 1 and not registry.is_stale("api")

    await until(counted)
    assert await registry.get_service("api") == instance


@pytest.fixture
def own_server() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as server:
        yield server


async def test_a_server_that_is_away_and_comes_back_empty(own_server: EmbeddedValkey) -> None:
    async with make(own_server.url, request_timeout=1.0) as registry:
        instance = await registry.register_service("api", "1", "h", 1)
        assert await registry.get_service("api") == instance
        assert not registry.is_stale("api")
        own_server.kill()

        async def stale() -> bool:
            assert await registry.get_service("api") == instance
            return registry.is_stale("api")

        await until(stale)
        began = time.monotonic()
        with pytest.raises(ServerUnavailable):
            await registry.get_service("never-read")
        with pytest.raises(ServerUnavailable):
            await registry.register_service("other", "1", "h", 2)
        assert time.monotonic() - began < 4
        own_server.restart()

        async def back() -> bool:
            assert await registry.get_service("api") == instance
            return not registry.is_stale("api")

        await until(back, within=30)
        assert await registry.list_services() == {"api": [instance]}, (
            "and what had failed was not registered later"
        )


async def test_a_deregistration_that_the_server_missed_is_told_later(own_server: EmbeddedValkey) -> None:
    async with make(own_server.url, request_timeout=0.5) as registry:
        instance = await registry.register_service("api", "1", "h", 1, ttl=600)
        own_server.pause()
        with pytest.raises(ServerUnavailable):
            await registry.deregister_service(instance)
        own_server.resume()

        async def gone() -> bool:
            try:
                return await registry.list_services() == {}
            except ServerUnavailable:
                return False

        await until(gone, within=30)


def test_several_loops_in_turn_and_two_at_once(valkey_url: str, unique: str) -> None:
    registry = make(valkey_url, namespace=unique)

    async def one(port: int) -> int:
        await registry.register_service("api", "1", "h", port)
        assert await registry.get_service("api")
        return len(await registry.discover_services("api"))

    assert [asyncio.run(one(port)) for port in (1, 2, 3)] == [1, 2, 3]
    failures: list[BaseException] = []

    def body(port: int) -> None:
        try:
            asyncio.run(one(port))
            for _ in range(1000):
                assert registry.pick("api")
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=body, args=(port,)) for port in (4, 5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(asyncio.run(registry.discover_services("api"))) == 6
    registry.close()


def test_without_any_loop(valkey_url: str, unique: str) -> None:
    registry = make(valkey_url, namespace=unique)
    asyncio.run(registry.register_service("api", "1", "h", 1))
    fresh = make(valkey_url, namespace=unique)
    chosen = fresh.pick("api")
    assert chosen is not None
    with fresh.use_service("api") as used:
        assert used is chosen
    assert fresh.explain_pick("api") == {
        "service": "api",
        "strategy": "round_robin",
        "matching": 1,
        "chosen_from": 1,
        "panicking": False,
        "stale": False,
    }
    fresh.close()
    registry.close()
