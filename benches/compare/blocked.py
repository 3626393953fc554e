"""How many locks does a process lose that is busy with something else?

It holds 100 locks under leases of two seconds and then stands still: in time.sleep, in a loop of plain
Python, in one C call that holds the interpreter's lock. Meanwhile the server is asked four times a second
what is still held. Only libraries that renew take part, each on a server of its own.

    python benches/compare/blocked.py [--seconds 8] [--only dotmac] [--json FILE]
"""

from __future__ import annotations

import time
from typing import Any

from holder import work
from peers import (
    BY_NAME,
    Aioredlock,
    Dotmac,
    DotmacSync,
    PythonRedisLock,
    RedisFifoLock,
    chosen,
    report_missing,
)
from stand import Server, Worker, arguments, load, save, start, table

PEERS = (Dotmac, DotmacSync, Aioredlock, RedisFifoLock, PythonRedisLock)
WAYS = ("time.sleep", "Python loop", "C call under the GIL")
LOCKS, LEASE = 100, 2.0


def lost(name: str, how: str, seconds: float) -> int:
    """Locks that were not held at some time while their holder was blocked."""
    prefix = "blocked:"
    with Server() as server:
        worker = Worker(__file__, name, server.port)
        try:
            worker.answer(60)
            worker.tell(do="hold", names=[f"{prefix}{n}" for n in range(LOCKS)], lease=LEASE)
            worker.answer(60)
            worker.tell(do="block", how=how, seconds=seconds)
            held = {f"{prefix}{n}" for n in range(LOCKS)}
            end = time.monotonic() + seconds - 0.3
            while time.monotonic() < end:
                held &= BY_NAME[name].leases(server, prefix).keys()
                time.sleep(0.25)
            worker.answer(seconds + 60)
        finally:
            worker.kill()
            worker.end()
    return LOCKS - len(held)


def main() -> None:
    options = arguments(__doc__, seconds=8.0)
    missing: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for peer in chosen(PEERS, options.only):
        try:
            found[peer.name] = {how: lost(peer.name, how, options.seconds) for how in WAYS}
        except (RuntimeError, TimeoutError) as error:
            missing[peer.name] = str(error) or "nothing was heard of it in time"
    title = f"of {LOCKS} locks with a lease of {LEASE:g} s, lost while blocked for {options.seconds:g} s"
    table(f"{title} ({load()})", ["peer", *WAYS], [[name, *row.values()] for name, row in found.items()])
    report_missing(missing)
    save(options.json, found | {"seconds": options.seconds, "not measured": missing})


if __name__ == "__main__":
    start(main, work)
