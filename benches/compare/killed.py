"""How long after the lease of a killed holder ends does the next live waiter hold the lock?

A process that holds and one with dead waiters ahead are killed together; the time counts from the end of the
holder's lease, which the server told just after. Several locks at once make the medians. A waiter that died
costs nothing only if it is skipped: where each is granted the lock first, the live one waits for a lease
each. Without a queue nobody is ahead. Then the same with waiters whose leases are longer than the holder's.

    python benches/compare/killed.py [--locks 5] [--lease 1] [--limit 15] [--only dotmac] [--json FILE]
"""

from __future__ import annotations

import time
from typing import Any

from holder import work
from peers import BY_NAME, Aioredlock, Dotmac, PythonRedisLock, RedisFifoLock, chosen, report_missing
from stand import Server, Worker, arguments, load, median, save, start, table

PEERS = (Dotmac, RedisFifoLock, Aioredlock, PythonRedisLock)
QUEUES = ("dotmac", "redis-fifo-lock")
# Dead waiters ahead, and the length of all waiters' leases; none for the holder's.
CASES = ((0, None), (10, None), (100, None), (10, 10.0))
PREFIX = "killed:"


def after(name: str, dead: int, lease: float, options: Any) -> list[float]:
    """For each lock, seconds from the end of the holder's lease to the grant; fewer if time ran out."""
    names = [f"{PREFIX}{n}" for n in range(options.locks)]
    with Server() as server:
        workers = [Worker(__file__, name, server.port) for _ in range(3)]
        holder, gone, live = workers
        try:
            for worker in workers:
                worker.answer(60)
            holder.ask(do="hold", names=names, lease=options.lease)
            for lock in names if dead else []:
                gone.ask(do="crowd", name=lock, lease=lease, count=dead)
            # They have to be in the queue before the live one, and nobody tells when they are.
            time.sleep(1.0)
            live.tell(do="want", names=names, lease=lease)
            time.sleep(0.5)
            holder.kill()
            gone.kill()
            ends = {
                key: time.monotonic() + left for key, left in BY_NAME[name].leases(server, PREFIX).items()
            }
            limit = time.monotonic() + options.lease + options.limit
            found: list[float] = []
            while len(found) < len(names):
                try:
                    told = live.answer(max(0.0, limit - time.monotonic()))
                except TimeoutError:
                    break
                found.append(told["held"] - ends[told["name"]])
            return found
        finally:
            for worker in workers:
                worker.kill()
                worker.end()


def case(dead: int, lease: float | None) -> str:
    """A heading."""
    return f"{dead} ahead" + ("" if lease is None else f", leases of {lease:g} s")


def told(found: list[float], options: Any) -> str:
    """The median of all locks in milliseconds."""
    waits = found + [float("inf")] * (options.locks - len(found))
    middle = median(waits)
    return f"> {options.limit:g} s" if middle == float("inf") else f"{middle * 1e3:,.0f} ms"


def main() -> None:
    options = arguments(__doc__, locks=5, lease=1.0, limit=15.0)
    missing: dict[str, str] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for peer in chosen(PEERS, options.only):
        row: dict[str, list[float]] = {}
        try:
            for dead, lease in CASES if peer.name in QUEUES else CASES[:1]:
                row[case(dead, lease)] = after(peer.name, dead, lease or options.lease, options)
                if len(row[case(dead, lease)]) < options.locks:
                    break  # more of them ahead would be no quicker
        except (RuntimeError, TimeoutError) as error:
            missing[peer.name] = str(error) or "nothing was heard of it in time"
        else:
            found[peer.name] = row
    head = [case(dead, lease) for dead, lease in CASES]
    rows = [
        [name, *(told(row[column], options) if column in row else "" for column in head)]
        for name, row in found.items()
    ]
    what = f"from the end of a killed holder's lease of {options.lease:g} s to the next grant"
    table(f"{what}, p50 of {options.locks} ({load()})", ["peer", *head], rows)
    report_missing(missing)
    save(options.json, found | {"not measured": missing})


if __name__ == "__main__":
    start(main, work)
