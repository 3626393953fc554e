"""The events of one piece of work, in order, with the time between them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.models import AuditOutcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from dotmac.platform.audit_trail.models import AuditEvent

__all__ = ["Step", "Timeline"]

_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Step:
    """One event of a timeline.

    Attributes: since_start, since_previous: time since the first event, and since the one before.
    """

    event: AuditEvent
    since_start: timedelta
    since_previous: timedelta


class Timeline(list[Step]):
    """The events that share a correlation id, oldest first.

    Attributes:
        correlation_id: what they share.
        truncated: there are more events than were asked for; these are the first ones.
    """

    def __init__(self, correlation_id: str, events: Sequence[AuditEvent], *, truncated: bool) -> None:
        first = previous = events[0].occurred_at if events else None
        for event in events:
            assert first is not None
            assert previous is not None
            self.append(Step(event, event.occurred_at - first, event.occurred_at - previous))
            previous = event.occurred_at
        self.correlation_id = correlation_id
        self.truncated = truncated

    @property
    def start(self) -> datetime | None:
        """When the first event happened."""
        return self[0].event.occurred_at if self else None

    @property
    def end(self) -> datetime | None:
        """When the last event happened."""
        return self[-1].event.occurred_at if self else None

    @property
    def duration(self) -> timedelta:
        """Time between the first and the last event."""
        return self[-1].since_start if self else timedelta()

    @property
    def longest_gap(self) -> Step | None:
        """The event that took longest to come after the one before it."""
        return max(self[1:], key=lambda step: step.since_previous, default=None)

    @property
    def first_failure(self) -> Step | None:
        """The first event that did not succeed: failed or was denied."""
        failed = (AuditOutcome.FAILURE, AuditOutcome.DENIED)
        return next((step for step in self if step.event.outcome in failed), None)

    def to_dict(self) -> dict[str, Any]:
        """The timeline as JSON types; times since are seconds."""
        gap, failure = self.longest_gap, self.first_failure
        users = dict.fromkeys(step.event.user_id for step in self if step.event.user_id is not None)
        return {
            "correlation_id": self.correlation_id,
            "start": self.start.isoformat(timespec="microseconds") if self.start else None,
            "end": self.end.isoformat(timespec="microseconds") if self.end else None,
            "duration": _seconds(self.duration),
            "longest_gap": _seconds(gap.since_previous) if gap else None,
            "longest_gap_before": str(gap.event.id) if gap else None,
            "first_failure": str(failure.event.id) if failure else None,
            "users": list(users),
            "truncated": self.truncated,
            "steps": [
                {
                    "since_start": _seconds(step.since_start),
                    "since_previous": _seconds(step.since_previous),
                    "event": step.event.to_dict(),
                }
                for step in self
            ],
        }


def _seconds(value: timedelta) -> float:
    return value // _MICROSECOND / 1_000_000
