"""A holder whose event loop stands still for three lease times keeps its lock.

Run as a program it is the holder.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from dotmac.platform.distributed_locks import DistributedLockManager

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dotmac.platform.cli.demo.report import Report

__all__ = ["run"]

LOCK = "demo:blocked"
LEASE = 2.0
BLOCKED = 3 * LEASE
_FEWEST_TRIES = 20


async def run(report: Report, locks: DistributedLockManager, env: Mapping[str, str]) -> None:
    """Try to take the lock from this process while its holder sleeps.

    Args:
        report: where findings go.
        locks: this process's locks.
        env: environment of the holder: addresses of the servers.
    """
    from dotmac.platform.cli.demo.processes import worker

    async with worker(__name__, env) as holder:
        held = await holder.answer()
        woke = asyncio.create_task(holder.answer())
        lock = locks.acquire_lock(LOCK, timeout=LEASE)
        tries = taken = 0
        while not woke.done():
            tries += 1
            taken += await lock.acquire(blocking=False)
            await asyncio.wait([woke], timeout=0.1)
        after = await woke
        report.claim(
            taken == 0 and tries >= _FEWEST_TRIES,
            f"while process {holder.pid} blocked its event loop for {after['blocked']:.1f} s under a lease "
            f"of {LEASE:g} s, this process tried {tries} times to take the lock and got it {taken} times",
        )
        report.claim(
            bool(after["held"]) and after["fence"] == held["fence"],
            f"the holder still held it on waking, with the same fencing token {held['fence']}",
        )
        if taken == 0:
            # The holder gives it back only when it is told, so that its words above cannot be late.
            holder.tell("release")
            await lock.acquire(blocking_timeout=5.0)
        report.claim(
            lock.held and lock.fencing_token > held["fence"],
            f"after its release this process got it, with the higher token {lock.fencing_token}",
        )
        await lock.release()


async def _hold() -> None:
    async with DistributedLockManager() as locks, locks.acquire_lock(LOCK, timeout=LEASE) as lock:
        _say({"fence": lock.fencing_token})
        began = time.monotonic()
        time.sleep(BLOCKED)  # noqa: ASYNC251 - blocking the loop is what is shown
        _say({"blocked": time.monotonic() - began, "held": lock.held, "fence": lock.fencing_token})
        await asyncio.to_thread(sys.stdin.readline)


def _say(message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_hold())
