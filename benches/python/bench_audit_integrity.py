"""Verification of the audit trail: whole, in Rust alone, and auditchain's over as many records.

The same events are stored once, by COPY through `log_events`, in one embedded PostgreSQL; turn by turn all of
them are verified, so that noise hits everyone; the median of the turns is shown. "hashing alone" feeds what
COPY gave into the check, without the database. auditchain (where it is installed) verifies records in memory.
With `--small` the events are logged one by one for 20 tenants from 100 tasks, so that a segment has two or
three. Run it as a script:

    python benches/python/bench_audit_integrity.py [--events 200000] [--turns 5] [--small]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import asyncpg

from dotmac.platform import _native
from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.integrity import SigningKey
from dotmac.platform.audit_trail.integrity.copying import copy_rows
from dotmac.platform.audit_trail.integrity.events import copy_events
from dotmac.platform.connection.embedded import EmbeddedPostgres

METADATA = {"ip_address": "192.168.1.1", "user_agent": "Mozilla/5.0", "path": "/users/7"}


def events(count):
    for number in range(count):
        yield {
            "category": "DATA_ACCESS",
            "action": "record.read",
            "user_id": f"user-{number % 500}",
            "tenant_id": f"tenant-{number // 20_000}",
            "metadata": METADATA | {"n": number},
        }


async def store(audit, count, small):
    """Store the events, in large segments or in small ones."""
    if not small:
        await audit.log_events(events(count))
        return
    left = events(count)

    async def work(number):
        for event in left:
            await audit.log_event(**event | {"tenant_id": f"tenant-{number % 20}"})

    await asyncio.gather(*(work(number) for number in range(100)))


async def copied(connection):
    """All events as COPY gives them, and a function that checks them."""
    pieces = []
    await copy_events(connection, "true", pieces.append)
    expected = []
    columns = ", ".join(_native.AUDIT_EXPECTED_COLUMNS)
    await copy_rows(connection, f"SELECT {columns} FROM audit_segments", expected.append)

    def check():
        checker = _native.SegmentCheck()
        for piece in expected:
            checker.expect(piece)
        for piece in pieces:
            checker.feed(piece)
        findings, _, strangers, count = checker.finish()
        assert (findings, strangers) == ([], [])
        return count

    return check, sum(map(len, pieces))


async def peer(count):
    """auditchain over as many records in memory, or None where it is not installed."""
    try:
        from auditchain import AuditLog, MemoryBackend, verify_chain
    except ImportError:
        return None
    log = AuditLog(MemoryBackend())
    await log.init()
    await log.append_many([("user-7", "record.read", "", METADATA | {"n": n}) for n in range(count)])
    records = await log.read()

    def check():
        report = verify_chain(records)
        assert report.ok, report
        return report.records_checked

    return check


async def main(count, turns, small):
    rates = {}

    def note(name, events, began):
        rates.setdefault(name, []).append(events / (time.perf_counter() - began))

    with EmbeddedPostgres() as postgres:
        key = SigningKey.generate()
        async with AuditAggregator(postgres.url, signing_key=key, sealing=False) as audit:
            await audit.migrate()
            began = time.perf_counter()
            await store(audit, count, small)
            note("log_event" if small else "log_events", count, began)
            await audit.checkpoint()
            connection = await asyncpg.connect(postgres.url)
            await connection.execute("VACUUM ANALYZE")
            check, size = await copied(connection)
            segments = await connection.fetchval("SELECT count(*) FROM audit_segments")
            other = await peer(min(count, 50_000))
            for _ in range(turns):
                for connections in (1, 2, 3):
                    began = time.perf_counter()
                    report = await audit.verify_integrity(connections=connections)
                    assert (report.ok, report.events) == (True, count), report.findings[:3]
                    note(f"verify_integrity, {connections} connections", count, began)
                began = time.perf_counter()
                note("hashing alone", check(), began)
                pieces = []
                began = time.perf_counter()
                await copy_events(connection, "true", pieces.append)
                note("COPY alone", count, began)
                if other is not None:
                    began = time.perf_counter()
                    note("auditchain", other(), began)
            await connection.close()
    print(
        f"{count:,} events in {segments:,} segments, {size / count:.0f} bytes each in binary; "
        f"events per second, median of {turns}:"
    )
    for name, found in rates.items():
        print(f"  {name:34}{statistics.median(found):>12,.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    asyncio.run(main(given.events, given.turns, given.small))
