"""`dotmac audit erase-subject|subject-access|new-personal-key|rotate-personal-key`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dotmac.platform.cli.output import show_json, visible

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.erasure import Erasure
    from dotmac.platform.audit_trail.subject_access import SubjectAccessSummary

__all__ = ["add_to"]

Subject = Annotated[str, typer.Argument(help="Subject id, as the events bear it.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="The subject's tenant.")]
Url = Annotated[str | None, typer.Option("--url", help="Database; default: the configuration's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to the group `audit`."""
    app.command("erase-subject")(erase_subject)
    app.command("subject-access")(subject_access)
    app.command("new-personal-key")(new_personal_key)
    app.command("rotate-personal-key")(rotate_personal_key)


def erase_subject(
    subject: Subject,
    reason: Annotated[str, typer.Option(help="Why; stored and reported.")],
    by: Annotated[str, typer.Option(help="Who decided it.")],
    tenant: Tenant = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a person's data in the trail unreadable for ever; the events stay."""
    from dotmac.platform.audit_trail import AuditAggregator

    if not yes:
        typer.confirm(
            f"Destroy the key of {visible(subject)!r}? Nobody can read their data then.", abort=True, err=True
        )

    async def work() -> Erasure:
        async with AuditAggregator(url) as audit:
            return await audit.erase_subject(subject, reason=reason, by=by, tenant_id=tenant)

    done = asyncio.run(work())
    if as_json:
        show_json(done.to_dict())
    elif done.key_id is None:
        typer.echo("nothing to erase: the trail holds no personal data of this subject")
    else:
        was = "" if done.new else f", already by {done.erased_by}"
        typer.echo(visible(f"key {done.key_id} ({done.fingerprint}) destroyed at {done.erased_at}{was}"))
        typer.echo(f"{done.fields} fields of {done.events} events can't be read any more")
        typer.echo(f"certificate: event {done.certificate}")


def subject_access(
    subject: Subject,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; default: standard output.", dir_okay=False)
    ] = None,
    format: Annotated[  # noqa: A002 (the option's name)
        str | None, typer.Option(help="json or html; default: by the file's name, else json.")
    ] = None,
    tenant: Tenant = None,
    url: Url = None,
) -> None:
    """Everything that the trail holds about a person, for that person: others are masked."""
    from dotmac.platform.audit_trail import AuditAggregator

    async def work() -> SubjectAccessSummary:
        async with AuditAggregator(url) as audit:
            target = sys.stdout if output is None else output
            return await audit.export_subject_access(subject, target, format=format, tenant_id=tenant)

    found = asyncio.run(work())
    where = "standard output" if output is None else str(output)
    typer.echo(f"{found.events} events to {visible(where)}, {found.masked} with others masked", err=True)


def new_personal_key() -> None:
    """Make a key for AUDIT_TRAIL_PERSONAL_KEY."""
    from dotmac.platform.audit_trail.personal_key import new_personal_key as make

    typer.echo(make())


def rotate_personal_key(url: Url = None, as_json: AsJson = False) -> None:
    """Wrap the keys of all subjects by AUDIT_TRAIL_PERSONAL_KEY; …_OLD_KEYS are not needed afterwards."""
    from dotmac.platform.audit_trail import AuditAggregator

    def tell(count: int) -> None:
        typer.echo(f"{count} keys …", err=True)

    async def work() -> int:
        async with AuditAggregator(url) as audit:
            return await audit.rotate_personal_key(progress=None if as_json else tell)

    done = asyncio.run(work())
    if as_json:
        show_json({"rewrapped": done})
    else:
        typer.echo(f"{done} keys wrapped anew")
