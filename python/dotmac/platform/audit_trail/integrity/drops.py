"""The months that retention says to have dropped: which of them were, and what may be missing for that.

`audit_archives` can be written by whoever runs retention, and the event that tells of a drop by every writer,
so neither is believed further than it can be held against what is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.integrity.report import Finding, FindingKind, in_reach

if TYPE_CHECKING:
    import asyncpg

    from dotmac.platform.audit_trail.integrity.verify import Scope

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Drop", "Drops", "check_counts", "find_drops"]

# A transaction that began just before the drop may have stored into the month that was made anew.
_SLACK = timedelta(seconds=60)
_TIMES = ", ".join(
    in_reach(f"a.{name}", name, always=True) for name in ("from_time", "to_time", "dropped_at")
)
_STATED = f"""
    SELECT a.partition, {_TIMES}, a.events, e.metadata, {in_reach("e.recorded_at", "recorded_at")}
    FROM audit_archives a LEFT JOIN audit_events e ON e.occurred_at = a.dropped_at AND e.id = a.event_id
        AND e.action = 'audit.partition.dropped' AND e.resource_id = a.partition
    WHERE a.state = 'dropped' AND a.dropped_at IS NOT NULL ORDER BY a.dropped_at DESC, a.from_time
"""  # noqa: S608 (ours)
_OLDEST = (
    f"SELECT {in_reach('min(recorded_at)', 'oldest')} FROM audit_events "  # noqa: S608 (ours)
    "WHERE occurred_at >= $1 AND occurred_at < $2"
)


@dataclass(frozen=True, slots=True)
class Drop:
    """A month that was dropped.

    Attributes: until: what was recorded from then on was not in it. events: it had so many.
    """

    start: datetime
    end: datetime
    until: datetime
    events: int


@dataclass(slots=True)
class Drops:
    """What is excused by drops. excused: missing events by the months in which they may have been."""

    known: list[Drop] = field(default_factory=list)
    excused: dict[tuple[datetime, ...], int] = field(default_factory=dict)

    def months(self, first: datetime, last: datetime, recorded: datetime) -> tuple[datetime, ...]:
        """The dropped months in which events of that stretch were, that were recorded at that time."""
        return tuple(
            sorted(
                {
                    drop.start
                    for drop in self.known
                    if first < drop.end and last >= drop.start and recorded < drop.until
                }
            )
        )

    def excuse(self, months: tuple[datetime, ...], events: int) -> None:
        """So many events are missing, which were in those months."""
        self.excused[months] = self.excused.get(months, 0) + events

    def excess(self) -> dict[datetime, int]:
        """By month: how many more are missing than its drops took, however they are shared out."""
        left: dict[datetime, int] = {}
        for drop in self.known:
            left[drop.start] = left.get(drop.start, 0) + drop.events
        over: dict[datetime, int] = {}
        # Each stretch takes from its first months on, those that end first before the others: no other way
        # of sharing out would find room for more.
        waiting = dict(self.excused)
        for month in sorted(left):
            for months in sorted(waiting, key=lambda one: (one[-1], one[0])):
                if month in months:
                    taken = min(left[month], waiting[months])
                    left[month] -= taken
                    waiting[months] -= taken
        for months, events in waiting.items():
            if events:
                over[months[-1]] = over.get(months[-1], 0) + events
        return over


async def find_drops(connection: Connection, scope: Scope) -> None:
    """Hold what `audit_archives` says against the trail; into `scope.drops` comes what is right.

    Retention drops the events that tell of drops, too, in the end: then the month in which such an event lay
    must have been dropped rightly, and later.
    """
    if await connection.fetchval("SELECT to_regclass('audit_archives')") is None:
        return
    for row in await connection.fetch(_STATED):
        await _look_at(connection, scope, row)


async def _look_at(connection: Connection, scope: Scope, row: asyncpg.Record) -> None:
    start, end, at = row["from_time"], row["to_time"], row["dropped_at"]
    details = _details(row)
    oldest = await connection.fetchval(_OLDEST, start, end)
    why = _why_not(scope, row, oldest)
    told = details is not None or bool(scope.drops.months(at, at, at))
    if why is not None:
        _add(
            scope,
            FindingKind.DROP_WRONG,
            row,
            f", as audit_archives says, but {why}",
            "a month that is gone",
            why,
        )
        return
    # Less than all is there where a month was made anew.
    until = at if oldest is None else min(at, oldest)
    events = (details or {}).get("events", 0) if details is not None else row["events"]
    scope.drops.known.append(Drop(start, end, until, events if isinstance(events, int) else 0))
    if told:
        _add(scope, FindingKind.EVENTS_DROPPED, row, "")
    elif scope.one_tenant:
        text = ", as audit_archives says; the event that says so is hidden from this database role"
        _add(scope, FindingKind.EVENTS_DROPPED, row, text)
    else:
        text = ", as audit_archives says; no event in the trail says so"
        _add(scope, FindingKind.DROP_UNTOLD, row, text, "an event audit.partition.dropped", "none")


def _details(row: asyncpg.Record) -> dict[str, Any] | None:
    """What the event says that tells of the drop, where it tells of this one."""
    recorded = row["recorded_at"]
    if row["metadata"] is None or recorded is None or recorded < row["dropped_at"] - _SLACK:
        return None
    try:
        details = json.loads(row["metadata"])
        times = [datetime.fromisoformat(details[name]) for name in ("from_time", "to_time")]
        says = times == [row["from_time"], row["to_time"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return details if says else None


def _why_not(scope: Scope, row: asyncpg.Record, oldest: datetime | None) -> str | None:
    """Why retention has not dropped that, if it has not."""
    start, end, at = (row[name].astimezone(UTC) for name in ("from_time", "to_time", "dropped_at"))
    month = start.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if (start, end, row["partition"]) != (
        month,
        (month + timedelta(days=32)).replace(day=1),
        f"audit_events_{month:%Y_%m}",
    ):
        return f"{start.isoformat()} to {end.isoformat()} is not the month of that partition"
    if at < end:
        return "the month was not over then"
    if at > scope.report.started_at:
        return "that is still to come"
    if oldest is not None and oldest < at - _SLACK:
        return f"the month has events that were recorded before, at {oldest.isoformat()}"
    return None


def _add(
    scope: Scope, kind: FindingKind, row: asyncpg.Record, more: str, expected: str = "", found: str = ""
) -> None:
    scope.report.add(
        Finding(
            kind=kind,
            text=f"partition {row['partition']} was dropped by retention "
            f"at {row['dropped_at'].isoformat()}{more}",
            expected=expected,
            found=found,
        )
    )


def check_counts(scope: Scope) -> None:
    """No more events may be missing than the drops took. For one tenant fewer are seen, so less is found."""
    for month, events in sorted(scope.drops.excess().items()):
        scope.report.add(
            Finding(
                kind=FindingKind.DROP_WRONG,
                text=f"{events} events more are gone of {month:%Y-%m} than retention dropped",
                expected="no more than the event audit.partition.dropped says",
                found=f"{events} more",
            )
        )
