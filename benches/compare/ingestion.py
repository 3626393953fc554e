"""Audit events per second, durable when the call returns, against the ways in which it is usually done.

All write into one PostgreSQL of this run alone, with synchronous_commit = on: this library with scores and
the hashes of integrity, and without the latter; an ORM's add and commit per event; an INSERT per event over a
pool of 10; auditchain, whose appends have to be taken one by one (a lock here: at once, all but one fail).
ORM and INSERT write into the same table with the same indexes; so does the floor, group commit and nothing
else. Then blocks of events: `log_events` against COPY … (FORMAT binary) of the same rows, encoded before the
clock starts. The peers take turns, so that noise hits all of them; medians of the turns are shown.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import time
import uuid
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
from ingestion_floor import GroupCommit
from sqlalchemy import Column, MetaData, Table, Text
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP, UUID
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import registry
from stand import arguments, load, median, save, share, table

from dotmac.platform._native import AUDIT_COLUMNS
from dotmac.platform.audit_trail import AuditAggregator, AuditTrailConfig
from dotmac.platform.connection.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

METADATA = {"ip_address": "192.168.1.1", "user_agent": "Mozilla/5.0", "path": "/users/7"}
EVENT = {"action": "user.login", "user_id": "user123", "tenant_id": "tenant456", "metadata": METADATA}
INSERT = (
    "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, user_id, tenant_id, "
    "metadata) VALUES ($1, $2, 'authentication', 'user.login', 'info', 'success', $3, $4, $5)"
)
TASKS = (1, 100, 1_000)
OURS, PLAIN, FLOOR = "dotmac", "dotmac, no integrity", "floor"
SHARES = {OURS: 10, PLAIN: 10, FLOOR: 10}  # so many times the events of the others, which take longer


class Stored:
    """A row, as an ORM sees it."""


def mapped() -> None:
    """Tell the ORM of the table."""
    texts = ("category", "action", "level", "outcome", "user_id", "tenant_id")
    columns = Table(
        "audit_events",
        MetaData(),
        Column("occurred_at", TIMESTAMP(timezone=True), primary_key=True),
        Column("id", UUID(as_uuid=True), primary_key=True),
        *(Column(name, Text) for name in texts),
        Column("metadata", JSONB, key="details"),
    )
    registry().map_imperatively(Stored, columns)


@asynccontextmanager
async def peers(url: str) -> AsyncIterator[dict[str, Callable[[], Awaitable[Any]]]]:
    """By name, each way to store one event."""
    mapped()
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url), pool_size=10
    )
    pool = await asyncpg.create_pool(url, min_size=10, max_size=10)
    ours = AuditAggregator(url)
    plain = AuditAggregator(url, config=AuditTrailConfig(integrity_enabled=False))
    texts = ("authentication", "user.login", "info", "success", "user123", "tenant456")
    floor = GroupCommit(url, texts, METADATA)
    await floor.open()

    async def insert() -> None:
        await pool.execute(
            INSERT, datetime.now(UTC), uuid.uuid4(), "user123", "tenant456", json.dumps(METADATA)
        )

    async def orm() -> None:
        async with AsyncSession(engine) as work:
            row: Any = Stored()
            row.occurred_at, row.id, row.category = datetime.now(UTC), uuid.uuid4(), "authentication"
            row.action, row.level, row.outcome = "user.login", "info", "success"
            row.user_id, row.tenant_id, row.details = "user123", "tenant456", METADATA
            work.add(row)
            await work.commit()

    ways = {
        OURS: lambda: ours.log_event("AUTHENTICATION", **EVENT),
        PLAIN: lambda: plain.log_event("AUTHENTICATION", **EVENT),
        FLOOR: floor.put,
        "ORM, add and commit": orm,
        "INSERT, pool of 10": insert,
    }
    chained: Any = None
    try:
        from auditchain import AuditLog, PostgresBackend
    except ImportError:
        pass
    else:
        chained, turn = AuditLog(PostgresBackend(url)), asyncio.Lock()

        async def append() -> None:
            async with turn:
                await chained.append("user123", "user.login", "tenant456", metadata=METADATA)

        ways["auditchain"] = append
    yield ways
    if chained is not None:
        await chained.close()
    await ours.aclose()
    await plain.aclose()
    await floor.aclose()
    await pool.close()
    await engine.dispose()


def server_cpu(pid: int) -> float:
    """Seconds of processor time that the server's processes have used, and those that have ended."""
    ticks = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            found = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        own = pid == int(status.parent.name)
        if own or pid == int(found[1]):
            ticks += sum(map(int, found[11 : 15 if own else 13]))  # of its children, too
    return ticks / os.sysconf("SC_CLK_TCK")


