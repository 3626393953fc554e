"""Promises of the registry between processes:

- what one process registers, another finds; it leaves the rotation at once when it ends by itself, after its
  ttl when it is killed; active health checks are faster than a long ttl;
- a process whose interpreter is blocked for several ttls stays registered; one that was stopped as a whole is
  back as soon as it goes on;
- after a fork the child's registry is its own: it neither keeps nor ends what the parent registered;
- `dotmac services list` shows what is registered.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.service_registry import ServiceRegistry, ServiceRegistryConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

WORKER = """
import asyncio, sys, time
from dotmac.platform.service_registry import ServiceRegistry, ServiceRegistryConfig

async def serve(url, namespace, ttl, kind):
    async def health(reader, writer):
        await reader.readuntil(b"\\r\\n\\r\\n")
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(health, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    registry = ServiceRegistry(url, config=ServiceRegistryConfig(), namespace=namespace)
    await registry.register_service(
        "worker", "1.0", "127.0.0.1", port, ttl=float(ttl), health_check_url=f"http://127.0.0.1:{port}/health"
    )
    print(port, flush=True)
    if kind == "block":
        time.sleep(4)
        print("awake", flush=True)
    if kind == "end":
        return
    await asyncio.sleep(600)

asyncio.run(serve(*sys.argv[1:]))
"""


class Workers:
    def __init__(self, url: str, namespace: str) -> None:
        self.url, self.namespace = url, namespace
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *, ttl: float = 60, kind: str = "stay") -> tuple[subprocess.Popen[str], int]:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, self.url, self.namespace, str(ttl), kind],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.running.append(worker)
        assert worker.stdout is not None
        return worker, int(worker.stdout.readline())


@pytest.fixture
def workers(valkey_url: str, unique: str) -> Iterator[Workers]:
    workers = Workers(valkey_url, unique)
    yield workers
    for worker in workers.running:
        worker.kill()
        worker.communicate()


@pytest.fixture
async def watcher(valkey_url: str, unique: str) -> AsyncIterator[ServiceRegistry]:
    async with make(valkey_url, unique) as registry:
        yield registry


def make(url: str, namespace: str, **arguments: Any) -> ServiceRegistry:
    return ServiceRegistry(url, config=ServiceRegistryConfig(), namespace=namespace, **arguments)


async def ports(registry: ServiceRegistry) -> set[int]:
    return {instance.port for instance in await registry.discover_services("worker")}


async def until(condition: Callable[[], Awaitable[bool]], within: float) -> float:
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within, "the condition did not come true in time"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


async def test_found_by_others_and_gone_when_it_ends_by_itself(
    workers: Workers, watcher: ServiceRegistry
) -> None:
    _, stays = workers.start()
    assert await ports(watcher) == {stays}
    ends, port = workers.start(kind="end")
    await asyncio.to_thread(ends.wait, 30)
    assert ends.returncode == 0

    async def gone() -> bool:
        return await ports(watcher) == {stays}

    await until(gone, within=5)
    assert port != stays


async def test_a_killed_process_leaves_the_rotation_after_its_ttl(
    workers: Workers, watcher: ServiceRegistry
) -> None:
    worker, _ = workers.start(ttl=2)
    assert len(await ports(watcher)) == 1
    worker.send_signal(signal.SIGKILL)

    async def gone() -> bool:
        return await watcher.get_service("worker") is None

    took = await until(gone, within=15)
    # Its ttl from its last heartbeat on, and one sweep per second.
    assert 1.0 < took < 6.0


async def test_health_checks_are_faster_than_a_long_ttl(
    valkey_url: str, unique: str, workers: Workers
) -> None:
    registry = make(
        valkey_url, unique, health_check_interval=0.2, health_check_timeout=1, health_check_fall=2
    )
    async with registry:
        await registry.start_health_monitoring()
        _, stays = workers.start(ttl=600)
        worker, _ = workers.start(ttl=600)
        assert len(await ports(registry)) == 2
        await asyncio.sleep(1.0)  # several checks, which all pass
        assert len(await ports(registry)) == 2
        worker.send_signal(signal.SIGKILL)

        async def left() -> bool:
            return await ports(registry) == {stays}

        await until(left, within=15)
        for _ in range(10):
            chosen = await registry.get_service("worker")
            assert chosen is not None
            assert chosen.port == stays
        everything = await registry.discover_services("worker", healthy_only=False)
        assert sorted(instance.healthy for instance in everything) == [False, True]


async def test_a_blocked_interpreter_keeps_its_registration(
    workers: Workers, watcher: ServiceRegistry
) -> None:
    worker, port = workers.start(ttl=1, kind="block")
    assert worker.stdout is not None
    awake = asyncio.ensure_future(asyncio.to_thread(worker.stdout.readline))
    while not awake.done():
        assert await ports(watcher) == {port}
        await asyncio.sleep(0.05)
    assert await awake == "awake\n"
    assert await ports(watcher) == {port}


async def test_a_stopped_process_is_back_when_it_goes_on(workers: Workers, watcher: ServiceRegistry) -> None:
    worker, port = workers.start(ttl=1)
    assert await ports(watcher) == {port}
    worker.send_signal(signal.SIGSTOP)

    async def gone() -> bool:
        return await ports(watcher) == set()

    await until(gone, within=15)
    worker.send_signal(signal.SIGCONT)

    async def back() -> bool:
        return await ports(watcher) == {port}

    assert await until(back, within=15) < 5


FORK = """
import asyncio, json, os, sys
from dotmac.platform.service_registry import ServiceRegistry, ServiceRegistryConfig

url, namespace = sys.argv[1:]
registry = ServiceRegistry(url, config=ServiceRegistryConfig(), namespace=namespace)
asyncio.run(registry.register_service("parent", "1", "h", 1))
assert registry.pick("parent")
child = os.fork()
if child == 0:
    async def inside():
        assert (await registry.get_service("parent")).port == 1
        await registry.register_service("child", "1", "h", 2)
        session = registry.stats()["session"]
        await registry.aclose()
        return session
    try:
        session = asyncio.run(inside())
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        code = 1
    os._exit(code)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert registry.pick("parent").port == 1
left = asyncio.run(registry.list_services())
print(json.dumps(sorted(left)))
registry.close()
"""


def test_a_forked_child_has_a_registry_of_its_own(valkey_url: str, unique: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, valkey_url, unique],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["parent"]


def test_the_command_line_lists_what_is_registered(valkey_url: str) -> None:
    environment = {**os.environ, "REDIS_URL": valkey_url, "ENVIRONMENT": "test"}
    environment.pop("SERVICE_REGISTRY_REDIS_URL", None)
    service = f"cli-{os.getpid()}"
    command = [
        sys.executable,
        "-c",
        "from dotmac.platform.cli.main import run; run()",
        "services",
        "list",
        service,
    ]

    async def body() -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
        async with make(valkey_url, "dotmac") as registry:
            await registry.register_service(service, "1.2", "localhost", 8001, tags=["user"], weight=3)

            def run(*more: str) -> subprocess.CompletedProcess[str]:
                return subprocess.run(
                    [*command, *more],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )

            return await asyncio.to_thread(run, "--json"), await asyncio.to_thread(run)

    as_json, as_table = asyncio.run(body())
    assert as_json.returncode == 0, as_json.stderr
    [listed] = json.loads(as_json.stdout)
    assert (listed["name"], listed["port"], listed["tags"], listed["healthy"]) == (
        service,
        8001,
        ["user"],
        True,
    )
    assert as_table.returncode == 0, as_table.stderr
    assert "not checked" in as_table.stdout
