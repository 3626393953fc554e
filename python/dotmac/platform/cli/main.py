"""`dotmac`: the command line.

Exit codes: 0 done, 1 it failed or a check did, 2 the command or the configuration is wrong.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from dotmac.platform.errors import ConfigurationError, DotmacError, InvalidArgument, InvalidCursor

if TYPE_CHECKING:
    import typer

__all__ = ["build", "run"]

# Command groups; each is a module of this package with a typer application named `app`.
_GROUPS = {
    "audit": "audit trail: query, count, tail, export, import, verify, report and more",
    "db": "tables of the audit trail: upgrade, status",
    "locks": "locks: list, show, graph, watch, force-release",
    "services": "registered services: list",
}


def run() -> None:
    """Entry point of the `dotmac` command."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"error: the command line needs {' and '.join(missing)}: pip install 'dotmac-platform[cli]'\n"
        )
        sys.exit(1)
    from dotmac.platform.cli.output import show_error

    try:
        build()()
    except (ConfigurationError, InvalidArgument, InvalidCursor) as error:
        show_error(error)
        sys.exit(2)
    except DotmacError as error:
        show_error(error)
        sys.exit(1)


def build() -> typer.Typer:
    """The application with all of its commands."""
    import typer

    from dotmac.platform.cli import settings
    from dotmac.platform.cli.demo import demo
    from dotmac.platform.cli.doctor import doctor

    app = typer.Typer(
        name="dotmac",
        help="Distributed locks, service registry, audit trail: look at them, check them, try them.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Show the version and end.")) -> None:
        if version:
            typer.echo(metadata.version("dotmac-platform"))
            raise typer.Exit

    app.command()(doctor)
    app.add_typer(settings.app, name="config", help="configuration: show, explain")
    for name, about in _GROUPS.items():
        app.add_typer(import_module(f"dotmac.platform.cli.{name}").app, name=name, help=about)
    app.command()(demo)
    return app
