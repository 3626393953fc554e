"""`dotmac audit verify|prove|checkpoint|explain|key`."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from dotmac.platform.cli.output import show_json, show_table, visible
from dotmac.platform.errors import ConfigurationError, InvalidArgument

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.integrity import IntegrityReport, VerifyProgress
    from dotmac.platform.audit_trail.integrity.sealer import SealResult

__all__ = ["register"]

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Url = Annotated[str | None, typer.Option("--url", help="Database; default: the configuration's.")]
Key = Annotated[
    list[str] | None,
    typer.Option("--key", help="Public key to trust (base64, PEM file, verifier key); repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add these commands to `dotmac audit`."""
    for command in (verify, prove, checkpoint, explain, key):
        app.command()(command)


def verify(
    since: Annotated[
        str | None, typer.Option(help="Events from here on: ISO 8601, or 30m, 12h, 7d, 2w ago.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Moment after the last, in the same forms.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant.")] = None,
    key: Key = None,
    anchor: Annotated[
        list[str] | None,
        typer.Option("--anchor", help="Place to read checkpoints back from; default: the configuration's."),
    ] = None,
    proof: Annotated[
        Path | None,
        typer.Option(help="Check this proof instead; needs no database.", exists=True, dir_okay=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 for notices, too.")] = False,
    max_findings: Annotated[int, typer.Option(help="Findings of a kind that are listed.")] = 1_000,
    connections: Annotated[
        int | None,
        typer.Option(help="So many read a large trail at once; default: one per processor, 2 to 4."),
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Find every changed, removed, inserted or moved event; exit code 1 where there is one."""
    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.cli.audit_options import moment_of

    keys = None if key is None else [_key(one) for one in key]
    if proof is not None:
        _verify_proof(proof, keys, as_json=as_json)
        return
    start, end = moment_of("--since", since), moment_of("--until", until)

    async def work() -> IntegrityReport:
        with _Bar(quiet=as_json) as bar:
            async with AuditAggregator(url, sealing=False) as audit:
                return await audit.verify_integrity(
                    start,
                    end,
                    tenant_id=tenant,
                    keys=keys,
                    anchors=anchor,
                    progress=bar.update,
                    max_findings=max_findings,
                    connections=connections,
                )

    report = asyncio.run(work())
    if as_json:
        show_json(report.to_dict())
    else:
        _show_report(report)
    if not report.ok or (strict and report.counts):
        raise typer.Exit(1)


def prove(
    event_id: Annotated[str, typer.Argument(help="Id of the event.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; default: standard output.")
    ] = None,
    url: Url = None,
) -> None:
    """Write the proof that an event is in the trail, as JSON."""
    from dotmac.platform.audit_trail import AuditAggregator

    async def work() -> dict[str, Any]:
        async with AuditAggregator(url, sealing=False) as audit:
            return await audit.prove(event_id)

    text = json.dumps(asyncio.run(work()), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgument("--output", str(output), f"it can't be written: {error.strerror}") from None


def checkpoint(url: Url = None, as_json: AsJson = False) -> None:
    """Seal what was stored, sign a checkpoint of every log that grew, anchor it: once, as a cron job does."""
    from dotmac.platform.audit_trail import AuditAggregator

    async def work() -> SealResult:
        async with AuditAggregator(url, sealing=False) as audit:
            return await audit.checkpoint()

    done = asyncio.run(work())
    if as_json:
        show_json(
            {
                "segments": done.segments,
                "checkpoints": [
                    {
                        "origin": one.checkpoint.origin,
                        "tenant_id": one.tenant_id,
                        "size": one.checkpoint.size,
                        "root": one.checkpoint.root.hex(),
                        "note": one.note,
                    }
                    for one in done.checkpoints
                ],
                "errors": [{"code": error.code, "text": str(error)} for error in done.errors],
            }
        )
    else:
        typer.echo(f"{done.segments} segments sealed, {len(done.checkpoints)} checkpoints signed")
        for one in done.checkpoints:
            typer.echo(f"  {visible(one.checkpoint.origin)}: {one.checkpoint.size} segments")
        for error in done.errors:
            typer.echo(f"error: {visible(str(error))}", err=True)
    if done.errors:
        raise typer.Exit(1)


def explain(
    writer: Annotated[str, typer.Argument(help="Id of the writer that `verify` told.")],
    reason: Annotated[str, typer.Argument(help="What happened, in words.")],
    url: Url = None,
) -> None:
    """Say why a writer ended without closing; `verify` does not tell it any more."""
    from dotmac.platform.audit_trail import AuditAggregator

    async def work() -> None:
        async with AuditAggregator(url, sealing=False) as audit:
            await audit.explain_writer(writer, reason)

    asyncio.run(work())
    typer.echo(f"explained: {writer}")


def key(
    new: Annotated[Path | None, typer.Option(help="Make a new key and write it to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the public half of the signing key, which those who verify need."""
    from dotmac.platform.audit_trail.integrity.keys import SigningKey, new_key_pem, signing_key
    from dotmac.platform.core.unified_config import get_config

    found: SigningKey | None
    if new is not None:
        try:
            # Not there before, and readable by nobody else at any moment.
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(new_key_pem())
        except OSError as error:
            raise InvalidArgument("--new", str(new), f"it can't be made: {error.strerror}") from None
        found = SigningKey.parse(new.read_bytes())
    else:
        found = signing_key(None, get_config().audit_trail)
    if found is None:
        raise ConfigurationError(
            "there is no signing key: set AUDIT_TRAIL_SIGNING_KEY or AUDIT_TRAIL_SIGNING_KEY_FILE, or make "
            "one with --new FILE"
        )
    public = base64.b64encode(found.public_key).decode()
    if as_json:
        show_json({"public_key": public})
    else:
        typer.echo(public)


def _key(text: str) -> bytes:
    from dotmac.platform.audit_trail.integrity.keys import public_key

    path = Path(text)
    try:
        data: str | bytes = path.read_bytes() if path.is_file() else text
    except OSError:
        data = text
    return public_key(data, name="--key")


def _verify_proof(file: Path, keys: list[bytes] | None, *, as_json: bool) -> None:
    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.audit_trail.integrity import check_proof, verifier_key

    trusted = keys if keys is not None else AuditAggregator().trusted_keys()
    if not trusted:
        raise InvalidArgument(
            "--key", None, "give the public key of the trail (`dotmac audit key` shows it), or configure it"
        )
    found = check_proof(file.read_bytes(), trusted)
    if as_json:
        show_json(
            {
                "ok": True,
                "event": found.event,
                "segment": found.segment,
                "origin": found.origin,
                "size": found.size,
                "key": base64.b64encode(found.key).decode(),
            }
        )
        return
    typer.echo(f"the proof holds: the event is in {visible(found.origin)}, at size {found.size}")
    typer.echo(f"signed by {visible(verifier_key(found.origin, found.key))}")
    show_table(("field", "value"), [(name, _cell(value)) for name, value in found.event.items()])


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _show_report(report: IntegrityReport) -> None:
    typer.echo(
        f"{report.events} events in {report.segments} segments, {report.log_entries} log entries, "
        f"{report.checkpoints} checkpoints, {report.anchored} anchored; {report.seconds:.1f} s"
    )
    for count, what in (
        (report.unsealed, "segments not sealed yet"),
        (report.dropped, "events dropped by retention, of which their segments still bear witness"),
        (report.legacy, "events from before integrity was recorded"),
    ):
        if count:
            typer.echo(f"{count} {what}")
    for title, findings in (("findings", report.problems), ("notices", report.notices)):
        if findings:
            show_table(
                ("kind", "tenant", "what", "expected", "found"),
                [(one.kind.value, one.tenant_id, one.text, one.expected, one.found) for one in findings],
                title=title,
            )
    told = len(report.findings)
    more = sum(report.counts.values()) - told + report.untold
    if more:
        typer.echo(f"… and {more} more")
    typer.echo("nothing was tampered with" if report.ok else "TAMPERED WITH: see the findings")


class _Bar:
    """A progress bar on standard error, so that standard output stays a program's."""

    def __init__(self, *, quiet: bool) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: VerifyProgress) -> None:
        if done.stage not in self._tasks:
            self._tasks[done.stage] = self._bar.add_task(done.stage, total=None)
        self._bar.update(self._tasks[done.stage], completed=done.done, total=done.total)
