"""Queries on a large audit trail: pages, counts, facets, followers; and what an index for text would cost.

The server makes the trail itself: 5 million events over 180 days, on which a run takes some minutes. Every
question is asked in turn with the others, so that noise hits all of them; the middle and the best of the
turns are shown, and what the question takes of a processor, here and in the server, which other load hardly
changes. Run it as a script; with the address of a database that has the trail already, it is reused:

    python benches/python/bench_audit_queries.py [--rows 5000000] [--turns 30] [--url postgresql://…]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from datetime import UTC, datetime, timedelta

import asyncpg
import psutil
from audit_rows import DAYS, fill

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.connection.embedded import EmbeddedPostgres

END = datetime(2026, 11, 27, tzinfo=UTC)
WEEK = {"start_time": END - timedelta(days=7), "end_time": END}
ALL = {"start_time": END - timedelta(days=DAYS), "end_time": END}
LIMIT = 50
SLOW = 3  # turns of questions that read the events themselves


async def deep(audit, pages, **filters):
    """The cursor of a page so far in."""
    cursor = None
    for _ in range(pages):
        page = await audit.query_events(**filters, limit=LIMIT, cursor=cursor)
        if page.next_cursor is None:
            return cursor
        cursor = page.next_cursor
    return cursor


async def questions(audit):
    """(name, how it is asked, turns of those asked for)."""
    found = []
    for user in ("u0", "u100"):
        mine = {**WEEK, "user_id": user, "limit": LIMIT}
        there = await deep(audit, 300, **WEEK, user_id=user)
        back = (await audit.query_events(**mine, cursor=there)).previous_cursor
        found += [
            (
                f"user {user}, 7 days, first page of {LIMIT}",
                lambda mine=mine: audit.query_events(**mine),
                None,
            ),
            ("  a deep page", lambda mine=mine, c=there: audit.query_events(**mine, cursor=c), None),
            ("  the page before it", lambda mine=mine, c=back: audit.query_events(**mine, cursor=c), None),
        ]
    by = ("day", "category")
    return [
        *found,
        ("tenant and category, 7 days", lambda: audit.query_events(
            **WEEK, tenant_id="t3", categories="security", limit=LIMIT), None),
        ("timeline of 5 events", lambda: audit.timeline("c500000"), None),
        (f"category per day, {DAYS} days, all tenants", lambda: audit.histogram(**ALL, by=by), None),
        ("  of one tenant", lambda: audit.histogram(**ALL, by=by, tenant_id="t3"), None),
        ("  from the events", lambda: audit.histogram(**ALL, by=by, actions="*"), SLOW),
        ("count, 7 days, whole", lambda: audit.count_events(**WEEK), None),
        ("count, 7 days, cut at both ends", lambda: audit.count_events(
            WEEK["start_time"] + timedelta(hours=5), END - timedelta(hours=5)), None),
        ("facets of 6 fields, 7 days", lambda: audit.facets(**WEEK), SLOW),
        ("metadata, 7 days, 1 in 1,000", lambda: audit.query_events(
            **WEEK, metadata={"order.total": {"gte": 999}}, limit=LIMIT), SLOW),
        ("text, 7 days, not there", lambda: audit.count_events(**WEEK, text="no such text"), SLOW),
    ]  # fmt: skip


class Processor:
    """Milliseconds that this process and the server's have taken."""

    def __init__(self, backend):
        self._server = psutil.Process(backend).parent()

    def now(self):
        found = psutil.Process().cpu_times()
        taken = found.user + found.system
        for process in self._server.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found = process.cpu_times()
                taken += found.user + found.system
        return taken * 1e3


