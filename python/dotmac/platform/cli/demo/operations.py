"""Times of single calls of each service, one after another, from one process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dotmac.platform.cli.demo.traffic import SERVICE

if TYPE_CHECKING:
    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.cli.demo.report import Report
    from dotmac.platform.distributed_locks import DistributedLockManager
    from dotmac.platform.service_registry import ServiceRegistry

__all__ = ["run"]

_MANY, _SOME, _FEW = 2_000, 300, 50


async def run(
    report: Report, registry: ServiceRegistry, locks: DistributedLockManager, audit: AuditAggregator
) -> None:
    """Call each operation often enough for a p99."""
    for number in range(_MANY):
        began = time.perf_counter()
        async with locks.acquire_lock(f"demo:free:{number % 10}"):
            acquired = time.perf_counter()
        report.timed("lock acquire, uncontended", acquired - began)
        report.timed("lock release", time.perf_counter() - acquired)
    missing = 0
    for _ in range(_MANY):
        began = time.perf_counter()
        missing += await registry.get_service(SERVICE) is None
        report.timed("registry get_service", time.perf_counter() - began)
    report.claim(missing == 0, f"each of {_MANY:,} lookups found an instance")
    for number in range(_FEW):
        began = time.perf_counter()
        await registry.register_service("demo-times", "1.0.0", "127.0.0.1", 20_000 + number)
        report.timed("registry register_service", time.perf_counter() - began)
    ids = []
    for number in range(_SOME):
        began = time.perf_counter()
        ids.append(await audit.log_event("SYSTEM_TASK", "demo.timed", resource_id=number))
        report.timed("audit log_event, durable, one at a time", time.perf_counter() - began)
    for _ in range(_FEW):
        began = time.perf_counter()
        page = await audit.query_events(actions=["demo.timed"], order="asc", limit=_SOME)
        report.timed(f"audit query_events, a page of {_SOME}", time.perf_counter() - began)
    report.claim(
        [event.id for event in page] == ids,
        f"{len(page)} events were found again, in the order of their logging",
    )
