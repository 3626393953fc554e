"""Counting by the rollup: which part of a count it answers, and which the events themselves must.

`audit_rollup` holds how many events each batch stored per tenant, UTC day, category, outcome and level, in
the transaction of the events: its sums are exact. `audit_rollup_totals` holds what they are for all tenants
together, as far as batches are summed up already. Both know whole days only. So days that a bound of the
query or of a bucket cuts are counted from the events; everything in one statement, and thus of one moment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.time_units import begins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from zoneinfo import ZoneInfo

    from dotmac.platform.audit_trail.filters import Filters

__all__ = ["ROLLUP_COLUMNS", "Counting", "plan"]

ROLLUP_COLUMNS = ("category", "level", "outcome", "tenant_id")
_ROLLUP_FILTERS = {"start_time", "end_time", "categories", "levels", "outcomes", "tenant_id", "exclude"}
_DAY = timedelta(days=1)
_MOST_CUTS = 32
_FIRST_YEAR, _LAST_YEAR = 1000, 9000  # far from where arithmetic with days ends
_UTC_NAMES = {"UTC", "Etc/UTC", "Etc/UCT", "UCT", "Zulu", "Etc/Zulu", "GMT", "Etc/GMT", "Universal"}


@dataclass(frozen=True, slots=True)
class Counting:
    """How to count: by the rollup but for some days, or, without `by_rollup`, by the events alone.

    Attributes: ranges: times that are counted from the events, where the rollup counts the rest.
    """

    filters: Filters
    by_rollup: bool = False
    ranges: tuple[tuple[datetime, datetime], ...] = ()

    def sources(
        self, add: Callable[[Any], str], columns: Iterable[str], unit: str | None, zone: ZoneInfo
    ) -> list[str]:
        """SELECTs of the columns, with the beginning of the unit before them, and `n`, how many events.

        Args: add: takes a parameter and returns its name.
        """
        columns = list(columns)
        label = f"date_trunc('{unit}', {{}}, {add(zone.key)}) AS begin" if unit else None
        if not self.by_rollup:
            return [self._from_events(columns, label, list(self.filters.parts(add)))]
        whole = replace(self.filters, start_time=None, end_time=None)
        selects = self._from_rollup(add, whole, columns, label)
        # One by one: of two ranges in one condition an index would read all that lies between them.
        for start, end in self.ranges:
            bounds = [f"occurred_at >= {add(start)}", f"occurred_at < {add(end)}"]
            selects.append(self._from_events(columns, label, [*bounds, *whole.parts(add)]))
        return selects

    @staticmethod
    def _from_events(columns: list[str], label: str | None, parts: list[str]) -> str:
        chosen = [label.format("occurred_at")] if label else []
        # The rollup has '' for no tenant.
        chosen += ["nullif(tenant_id, '') AS tenant_id" if c == "tenant_id" else c for c in columns]
        return _select(chosen, "count(*)", "audit_events", parts)

    def _from_rollup(
        self, add: Callable[[Any], str], whole: Filters, columns: list[str], label: str | None
    ) -> list[str]:
        chosen = ["nullif(tenant_id, '') AS tenant_id" if c == "tenant_id" else c for c in columns]
        parts = list(whole.parts(add))
        start, end = self.filters.start_time, self.filters.end_time
        first = after = "NULL"
        if start is not None:
            first = add(_day_of(start))
            parts.append(f"day >= {first}")
        if end is not None:
            after = add(_day_of(end - timedelta(microseconds=1)) + _DAY)
            parts.append(f"day < {after}")
        cut = [day for start, end in self.ranges for day in _days(start, end)]
        if cut:
            parts.append(f"day <> ALL({add(cut)}::date[])")
        keys = chosen if label is None else ["day", *chosen]

        def sums(table: str, *more: str) -> str:
            return _select(keys, "sum(events)", table, [*more, *parts])

        if _of_all_tenants(whole, columns):
            # Who sees one tenant alone has no totals, but rows of the function, where all others have none.
            selects = [
                sums("audit_rollup_totals"),
                sums("audit_rollup", "batch IS NOT NULL"),
                sums(f"audit_rollup_of_tenant({first}, {after})"),
            ]
        else:
            selects = [sums("audit_rollup")]
        if label is None:
            return selects
        # The unit is found for each day, not for each row.
        begin = label.format("day::timestamp AT TIME ZONE 'UTC'")
        return [
            f"SELECT {', '.join([begin, *columns, 'n'])} FROM ({' UNION ALL '.join(selects)}) AS days"  # noqa: S608 (names and conditions of ours)
        ]


def plan(filters: Filters, columns: Iterable[str], unit: str | None, zone: ZoneInfo) -> Counting:
    """How to count these events by these columns and this unit of time."""
    by_events = Counting(filters)
    excluded = filters.exclude
    if (
        not set(columns) <= set(ROLLUP_COLUMNS)
        or not filters.given() <= _ROLLUP_FILTERS
        or (excluded is not None and not excluded.given() <= _ROLLUP_FILTERS)
        or unit in {"minute", "hour"}
        or any("" in (one.tenant_id or ()) for one in (filters, excluded) if one is not None)
    ):
        return by_events
    start, end = filters.start_time, filters.end_time
    if any(moment is not None and not _FIRST_YEAR < moment.year < _LAST_YEAR for moment in (start, end)) or (
        start is not None and end is not None and start >= end
    ):
        return by_events
    cuts = [moment for moment in (start, end) if moment is not None]
    if unit is not None and zone.key not in _UTC_NAMES:
        if unit == "day" or start is None or end is None:
            return by_events
        for moment in begins(unit, start, end, zone):
            cuts.append(max(moment, start))
            if len(cuts) > _MOST_CUTS:
                return by_events
    ranges = _ranges(cuts, start, end)
    return Counting(filters, by_rollup=True, ranges=ranges)


def _of_all_tenants(filters: Filters, columns: Iterable[str]) -> bool:
    """Is the same counted whichever tenant an event is of?"""
    asked = [filters.tenant_id, filters.exclude and filters.exclude.tenant_id]
    return "tenant_id" not in columns and not any(one is not None for one in asked)


def _ranges(
    cuts: list[datetime], start: datetime | None, end: datetime | None
) -> tuple[tuple[datetime, datetime], ...]:
    """The UTC days that are cut in two, each from its first moment that is asked for to its last."""
    days = sorted({_day_of(moment) for moment in cuts if moment.astimezone(UTC).time() != time()})
    made = []
    for day in days:
        first = datetime.combine(day, time(), UTC)
        after = first + _DAY
        low, high = (max(first, start) if start else first), (min(after, end) if end else after)
        if low < high:
            made.append((low, high))
    return tuple(made)


def _select(chosen: list[str], count: str, table: str, parts: list[str]) -> str:
    where = f" WHERE {' AND '.join(parts)}" if parts else ""
    group = f" GROUP BY {', '.join(str(place) for place in range(1, len(chosen) + 1))}" if chosen else ""
    return f"SELECT {', '.join([*chosen, f'{count} AS n'])} FROM {table}{where}{group}"  # noqa: S608 (names and conditions of ours)


def _day_of(moment: datetime) -> date:
    return moment.astimezone(UTC).date()


def _days(start: datetime, end: datetime) -> list[date]:
    first, last = _day_of(start), _day_of(end - timedelta(microseconds=1))
    return [first + n * _DAY for n in range((last - first).days + 1)]
