"""`dotmac audit query|import|tail`."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer

from dotmac.platform.cli.output import show_json, show_table, visible
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from dotmac.platform.audit_trail import AuditEvent, EventPage, ImportSummary
    from dotmac.platform.audit_trail.importer import Progress

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON; for tail, one object per line.")]
Url = Annotated[str | None, typer.Option("--url", help="Database; default: the configuration's.")]
Category = Annotated[list[str] | None, typer.Option("--category", help="Repeatable.")]
Level = Annotated[list[str] | None, typer.Option("--level", help="Repeatable.")]
Action = Annotated[list[str] | None, typer.Option("--action", help="Repeatable; * stands for anything.")]
Outcome = Annotated[list[str] | None, typer.Option("--outcome", help="Repeatable.")]
User = Annotated[str | None, typer.Option("--user", help="User id.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Tenant id.")]
Address = Annotated[str | None, typer.Option("--address", help="Address or network, 10.0.0.0/8.")]
Correlation = Annotated[str | None, typer.Option("--correlation", help="Correlation id.")]
Score = Annotated[float | None, typer.Option("--min-score", help="Least anomaly score, 0 to 1.")]

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_COLUMNS = ("time", "level", "category", "action", "outcome", "user", "tenant", "address", "score", "reason")


def _filters(
    category: list[str] | None,
    level: list[str] | None,
    action: list[str] | None,
    outcome: list[str] | None,
    user: str | None,
    tenant: str | None,
    address: str | None,
    correlation: str | None,
    score: float | None,
) -> dict[str, Any]:
    return {
        "categories": category or None,
        "levels": level or None,
        "actions": action or None,
        "outcome": outcome or None,
        "user_id": user,
        "tenant_id": tenant,
        "ip_address": address,
        "correlation_id": correlation,
        "min_anomaly_score": score,
    }


@app.command()
def query(
    since: Annotated[
        str | None, typer.Option(help="First moment: ISO 8601, or 30m, 12h, 7d, 2w ago.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Moment after the last, in the same forms.")] = None,
    category: Category = None,
    level: Level = None,
    action: Action = None,
    outcome: Outcome = None,
    user: User = None,
    tenant: Tenant = None,
    address: Address = None,
    correlation: Correlation = None,
    min_score: Score = None,
    limit: Annotated[int, typer.Option(help="Events per page, at most 10000.")] = 100,
    cursor: Annotated[str | None, typer.Option(help="Go on where the page before ended.")] = None,
    oldest_first: Annotated[bool, typer.Option("--oldest-first", help="Ascending by time.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Find events; all filters must hold."""
    from dotmac.platform.audit_trail import AuditAggregator

    filters = _filters(category, level, action, outcome, user, tenant, address, correlation, min_score)
    start, end = _moment("--since", since), _moment("--until", until)
    order = "asc" if oldest_first else "desc"

    async def work() -> EventPage:
        async with AuditAggregator(url) as audit:
            return await audit.query_events(start, end, limit=limit, cursor=cursor, order=order, **filters)

    page = asyncio.run(work())
    if as_json:
        show_json({"events": [event.to_dict() for event in page], "next_cursor": page.next_cursor})
        return
    show_table(_COLUMNS, [_cells(event) for event in page])
    if page.next_cursor is not None:
        typer.echo(f"more: --cursor {page.next_cursor}", err=True)


@app.command()
def tail(
    category: Category = None,
    level: Level = None,
    action: Action = None,
    outcome: Outcome = None,
    user: User = None,
    tenant: Tenant = None,
    address: Address = None,
    correlation: Correlation = None,
    min_score: Score = None,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin with the first event.")] = False,
    stop_after: Annotated[int | None, typer.Option("--stop-after", help="End after so many events.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Follow the trail: every event as it is stored, until interrupted."""
    from dotmac.platform.audit_trail import AuditAggregator

    filters = _filters(category, level, action, outcome, user, tenant, address, correlation, min_score)

    async def work() -> None:
        shown = 0
        async with AuditAggregator(url) as audit:
            if stop_after == 0:
                return
            async for event in audit.tail(since_start=from_start, **filters):
                if as_json:
                    line = json.dumps(event.to_dict(), ensure_ascii=False)
                else:
                    line = "  ".join(visible(cell) for cell in _cells(event) if cell)
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
                shown += 1
                if shown == stop_after:
                    return

    try:
        asyncio.run(work())
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="The log.", exists=True, dir_okay=False, readable=True)],
    format: Annotated[str, typer.Option(help="sshd or ndjson.")],  # noqa: A002 (the option's name)
    year: Annotated[
        int | None, typer.Option(help="Year of an sshd log's first line; default: inferred.")
    ] = None,
    time_zone: Annotated[str | None, typer.Option(help="Zone of times without one; default: local.")] = None,
    tenant: Tenant = None,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Read all again; adds nothing twice.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Read a log into the trail; run it again to go on where it stopped."""
    from dotmac.platform.audit_trail import AuditAggregator, import_events

    zone = _zone(time_zone)

    async def work() -> ImportSummary:
        with _Bar(file.name, quiet=as_json) as bar:
            async with AuditAggregator(url) as audit:
                return await import_events(
                    audit,
                    file,
                    format=format,
                    year=year,
                    time_zone=zone,
                    tenant_id=tenant,
                    resume=not from_start,
                    progress=bar.update,
                )

    found = asyncio.run(work())
    if as_json:
        show_json(found.to_dict())
    else:
        _show_summary(found)


class _Bar:
    """A progress bar on standard error, so that standard output stays a program's."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TextColumn("{task.fields[lines]} lines, {task.fields[bad]} bad"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._bar.add_task(name, total=None, lines=0, bad=0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: Progress) -> None:
        self._bar.update(self._task, completed=done.position, total=done.size, lines=done.lines, bad=done.bad)


def _show_summary(found: ImportSummary) -> None:
    if found.resumed_at:
        typer.echo(f"resumed after line {found.resumed_at}")
    typer.echo(
        f"{found.lines} lines: {found.stored} events stored, {found.present} there already, "
        f"{found.skipped} lines without an event, {found.bad} bad"
    )
    for number, why in found.bad_lines:
        typer.echo(f"  line {number}: {visible(why)}")
    if found.bad > len(found.bad_lines):
        typer.echo(f"  … and {found.bad - len(found.bad_lines)} more")
    if found.failures:
        rows = []
        for address, failures in found.top_attackers():
            flagged = found.flagged.get(address)
            rows.append(
                (address, failures, flagged.events if flagged else 0)
                + ((f"{flagged.score:.2f}", flagged.reasons[0]) if flagged else ("", ""))
            )
        show_table(("address", "failures", "anomalies", "score", "reason"), rows, title="attacking addresses")
    typer.echo(f"{found.anomalies} events flagged as anomalies")


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


def _moment(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    if text[-1:] in _UNITS and text[:-1].isdecimal():
        try:
            return datetime.now(UTC) - timedelta(**{_UNITS[text[-1]]: int(text[:-1])})
        except OverflowError:
            raise InvalidArgument(option, text, "that is before the year 1") from None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(option, text, "give ISO 8601 (2026-01-31T12:00) or 30m, 12h, 7d, 2w") from None


def _zone(name: str | None) -> ZoneInfo | None:
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidArgument("--time-zone", name, "give an IANA name such as Europe/Berlin") from None
