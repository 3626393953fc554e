"""Celery tasks that run once at a time in the whole system, however many workers there are."""

import asyncio
import os

from celery import Celery

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.distributed_locks import DistributedLockManager

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")

app = Celery("tasks", broker=REDIS_URL, backend=REDIS_URL)
app.conf.broker_connection_retry_on_startup = True

# Made before the worker forks its children; each child starts an engine of its own on first use.
locks = DistributedLockManager()
audit = AuditAggregator()


@app.task
@locks.with_lock("report:generation", timeout=300.0)
async def generate_monthly_report(month: str) -> dict[str, str | int]:
    """Celery itself knows nothing of coroutines: the decorator runs this one to its end in the worker."""
    started = await audit.log_event(
        category="SYSTEM_TASK",
        action="report.generate",
        resource_type="report",
        resource_id=month,
        metadata={"phase": "started", "pid": os.getpid()},
    )
    await asyncio.sleep(0.2)  # the report's own work
    await audit.log_event(
        category="SYSTEM_TASK",
        action="report.generate",
        resource_type="report",
        resource_id=month,
        metadata={"phase": "finished", "pid": os.getpid()},
    )
    return {"month": month, "event": str(started), "pid": os.getpid()}


@app.task
@locks.with_lock("report:cleanup", timeout=60.0)
def remove_old_reports(keep: int) -> int:
    """A task that is an ordinary function: the lock is held by the worker's thread."""
    return keep
