"""`dotmac audit grant|revoke|roles|retention|partitions|archives|hold`: the owner's work on the trail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dotmac.platform.cli.audit_options import AsJson, Url, moment_of
from dotmac.platform.cli.output import show_json, show_table
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from dotmac.platform.audit_trail import AuditAggregator, LegalHold

__all__ = ["register"]

Answer = TypeVar("Answer")

Writer = Annotated[list[str] | None, typer.Option("--writer", help="Logs events of all tenants. Repeatable.")]
Reader = Annotated[list[str] | None, typer.Option("--reader", help="Reads one tenant's. Repeatable.")]
Member = Annotated[list[str] | None, typer.Option("--member", help="Does both, for one tenant. Repeatable.")]
Auditor = Annotated[list[str] | None, typer.Option("--auditor", help="Reads all tenants'. Repeatable.")]
OfTenant = Annotated[str | None, typer.Option("--tenant", help="Only tenant of these readers, members.")]

hold = typer.Typer(no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to `dotmac audit`."""
    for command in (grant, revoke, roles, retention, partitions, archives):
        app.command()(command)
    app.add_typer(hold, name="hold", help="legal holds: add, list, release")


def grant(
    writer: Writer = None,
    reader: Reader = None,
    member: Member = None,
    auditor: Auditor = None,
    tenant: OfTenant = None,
    url: Url = None,
) -> None:
    """Give database roles their rights on the trail; the roles exist already."""

    async def work(audit: AuditAggregator) -> None:
        for kind, role in _named(writer, reader, member, auditor):
            await audit.grant_role(kind, role, tenant_id=tenant)
            typer.echo(f"{role}: {kind}" + (f" of {tenant}" if tenant else ""))

    _run(url, work)


def revoke(
    writer: Writer = None,
    reader: Reader = None,
    member: Member = None,
    auditor: Auditor = None,
    url: Url = None,
) -> None:
    """Take database roles their rights on the trail; exit code 1 where one had none."""

    async def work(audit: AuditAggregator) -> bool:
        missing = False
        for kind, role in _named(writer, reader, member, auditor):
            had = await audit.revoke_role(kind, role)
            typer.echo(f"{role}: {kind} no more" if had else f"{role}: was no {kind}")
            missing = missing or not had
        return missing

    if _run(url, work):
        raise typer.Exit(1)


def roles(url: Url = None, as_json: AsJson = False) -> None:
    """Which roles may do what, and whether tenants are kept apart."""

    async def work(audit: AuditAggregator) -> None:
        found, apart = await audit.list_roles(), await audit.tenants_are_kept_apart()
        if as_json:
            listed = [
                {"role": one.role, "kind": one.kind, "tenant_id": one.tenant_id, "granted_at": one.granted_at}
                for one in found
            ]
            show_json({"row_level_security": apart, "roles": listed})
            return
        rows = [(one.role, one.kind, one.tenant_id, f"{one.granted_at:%Y-%m-%d %H:%M}") for one in found]
        show_table(("role", "kind", "tenant", "granted at"), rows)
        typer.echo(f"row-level security is {'on' if apart else 'off'}")

    _run(url, work)


