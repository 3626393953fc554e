"""What does a lock cost that nobody else wants?

Acquire and release of locks with names of their own, the peers one after the other within each repeat on one
server: pairs per second, processor time of the client and of the server per pair, and the duration of a pair
at one task. Medians over the repeats. At 1, 100 and 1,000 tasks on asyncio and on uvloop, and from one
thread. Also what one round trip over the bridge costs when no server is involved.

    python benches/compare/uncontended.py [--repeats 5] [--seconds 0.4] [--only dotmac redis-py] [--json FILE]
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import uvloop
from peers import ASYNC, SYNC, chosen, report_missing, started, started_sync
from stand import Server, arguments, load, median, save, share, table

from dotmac.platform.connection.engine import Link

if TYPE_CHECKING:
    from peers import AsyncPeer, SyncPeer

TASKS = (1, 100, 1000)
LEASE = 10.0
ECHOES = 20_000
MICRO = 1e6


class Sample:
    """One repeat's figures for one peer and number of tasks."""

    def __init__(self, pairs: int, took: float, client: float, server: float, each: list[float]) -> None:
        self.rate = pairs / took
        self.client, self.server = client / pairs * MICRO, server / pairs * MICRO
        self.p50, self.p99 = share(each, 0.5) * MICRO, share(each, 0.99) * MICRO


async def measure(peer: AsyncPeer, tasks: int, seconds: float, server: Server) -> Sample:
    """Lets tasks take and give back their locks for a while."""
    each: list[float] = []
    end = 0.0

    async def pairs(name: str) -> int:
        count = 0
        while count == 0 or time.perf_counter() < end:
            async with peer.lock(name, LEASE):
                pass
            count += 1
        return count

    async def timed(name: str) -> int:
        while not each or time.perf_counter() < end:
            began = time.perf_counter()
            async with peer.lock(name, LEASE):
                pass
            each.append(time.perf_counter() - began)
        return len(each)

    body = timed if tasks == 1 else pairs
    served, cpu, began = server.cpu(), time.process_time(), time.perf_counter()
    end = began + seconds
    done = sum(await asyncio.gather(*(body(f"bench:{peer.name}:{i}") for i in range(tasks))))
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Sample(done, took, cpu, server.cpu() - served, each or [0.0])


def measure_sync(peer: SyncPeer, seconds: float, server: Server) -> Sample:
    """The same from this thread."""
    each: list[float] = []
    served, cpu, began = server.cpu(), time.process_time(), time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        with peer.lock(f"bench:{peer.name}", LEASE):
            pass
        each.append(time.perf_counter() - now)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Sample(len(each), took, cpu, server.cpu() - served, each)


async def echo(url: str, concurrent: int) -> float:
    """Microseconds per round trip through the engine thread, no server involved."""
    link = Link(url)
    bridge = (await link.side()).bridge

    async def some(count: int) -> None:
        for _ in range(count):
            await bridge.echo()

    began = time.perf_counter()
    await asyncio.gather(*(some(ECHOES // concurrent) for _ in range(concurrent)))
    took = time.perf_counter() - began
    await link.aclose()
    return took / ECHOES * MICRO


async def on_this_loop(
    server: Server, options: Any, missing: dict[str, str]
) -> dict[tuple[str, int], list[Sample]]:
    found: dict[tuple[str, int], list[Sample]] = {}
    async with started(chosen(ASYNC, options.only), server.port, missing) as peers:
        for _ in range(options.repeats):
            for tasks in TASKS:
                for peer in peers:
                    sample = await measure(peer, tasks, options.seconds, server)
                    found.setdefault((peer.name, tasks), []).append(sample)
    return found


def in_this_thread(
    server: Server, options: Any, missing: dict[str, str]
) -> dict[tuple[str, int], list[Sample]]:
    found: dict[tuple[str, int], list[Sample]] = {}
    with started_sync(chosen(SYNC, options.only), server.port, missing) as peers:
        for _ in range(options.repeats):
            for peer in peers:
                sample = measure_sync(peer, options.seconds, server)
                found.setdefault((peer.name, 1), []).append(sample)
    return found


def report(
    loop: str, found: dict[tuple[str, int], list[Sample]], reference: str
) -> dict[str, dict[str, float]]:
    """Prints the medians; returns them by peer and tasks."""
    medians = {
        key: {name: median(getattr(sample, name) for sample in samples) for name in vars(samples[0])}
        for key, samples in found.items()
    }
    head = [
        "tasks",
        "peer",
        "pairs/s",
        f"× {reference}",
        "client µs CPU",
        "server µs CPU",
        "p50 µs",
        "p99 µs",
    ]
    rows = []
    for tasks in TASKS:
        beside = medians.get((reference, tasks))
        for (peer, count), row in medians.items():
            if count == tasks:
                times = f"{row['rate'] / beside['rate']:.1f}" if beside else ""
                durations = [f"{row['p50']:.0f}", f"{row['p99']:.0f}"] if tasks == 1 else ["", ""]
                cells = [f"{row['rate']:,.0f}", times, f"{row['client']:.1f}", f"{row['server']:.1f}"]
                rows.append([f"{tasks:,}", peer, *cells, *durations])
    table(f"{loop}: uncontended pairs, medians ({load()})", head, rows)
    return {f"{peer} {tasks}": row for (peer, tasks), row in medians.items()}


def main() -> None:
    options = arguments(__doc__, repeats=5, seconds=0.4)
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    with Server() as server:
        for loop, factory in (("asyncio", None), ("uvloop", uvloop.new_event_loop)):
            with asyncio.Runner(loop_factory=factory) as runner:
                samples = runner.run(on_this_loop(server, options, missing))
                echoes = {
                    n: median([runner.run(echo(server.url, n)) for _ in range(options.repeats)])
                    for n in (1, 1000)
                }
            found[loop] = report(loop, samples, "redis-py") | {"echo µs": echoes}
            print(
                f"\nbridge without a server: {echoes[1]:.1f} µs alone, {echoes[1000]:.1f} µs at 1,000 at once"
            )
        found["one thread"] = report("one thread", in_this_thread(server, options, missing), "redis-py sync")
    report_missing(missing)
    save(options.json, found | {"not measured": missing})


if __name__ == "__main__":
    main()