async def ask(audit, turns, processor):
    asked = await questions(audit)
    seen = {place: [] for place in range(len(asked))}
    for turn in range(turns):
        for place, (_, one, most) in enumerate(asked):
            if most is None or turn < most:
                began = time.perf_counter()
                await one()
                seen[place].append((time.perf_counter() - began) * 1e3)
    print(f"{'question':<46} {'p50 ms':>9} {'best ms':>9} {'CPU ms':>9}")
    for place, (name, one, most) in enumerate(asked):
        times = 100 if most is None else 1
        before = processor.now()
        for _ in range(times):
            await one()
        taken = (processor.now() - before) / times
        print(f"{name:<46} {statistics.median(seen[place]):>9.2f} {min(seen[place]):>9.2f} {taken:>9.2f}")


async def follow(audit, events):
    """How long after it was logged a follower has an event, while nothing else is written."""
    delays = []
    async with audit.tail(actions="bench.tail", poll=5) as tail:
        for _ in range(events):
            waiting = asyncio.create_task(anext(tail))
            await asyncio.sleep(0.3)
            await audit.log_event("SYSTEM", "bench.tail")
            stored = time.perf_counter()
            await waiting
            delays.append((time.perf_counter() - stored) * 1e3)
    name = "a follower has an event after its commit"
    print(f"{name:<46} {statistics.median(delays):>9.2f} {min(delays):>9.2f}")


async def index_costs(connection, rows=120_000, turns=3):
    """Rows per second with one index more or less; the turns go round."""
    by_transaction = "DROP INDEX bench_into_recorded_tx_idx"
    extra = {
        "the indexes that there are": [],
        "  without the one by storing transaction": [by_transaction],
        "  with BRIN in its place": [by_transaction, "CREATE INDEX ON bench_into USING brin (recorded_tx)"],
        "  and full text (GIN)": [
            "CREATE INDEX ON bench_into USING gin (to_tsvector('simple', action || ' ' || metadata::text))"
        ],
        "  and metadata (GIN)": ["CREATE INDEX ON bench_into USING gin (metadata jsonb_path_ops)"],
    }
    await connection.execute(
        "CREATE UNLOGGED TABLE bench_rows AS "
        "SELECT *, row_number() OVER (ORDER BY occurred_at, id) AS bench_place "
        f"FROM (SELECT * FROM audit_events LIMIT {rows}) AS few"
    )
    columns = await connection.fetchval(
        "SELECT string_agg(attname, ', ') FROM pg_attribute "
        "WHERE attrelid = 'audit_events'::regclass AND attnum > 0 AND NOT attisdropped"
    )
    rates = {name: [] for name in extra}
    for _ in range(turns):
        for name, changes in extra.items():
            await connection.execute("CREATE TABLE bench_into (LIKE audit_events INCLUDING ALL)")
            for change in changes:
                await connection.execute(change)
            began = time.perf_counter()
            for first in range(0, rows, 10_000):
                await connection.execute(
                    f"INSERT INTO bench_into ({columns}) SELECT {columns} FROM bench_rows "
                    f"WHERE bench_place > {first} AND bench_place <= {first + 10_000}"
                )
            rates[name].append(rows / (time.perf_counter() - began))
            await connection.execute("DROP TABLE bench_into")
    await connection.execute("DROP TABLE bench_rows")
    print(f"\n{'what an index costs':<46} {'rows/s':>9}")
    for name, found in rates.items():
        print(f"{name:<46} {statistics.median(found):>9,.0f}")


async def run(url, rows, turns):
    async with AuditAggregator(url, timeout=120) as audit:
        await audit.migrate()
        connection = await asyncpg.connect(url)
        began = time.perf_counter()
        await fill(connection, rows, END)
        print(f"{rows:,} events, ready after {time.perf_counter() - began:.0f} s\n")
        await ask(audit, turns, Processor(connection.get_server_pid()))
        await follow(audit, 10)
        await index_costs(connection)
        await connection.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--url")
    asked = parser.parse_args()
    if asked.url:
        asyncio.run(run(asked.url, asked.rows, asked.turns))
        return
    with EmbeddedPostgres() as server:
        asyncio.run(run(server.url, asked.rows, asked.turns))


if __name__ == "__main__":
    main()
