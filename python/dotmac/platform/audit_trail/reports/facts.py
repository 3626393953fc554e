"""What a report knows beside its statements' rows: for sections that are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from dotmac.platform.audit_trail.reports.model import Section
    from dotmac.platform.audit_trail.reports.registry import ProcessingRecord

__all__ = ["Facts", "moment_of", "told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Attributes:
    start, end: the period, in UTC, its end excluded.
    zone: where days begin.
    subject: the person or patient that the report is about, or None.
    retention_days: how long events are kept, by the settings.
    completeness: the completeness block.
    records: the record of processing activities, or None where none was given.
    sections: those made so far, by name.
    """

    start: datetime
    end: datetime
    zone: ZoneInfo
    subject: str | None
    retention_days: int
    completeness: dict[str, Any]
    records: tuple[ProcessingRecord, ...] | None
    sections: dict[str, Section] = field(default_factory=dict)

    def days(self) -> list[str]:
        """The days of the period, in its zone."""
        day, last = self.start.astimezone(self.zone).date(), (self.end - timedelta(microseconds=1))
        found = []
        while day <= last.astimezone(self.zone).date():
            found.append(day.isoformat())
            day += timedelta(days=1)
        return found


def moment_of(text: object) -> datetime | None:
    """A moment that somebody wrote into metadata, or None where it is none; without a zone it is UTC."""
    if not isinstance(text, str):
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    try:
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError:
        return None


def told(moment: datetime | None) -> str | None:
    """A moment as reports write it."""
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
