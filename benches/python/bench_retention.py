"""Retention on five million rows: one month dropped, archived before or not, and an archived month read.

The rows are those of bench_indexes.py, in a table with all of its indexes. While months are dropped, a writer
goes on; the longest that one of its events took is shown beside. Run it as a script:

    python benches/python/bench_retention.py [--rows 5000000]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from datetime import UTC, datetime, timedelta

import asyncpg
from bench_indexes import DAYS, fill

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.connection.embedded import EmbeddedPostgres


async def beside(audit, work):
    """Runs some work while events are logged. Returns its answer, its seconds, the slowest event's."""
    slowest, done = 0.0, asyncio.Event()

    async def log():
        nonlocal slowest
        while not done.is_set():
            began = time.perf_counter()
            await audit.log_event("SECURITY", "x", user_id="ada", tenant_id="acme")
            slowest = max(slowest, time.perf_counter() - began)

    logging = asyncio.create_task(log())
    await asyncio.sleep(0.5)
    slowest = 0.0
    began = time.perf_counter()
    answer = await work
    took = time.perf_counter() - began
    done.set()
    await logging
    return answer, took, slowest


async def run(url, rows):
    async with AuditAggregator(url) as audit:
        await audit.migrate()
        connection = await asyncpg.connect(url)
        now = datetime.now(UTC)
        first = now - timedelta(days=DAYS)
        await fill(connection, rows, first)
        months = sorted(row["name"] for row in await connection.fetch(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits "
            "WHERE inhparent = 'audit_events'::regclass"
        ))  # fmt: skip

        def age(place):
            year, month = int(months[place][-7:-3]), int(months[place][-2:])
            end = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
            return (now - end).days

        await audit.apply_retention(age(0))  # the first month is not whole
        for place in (1, 2):
            (one,), took, slowest = await beside(audit, audit.apply_retention(age(place)))
            print(
                f"{one.partition}: {one.events:,} events dropped in {took:.2f} s, "
                f"{one.seconds:.2f} s of them for the partition; slowest event beside {slowest * 1e3:.0f} ms",
                flush=True,
            )
        with tempfile.TemporaryDirectory() as folder:
            (one,), took, slowest = await beside(audit, audit.apply_retention(age(3), archive_url=folder))
            size = (await audit.list_archives())[-1]["bytes"]
            print(
                f"{one.partition}: {one.events:,} events archived ({size / 2**20:.0f} MiB), read back and "
                f"dropped in {took:.1f} s; slowest event beside {slowest * 1e3:.0f} ms",
                flush=True,
            )
            month = {"start_time": one.start_time, "end_time": one.end_time, "include_archive": True}
            for name, filters in (
                ("a page of a user", {"user_id": "user-7", "limit": 100}),
                ("a page of all", {"limit": 100}),
            ):
                began = time.perf_counter()
                page = await audit.query_events(**month, **filters)
                print(f"archive, {name}: {len(page)} events in {(time.perf_counter() - began) * 1e3:.0f} ms")
            for name, filters in (("all", {}), ("of a tenant", {"tenant_id": "tenant-7"})):
                began = time.perf_counter()
                count = await audit.count_events(**month, **filters)
                print(f"archive, count {name}: {count:,} in {(time.perf_counter() - began) * 1e3:.0f} ms")
        await connection.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    asked = parser.parse_args()
    settings = {"shared_buffers": "1GB", "max_wal_size": "4GB"}
    with EmbeddedPostgres(settings=settings) as server:
        asyncio.run(run(server.url, asked.rows))


if __name__ == "__main__":
    main()
