"""`dotmac config show|explain`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dotmac.platform.cli.output import show_json, show_table

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.command()
def show(as_json: AsJson = False) -> None:
    """Every setting, its variable, its value (secrets masked) and where that came from."""
    from dotmac.platform.core.unified_config import get_config

    found = get_config().explain_all()
    if as_json:
        show_json([asdict(one) for one in found])
    else:
        show_table(
            ("setting", "variable", "value", "from"),
            [(one.key, one.variable, one.value, one.origin) for one in found],
        )


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="service_registry.default_ttl or SERVICE_REGISTRY_DEFAULT_TTL")],
    as_json: AsJson = False,
) -> None:
    """One setting: its value (masked if secret) and where it came from."""
    from dotmac.platform.core.unified_config import get_config

    one = get_config().explain(key)
    if as_json:
        show_json(asdict(one))
    else:
        typer.echo(f"{one.key} ({one.variable}) = {one.value}\nfrom: {one.origin}")
