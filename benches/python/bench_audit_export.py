"""Exports of many events against `COPY … TO STDOUT (FORMAT csv)` of the same rows.

All write to files on the same disk, out of one embedded PostgreSQL, turn by turn, so that noise hits all of
them; the median of the turns is shown. Each export runs in a process of its own, whose highest resident
memory and processor time (with that of starting Python, the server's not in it) are shown. Run it as a
script:

    python benches/python/bench_audit_export.py [--events 1000000] [--turns 5] [--pdf 100000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import asyncpg

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.connection.embedded import EmbeddedPostgres

FILL = """
    INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, user_id, tenant_id,
        resource_type, resource_id, ip_address, correlation_id, metadata, anomaly_score)
    SELECT moment, gen_random_uuid(), (ARRAY['authentication', 'data_access', 'data_change'])[1 + n % 3],
        (ARRAY['user.login', 'record.read', 'record.update', '=cmd|calc'])[1 + n % 4], 'info', 'success',
        'user-' || n % 5000, 'tenant-' || n % 20, 'record', n::text,
        ('10.0.' || n / 250 % 250 || '.' || n % 250)::inet, md5(n::text),
        jsonb_build_object('user_agent', 'Mozilla/5.0', 'path', '/records/' || n, 'took_ms', n % 900), 0.1
    FROM (SELECT n, now() - interval '20 days' + n * interval '1 second' AS moment
        FROM generate_series(1, $1::bigint) AS n) AS made
"""
COLUMNS = (
    "id, occurred_at, recorded_at, category, action, level, outcome, user_id, tenant_id, resource_type, "
    "resource_id, host(ip_address), correlation_id, trace_id, span_id, metadata, anomaly_score, "
    "anomaly_reasons, subject_id, personal"
)
ORDERED = f"SELECT {COLUMNS} FROM audit_events ORDER BY occurred_at, id"
CHILD = """
import asyncio, json, re, resource, sys, time
from dotmac.platform.audit_trail import AuditAggregator
async def main(url, path, limit):
    async with AuditAggregator(url, timeout=60) as audit:
        await audit.ping()
        filters = {"tenant_id": limit} if limit else {}
        began = time.perf_counter()
        made = await audit.export_events(path, **filters)
        took = time.perf_counter() - began
    print(json.dumps({"seconds": took, "rows": made.rows, "bytes": made.size,
        "cpu": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
        "peak": int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024}))
asyncio.run(main(*sys.argv[1:]))
"""
COPY = """
import asyncio, json, re, resource, sys, time
import asyncpg
async def main(url, path, sql):
    connection = await asyncpg.connect(url)
    began = time.perf_counter()
    done = await connection.copy_from_query(sql, output=path, format="csv", header=True)
    took = time.perf_counter() - began
    await connection.close()
    print(json.dumps({"seconds": took, "rows": int(done.split()[1]),
        "cpu": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
        "peak": int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024}))
asyncio.run(main(*sys.argv[1:]))
"""


def child(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


async def fill(url, events):
    async with AuditAggregator(url) as audit:
        await audit.migrate()
    connection = await asyncpg.connect(url)
    await connection.execute(
        "SELECT audit_ensure_partition(now() - months * interval '1 month') "
        "FROM generate_series(0, 1) AS months"
    )
    await connection.execute(FILL.replace("$1", str(events)))
    await connection.execute("VACUUM ANALYZE audit_events")
    await connection.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pdf", type=int, default=100_000)
    given = parser.parse_args()
    with EmbeddedPostgres() as postgres, tempfile.TemporaryDirectory() as folder:
        asyncio.run(fill(postgres.url, given.events))
        found = {}

        def note(name, one):
            found.setdefault(name, []).append(one)

        for _ in range(given.turns):
            note("COPY csv", child(COPY, postgres.url, f"{folder}/copy.csv", ORDERED))
            for suffix in ("csv", "ndjson", "json"):
                note(suffix, child(CHILD, postgres.url, f"{folder}/events.{suffix}", ""))
        for suffix in ("ndjson.gz", "ndjson.zst", "parquet"):
            note(suffix, child(CHILD, postgres.url, f"{folder}/events.{suffix}", ""))
        if given.pdf:
            # Some of the twenty tenants make as many rows as are asked for.
            with EmbeddedPostgres() as small:
                asyncio.run(fill(small.url, given.pdf))
                note("pdf", child(CHILD, small.url, f"{folder}/events.pdf", ""))
        base = statistics.median(one["seconds"] for one in found["COPY csv"])
        for name, turns in found.items():
            seconds = statistics.median(one["seconds"] for one in turns)
            rows, peak = turns[0]["rows"], max(one["peak"] for one in turns)
            cpu = statistics.median(one["cpu"] for one in turns)
            share = f"{base / seconds:6.0%} of COPY csv" if rows == given.events else ""
            print(
                f"{name:11} {rows:9,} rows {seconds:6.2f} s {rows / seconds:11,.0f} rows/s "
                f"{peak:5.0f} MB {cpu:6.2f} s CPU  {share}"
            )
        size = Path(folder, "events.ndjson").stat().st_size
        print(f"NDJSON: {size / given.events:.0f} bytes per event")


if __name__ == "__main__":
    main()
