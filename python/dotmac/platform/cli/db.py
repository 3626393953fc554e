"""`dotmac db upgrade|status`: the tables of the audit trail."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dotmac.platform.cli.output import show_json

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.schema import SchemaStatus

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Url = Annotated[str | None, typer.Option("--url", help="Database; default: the configuration's.")]


@app.command()
def upgrade(
    url: Url = None,
    tenants: Annotated[
        bool, typer.Option("--tenants", help="Keep tenants apart by row-level security from now on.")
    ] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL of all versions; change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the tables up to date; several at once wait for one another."""
    from dotmac.platform.audit_trail import AuditAggregator, schema

    if sql:
        typer.echo(schema.printable_sql(tenants=tenants))
        return

    async def work() -> SchemaStatus:
        async with AuditAggregator(url) as audit:
            return await audit.migrate(tenants=tenants or None)

    found = asyncio.run(work())
    if as_json:
        show_json({"before": found.current, "now": found.wanted})
    elif found.up_to_date:
        typer.echo(f"up to date: version {found.current}")
    else:
        typer.echo(f"upgraded from {found.current or 'no tables'} to version {found.wanted}")


@app.command()
def status(url: Url = None, as_json: AsJson = False) -> None:
    """The tables' version and the one that is wanted; exit code 1 where they are missing or older."""
    from dotmac.platform.audit_trail import AuditAggregator

    async def work() -> SchemaStatus:
        async with AuditAggregator(url) as audit:
            return await audit.schema_status()

    found = asyncio.run(work())
    if as_json:
        show_json({**asdict(found), "up_to_date": found.up_to_date})
    else:
        state = "up to date" if found.up_to_date else "run `dotmac db upgrade`"
        typer.echo(f"tables: version {found.current or 'none'}, wanted: {found.wanted}: {state}")
    if not found.up_to_date:
        raise typer.Exit(1)
