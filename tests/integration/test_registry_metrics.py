"""Promise: with an OpenTelemetry SDK, what the registry does is read under its names, with the right counts.

In a process of its own, because a process has one meter provider.
"""

from __future__ import annotations

import subprocess
import sys

WORK = """
import asyncio, sys
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from dotmac.platform.service_registry import ServiceRegistry, ServiceRegistryConfig

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))

def read():
    data = reader.get_metrics_data()
    points = {}
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    value = point.count if hasattr(point, "count") else point.value
                    points[metric.name, tuple(point.attributes.values())] = value
    return points

async def web(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    await writer.drain()
    writer.close()

async def main(url, namespace):
    server = await asyncio.start_server(web, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = dict(health_check_interval=0.05, namespace=namespace, config=ServiceRegistryConfig())
    async with ServiceRegistry(url, **settings) as registry:
        url = f"http://127.0.0.1:{port}/"
        await registry.register_service("api", "1", "127.0.0.1", port, health_check_url=url)
        gone = await registry.register_service("api", "1", "127.0.0.1", 1)
        await registry.deregister_service(gone)
        for _ in range(3):
            await registry.discover_services("api")
        for _ in range(5):
            assert registry.pick("api")
        await registry.start_health_monitoring()
        async with asyncio.timeout(20):
            while read().get(("dotmac.registry.health_checks", ("healthy",)), 0) < 2:
                await asyncio.sleep(0.02)
        await registry.register_service("api", "1", "127.0.0.1", 1, health_check_url="http://127.0.0.1:1/")
        async with asyncio.timeout(20):
            while read().get(("dotmac.registry.health_checks", ("unhealthy",)), 0) < 2:
                await asyncio.sleep(0.02)
        found = read()
    assert found["dotmac.registry.registrations", ()] == 3, found
    assert found["dotmac.registry.deregistrations", ()] == 1, found
    assert found["dotmac.registry.discoveries", ()] == 3, found
    assert found["dotmac.registry.picks", ()] == 5, found
    assert found["dotmac.registry.reregistrations", ()] == 0, found
    checks = sum(value for (name, _), value in found.items() if name == "dotmac.registry.health_checks")
    assert abs(found["dotmac.registry.health_check.duration", ()] - checks) <= 1, found
    print("read")

asyncio.run(main(*sys.argv[1:]))
"""


def test_the_registrys_metrics_are_read_under_their_names(valkey_url: str, unique: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WORK, valkey_url, unique],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr
