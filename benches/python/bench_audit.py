"""Audit ingestion: durable `log_event` against an INSERT per event and an ORM commit per event.

All three write the same events into the same table of one embedded PostgreSQL, with synchronous commit, turn
by turn, so that noise hits all of them; the median of the turns is shown. Run it as a script:

    python benches/python/bench_audit.py [--events 3000] [--turns 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from datetime import UTC, datetime

import asyncpg
from sqlalchemy import Column, MetaData, Table, Text
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP, UUID
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import registry

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.ids import IdSource
from dotmac.platform.connection.embedded import EmbeddedPostgres

METADATA = {"ip_address": "192.168.1.1", "user_agent": "Mozilla/5.0", "path": "/users/7"}


class Stored:
    """A row, as an ORM sees it."""


def orm():
    mapping = registry()
    texts = ("category", "action", "level", "outcome", "user_id", "tenant_id")
    table = Table(
        "audit_events",
        MetaData(),
        Column("occurred_at", TIMESTAMP(timezone=True), primary_key=True),
        Column("id", UUID(as_uuid=True), primary_key=True),
        *(Column(name, Text) for name in texts),
        Column("metadata", JSONB, key="details"),
    )
    mapping.map_imperatively(Stored, table)


async def spread(tasks, events, one):
    """Run `one` events times from so many tasks; returns events per second and sorted latencies."""
    latencies = []

    async def work():
        for _ in range(max(1, events // tasks)):
            began = time.perf_counter()
            await one()
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(tasks)))
    return len(latencies) / (time.perf_counter() - began), sorted(latencies)


async def run(url, events, turns):
    ids = IdSource()
    orm()
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url), pool_size=10
    )
    async with AuditAggregator(url) as audit, asyncpg.create_pool(url, min_size=10, max_size=10) as pool:
        await audit.migrate()

        async def ours():
            await audit.log_event(
                "AUTHENTICATION", "user.login", user_id="user123", tenant_id="tenant456", metadata=METADATA
            )

        async def insert():
            await pool.execute(
                "INSERT INTO audit_events "
                "(occurred_at, id, category, action, level, outcome, user_id, tenant_id, "
                "metadata) VALUES ($1, $2, 'authentication', 'user.login', 'info', 'success', $3, $4, $5)",
                datetime.now(UTC), ids.new(ids.now()), "user123", "tenant456", json.dumps(METADATA),
            )  # fmt: skip

        async def session():
            async with AsyncSession(engine) as work:
                row = Stored()
                row.occurred_at, row.id = datetime.now(UTC), ids.new(ids.now())
                row.category, row.action, row.level, row.outcome = (
                    "authentication",
                    "user.login",
                    "info",
                    "success",
                )
                row.user_id, row.tenant_id, row.details = "user123", "tenant456", METADATA
                work.add(row)
                await work.commit()

        print(f"{'tasks':>6} {'way':<28} {'events/s':>10} {'p50 ms':>8} {'p99 ms':>8}")
        for tasks in (1, 100, 1000):
            seen = {}
            for _ in range(turns):
                for name, one, share in (
                    ("log_event", ours, 1 if tasks == 1 else 10),
                    ("INSERT, pool of 10", insert, 1),
                    ("ORM add and commit", session, 1),
                ):
                    rate, latencies = await spread(tasks, max(events * share // 3, tasks), one)
                    middle = latencies[len(latencies) // 2]
                    last = latencies[int(len(latencies) * 0.99)]
                    seen.setdefault(name, []).append((rate, middle, last))
            for name, found in seen.items():
                rate, middle, last = (statistics.median(column) for column in zip(*found, strict=True))
                print(f"{tasks:>6} {name:<28} {rate:>10,.0f} {middle * 1e3:>8.2f} {last * 1e3:>8.2f}")
    await engine.dispose()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=3000)
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    with EmbeddedPostgres() as server:
        asyncio.run(run(server.url, asked.events, asked.turns))


if __name__ == "__main__":
    main()
