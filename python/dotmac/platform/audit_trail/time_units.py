"""Units of time of a histogram, in any time zone: where each begins.

Days and longer units begin at midnight on the wall; minutes and hours are cut from the time on the wall, so
that both hours of a night when clocks go back stay apart. PostgreSQL's `date_trunc(unit, moment, zone)` does
the same.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["UNITS", "begin_of", "begins", "zone_of"]

UNITS = ("minute", "hour", "day", "week", "month", "quarter", "year")
_SHORT = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1)}
_DAY = timedelta(days=1)


def zone_of(value: object) -> ZoneInfo:
    """The time zone of that name. Raises: InvalidArgument: it has none, or is unknown."""
    name = value.key if isinstance(value, ZoneInfo) else "UTC" if value is UTC else value
    try:
        if isinstance(name, str) and name:
            return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise InvalidArgument("time_zone", value, "give an IANA name such as Europe/Berlin, or a ZoneInfo of one")


def begin_of(unit: str, moment: datetime, zone: tzinfo) -> datetime:
    """When the unit that holds `moment` began; in `zone`."""
    local = moment.astimezone(zone)
    if unit in _SHORT:
        past = timedelta(seconds=local.second, microseconds=local.microsecond)
        if unit == "hour":
            past += timedelta(minutes=local.minute)
        return (moment.astimezone(UTC) - past).astimezone(zone)
    return _midnight(_first_day(unit, local.date()), zone)


def begins(unit: str, start: datetime, end: datetime, zone: tzinfo) -> Iterator[datetime]:
    """The beginning of each unit that has a moment in [start, end), in order; the first may lie before it."""
    begin = begin_of(unit, start, zone)
    while begin < end:
        yield begin
        if unit in _SHORT:
            begin = begin_of(unit, begin.astimezone(UTC) + _SHORT[unit], zone)
            continue
        day = begin.date()
        following = begin
        while following <= begin:  # a day that a zone left out begins when the next one does
            day = _next_day(unit, day)
            following = _midnight(day, zone)
        begin = following


def _midnight(day: date, zone: tzinfo) -> datetime:
    # By way of UTC: where midnight is left out, the day begins later on the wall.
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC).astimezone(zone)


def _first_day(unit: str, day: date) -> date:
    if unit == "week":
        return day - timedelta(days=day.weekday())
    if unit == "month":
        return day.replace(day=1)
    if unit == "quarter":
        return day.replace(month=day.month - (day.month - 1) % 3, day=1)
    if unit == "year":
        return day.replace(month=1, day=1)
    return day


def _next_day(unit: str, day: date) -> date:
    if unit == "day":
        return day + _DAY
    if unit == "week":
        return day + 7 * _DAY
    months = {"month": 1, "quarter": 3, "year": 12}[unit]
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, 1)
