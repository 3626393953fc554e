"""Celery: tasks that hold a lock while they run, and the audit context that travels with a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.contrib.celery.context import carry_audit_context
    from dotmac.platform.contrib.celery.locks import LockedTask

_HOMES = {"LockedTask": "locks", "carry_audit_context": "context"}

__all__ = ["LockedTask", "carry_audit_context"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
