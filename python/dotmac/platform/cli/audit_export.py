"""`dotmac audit export|forward`, and `import` of what was exported."""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from dotmac.platform.cli.audit_options import AsJson, Since, Until, Url, filtered, moment_of
from dotmac.platform.cli.output import show_json, visible
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dotmac.platform.audit_trail import (
        Destination,
        ExportProgress,
        ExportSummary,
        ForwardSummary,
        RestoreProgress,
        RestoreSummary,
    )

__all__ = ["add_to", "restore"]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(filtered(export))
    app.command()(filtered(forward))


def export(
    filters: dict[str, Any],
    *,
    file: Annotated[
        str, typer.Argument(help="Where to: a path, a URL such as s3://…, or - for standard output.")
    ],
    format: Annotated[  # noqa: A002 (the option's name)
        str | None,
        typer.Option("--format", help="json, ndjson, csv, parquet, pdf or ocsf; default: by the name."),
    ] = None,
    compression: Annotated[
        str | None, typer.Option("--compression", help="gzip or zstd; default: by the name (.gz, .zst).")
    ] = None,
    since: Since = None,
    until: Until = None,
    newest_first: Annotated[bool, typer.Option("--newest-first", help="Descending by time.")] = False,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Begin anew, and keep nothing when interrupted.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Write events to a file, complete or not at all; run again after an interruption, it goes on."""
    from dotmac.platform.audit_trail import AuditAggregator

    start, end = moment_of("--since", since), moment_of("--until", until)
    to_stdout = file == "-"

    async def work() -> ExportSummary:
        async with AuditAggregator(url) as audit:
            shown = sys.stderr.isatty() and not as_json
            total = await audit.count_events(start, end, **filters) if shown else None
            with _Bar("export", total, quiet=as_json) as bar:
                return await audit.export_events(
                    sys.stdout.buffer if to_stdout else file,
                    format,
                    start,
                    end,
                    order="desc" if newest_first else "asc",
                    compression=compression,
                    resume=not no_resume,
                    progress=bar.exported,
                    **filters,
                )

    made = _run(work)
    if as_json and not to_stdout:
        show_json(made.to_dict())
        return
    if made.started_over:
        typer.echo(f"began anew: {made.started_over}", err=True)
    if made.resumed_rows:
        typer.echo(f"went on after {made.resumed_rows} events", err=True)
    typer.echo(
        f"{made.rows} events, {made.size} bytes, as of {made.as_of.isoformat(timespec='seconds')}\n"
        f"sha256 {made.sha256}",
        err=to_stdout,
    )


def restore(file: Path, url: str | None, *, as_json: bool) -> None:
    """Take an export in again."""
    from dotmac.platform.audit_trail import AuditAggregator

    async def work() -> RestoreSummary:
        with _Bar(file.name, None, quiet=as_json) as bar:
            async with AuditAggregator(url) as audit:
                return await audit.import_events(file, progress=bar.restored)

    found = _run(work)
    if as_json:
        show_json(found.to_dict())
        return
    typer.echo(
        f"{found.records} events: {found.stored} stored, {found.present} there already, {found.bad} bad"
    )
    for number, why in found.bad_records:
        typer.echo(f"  record {number}: {visible(why)}")
    if found.bad > len(found.bad_records):
        typer.echo(f"  … and {found.bad - len(found.bad_records)} more")


def forward(
    filters: dict[str, Any],
    *,
    destination: Annotated[
        str, typer.Argument(help="syslog+udp://, syslog+tcp:// or syslog+tls://host[:port], or https://…")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Under which the position is kept; default: the destination.")
    ] = None,
    from_start: Annotated[
        bool,
        typer.Option("--from-start", help="A name that is new begins with the first event, not with now."),
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="End when all that is stored now is delivered.")
    ] = False,
    dead_letters: Annotated[
        bool, typer.Option("--dead-letters", help="Only deliver what was put aside, and end.")
    ] = False,
    payload: Annotated[str, typer.Option("--payload", help="json or ocsf.")] = "json",
    ca_file: Annotated[
        Path | None, typer.Option("--ca-file", help="Authorities for syslog+tls; default: the system's.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Deliver events to syslog or a webhook as they are stored, until interrupted.

    Webhooks are signed with AUDIT_TRAIL_FORWARD_SECRET.
    """
    from dotmac.platform.audit_trail import AuditAggregator

    to = _destination(destination, payload, ca_file)

    async def work() -> ForwardSummary | int:
        async with AuditAggregator(url) as audit:
            try:
                if dead_letters:
                    return await audit.retry_dead_letters(to, name=name)
                with _Bar(to.label, None, quiet=as_json) as bar:
                    return await audit.forward_events(
                        to,
                        name=name,
                        start="beginning" if from_start else "now",
                        once=once,
                        progress=bar.forwarded,
                        **filters,
                    )
            finally:
                await to.aclose()

    found = _run(work)
    if isinstance(found, int):
        show_json({"delivered": found}) if as_json else typer.echo(f"{found} events delivered")
    elif as_json:
        show_json(found.to_dict())
    elif found.elsewhere:
        typer.echo("another process delivers there")
    else:
        typer.echo(
            f"{found.delivered} events delivered, {found.dead_letters} put aside, "
            f"{found.failures} tries failed"
        )


def _destination(url: str, payload: str, ca_file: Path | None) -> Destination:
    from dotmac.platform.audit_trail import SyslogDestination, WebhookDestination
    from dotmac.platform.core.unified_config import get_config

    section = get_config().audit_trail
    if url.startswith(("http://", "https://")):
        secret = section.forward_secret
        if secret is None:
            raise InvalidArgument(
                "AUDIT_TRAIL_FORWARD_SECRET", None, "set it: what is posted is signed with it"
            )
        return WebhookDestination(
            url, secret=secret.get_secret_value(), payload=payload, timeout=section.forward_timeout
        )
    context = None
    if ca_file is not None:
        try:
            context = ssl.create_default_context(cafile=os.fspath(ca_file))
        except OSError as error:  # ssl.SSLError is one
            raise InvalidArgument("--ca-file", str(ca_file), f"give a readable PEM file ({error})") from error
    return SyslogDestination(url, payload=payload, timeout=section.forward_timeout, ssl_context=context)


def _run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await work()

    try:
        return asyncio.run(main())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


class _Bar:
    """A progress bar on standard error, so that standard output stays a program's."""

    def __init__(self, name: str, total: int | None, *, quiet: bool) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.completed:,.0f} events {task.fields[more]}"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._bar.add_task(visible(name), total=total, more="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def exported(self, done: ExportProgress) -> None:
        self._bar.update(self._task, completed=done.rows, more=f"{done.size / 1e6:,.1f} MB")

    def restored(self, done: RestoreProgress) -> None:
        self._bar.update(self._task, completed=done.records, more=f"{done.bad} bad" if done.bad else "")

    def forwarded(self, done: ForwardSummary) -> None:
        more = f"{done.failures} tries failed, {done.dead_letters} put aside" if done.failures else ""
        self._bar.update(self._task, completed=done.delivered, more=more)
