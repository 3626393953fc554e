"""`dotmac locks list`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from dotmac.platform.cli.output import show_json, show_table

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Keeps `list` a command of its own name while it is the only one."""


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False) -> None:
    """Every held lock: who holds it, since when, how long its lease has left, how many wait."""
    from dotmac.platform.distributed_locks import DistributedLockManager

    with DistributedLockManager() as manager:
        found = sorted(manager.list_locks_sync(), key=lambda lock: lock.name)
    if as_json:
        show_json([asdict(lock) for lock in found])
    else:
        show_table(
            ("lock", "service", "host", "pid", "token", "asked for", "lease left", "waiting"),
            [
                (
                    lock.name,
                    lock.service,
                    lock.host,
                    lock.pid,
                    lock.fencing_token,
                    datetime.fromtimestamp(lock.since / 1000, UTC).isoformat(timespec="seconds"),
                    f"{lock.remaining:.1f} s",
                    lock.waiters,
                )
                for lock in found
            ],
        )