def retention(
    days: Annotated[int | None, typer.Option(help="Age from which on months go; default: setting.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    archive_url: Annotated[
        str | None, typer.Option(help="Where months are archived first; default: setting.")
    ] = None,
    no_archive: Annotated[bool, typer.Option("--no-archive", help="Drop without archiving.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Drop months that are older than the retention, archived before where there is a place for it."""

    def told(partition: str, rows: int) -> None:
        typer.echo(f"{partition}: {rows:,} events archived", err=True)

    async def work(audit: AuditAggregator) -> None:
        found = await audit.apply_retention(
            days,
            archive_url=archive_url,
            archive=not no_archive,
            dry_run=dry_run,
            progress=None if as_json else told,
        )
        if as_json:
            show_json([one.to_dict() for one in found])
            return
        rows = [
            (one.partition, f"{one.start_time:%Y-%m}", one.outcome, f"{one.events:,}", one.archive,
             ", ".join(map(str, one.holds)))
            for one in found
        ]  # fmt: skip
        show_table(("partition", "month", "outcome", "events", "archive", "held by"), rows)

    _run(url, work)


def partitions(
    ahead: Annotated[int, typer.Option(help="Months beyond this one, 1 to 3.")] = 3,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make the partitions of the months to come."""
    made = _run(url, lambda audit: audit.ensure_partitions(ahead))
    if as_json:
        show_json({"made": made})
    else:
        typer.echo("made: " + ", ".join(made) if made else "all there")


def archives(url: Url = None, as_json: AsJson = False) -> None:
    """What retention has taken, and where it is."""
    found = _run(url, lambda audit: audit.list_archives())
    if as_json:
        show_json(found)
        return
    columns = ("partition", "state", "events", "bytes", "url", "dropped_at")
    show_table(columns, [[one[name] for name in columns] for one in found])


@hold.command()
def add(
    reason: Annotated[str, typer.Option(help="Why, such as the case's number.")],
    by: Annotated[str, typer.Option(help="Who asks for it.")],
    since: Annotated[str | None, typer.Option(help="Events from here on: ISO 8601, or 7d, 2w ago.")] = None,
    until: Annotated[str | None, typer.Option(help="Events before this, in the same forms.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant.")] = None,
    user: Annotated[str | None, typer.Option(help="Of this user.")] = None,
    resource_type: Annotated[str | None, typer.Option(help="About resources of this type.")] = None,
    resource_id: Annotated[str | None, typer.Option(help="About this resource.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Keep events from being dropped; they fit where all that is given fits."""
    start, end = moment_of("--since", since), moment_of("--until", until)

    async def work(audit: AuditAggregator) -> LegalHold:
        return await audit.legal_hold(
            reason,
            placed_by=by,
            start_time=start,
            end_time=end,
            tenant_id=tenant,
            user_id=user,
            resource_type=resource_type,
            resource_id=resource_id,
        )

    placed = _run(url, work)
    if as_json:
        show_json(placed.to_dict())
    else:
        typer.echo(f"held: {placed.id}")


@hold.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Those that were released, too.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """The holds, oldest first."""
    found = _run(url, lambda audit: audit.list_holds(released=everything))
    if as_json:
        show_json([one.to_dict() for one in found])
        return
    columns = (
        "id", "reason", "placed_by", "placed_at", "from_time", "to_time", "tenant_id", "user_id",
        "resource_type", "resource_id", "released_at", "released_by",
    )  # fmt: skip
    show_table(columns, [[one.to_dict()[name] for name in columns] for one in found])


@hold.command()
def release(
    hold_id: Annotated[str, typer.Argument(help="The hold's id.")],
    by: Annotated[str, typer.Option(help="Who releases it.")],
    reason: Annotated[str, typer.Option(help="Why.")],
    url: Url = None,
) -> None:
    """Let retention have the events again."""
    found = _run(url, lambda audit: audit.release_hold(hold_id, released_by=by, reason=reason))
    typer.echo(f"released: {found.id} (by {found.released_by} at {found.released_at})")


def _run(url: str | None, work: Callable[[AuditAggregator], Awaitable[Answer]]) -> Answer:
    from dotmac.platform.audit_trail import AuditAggregator

    async def run() -> Answer:
        async with AuditAggregator(url) as audit:
            return await work(audit)

    return asyncio.run(run())


def _named(*given: list[str] | None) -> list[tuple[str, str]]:
    kinds = ("writer", "reader", "member", "auditor")
    found = [(kind, role) for kind, some in zip(kinds, given, strict=True) for role in some or ()]
    if not found:
        raise InvalidArgument("--writer", None, "name a role: --writer, --reader, --member or --auditor")
    return found
