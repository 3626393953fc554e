"""The detector beside the stream of events: facts in, score and reasons out.

The arithmetic is Rust (`_native.RateDetector`); this file says what of an event is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dotmac.platform._native import RateDetector
from dotmac.platform.audit_trail.ids import micros

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from dotmac.platform.audit_trail.entry import Row

__all__ = ["Anomaly", "OnAnomaly", "Scorer"]

_FAILED = frozenset({"failure", "denied"})
_NOUNS = {
    "authentication": "logins",
    "authorization": "access checks",
    "data_access": "reads",
    "data_change": "changes",
    "data_export": "exports",
}


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


class Scorer:
    """Scores rows in the order in which they come.

    Args:
        threshold: score in [0, 1] from which an event is an anomaly; 0.5 stands for one chance in a
            million under the entity's own usual rate.
        capacity: users, addresses, tenants and actions remembered; about 500 bytes each.
        seed: makes what is forgotten under pressure repeatable.
    """

    def __init__(self, threshold: float = 0.5, *, capacity: int = 16_384, seed: int = 0) -> None:
        self.threshold = threshold
        self._detector = RateDetector(capacity=capacity, seed=seed)

    def score(self, row: Row) -> tuple[Row, Anomaly | None]:
        """The row with its score and reasons, and the anomaly where it is one."""
        score, reasons = self._detector.score(
            micros(row.occurred_at),
            failed=row.outcome in _FAILED,
            noun=_NOUNS.get(row.category, ""),
            user=row.user_id,
            address=row.ip_address,
            tenant=row.tenant_id,
            action=row.action,
        )
        told = json.dumps(reasons, ensure_ascii=False) if reasons else None
        scored = row._replace(anomaly_score=score, anomaly_reasons=told)
        if score < self.threshold:
            return scored, None
        return scored, Anomaly(
            event_id=row.id,
            occurred_at=row.occurred_at,
            category=row.category,
            action=row.action,
            user_id=row.user_id,
            tenant_id=row.tenant_id,
            ip_address=row.ip_address,
            score=score,
            reasons=tuple(reasons),
        )
