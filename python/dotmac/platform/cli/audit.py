"""`dotmac audit`: `import` here, the other commands in files of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from dotmac.platform.cli import audit_export, audit_integrity, audit_privacy, audit_queries, audit_upkeep
from dotmac.platform.cli.audit_options import AsJson, Tenant, Url, zone_of
from dotmac.platform.cli.audit_report import report
from dotmac.platform.cli.output import show_json, show_table, visible

if TYPE_CHECKING:
    from dotmac.platform.audit_trail import ImportSummary
    from dotmac.platform.audit_trail.importer import Progress

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)
audit_queries.add_to(app)
app.command()(report)
audit_integrity.register(app)
audit_upkeep.register(app)
audit_export.add_to(app)
audit_privacy.add_to(app)


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="The log or export.", exists=True, dir_okay=False, readable=True)
    ],
    format: Annotated[  # noqa: A002 (the option's name)
        str | None,
        typer.Option(help="sshd or ndjson for a log; default: an export, of which kind its name tells."),
    ] = None,
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
    """Read a log or an export into the trail; run it again to go on where it stopped."""
    if format is None:
        audit_export.restore(file, url, as_json=as_json)
        return
    from dotmac.platform.audit_trail import AuditAggregator, import_events

    zone = zone_of(time_zone)

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
