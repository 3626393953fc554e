"""Promises of health monitoring, on real HTTP servers:

- an instance is unhealthy after `fall` failures in a row and healthy again after `rise` successes, which all
  processes learn; a server that flaps faster than that changes nothing;
- what counts as a failure: no connection, a bad status, a redirect, silence, an endless answer;
- only the registered host is asked, unless another is allowed;
- every instance is checked by one of several monitors, and the others take over when one leaves;
- a registration that the server lost and was told again is judged anew;
- a record that can't be read or checked concerns that instance alone;
- monitoring survives a server that is away, ends when it is told to, and may start again in a new loop.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
import redis

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.service_registry import ServiceInstance, ServiceRegistry, ServiceRegistryConfig
from dotmac.platform.service_registry.probe import Prober
from support import registry as support

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class Web:
    """A server that answers as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[], bytes | None] = lambda: response(200)
        self.requests: list[bytes] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            answer = self.answer()
            if answer is None:
                await reader.read()  # until the other side gives up
            else:
                writer.write(answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side went away, as some tests want
        finally:
            writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/health?deep=1"

    def instance(self, **changes: Any) -> ServiceInstance:
        values = {"health_check_url": self.url, **changes}
        return ServiceInstance("i", "api", "1", "127.0.0.1", self.port, **values)


def response(status: int, body: bytes = b"ok", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with Web() as web:
        yield web


def make(url: str, namespace: str, **arguments: Any) -> ServiceRegistry:
    settings: dict[str, Any] = {
        "health_check_interval": 0.1,
        "health_check_timeout": 1.0,
        "health_check_rise": 2,
        "health_check_fall": 3,
        **arguments,
    }
    return ServiceRegistry(url, config=ServiceRegistryConfig(), namespace=namespace, **settings)


async def until(condition: Callable[[], bool], within: float = 20.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within, "the condition did not come true in time"
        await asyncio.sleep(0.02)


async def test_rise_and_fall_are_told_to_everybody(web: Web, valkey_url: str, unique: str) -> None:
    # Another timeout is another engine: its own connection and session, as in another process.
    other = make(valkey_url, unique, request_timeout=9.0, panic_threshold=0.0)
    async with other, make(valkey_url, unique) as registry:
        await registry.register_service("api", "1", "127.0.0.1", web.port, health_check_url=web.url)
        assert await other.get_service("api")
        await registry.start_health_monitoring()
        await registry.start_health_monitoring()
        await until(lambda: len(web.requests) >= 3)
        assert web.requests[0].startswith(b"GET /health?deep=1 HTTP/1.1\r\n")
        assert f"host: 127.0.0.1:{web.port}".encode() in web.requests[0].lower()
        assert other.pick("api")

        web.answer = lambda: response(503)
        await until(lambda: other.pick("api") is None)
        assert registry.pick("api") is not None, "below the panic threshold all are chosen from"
        [down] = await other.discover_services("api", healthy_only=False)
        assert (down.healthy, down.status) == (False, "unhealthy")

        web.answer = lambda: response(204, b"")
        await until(lambda: other.pick("api") is not None)


async def test_flapping_faster_than_the_thresholds_changes_nothing(
    web: Web, valkey_url: str, unique: str
) -> None:
    async with make(valkey_url, unique, panic_threshold=0.0) as registry:
        await registry.register_service("api", "1", "127.0.0.1", web.port, health_check_url=web.url)
        first = await registry.get_service("api")
        # Two failures, one success, and so on: never three failures in a row.
        web.answer = lambda: response(200 if len(web.requests) % 3 == 0 else 500)
        await registry.start_health_monitoring()
        seen: set[ServiceInstance | None] = set()

        def looked() -> bool:
            seen.add(registry.pick("api"))
            return len(web.requests) >= 15

        await until(looked)
        assert seen == {first}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (response(200), None),
        (response(204, b""), None),
        (response(500), "HTTP status 500"),
        (response(404), "HTTP status 404"),
        (response(302, more="Location: http://127.0.0.1:1/\r\n"), "HTTP status 302"),
        (response(200, b"x" * 100_000), "longer than 65536 bytes"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "RemoteProtocolError"),
        (b"", "RemoteProtocolError"),
        (None, "no answer within 0.3 s"),
    ],
)
async def test_what_counts_as_a_failure(web: Web, answer: bytes | None, problem: str | None) -> None:
    web.answer = lambda: answer
    prober = Prober(timeout=0.3 if answer is None else 5.0)
    found = await prober.probe(web.instance())
    await prober.aclose()
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert problem in found


async def test_only_the_registered_host_is_asked_unless_another_is_allowed(web: Web) -> None:
    elsewhere = ServiceInstance("i", "api", "1", "api.internal", 80, health_check_url=web.url)
    strict, open_ = Prober(5.0), Prober(5.0, frozenset({"127.0.0.1"}))
    refused = await strict.probe(elsewhere)
    assert refused is not None
    assert "may not be asked" in refused
    assert not web.requests
    assert await open_.probe(elsewhere) is None
    named = web.instance(health_check_url="http://no-such-host.invalid/")
    assert "may not be asked" in (await strict.probe(named) or "")
    await strict.aclose()
    await open_.aclose()


async def test_nobody_listening_is_a_failure(web: Web) -> None:
    instance = web.instance()
    await web.__aexit__()
    prober = Prober(5.0)
    assert "no connection" in (await prober.probe(instance) or "")
    await prober.aclose()


async def test_a_name_with_several_addresses_is_asked_at_each(web: Web) -> None:
    """`localhost` may mean ::1 first, where nobody listens."""
    prober = Prober(5.0)
    url = f"http://localhost:{web.port}/"
    assert await prober.probe(ServiceInstance("i", "api", "1", "localhost", 1, health_check_url=url)) is None
    assert f"host: localhost:{web.port}".encode() in web.requests[0].lower()
    await prober.aclose()


async def test_monitors_share_the_work_and_take_over(web: Web, valkey_url: str, unique: str) -> None:
    registries = [make(valkey_url, unique, health_check_interval=0.3) for _ in range(3)]
    first = registries[0]
    # So many that each monitor gets some: with 9, chance leaves one of three without any in one run of 13.
    for port in range(1, 41):
        await first.register_service("api", "1", "127.0.0.1", port, health_check_url=web.url)
    for registry in registries:
        await registry.start_health_monitoring()

    def checked() -> list[set[Any]]:
        return [set(r._monitor._checks) if r._monitor else set() for r in registries]

    await until(lambda: sum(len(checks) for checks in checked()) == 40 == len(set.union(*checked())))
    await until(lambda: all(checked()), within=5)
    await registries[2].aclose()
    await until(lambda: len(set.union(*checked()[:2])) == 40)
    for registry in registries:
        await registry.aclose()


async def test_monitoring_survives_a_server_that_is_away(web: Web, unique: str) -> None:
    with EmbeddedValkey() as server:
        async with make(server.url, unique, request_timeout=0.5) as registry:
            instance = await registry.register_service(
                "api", "1", "127.0.0.1", web.port, health_check_url=web.url
            )
            await registry.start_health_monitoring()
            await until(lambda: len(web.requests) >= 2)
            server.kill()
            await until(lambda: registry.is_stale("api") or registry.pick("api") is None)
            before = len(web.requests)
            await until(lambda: len(web.requests) > before + 3)
            web.answer = lambda: response(500)
            server.restart()
            await registry.get_service("api")

            async def down() -> bool:
                found = await registry.discover_services("api", healthy_only=False)
                return [one.healthy for one in found if one.id == instance.id] == [False]

            began = time.monotonic()
            while not await down():
                assert time.monotonic() - began < 30
                await asyncio.sleep(0.05)


async def test_what_the_server_lost_and_was_told_again_is_judged_anew(
    web: Web, valkey_url: str, unique: str
) -> None:
    web.answer = lambda: response(500)
    async with make(valkey_url, unique, health_check_fall=1) as registry:
        await registry.register_service("api", "1", "127.0.0.1", web.port, health_check_url=web.url)
        await registry.start_health_monitoring()

        async def down() -> bool:
            return [one.healthy for one in (await registry.list_services()).get("api", [])] == [False]

        await support.until(down)
        with redis.Redis.from_url(valkey_url) as client:
            # What a registration that is told again leaves: the same epoch, and healthy.
            (member, entry), *_ = client.hgetall(f"{{{unique}:0}}:ri").items()
            client.hset(f"{{{unique}:0}}:ri", member, entry.replace(b" down\0", b" up\0"))
            client.hincrby(f"{{{unique}:0}}:m", "g", 1)
        await support.until(down)


async def test_what_the_server_does_not_know_is_not_taken_for_reported(
    web: Web, valkey_url: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with make(valkey_url, unique, health_check_fall=1) as registry:
        await registry.register_service("api", "1", "127.0.0.1", web.port, health_check_url=web.url)
        await registry.start_health_monitoring()
        await until(lambda: len(web.requests) >= 1)
        with redis.Redis.from_url(valkey_url) as client:
            instances = f"{{{unique}:0}}:ri"
            (member, entry), *_ = client.hgetall(instances).items()
            client.hdel(instances, member)
            web.answer = lambda: response(500)
            before, monitor = len(web.requests), registry._monitor
            assert monitor is not None
            await until(lambda: len(web.requests) >= before + 3 or not monitor._checks)
            assert "instance is unhealthy" not in caplog.text
            client.hset(instances, member, entry)
        await until(lambda: "instance is unhealthy" in caplog.text)


@pytest.mark.parametrize(
    "broken",
    [
        b"not JSON",
        b"[]",
        b'{"id":"broken","name":"api"}',
        b'{"id":"broken","name":5,"version":"1","host":"h","port":1}',
    ],
)
async def test_a_record_that_cant_be_read_hides_no_other(
    web: Web, valkey_url: str, unique: str, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with make(valkey_url, unique) as registry:
        await registry.start_health_monitoring()
        instance = await registry.register_service(
            "api", "1", "127.0.0.1", web.port, health_check_url=web.url
        )
        with redis.Redis.from_url(valkey_url) as client:
            support.register_by_hand(
                client, unique, registry.stats()["session"], broken.decode(), instance="broken"
            )
        assert await registry.list_services() == {"api": [instance]}
        assert "registrations can't be read" in caplog.text
        web.answer = lambda: response(500)

        async def down() -> bool:
            return [one.healthy for one in (await registry.list_services())["api"]] == [False]

        await support.until(down)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("a..b", "http://a..b/health"),
        ("h" * 64, f"http://{'h' * 64}/health"),
        ("h", 5),  # nothing that a check could be made of
    ],
)
async def test_what_cant_even_be_asked_is_unhealthy(
    host: str, url: Any, valkey_url: str, unique: str
) -> None:
    """Records as another version may have written them: `register_service` refuses such hosts."""
    async with make(valkey_url, unique) as registry:
        assert await registry.list_services() == {}
        record = ServiceInstance("i", "api", "1", host, 1, health_check_url=url).to_record()
        with redis.Redis.from_url(valkey_url) as client:
            support.register_by_hand(client, unique, registry.stats()["session"], record)
        await registry.start_health_monitoring()

        async def down() -> bool:
            return [one.healthy for one in (await registry.list_services())["api"]] == [False]

        await support.until(down)


def test_it_stops_and_starts_again_in_a_new_loop(valkey_url: str, unique: str) -> None:
    registry = make(valkey_url, unique)

    async def turn() -> None:
        async with Web() as web:
            await registry.register_service("api", "1", "127.0.0.1", web.port, health_check_url=web.url)
            await registry.start_health_monitoring()
            await until(lambda: len(web.requests) >= 2)

    asyncio.run(turn())  # ends the loop without a word to the monitor

    async def again() -> None:
        await turn()
        await registry.stop_health_monitoring()
        await registry.stop_health_monitoring()
        assert registry._monitor is None
        await registry.aclose()

    asyncio.run(again())
