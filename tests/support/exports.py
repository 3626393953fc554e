"""What the tests of exports share: events to export, and readers of files that are not ours."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
from datetime import UTC, datetime, timedelta

import asyncpg
import pyarrow.parquet
import zstandard


async def fill(audit, tenant, count, **more):
    start = datetime.now(UTC) - timedelta(days=3)
    await asyncio.gather(
        *(
            audit.log_event(
                "DATA_ACCESS", f"record.read{n % 7}", tenant_id=tenant, user_id=f"u{n % 11}", resource_id=n,
                ip_address=f"10.0.{n % 200}.7", metadata={"n": n, "text": "x" * (n % 50)},
                occurred_at=start + timedelta(seconds=n // 3), **more,
            )
            for n in range(count)
        )
    )  # fmt: skip


async def dicts(audit, tenant, order="asc"):
    return [event.to_dict() async for event in audit.iter_events(tenant_id=tenant, order=order)]


def like(text, wanted):
    """Are these JSON lines those events? (An export has columns that an event shows otherwise.)"""
    return [
        {name: said[name] for name in event}
        for said, event in zip(map(json.loads, text.splitlines()), wanted, strict=True)
    ] == wanted


def unpacked(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()
    return data


def read(path, format):  # noqa: A002 (as the argument is called)
    """The events of a file, by readers that are not ours."""
    if format == "parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
        for row in rows:
            for name in ("occurred_at", "recorded_at"):
                row[name] = row[name].isoformat(timespec="microseconds")
            row["metadata"] = json.loads(row["metadata"])
        return rows
    text = unpacked(path).decode()
    if format == "csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        for row in rows:
            row["metadata"], row["anomaly_reasons"] = (
                json.loads(row["metadata"]),
                json.loads(row["anomaly_reasons"]),
            )
            row["anomaly_score"] = float(row["anomaly_score"]) if row["anomaly_score"] else None
        return [{name: None if value == "" else value for name, value in row.items()} for row in rows]
    return json.loads(text) if format == "json" else [json.loads(line) for line in text.splitlines()]


async def forget(audit, tenant):
    """Take the events away, as only a superuser can."""
    async with audit_connection(audit) as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")  # no triggers
        await connection.execute("DELETE FROM audit_events WHERE tenant_id = $1", tenant)


class audit_connection:  # noqa: N801 (used like a function)
    def __init__(self, audit):
        self._url = audit._postgres_url

    async def __aenter__(self):
        self._connection = await asyncpg.connect(self._url)
        return self._connection

    async def __aexit__(self, *_):
        await self._connection.close()


def same(found, wanted):
    def told(event):
        return {name: value for name, value in event.items() if name != "recorded_at"}

    return [told(event) for event in found] == [told(event) for event in wanted]
