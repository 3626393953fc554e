"""Compliance reports of 100,000 rows as PDF: seconds, and memory at its peak. Run it as a script:

    python benches/python/bench_audit_report.py [--rows 100000] [--turns 3] [--no-database]

First the table alone, as an export draws it, from an iterator; then, on embedded PostgreSQL, a report of as
many accesses: made, and drawn. Each turn is a process of its own, so that its peak of memory is its own.
reportlab's own table (`LongTable`), with a hundredth of the rows, stands beside for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import re
import statistics
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

# ruff: noqa: E501 (rows of the benchmark read best by the line)

COLUMNS = (
    "time", "user", "tenant", "address", "category", "action", "resource_type", "resource_id", "outcome", "event",
)  # fmt: skip


def rows(count):
    for number in range(count):
        yield (
            f"2024-03-10T12:{number // 60 % 60:02}:{number % 60:02}.{number:06}Z", f"user{number % 500}", "acme",
            f"10.0.{number % 256}.{number % 100}", "data_access", "record.read", "record", f"r-{number}", "success",
            f"018e2845-{number % 65536:04x}-7000-8000-{number:012x}",
        )  # fmt: skip


def table(count):
    from dotmac.platform.audit_trail.pdf.document import Document
    from dotmac.platform.audit_trail.pdf.table import draw_table

    document = Document("Events", head="all", foot="benchmark")
    document.heading("Events")
    draw_table(document, COLUMNS, rows(count))
    return {"pages": document.pages, "bytes": len(document.to_bytes())}


def long_table(count):
    import io

    from reportlab.lib.pagesizes import A4, landscape
    from reportlab.platypus import LongTable, SimpleDocTemplate

    out = io.BytesIO()
    SimpleDocTemplate(out, pagesize=landscape(A4)).build(
        [LongTable([COLUMNS, *rows(count // 100)], repeatRows=1)]
    )
    return {"bytes": len(out.getvalue())}


def report(url):
    from dotmac.platform.audit_trail import AuditAggregator

    async def work():
        async with AuditAggregator(url) as audit:
            return await audit.generate_compliance_report(
                date(2024, 3, 1), date(2024, 3, 31), "access_log", "bench", max_rows=100_000, timeout=3_000
            )

    began = time.perf_counter()
    made = asyncio.run(work())
    drawn = time.perf_counter()
    size = len(made.to_pdf())
    return {
        "rows": len(made.section("events").rows),
        "made_s": drawn - began,
        "drawn_s": time.perf_counter() - drawn,
        "bytes": size,
    }


def apart(queue, work, arguments):
    began, used = time.perf_counter(), time.process_time()
    found = work(*arguments)
    found["seconds"] = time.perf_counter() - began
    found["cpu_s"] = time.process_time() - used
    # Not ru_maxrss, which begins with what the process that started this one had.
    found["peak_MB"] = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    queue.put(found)


def turns(name, count, work, *arguments):
    context = multiprocessing.get_context("spawn")
    found = []
    for _ in range(count):
        queue = context.Queue()
        process = context.Process(target=apart, args=(queue, work, arguments))
        process.start()
        found.append(queue.get())
        process.join()
    told = {key: statistics.median(one[key] for one in found) for key in found[0]}
    print(
        f"{name:<34}"
        + "  ".join(
            f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value:,}"
            for key, value in told.items()
        )
    )


async def fill(url, count):
    from dotmac.platform.audit_trail import AuditAggregator

    start = datetime(2024, 3, 1, tzinfo=UTC)
    async with AuditAggregator(url, anomaly_detection=False, timeout=300) as audit:
        await audit.migrate()
        for first in range(0, count, 5_000):
            await asyncio.gather(
                *(
                    audit.log_event(
                        "DATA_ACCESS", "record.read", user_id=f"user{number % 500}", tenant_id="bench",
                        ip_address=f"10.0.{number % 256}.{number % 100}", resource_type="record",
                        resource_id=f"r-{number}", occurred_at=start + timedelta(seconds=25 * number),
                        metadata={"user_agent": "Mozilla/5.0", "session_id": f"s{number % 5_000}"},
                    )
                    for number in range(first, min(first + 5_000, count))
                )
            )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-database", action="store_true")
    given = parser.parse_args()
    turns(f"table of {given.rows:,} rows", given.turns, table, given.rows)
    turns(f"LongTable of {given.rows // 100:,} rows", given.turns, long_table, given.rows)
    if given.no_database:
        return
    from dotmac.platform.connection.embedded import EmbeddedPostgres

    with EmbeddedPostgres() as postgres:
        asyncio.run(fill(postgres.url, given.rows))
        turns(f"report of {given.rows:,} rows", given.turns, report, postgres.url)


if __name__ == "__main__":
    main()
