"""`dotmac audit query|count|histogram|facets|timeline|tail`: commands that read events."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dotmac.platform.cli.audit_options import AsJson, Since, Tenant, Until, Url, filtered, moment_of
from dotmac.platform.cli.output import show_json, show_table, visible
from dotmac.platform.errors import AuditUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dotmac.platform.audit_trail import AuditAggregator, AuditEvent

__all__ = ["add_to"]

Answer = TypeVar("Answer")

Order = Annotated[bool, typer.Option("--oldest-first", help="Ascending by time.")]
_COLUMNS = ("time", "level", "category", "action", "outcome", "user", "tenant", "address", "score", "reason")
_FIELD = "category, level, outcome, action, user_id, tenant_id, resource_type, resource_id, ip_address"
_BAR = 40


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (query, count, histogram, facets, tail):
        app.command()(filtered(command))
    app.command()(timeline)


def query(
    filters: dict[str, Any],
    *,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(help="Events per page, at most 10000.")] = 100,
    cursor: Annotated[str | None, typer.Option(help="Another page's next or previous cursor.")] = None,
    oldest_first: Order = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Find events; all filters must hold."""
    start, end = _times(since, until)
    order = "asc" if oldest_first else "desc"
    page = _ask(
        url,
        lambda audit: audit.query_events(start, end, limit=limit, cursor=cursor, order=order, **filters),
    )
    if as_json:
        show_json(
            {
                "events": [event.to_dict() for event in page],
                "next_cursor": page.next_cursor,
                "previous_cursor": page.previous_cursor,
            }
        )
        return
    show_table(_COLUMNS, [_cells(event) for event in page])
    for name, there in (("more", page.next_cursor), ("back", page.previous_cursor)):
        if there is not None:
            typer.echo(f"{name}: --cursor {there}", err=True)


def count(
    filters: dict[str, Any],
    *,
    since: Since = None,
    until: Until = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """How many events there are."""
    start, end = _times(since, until)
    found = _ask(url, lambda audit: audit.count_events(start, end, **filters))
    if as_json:
        show_json({"count": found})
    else:
        typer.echo(found)


def histogram(
    filters: dict[str, Any],
    *,
    by: Annotated[
        list[str] | None,
        typer.Option(help=f"minute, hour, day, week, month, quarter, year; {_FIELD}. Repeatable."),
    ] = None,
    since: Since = None,
    until: Until = None,
    time_zone: Annotated[str, typer.Option(help="Whose days, an IANA name.")] = "UTC",
    fill: Annotated[bool, typer.Option("--fill", help="Show units without events too.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Counts by unit of time, by field, or by both; by day unless said otherwise."""
    start, end = _times(since, until)
    found = _ask(
        url,
        lambda audit: audit.histogram(
            start, end, by=tuple(by or ("day",)), time_zone=time_zone, fill=fill, **filters
        ),
    )
    if as_json:
        show_json(found.to_dict())
        return
    most = max((bucket.count for bucket in found), default=0)
    rows = [(*map(_key, bucket.key), bucket.count, "█" * (bucket.count * _BAR // most)) for bucket in found]
    show_table((*found.by, "events", ""), rows)


def facets(
    filters: dict[str, Any],
    *,
    field: Annotated[list[str] | None, typer.Option(help=f"{_FIELD}. Repeatable.")] = None,
    limit: Annotated[int, typer.Option(help="Values per field.")] = 10,
    since: Since = None,
    until: Until = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """The commonest values of fields."""
    start, end = _times(since, until)
    named = {"fields": field} if field else {}
    found = _ask(url, lambda audit: audit.facets(start, end, limit=limit, **named, **filters))
    if as_json:
        show_json({"facets": [facet.to_dict() for facet in found.values()]})
        return
    rows: list[tuple[object, ...]] = []
    for facet in found.values():
        rows += [
            (facet.field, "(none)" if one.value is None else one.value, one.count) for one in facet.values
        ]
        if facet.other:
            rows.append((facet.field, f"({facet.distinct - len(facet.values)} others)", facet.other))
    show_table(("field", "value", "events"), rows)


def timeline(
    correlation_id: Annotated[str, typer.Argument(help="What the events share.")],
    tenant: Tenant = None,
    limit: Annotated[int, typer.Option(help="Events at most.")] = 1_000,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """The events of one piece of work, oldest first, with the time between them."""
    found = _ask(url, lambda audit: audit.timeline(correlation_id, limit=limit, tenant_id=tenant))
    if as_json:
        show_json(found.to_dict())
        return
    gap = found.longest_gap
    show_table(
        ("since start", "gap", *_COLUMNS),
        [
            (
                f"{step.since_start.total_seconds():.6f}",
                f"{step.since_previous.total_seconds():.6f}{' longest' if step is gap else ''}",
                *_cells(step.event),
            )
            for step in found
        ],
    )
    more = ", and there are more" if found.truncated else ""
    typer.echo(f"{len(found)} events{more} in {found.duration.total_seconds():.6f} s")


def tail(
    filters: dict[str, Any],
    *,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin with the first event.")] = False,
    after: Annotated[str | None, typer.Option(help="Go on where another tail ended.")] = None,
    stop_after: Annotated[int | None, typer.Option("--stop-after", help="End after so many events.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Follow the trail: every event as it is stored, until interrupted."""
    from dotmac.platform.audit_trail import AuditAggregator

    position: str | None = after

    async def work() -> None:
        nonlocal position
        shown = 0
        async with (
            AuditAggregator(url) as audit,
            audit.tail(since_start=from_start, after=after, **filters) as events,
        ):
            while shown != stop_after:
                try:
                    event = await anext(events)
                except AuditUnavailable as error:
                    typer.echo(f"waiting: {visible(str(error))}", err=True)
                    continue
                sys.stdout.write(_line(event, as_json=as_json) + "\n")
                sys.stdout.flush()
                position = events.position
                shown += 1

    try:
        asyncio.run(work())
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    finally:
        if position is not None:
            typer.echo(f"go on: --after {position}", err=True)


def _ask(url: str | None, question: Callable[[AuditAggregator], Awaitable[Answer]]) -> Answer:
    from dotmac.platform.audit_trail import AuditAggregator

    async def work() -> Answer:
        async with AuditAggregator(url) as audit:
            return await question(audit)

    return asyncio.run(work())


def _times(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    return moment_of("--since", since), moment_of("--until", until)


def _line(event: AuditEvent, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(event.to_dict(), ensure_ascii=False)
    return "  ".join(visible(cell) for cell in _cells(event) if cell)


def _key(part: object) -> object:
    return (
        part.isoformat(timespec="minutes")
        if isinstance(part, datetime)
        else "(none)"
        if part is None
        else part
    )


def _cells(event: AuditEvent) -> tuple[str, ...]:
    return (
        event.occurred_at.isoformat(timespec="milliseconds"),
        event.level.value,
        event.category.value,
        event.action,
        event.outcome.value,
        event.user_id or "",
        event.tenant_id or "",
        event.ip_address or "",
        f"{event.anomaly_score:.2f}" if event.anomaly_score else "",
        event.anomaly_reasons[0] if event.anomaly_reasons else "",
    )
