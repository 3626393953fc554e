"""The audit context travels with a task: who published it is who its events are about.

    carry_audit_context()  # once, in the module that makes the Celery application

It goes in a header of the task's message, through retries, chains, groups and chords; workers of every pool
put it around the task. Whoever may write to the broker may write that header, as they may name any task.

The context's metadata go to the broker as they were given: redaction happens when an event is logged, not
here. So keep secrets and personal data out of a context, or keep the broker as safe as the trail.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery import signals  # type: ignore[import-untyped]

from dotmac.platform.audit_trail.context import AuditContext, audit_context, current_audit_context
from dotmac.platform.audit_trail.entry import parse_address
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["HEADER", "carry_audit_context"]

HEADER = "dotmac_audit"
_log = get_logger(__name__)
_UID = "dotmac-audit-context"
_MAX_BYTES = 16 << 10
_NAMES = ("user_id", "tenant_id", "correlation_id")
# The block around each task that runs in this process.
_around: dict[str, audit_context] = {}


def carry_audit_context() -> None:
    """Send the audit context along with every task that this process publishes, and put it around every task
    that it runs. Without a correlation id, a task's events get the id of the first task of its chain.

    Calling it again changes nothing. It holds for all Celery applications of the process.
    """
    signals.before_task_publish.connect(_attach, weak=False, dispatch_uid=_UID)
    signals.task_prerun.connect(_enter, weak=False, dispatch_uid=_UID)
    signals.task_postrun.connect(_leave, weak=False, dispatch_uid=_UID)


def _attach(headers: Any = None, **_: Any) -> None:
    if not isinstance(headers, dict) or HEADER in headers:
        return
    said = _packed(current_audit_context())
    if said:
        headers[HEADER] = said


def _packed(context: AuditContext) -> dict[str, Any]:
    said: dict[str, Any] = {
        name: _text(value) for name in _NAMES if (value := getattr(context, name)) is not None
    }
    address = parse_address(context.ip_address)
    if address is not None:
        said["ip_address"] = address
    if context.metadata:
        try:
            if len(json.dumps(dict(context.metadata), allow_nan=False)) <= _MAX_BYTES:
                said["metadata"] = dict(context.metadata)
            else:
                _log.warning("audit context's metadata do not travel with tasks", more_than_bytes=_MAX_BYTES)
        except (TypeError, ValueError, RecursionError) as error:
            _log.warning("audit context's metadata do not travel with tasks", error=type(error).__name__)
    return said


def _text(value: str | int | UUID) -> str:
    return value if isinstance(value, str) else str(value)


def _enter(task_id: str = "", task: Any = None, **_: Any) -> None:
    request = task.request
    said = getattr(request, HEADER, None)
    if said is None and request.is_eager:
        return  # it runs inside of its caller, whose context holds
    block = audit_context(inherit=False, **_unpacked(said, request))
    _around[task_id] = block
    block.__enter__()


def _unpacked(said: Any, request: Any) -> dict[str, Any]:
    """What the header says, as far as it makes sense."""
    if not isinstance(said, Mapping):
        said = {}
    given: dict[str, Any] = {name: said[name] for name in _NAMES if isinstance(said.get(name), str)}
    given["ip_address"] = parse_address(said.get("ip_address"))
    if isinstance(said.get("metadata"), Mapping):
        given["metadata"] = said["metadata"]
    given.setdefault("correlation_id", request.root_id)
    return given


def _leave(task_id: str = "", **_: Any) -> None:
    block = _around.pop(task_id, None)
    if block is not None:
        block.__exit__()
