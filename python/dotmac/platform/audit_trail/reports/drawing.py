"""What the charts of a report show."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.reports.model import Chart
from dotmac.platform.audit_trail.reports.spec import PERIOD

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dotmac.platform.audit_trail.reports.facts import Facts
    from dotmac.platform.audit_trail.reports.spec import ChartSpec, Spec
    from dotmac.platform.audit_trail.reports.statements import Statements

__all__ = ["charts"]

_OUTCOMES = ("success", "failure", "denied", "unknown")
# A bar is the shortest of these that makes at most so many of them.
_UNITS = (("hour", timedelta(hours=1)), ("day", timedelta(days=1)), ("week", timedelta(days=7)))
_MOST_BARS = 93


async def charts(run: Statements, facts: Facts, spec: Spec) -> tuple[Chart, ...]:
    """Events over time, by category, and what the framework's own charts show; none where nothing is."""
    if not facts.completeness["events"]:
        return ()
    made: list[Chart | None] = [await _over_time(run, facts), _by_category(facts)]
    made.extend(_of_section(facts, one) for one in spec.charts)
    return tuple(one for one in made if one is not None)


async def _over_time(run: Statements, facts: Facts) -> Chart:
    length = facts.end - facts.start
    unit = next((name for name, step in _UNITS if length / step <= _MOST_BARS), "month")
    sql = f"""
        SELECT date_trunc('{unit}', e.occurred_at AT TIME ZONE $zone) AS bar, e.outcome, count(*) AS events
        FROM audit_events e WHERE {PERIOD} GROUP BY 1, 2
    """  # noqa: S608 (constants of ours)
    found: dict[tuple[datetime, str], int] = {}
    for row in await run.rows(sql):
        outcome = row["outcome"] if row["outcome"] in _OUTCOMES else "unknown"
        found[row["bar"], outcome] = found.get((row["bar"], outcome), 0) + row["events"]
    bars = list(_bars(facts, unit))
    named = [outcome for outcome in _OUTCOMES if any(one == outcome for _, one in found)]
    return Chart(
        title=f"Events by {unit} and outcome ({facts.zone.key})",
        labels=tuple(_label(bar, unit) for bar in bars),
        series={outcome: tuple(found.get((bar, outcome), 0) for bar in bars) for outcome in named},
        over_time=True,
    )


def _bars(facts: Facts, unit: str) -> Iterable[datetime]:
    """Beginnings of the bars, in local time without a zone, as `date_trunc` gives them."""
    first = facts.start.astimezone(facts.zone).replace(tzinfo=None)
    last = (facts.end - timedelta(microseconds=1)).astimezone(facts.zone).replace(tzinfo=None)
    if unit == "hour":
        # In UTC: an hour that the clock repeats is one bar, one that it skips is none.
        seen, moment = set(), facts.start.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        while moment < facts.end:
            bar = moment.astimezone(facts.zone).replace(tzinfo=None, minute=0, second=0, microsecond=0)
            if bar not in seen:
                seen.add(bar)
                yield bar
            moment += timedelta(minutes=30)
        return
    bar = first.replace(hour=0, minute=0, second=0, microsecond=0)
    if unit == "week":
        bar -= timedelta(days=bar.weekday())
    elif unit == "month":
        bar = bar.replace(day=1)
    while bar <= last:
        yield bar
        if unit == "month":
            bar = (bar + timedelta(days=32)).replace(day=1)
        else:
            bar += timedelta(days=7 if unit == "week" else 1)


def _label(bar: datetime, unit: str) -> str:
    if unit == "hour":
        return bar.strftime("%m-%d %H:00")
    return bar.strftime("%Y-%m") if unit == "month" else bar.strftime("%Y-%m-%d")


def _by_category(facts: Facts) -> Chart:
    counts = facts.completeness["events_by_category"]
    order = sorted(counts, key=lambda name: (-counts[name], name))
    return Chart(
        title="Events by category",
        labels=tuple(order),
        series={"events": tuple(counts[name] for name in order)},
    )


def _of_section(facts: Facts, spec: ChartSpec) -> Chart | None:
    section = facts.sections[spec.section]
    by, value = section.columns.index(spec.by), section.columns.index(spec.value)
    sums: dict[str, float] = {}
    for row in section.rows:
        number = row[value]
        if isinstance(number, int | float):
            sums[str(row[by])] = sums.get(str(row[by]), 0) + number
    order = sorted((name for name in sums if sums[name]), key=lambda name: (-sums[name], name))[: spec.most]
    if not order:
        return None
    more = "" if len(sums) <= spec.most else f", the {spec.most} most of {len(sums)}"
    return Chart(
        title=spec.title + more,
        labels=tuple(order),
        series={spec.value: tuple(sums[name] for name in order)},
        unit=spec.value,
    )
