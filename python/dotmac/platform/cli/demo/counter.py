"""Eight processes increment one row of PostgreSQL by reading and writing it, without and with a lock.

Run as a program it is one of the eight.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import AsyncExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import asyncpg

from dotmac.platform.distributed_locks import DistributedLockManager

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dotmac.platform.cli.demo.report import Report

__all__ = ["run"]

PROCESSES = 8
INCREMENTS = 40
LOCK = "demo:counter"
TABLES = """
    CREATE TABLE counter (name text PRIMARY KEY, value int NOT NULL);
    CREATE TABLE counter_log (fence bigint PRIMARY KEY, value int NOT NULL);
    INSERT INTO counter VALUES ('free', 0), ('locked', 0);
"""


async def run(report: Report, env: Mapping[str, str]) -> None:
    """Let them count, and check the sum.

    Args:
        report: where findings go.
        env: environment of the processes: addresses of the servers.
    """
    from dotmac.platform.cli.demo.processes import worker

    database = await asyncpg.connect(env["DATABASE_URL"])
    async with AsyncExitStack() as stack:
        stack.push_async_callback(database.close)
        await database.execute(TABLES)
        workers = [await stack.enter_async_context(worker(__name__, env)) for _ in range(PROCESSES)]
        for one in workers:
            await one.answer()  # it is ready
        for name in ("free", "locked"):
            for one in workers:
                one.tell(name)
            waits = [await one.answer() for one in workers]
            for wait in (wait for of_one in waits for wait in of_one):
                report.timed(f"lock wait, {PROCESSES} processes contending", wait)
        values = {
            row["name"]: row["value"] for row in await database.fetch("SELECT name, value FROM counter")
        }
        log = await database.fetch("SELECT value FROM counter_log ORDER BY fence")
    total = PROCESSES * INCREMENTS
    report.note(
        f"without a lock {PROCESSES} processes × {INCREMENTS} increments left {values['free']}: "
        f"{total - values['free']} updates of {total} were lost"
    )
    report.claim(
        values["locked"] == total,
        f"under a distributed lock they left {values['locked']} of {total}: no update was lost",
    )
    report.claim(
        [row["value"] for row in log] == list(range(1, total + 1)),
        f"in the order of the {len(log)} fencing tokens the values are 1, 2, … {total}: "
        "holders never overlapped",
    )


async def _work() -> None:
    """One of the eight: ready, then a line of waits for each line that names a row."""
    loop = asyncio.get_running_loop()
    database = await asyncpg.connect(os.environ["DATABASE_URL"])
    async with DistributedLockManager() as locks:
        sys.stdout.write("true\n")
        sys.stdout.flush()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            waits = [await _increment(database, locks, json.loads(line)) for _ in range(INCREMENTS)]
            sys.stdout.write(json.dumps([wait for wait in waits if wait is not None]) + "\n")
            sys.stdout.flush()
    await database.close()


async def _increment(database: Any, locks: DistributedLockManager, name: str) -> float | None:
    """Read, add one, write. Returns the seconds that the lock took, if there was one."""
    began = time.monotonic()
    async with locks.acquire_lock(LOCK, timeout=10.0) if name == "locked" else nullcontext() as lock:
        waited = time.monotonic() - began
        value = await database.fetchval("SELECT value FROM counter WHERE name = $1", name) + 1
        await database.execute("UPDATE counter SET value = $2 WHERE name = $1", name, value)
        if lock is None:
            return None
        await database.execute("INSERT INTO counter_log VALUES ($1, $2)", lock.fencing_token, value)
        return waited


if __name__ == "__main__":
    asyncio.run(_work())
