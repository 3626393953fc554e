"""What does it cost to keep many locks, and are they kept?

One process holds the locks; after they are taken, processor time and commands are read over windows of one
lease each, the medians told per minute. Lost is what the server no longer says is held in the end. The peers
hold one after the other, each on a server of its own.

    python benches/compare/renewal.py [--repeats 5] [--lease 6] [--threads 1000] [--only dotmac] [--json FILE]
"""

from __future__ import annotations

from typing import Any

from holder import work
from peers import BY_NAME, Aioredlock, Dotmac, PythonRedisLock, RedisFifoLock, chosen, report_missing
from stand import Server, Worker, arguments, cpu_of, load, median, save, start, table

PEERS = (Dotmac, Aioredlock, RedisFifoLock, PythonRedisLock)
LOCKS = 10_000
MORE = {"dotmac": (LOCKS, 10 * LOCKS)}
MINUTE = 60.0


def measure(name: str, count: int, options: Any) -> dict[str, float]:
    """Per minute: processor seconds of the client and of the server, commands sent and executed; losses."""
    with Server() as server:
        worker = Worker(__file__, name, server.port)
        try:
            worker.answer(60)
            prefix = "renewed:"
            worker.tell(do="hold", names=[f"{prefix}{n}" for n in range(count)], lease=options.lease)
            worker.answer(300)
            windows: list[tuple[float, float, float, float]] = []
            for _ in range(options.repeats):
                client, busy, calls = cpu_of(worker.pid), server.cpu(), server.calls()
                sent, began, ended = server.watch(options.lease)
                per_minute = MINUTE / (ended - began)
                windows.append(
                    (
                        (cpu_of(worker.pid) - client) * per_minute,
                        (server.cpu() - busy) * per_minute,
                        sent * per_minute,
                        (server.calls() - calls) * per_minute,
                    )
                )
            left = len(BY_NAME[name].leases(server, prefix))
        finally:
            worker.kill()
            worker.end()
    columns = zip(*windows, strict=True)
    names = ("client CPU s", "server CPU s", "commands", "server calls")
    found = {column: median(values) for column, values in zip(names, columns, strict=True)}
    return found | {"lost": float(count - left)}


def main() -> None:
    options = arguments(__doc__, repeats=5, lease=6.0, threads=1000)
    missing: dict[str, str] = {}
    found: dict[str, dict[str, float]] = {}
    for peer in chosen(PEERS, options.only):
        # A thread for each lock: ten thousand of them are more than many a machine allows.
        for count in MORE.get(peer.name, (options.threads if peer.sync else LOCKS,)):
            try:
                found[f"{peer.name}, {count:,} locks"] = measure(peer.name, count, options)
            except (RuntimeError, TimeoutError) as error:
                missing[peer.name] = str(error) or "nothing was heard of it in time"
    rows = [
        [
            name,
            f"{row['client CPU s']:.2f}",
            f"{row['server CPU s']:.2f}",
            f"{row['commands']:,.0f}",
            f"{row['server calls']:,.0f}",
            f"{row['lost']:,.0f}",
        ]
        for name, row in found.items()
    ]
    head = ["held", "client CPU s", "server CPU s", "commands sent", "calls at the server", "lost"]
    table(f"locks kept for a minute under leases of {options.lease:g} s ({load()})", head, rows)
    report_missing(missing)
    save(options.json, found | {"not measured": missing})


if __name__ == "__main__":
    start(main, work)
