"""What `on_anomaly` gets. Events are scored where they are made, in Rust."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from dotmac.platform.audit_trail.ids import from_micros

if TYPE_CHECKING:
    from datetime import datetime

    from dotmac.platform._native import AuditEntry

__all__ = ["Anomaly", "OnAnomaly", "anomaly_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """A stored event whose score reached the threshold, as `on_anomaly` gets it."""

    event_id: UUID
    occurred_at: datetime
    category: str
    action: str
    user_id: str | None
    tenant_id: str | None
    ip_address: str | None
    score: float
    reasons: tuple[str, ...]


OnAnomaly = Callable[[Anomaly], Awaitable[None] | None]


def anomaly_of(entry: AuditEntry, threshold: float) -> Anomaly | None:
    """The anomaly that an event is, where its score reaches the threshold.

    Args:
        threshold: score in (0, 1]; 0.5 stands for one chance in a million under the entity's usual rate.
    """
    if entry.score is None or entry.score < threshold:
        return None
    fields = entry.fields()
    return Anomaly(
        event_id=UUID(int=entry.id),
        occurred_at=from_micros(entry.occurred_at),
        category=fields["category"],
        action=fields["action"],
        user_id=fields["user_id"],
        tenant_id=fields["tenant_id"],
        ip_address=fields["ip_address"],
        score=entry.score,
        reasons=tuple(json.loads(fields["anomaly_reasons"] or "[]")),
    )