async def spread(tasks: int, events: int, one: Callable[[], Awaitable[Any]], server: int) -> dict[str, float]:
    """Run `one` events times from so many tasks. Args: server: its process."""
    waits: list[float] = []

    async def work() -> None:
        for _ in range(max(1, events // tasks)):
            began = time.perf_counter()
            await one()
            waits.append(time.perf_counter() - began)

    server_used = server_cpu(server)
    began, used = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(tasks)))
    seconds = time.perf_counter() - began
    return {
        "rate": len(waits) / seconds,
        "p50": share(waits, 0.5) * 1e3,
        "p99": share(waits, 0.99) * 1e3,
        "cpu": (time.process_time() - used) / len(waits) * 1e6,
        "server_cpu": (server_cpu(server) - server_used) / len(waits) * 1e6,
    }


async def one_by_one(url: str, server: int, options: Any) -> list[dict[str, Any]]:
    """Events stored one by one, by peer and number of tasks."""
    events, repeats, only = options.events, options.repeats, options.only
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    async with peers(url) as ways:
        for tasks in TASKS:
            for turn in range(repeats + 1):
                for name, one in ways.items():
                    if only and name not in only:
                        continue
                    number = max(tasks, events * (SHARES.get(name, 1) if tasks > 1 else 1))
                    measured = await spread(tasks, number if turn else tasks, one, server)
                    if turn:  # the first warms up
                        found.setdefault((tasks, name), []).append(measured)
    return [
        {"tasks": tasks, "peer": name, **{key: median(one[key] for one in runs) for key in runs[0]}}
        for (tasks, name), runs in found.items()
    ]


async def in_blocks(url: str, events: int, repeats: int) -> dict[str, float]:
    """Rows per second of `log_events`, with and without integrity, and of COPY."""
    items = [
        {"category": "AUTHENTICATION", **EVENT, "user_id": f"user{number % 1000}"} for number in range(events)
    ]
    fresh = ", ".join("gen_random_uuid()" if name == "id" else name for name in AUDIT_COLUMNS)
    found: dict[str, list[float]] = {}
    connection = await asyncpg.connect(url)
    try:
        for integrity in (False, True):
            config = AuditTrailConfig(integrity_enabled=integrity)
            name = OURS if integrity else PLAIN
            async with AuditAggregator(url, config=config) as audit:
                await audit.log_events(items[:1000])
                for _ in range(repeats):
                    began = time.perf_counter()
                    await audit.log_events(items)
                    found.setdefault(name, []).append(events / (time.perf_counter() - began))
                    # The same rows again, under ids of their own.
                    encoded = io.BytesIO()
                    await connection.copy_from_query(
                        f"SELECT {fresh} FROM (SELECT * FROM audit_events ORDER BY recorded_tx DESC "
                        f"LIMIT {events}) AS latest ORDER BY occurred_at",
                        output=encoded,
                        format="binary",
                    )
                    rows = encoded.getvalue()
                    began = time.perf_counter()
                    await connection.copy_to_table(
                        "audit_events", source=_Once(rows), columns=list(AUDIT_COLUMNS), format="binary"
                    )
                    copied = events / (time.perf_counter() - began)
                    found.setdefault(f"COPY beside {name}", []).append(copied)
    finally:
        await connection.close()
    return {name: median(rates) for name, rates in found.items()}


class _Once:
    """Bytes that are there already, as COPY wants them: in pieces."""

    def __init__(self, data: bytes) -> None:
        self._pieces = iter([data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)])

    def __aiter__(self) -> _Once:
        return self

    async def __anext__(self) -> bytes:
        try:
            return next(self._pieces)
        except StopIteration:
            raise StopAsyncIteration from None


def main() -> int:
    options = arguments(__doc__, events=1_500, repeats=5, block=60_000)
    with EmbeddedPostgres() as server:

        async def run() -> tuple[list[dict[str, Any]], dict[str, float]]:
            async with AuditAggregator(server.url) as audit:
                await audit.migrate()
            pid = server.pid
            assert pid is not None
            singles = await one_by_one(server.url, pid, options)
            return singles, await in_blocks(server.url, options.block, options.repeats)

        singles, blocks = asyncio.run(run())
    rates = {(one["tasks"], one["peer"]): one["rate"] for one in singles}
    table(
        f"Audit events, durable when the call returns ({load()}); × is this library's rate over the peer's",
        ("tasks", "peer", "events/s", "p50 ms", "p99 ms", "client CPU µs", "server CPU µs", "×"),
        (
            (
                one["tasks"],
                one["peer"],
                f"{one['rate']:,.0f}",
                f"{one['p50']:.2f}",
                f"{one['p99']:.2f}",
                f"{one['cpu']:.1f}",
                f"{one['server_cpu']:.1f}",
                f"{rates.get((one['tasks'], OURS), 0.0) / one['rate']:.1f}",
            )
            for one in singles
        ),
    )
    table(
        "Blocks of events",
        ("way", "rows/s", "of COPY"),
        (
            (name, f"{blocks[name]:,.0f}", f"{blocks[name] / blocks[f'COPY beside {name}']:.0%}")
            for name in (PLAIN, OURS)
        ),
    )
    save(options.json, {"one by one": singles, "blocks": blocks})
    return 0


if __name__ == "__main__":
    sys.exit(main())
