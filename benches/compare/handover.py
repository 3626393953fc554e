"""How fast, how fairly and at what cost does one lock pass among many that want it?

48 tasks (threads, for libraries without asyncio) in 4 processes take and give back one lock, the peers one
after the other within each repeat on one server. A hand-over is an acquisition by another task than the one
before. Jain's index is 1 when all tasks got it equally often; with many tasks the ends of a short repeat
lower it. The commands that clients send and all that the server executes, scripts' inner ones included, are
counted per acquisition. Then the same for those with a queue, with 10 and with 1,000 tasks in one process:
what a hand-over costs must not grow with the number of waiters.

    python benches/compare/handover.py [--repeats 5] [--seconds 1] [--only dotmac floor] [--json FILE]
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from peers import ASYNC, BY_NAME, PythonRedisLock, chosen, report_missing
from stand import Server, Worker, arguments, cpu_of, hear, load, median, save, say, share, start, table, why

if TYPE_CHECKING:
    from peers import AsyncPeer, SyncPeer

PROCESSES, TASKS = 4, 12
LEASE = 10.0
HOT = "hot"
WATCHED = 0.4
QUEUED = ("dotmac", "redis-fifo-lock", "floor")
# When it was asked for, when it was held, by which task.
Turn = tuple[float, float, int]


# ---- the worker: the tasks of one process


async def _take_turns(peer: AsyncPeer, tasks: int, begin: float, end: float) -> list[Turn]:
    turns: list[Turn] = []

    async def one(number: int) -> None:
        await asyncio.sleep(begin - time.monotonic())
        while (asked := time.monotonic()) < end:
            async with peer.lock(HOT, LEASE):
                turns.append((asked, time.monotonic(), number))

    await asyncio.gather(*(one(number) for number in range(tasks)))
    return turns


def _take_turns_in_threads(peer: SyncPeer, tasks: int, begin: float, end: float) -> list[Turn]:
    turns: list[Turn] = []

    def one(number: int) -> None:
        time.sleep(begin - time.monotonic())
        while (asked := time.monotonic()) < end:
            with peer.lock(HOT, LEASE):
                turns.append((asked, time.monotonic(), number))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return turns


async def _work(peer: AsyncPeer, port: int) -> None:
    await peer.start(port)
    async with peer.lock("warm", LEASE):
        say("ready")
    # No thread of this process may be busy with waiting for the parent while it is measured.
    while (asked := await asyncio.to_thread(hear)) is not None:
        say(await _take_turns(peer, **asked))
    await peer.stop()


def _work_sync(peer: SyncPeer, port: int) -> None:
    peer.start(port)
    with peer.lock("warm", LEASE):
        say("ready")
    while (asked := hear()) is not None:
        say(_take_turns_in_threads(peer, **asked))
    peer.stop()


def work(name: str, port: int) -> None:
    """The whole life of a worker."""
    peer = BY_NAME[name]()
    try:
        if peer.sync:
            _work_sync(peer, port)  # type: ignore[arg-type]
        else:
            asyncio.run(_work(peer, port))  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - the parent reports it
        say({"failed": why(error)})


# ---- the parent


def figures(by_process: list[list[Turn]], begin: float, end: float) -> dict[str, float]:
    """What the turns between two times say."""
    turns = sorted(
        (held, asked, (process, task))
        for process, own in enumerate(by_process)
        for asked, held, task in own
        if begin <= held < end
    )
    if not turns:
        return {"turns": 0.0}
    tasks = [task for _, _, task in turns]
    waits = [held - asked for held, asked, _ in turns]
    counts = Counter(tasks).values()
    mean = sum(waits) / len(waits)
    passed = sum(one != other for one, other in itertools.pairwise(tasks))
    return {
        "turns": len(turns),
        "hand-overs/s": passed / (end - begin),
        "squares": float(sum(n * n for n in counts)),
        "mean wait ms": mean * 1e3,
        "p99 wait ms": share(waits, 0.99) * 1e3,
        "max/mean wait": max(waits) / mean,
    }


def run(workers: list[Worker], tasks: int, seconds: float, server: Server) -> dict[str, float]:
    """One repeat: the tasks of all workers at once."""
    # A fifth of a second to begin with, and another until everybody has waited once, is not looked at.
    # Commands are watched afterwards, for that slows the server down.
    begin = time.monotonic() + 0.2
    start, end = begin + 0.2, begin + 0.2 + seconds
    for worker in workers:
        worker.tell(tasks=tasks, begin=begin, end=end + WATCHED)
    time.sleep(start - time.monotonic())
    client, busy = sum(cpu_of(w.pid) for w in workers), server.cpu()
    calls, started = server.calls(), time.monotonic()
    time.sleep(end - time.monotonic())
    calls, ended = server.calls() - calls, time.monotonic()
    client, busy = sum(cpu_of(w.pid) for w in workers) - client, server.cpu() - busy
    watched, first, last = server.watch(WATCHED)
    turns = [worker.answer() for worker in workers]
    found = figures(turns, start, end)
    if not found["turns"]:
        return dict.fromkeys(COLUMNS, float("nan")) | {"hand-overs/s": 0.0}
    found["Jain"] = found["turns"] ** 2 / (len(workers) * tasks * found.pop("squares"))
    count = figures(turns, started, ended)["turns"]
    found["server calls"] = calls / count
    found["client µs CPU"], found["server µs CPU"] = client / count * 1e6, busy / count * 1e6
    while_watched = figures(turns, first, last)["turns"]
    found["client commands"] = watched / while_watched if while_watched else float("nan")
    return found


COLUMNS = {
    "hand-overs/s": ",.0f",
    "Jain": ".4f",
    "mean wait ms": ".1f",
    "max/mean wait": ".1f",
    "client commands": ".1f",
    "server calls": ".1f",
    "client µs CPU": ".0f",
    "server µs CPU": ".0f",
}


def _row(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(sample.get(name, float("nan")) for sample in samples) for name in COLUMNS}


def _table(title: str, rows: dict[str, dict[str, float]]) -> None:
    cells = [[name, *(format(row[c], how) for c, how in COLUMNS.items())] for name, row in rows.items()]
    table(f"{title} ({load()})", ["peer", *COLUMNS], cells)


def measured(
    server: Server, sets: dict[str, list[Worker]], options: Any, tasks: list[int]
) -> dict[int, dict[str, dict[str, float]]]:
    """The medians of all repeats, by number of tasks and peer."""
    samples: dict[int, dict[str, list[dict[str, float]]]] = {n: {name: [] for name in sets} for n in tasks}
    for _ in range(options.repeats):
        for n in tasks:
            for name, workers in sets.items():
                samples[n][name].append(run(workers, n, options.seconds, server))
    return {n: {name: _row(found) for name, found in by_peer.items()} for n, by_peer in samples.items()}


def started_workers(
    names: list[str], processes: int, server: Server, missing: dict[str, str]
) -> dict[str, list[Worker]]:
    """Those that start; why the others don't goes to `missing`."""
    sets: dict[str, list[Worker]] = {}
    for name in names:
        workers = [Worker(__file__, name, server.port) for _ in range(processes)]
        try:
            for worker in workers:
                worker.answer()
        except RuntimeError as error:
            missing[name] = str(error)
            for worker in workers:
                worker.end()
        else:
            sets[name] = workers
    return sets


def main() -> None:
    options = arguments(__doc__, repeats=5, seconds=1.0)
    missing: dict[str, str] = {}
    names = [peer.name for peer in chosen([*ASYNC, PythonRedisLock], options.only)]
    found: dict[str, Any] = {}
    for title, among, processes, tasks in (
        (f"{PROCESSES * TASKS} tasks in {PROCESSES} processes", names, PROCESSES, [TASKS]),
        ("one process", [name for name in names if name in QUEUED], 1, [10, 1000]),
    ):
        with Server() as server:
            sets = started_workers(among, processes, server, missing)
            try:
                for n, rows in measured(server, sets, options, tasks).items():
                    label = title if processes > 1 else f"{n:,} tasks in {title}"
                    found[label] = rows
                    _table(f"one lock, {label}: medians of {options.repeats}, costs per acquisition", rows)
            finally:
                for workers in sets.values():
                    for worker in workers:
                        worker.end()
    report_missing(missing)
    save(options.json, found | {"not measured": missing})


if __name__ == "__main__":
    start(main, work)
