"""What a verification found: each thing by its name, its place, what was expected and what is there."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from dotmac.platform.audit_trail.ids import from_micros

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

__all__ = ["Finding", "FindingKind", "IntegrityReport", "VerifyProgress", "in_reach", "shown_time"]


class FindingKind(enum.StrEnum):
    """What is wrong, or only worth knowing (`is_notice`)."""

    EVENT_CHANGED = "event_changed"
    EVENT_MISSING = "event_missing"
    EVENTS_TRUNCATED = "events_truncated"
    EVENT_INSERTED = "event_inserted"
    EVENT_REORDERED = "event_reordered"
    EVENT_UNCOVERED = "event_uncovered"
    EVENTS_CHANGED = "events_changed"
    TENANT_SWAPPED = "tenant_swapped"
    CLOCK_REWOUND = "clock_rewound"
    SEGMENT_CHANGED = "segment_changed"
    SEGMENT_EMPTIED = "segment_emptied"
    SEGMENT_MISSING = "segment_missing"
    SEGMENT_UNLOGGED = "segment_unlogged"
    LINK_BROKEN = "link_broken"
    CHAIN_TRUNCATED = "chain_truncated"
    WRITER_UNKNOWN = "writer_unknown"
    LOG_GAP = "log_gap"
    LOG_TRUNCATED = "log_truncated"
    CHECKPOINT_INVALID = "checkpoint_invalid"
    CHECKPOINT_MISMATCH = "checkpoint_mismatch"
    CHECKPOINT_MISSING = "checkpoint_missing"
    KEY_UNKNOWN = "key_unknown"
    ORIGIN_CHANGED = "origin_changed"
    DROP_UNTOLD = "drop_untold"
    DROP_WRONG = "drop_wrong"
    CHECKPOINT_OVERDUE = "checkpoint_overdue"
    ANCHOR_BEHIND = "anchor_behind"
    # Notices
    WRITER_OPEN = "writer_open"
    NOT_SEALED = "not_sealed"
    NO_CHECKPOINT = "no_checkpoint"
    KEYS_NOT_GIVEN = "keys_not_given"
    EVENTS_DROPPED = "events_dropped"
    EVENTS_LEGACY = "events_legacy"
    ANCHOR_UNREADABLE = "anchor_unreadable"

    @property
    def is_notice(self) -> bool:
        """Is it no sign of tampering by itself?"""
        return self in _NOTICES


_NOTICES = frozenset(
    {
        FindingKind.WRITER_OPEN,
        FindingKind.NOT_SEALED,
        FindingKind.NO_CHECKPOINT,
        FindingKind.KEYS_NOT_GIVEN,
        FindingKind.EVENTS_DROPPED,
        FindingKind.EVENTS_LEGACY,
        FindingKind.ANCHOR_UNREADABLE,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong or worth knowing.

    Attributes: kind: what. text: the same in a sentence. tenant_id: whose (None: nobody's in particular).
        event_id, segment, writer: which. place: the event's place in its segment, or the segment's in its
        log. expected, found: hashes in hexadecimal, times in ISO 8601, counts.
    """

    kind: FindingKind
    text: str
    tenant_id: str | None = None
    event_id: UUID | None = None
    segment: UUID | None = None
    writer: UUID | None = None
    place: int | None = None
    expected: str = ""
    found: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "kind": self.kind.value,
            "notice": self.kind.is_notice,
            "text": self.text,
            "tenant_id": self.tenant_id,
            "event_id": _text(self.event_id),
            "segment": _text(self.segment),
            "writer": _text(self.writer),
            "place": self.place,
            "expected": self.expected,
            "found": self.found,
        }


class VerifyProgress(NamedTuple):
    """How far a verification is.

    Attributes: stage: "anchors", "events", "log" or "writers". done, total: events, entries or segments;
        `total` is None where nobody counted.
    """

    stage: str
    done: int
    total: int | None


@dataclass(slots=True, kw_only=True)
class IntegrityReport:
    """The result of `AuditAggregator.verify_integrity`.

    Attributes: origin: the trail's name, None where nothing was sealed yet. started_at: by the database's
        clock. seconds: how long it took. start, end, tenant_id: what was asked for. events, segments:
        checked. log_entries, checkpoints, anchored: checked. unsealed: segments that are not in a log yet.
        dropped: events in months that retention dropped, which only their segments still bear witness to.
        legacy: events from before integrity was recorded, which nothing protects; of a tenant or a stretch of
        time, those that say so. findings: at most
        `max_findings` of each kind, of one segment at most a hundred (`untold` counts the others). counts:
        all others, too, by kind.
    """

    started_at: datetime
    start: datetime | None = None
    end: datetime | None = None
    tenant_id: str | None = None
    origin: str | None = None
    seconds: float = 0.0
    events: int = 0
    segments: int = 0
    log_entries: int = 0
    checkpoints: int = 0
    anchored: int = 0
    unsealed: int = 0
    dropped: int = 0
    untold: int = 0
    legacy: int = 0
    max_findings: int = 1_000
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[FindingKind] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Was nothing found that should not be? Notices don't count."""
        return not any(count for kind, count in self.counts.items() if not kind.is_notice)

    @property
    def problems(self) -> list[Finding]:
        """The findings that are no notices."""
        return [one for one in self.findings if not one.kind.is_notice]

    @property
    def notices(self) -> list[Finding]:
        """The findings that are no sign of tampering by themselves."""
        return [one for one in self.findings if one.kind.is_notice]

    def add(self, finding: Finding) -> None:
        """Take one in; beyond `max_findings` of a kind it is only counted."""
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] <= self.max_findings:
            self.findings.append(finding)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "ok": self.ok,
            "origin": self.origin,
            "started_at": self.started_at.isoformat(),
            "seconds": round(self.seconds, 3),
            "start": self.start.isoformat() if self.start else None,
            "end": self.end.isoformat() if self.end else None,
            "tenant_id": self.tenant_id,
            "events": self.events,
            "segments": self.segments,
            "log_entries": self.log_entries,
            "checkpoints": self.checkpoints,
            "anchored": self.anchored,
            "unsealed": self.unsealed,
            "dropped": self.dropped,
            "legacy": self.legacy,
            "untold": self.untold,
            "counts": {kind.value: count for kind, count in sorted(self.counts.items())},
            "findings": [one.to_dict() for one in self.findings],
        }


def _text(value: UUID | None) -> str | None:
    return None if value is None else str(value)


def shown_time(value: int) -> str:
    """A time of the database for people. Args: value: microseconds since 1970."""
    try:
        return from_micros(value).isoformat()
    except OverflowError:
        return str(value)  # infinity


def in_reach(time: str, name: str, *, always: bool = False) -> str:
    """SQL for a time, under that name; one that Python can't have is drawn to the ends of those it can.

    Args: always: where it is null, somebody put that there: it counts as the earliest.
    """
    if always:
        time = f"coalesce({time}, '-infinity')"
    # Null stays null, which both functions pass over.
    clamped = f"greatest(least({time}, '9999-01-01Z'), '0002-01-01Z')"
    return f"CASE WHEN {time} IS NOT NULL THEN {clamped} END AS {name}"
