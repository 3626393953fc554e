"""Tasks for real workers of the tests of the audit context; `URL` and `NAMESPACE` say where."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, chain

from dotmac.platform.audit_trail.context import audit_context, current_audit_context
from dotmac.platform.contrib.celery import LockedTask, carry_audit_context
from support.locks import manager_at

URL, NAMESPACE = os.environ["URL"], os.environ["NAMESPACE"]

carry_audit_context()
app = Celery("tasks", broker=URL, backend=URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_default_queue=NAMESPACE,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
)
locks = manager_at(URL, NAMESPACE, default_timeout=2.0)


def seen() -> dict[str, Any]:
    now = current_audit_context()
    return {
        "user": now.user_id,
        "tenant": now.tenant_id,
        "correlation": now.correlation_id,
        "address": now.ip_address,
        "metadata": dict(now.metadata),
        "pid": os.getpid(),
    }


@app.task
def look() -> dict[str, Any]:
    return seen()


@app.task(base=LockedTask, lock="{name}", lock_manager=locks)
async def look_in_a_coroutine(name: str) -> dict[str, Any]:
    return seen()


@app.task(bind=True, max_retries=3)
def look_at_the_third_try(self: Any) -> dict[str, Any]:
    if self.request.retries < 2:
        raise self.retry(countdown=0.01)
    return {**seen(), "retries": self.request.retries}


@app.task
def fail() -> None:
    raise RuntimeError("on purpose")


@app.task
def collect(before: list[Any]) -> list[Any]:
    return [*before, seen()]


@app.task
def publish(as_user: str | None) -> str:
    """Publishes another task out of this one; its id."""
    if as_user is None:
        return str(look.delay().id)
    with audit_context(user_id=as_user):
        return str(chain(collect.s([]), collect.s()).delay().id)
