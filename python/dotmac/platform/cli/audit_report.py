"""`dotmac audit report`."""

from __future__ import annotations

import asyncio
import sys
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dotmac.platform.cli.output import visible
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dotmac.platform.audit_trail.reports.model import ComplianceReport

    Progress = Callable[[int, int, str], None]

__all__ = ["report"]

# What the CSV files of a report come in.
_SUFFIXES = {"json": ".json", "csv": ".zip", "html": ".html", "pdf": ".pdf"}


def report(
    report_type: Annotated[
        str, typer.Argument(metavar="TYPE", help="access_log, gdpr, hipaa, pci_dss, soc2 or sox.")
    ],
    start: Annotated[
        str, typer.Option("--from", help="First day (2026-01-01), or an exact moment, ISO 8601.")
    ],
    end: Annotated[str, typer.Option("--to", help="Last day, included; or the moment after the last.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="json, csv (a file per section, zipped), html or pdf; default: by --output, else json.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; default: standard output.")
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's events.")] = None,
    time_zone: Annotated[str, typer.Option(help="IANA name of the zone in which days begin.")] = "UTC",
    subject: Annotated[
        str | None, typer.Option("--subject", help="The one person (gdpr) or patient (hipaa) it is about.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option("--records", help="Record of processing activities (gdpr): .json, .toml, .csv."),
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Rows per section at most, up to 100000.")] = 10_000,
    sample_size: Annotated[int, typer.Option(help="Events of each sample.")] = 25,
    seed: Annotated[
        str | None, typer.Option(help="Seed of the samples; default: from the parameters.")
    ] = None,
    page_size: Annotated[str, typer.Option(help="Of a PDF: A4 or letter.")] = "A4",
    font: Annotated[
        list[Path] | None,
        typer.Option("--font", help="TrueType font to embed in a PDF for East Asian text; repeatable."),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for the whole.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Database; default: the configuration's.")] = None,
) -> None:
    """Report on a period for an auditor. The same options over the same events give the same bytes."""
    from dotmac.platform.audit_trail import AuditAggregator

    suffix = _suffix(form, output)
    if output is None and suffix in (".zip", ".pdf") and sys.stdout.isatty():
        raise InvalidArgument("--output", None, f"give a file: {suffix[1:]} is not for terminals")
    first, last = _day("--from", start), _day("--to", end)

    async def work(tell: Progress) -> ComplianceReport:
        async with AuditAggregator(url) as audit:
            return await audit.generate_compliance_report(
                first,
                last,
                report_type,
                tenant,
                time_zone=time_zone,
                max_rows=max_rows,
                sample_size=sample_size,
                seed=seed,
                subject_id=subject,
                processing_records=records,
                timeout=timeout,
                progress=tell,
            )

    made = asyncio.run(_with_bar(work))
    data = made.to_pdf(page_size=page_size, fonts=font or ()) if suffix == ".pdf" else made.to_bytes(suffix)
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    output.write_bytes(data)
    known = made.completeness
    typer.echo(
        f"{visible(str(output))}: {known['events']} events, {len(made.sections)} sections, {len(data)} bytes",
        err=True,
    )
    typer.echo(f"body SHA-256 {made.body_sha256}", err=True)


async def _with_bar(work: Callable[[Progress], Awaitable[ComplianceReport]]) -> ComplianceReport:
    from rich import progress
    from rich.console import Console

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("report", total=None)

        def tell(done: int, total: int, title: str) -> None:
            bar.update(task, completed=done, total=total, description=title[:60])

        return await work(tell)


def _suffix(form: str | None, output: Path | None) -> str:
    if form is not None:
        if form not in _SUFFIXES:
            raise InvalidArgument("--format", form, f"give one of {', '.join(_SUFFIXES)}")
        return _SUFFIXES[form]
    if output is None:
        return ".json"
    if output.suffix not in _SUFFIXES.values():
        raise InvalidArgument(
            "--output", str(output), f"give a file that ends in {', '.join(_SUFFIXES.values())}, or --format"
        )
    return output.suffix


def _day(option: str, text: str) -> date | datetime:
    try:
        return date.fromisoformat(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(
            option, text, "give a day (2026-01-31) or ISO 8601 (2026-01-31T12:00)"
        ) from None
