"""Counts of events by unit of time and by field."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.filters import Parameters
from dotmac.platform.audit_trail.rollup import plan
from dotmac.platform.audit_trail.time_units import UNITS, begins
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable
    from zoneinfo import ZoneInfo

    import asyncpg

    from dotmac.platform.audit_trail.filters import Filters

__all__ = ["GROUPS", "MOST_BUCKETS", "Bucket", "Histogram", "Shape", "count_sql"]

# Fields by which events can be counted; what SQL reads for each.
GROUPS = {
    "category": "category",
    "level": "level",
    "outcome": "outcome",
    "action": "action",
    "user_id": "user_id",
    "tenant_id": "tenant_id",
    "resource_type": "resource_type",
    "resource_id": "resource_id",
    "ip_address": "host(ip_address) AS ip_address",
    "correlation_id": "correlation_id",
}
MOST_BUCKETS = 100_000
_MOST_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Bucket:
    """How many events fall together.

    Attributes:
        key: one value for each of the histogram's `by`: for a unit of time when it began, in the time zone
            that was asked for; for a field its value, None where events have none.
        count: events.
    """

    key: tuple[datetime | str | None, ...]
    count: int


class Histogram(list[Bucket]):
    """Buckets in the order of their keys.

    Attributes:
        by: what was counted by.
        time_zone: name of the zone of the units of time.
        source: `rollup` where the sums of whole days answered, else `events`; exact either way.
    """

    def __init__(self, buckets: Iterable[Bucket], by: tuple[str, ...], time_zone: str, source: str) -> None:
        super().__init__(buckets)
        self.by = by
        self.time_zone = time_zone
        self.source = source

    @property
    def total(self) -> int:
        """All events in it."""
        return sum(bucket.count for bucket in self)

    def to_dict(self) -> dict[str, Any]:
        """The histogram as JSON types: each bucket an object of the `by` and `count`."""
        return {
            "by": list(self.by),
            "time_zone": self.time_zone,
            "source": self.source,
            "total": self.total,
            "buckets": [
                dict(zip(self.by, (_plain(part) for part in bucket.key), strict=True))
                | {"count": bucket.count}
                for bucket in self
            ],
        }


@dataclass(frozen=True, slots=True)
class Shape:
    """What a histogram is by; make one with `of`."""

    by: tuple[str, ...]
    unit: str | None
    zone: ZoneInfo

    @classmethod
    def of(cls, by: object, zone: ZoneInfo) -> Shape:
        """Check what a caller gave. Raises: InvalidArgument."""
        names = (by,) if isinstance(by, str) else tuple(by) if isinstance(by, list | tuple) else ()
        allowed = f"give one or several of {', '.join([*UNITS, *GROUPS])}; only one of them a unit of time"
        units = [name for name in names if name in UNITS]
        if (
            not 0 < len(names) <= _MOST_GROUPS
            or any(name not in UNITS and name not in GROUPS for name in names)
            or len(set(names)) < len(names)
            or len(units) > 1
        ):
            raise InvalidArgument("by", by, allowed)
        return cls(names, units[0] if units else None, zone)

    def sql(self, filters: Filters) -> tuple[str, list[Any], str]:
        """The statement, its parameters, and what answers it."""
        values = Parameters()
        columns = [name for name in self.by if name != self.unit]
        counting = plan(filters, columns, self.unit, self.zone)
        sources = counting.sources(values.add, [GROUPS[name] for name in columns], self.unit, self.zone)
        keys = ["begin" if name == self.unit else name for name in self.by]
        order = ", ".join(key if key == "begin" else f'{key} COLLATE "C" NULLS LAST' for key in keys)
        sql = (
            f"SELECT {', '.join(keys)}, sum(n)::bigint AS n FROM ({' UNION ALL '.join(sources)}) AS part "  # noqa: S608 (names and conditions of ours)
            f"GROUP BY {', '.join(keys)} HAVING sum(n) <> 0 ORDER BY {order} LIMIT {MOST_BUCKETS + 1}"
        )
        return sql, values, "rollup" if counting.by_rollup else "events"

    def histogram(
        self, rows: list[asyncpg.Record], filters: Filters, source: str, *, fill: bool
    ) -> Histogram:
        """The histogram of what the statement found."""
        self._check_size(len(rows))
        place = None if self.unit is None else self.by.index(self.unit)
        buckets = []
        for *key, count in rows:
            if place is not None:
                key[place] = key[place].astimezone(self.zone)
            buckets.append(Bucket(tuple(key), count))
        if fill and place is not None:
            buckets = self._filled(buckets, filters, place)
        return Histogram(buckets, self.by, self.zone.key, source)

    def _filled(self, buckets: list[Bucket], filters: Filters, place: int) -> list[Bucket]:
        """With a bucket of 0 for each unit of the time asked for, and each combination of the other keys."""
        assert self.unit is not None
        found = [bucket.key[place] for bucket in buckets]
        seen = [moment for moment in found if isinstance(moment, datetime)]
        start = filters.start_time or (min(seen) if seen else None)
        end = filters.end_time or (max(seen).replace(microsecond=1) if seen else None)
        if start is None or end is None:
            return buckets
        rests = dict.fromkeys(_without(bucket.key, place) for bucket in buckets) or {(): None}
        if len(self.by) > 1 and not buckets:
            return buckets
        made = {bucket.key: bucket for bucket in buckets}
        for number, begin in enumerate(begins(self.unit, start, end, self.zone), 1):
            self._check_size(number * len(rests))
            for rest in rests:
                key = (*rest[:place], begin, *rest[place:])
                made.setdefault(key, Bucket(key, 0))
        return sorted(made.values(), key=lambda bucket: [_sortable(part) for part in bucket.key])

    def _check_size(self, buckets: int) -> None:
        if buckets > MOST_BUCKETS:
            raise InvalidArgument(
                "by",
                self.by if len(self.by) > 1 else self.by[0],
                f"that makes more than {MOST_BUCKETS} buckets: give a longer unit, fewer fields or less time",
            )


def count_sql(filters: Filters, zone: ZoneInfo) -> tuple[str, list[Any]]:
    """The statement that counts all events of the filters, and its parameters."""
    values = Parameters()
    sources = plan(filters, (), None, zone).sources(values.add, (), None, zone)
    return f"SELECT coalesce(sum(n), 0)::bigint FROM ({' UNION ALL '.join(sources)}) AS part", values  # noqa: S608 (names and conditions of ours)


def _without(key: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    return key[:place] + key[place + 1 :]


def _sortable(part: datetime | str | None) -> tuple[bool, Any]:
    return (part is None, part.timestamp() if isinstance(part, datetime) else (part or "").encode())


def _plain(part: datetime | str | None) -> str | None:
    return part.isoformat() if isinstance(part, datetime) else part
