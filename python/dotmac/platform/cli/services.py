"""`dotmac services list`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from dotmac.platform.cli.output import show_json, show_table

if TYPE_CHECKING:
    from dotmac.platform.service_registry import ServiceInstance

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Keeps `list` a command of its own name while it is the only one."""


@app.command("list")
def list_(
    name: Annotated[str, typer.Argument(help="Only this service; all of them if left out.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Every live instance: where it is, what it registered, what the health checks say."""
    found = [one for one in asyncio.run(_instances()) if name in {"", one.name}]
    if as_json:
        show_json([one.as_dict() for one in found])
    else:
        show_table(
            ("service", "version", "address", "health", "tags", "weight", "zone", "registered", "id"),
            [
                (
                    one.name,
                    one.version,
                    one.address,
                    one.status if one.health_check_url else "not checked",
                    ", ".join(one.tags),
                    one.weight,
                    one.zone or "",
                    datetime.fromtimestamp(one.registered_at, UTC).isoformat(timespec="seconds"),
                    one.id,
                )
                for one in found
            ],
        )


async def _instances() -> list[ServiceInstance]:
    from dotmac.platform.service_registry import ServiceRegistry

    async with ServiceRegistry() as registry:
        services = await registry.list_services()
    return [one for name in sorted(services) for one in services[name]]
