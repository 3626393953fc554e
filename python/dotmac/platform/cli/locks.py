"""`dotmac locks`: who holds which lock, who waits, who is in whose way; taking a lock away."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from dotmac.platform.cli.output import show_json, show_table, visible
from dotmac.platform.cli.watching import follow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dotmac.platform.distributed_locks import HolderInfo, LockInfo, OwnerInfo, WaitGraph

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

_Name = Annotated[str, typer.Argument(help="Name of the lock.")]
_Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.command("list")
def list_(as_json: _Json = False) -> None:
    """Every held lock: who holds it, since when, from where, how long its lease has left, how many wait."""
    from dotmac.platform.distributed_locks import DistributedLockManager

    with DistributedLockManager() as manager:
        found = sorted(manager.list_locks_sync(), key=lambda lock: lock.name)
    if as_json:
        show_json([lock.to_dict() for lock in found])
    else:
        show_table(
            ("lock", "kind", *_HOLDER, "waiting"),
            [
                (lock.name, _kind(lock), *_of(holder), lock.waiters)
                for lock in found
                for holder in lock.holders
            ],
        )


@app.command()
def show(name: _Name, as_json: _Json = False) -> None:
    """One lock: who holds it, and the first 100 who wait, in their order. Ends with 1 where nobody does."""
    from dotmac.platform.distributed_locks import DistributedLockManager

    with DistributedLockManager() as manager:
        lock = manager.get_lock_sync(name)
    if as_json:
        show_json(None if lock is None else lock.to_dict())
    elif lock is not None:
        _show_holders(lock, lock.holders)
        show_table(
            (
                "place",
                "asks for",
                "priority",
                "service",
                "host",
                "pid",
                "waiting at",
                "asked for it",
                "owner",
            ),
            [
                (
                    one.position,
                    one.kind,
                    one.priority,
                    one.service,
                    one.host,
                    one.pid,
                    one.waiting_at,
                    _time(one.since),
                    one.owner,
                )
                for one in lock.queue
            ],
            title=f"waiting: {lock.waiters}"
            + (f", the first {len(lock.queue)} of them" if len(lock.queue) < lock.waiters else ""),
        )
    if lock is None:
        _say(f"nobody holds lock {name!r} or waits for it")
        raise typer.Exit(1)


@app.command()
def graph(
    as_json: _Json = False,
    dot: Annotated[bool, typer.Option("--dot", help="Write a graph for Graphviz.")] = False,
) -> None:
    """Who waits for whom, and rings of them who wait for each other."""
    from dotmac.platform.distributed_locks import DistributedLockManager

    if as_json and dot:
        raise typer.BadParameter("choose one of --json and --dot")
    with DistributedLockManager() as manager:
        found = manager.wait_graph_sync()
    if as_json:
        show_json(found.to_dict())
    elif dot:
        sys.stdout.write(found.to_dot())
    else:
        _show_graph(found)


@app.command("force-release")
def force_release(
    name: _Name,
    token: Annotated[
        int | None, typer.Option(min=1, help="Only from the holder with this fencing token.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Take a lock away from its holders, who are told. Ends with 1 where nothing was taken.

    A holder may be in the midst of what the lock guards; only its fencing token keeps its late writes out.
    """
    from dotmac.platform.distributed_locks import DistributedLockManager

    with DistributedLockManager() as manager:
        lock = manager.get_lock_sync(name)
        holders = [] if lock is None else [one for one in lock.holders if token in {None, one.fencing_token}]
        if lock is None or not holders:
            _say(f"nobody holds lock {name!r}" + (f" with token {token}" if token is not None else ""))
            raise typer.Exit(1)
        if not yes:
            _show_holders(lock, holders)
            typer.confirm(f"Take {visible(repr(name))} away?", abort=True)
        # From those who were seen, however long the answer took.
        taken = sum(manager.force_release_sync(name, one.fencing_token) for one in holders)
    if not taken:
        _say(f"lock {name!r} was given back meanwhile")
        raise typer.Exit(1)
    sys.stdout.write(f"taken from {taken} of {len(holders)}\n" if len(holders) > 1 else "taken away\n")


@app.command()
def watch(
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many looks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write a JSON object per line.")] = False,
) -> None:
    """Print what changes, until Ctrl-C: acquired, released, lost, waiting, left (waits no longer).

    What is there at the first look is printed as held and waiting. Lost is a lock whose lease ended without a
    renewal; one that was taken away, or ended between two looks, counts as released.
    """
    try:
        follow(interval, count, as_json=as_json)
    except KeyboardInterrupt:
        return


# ---- how it is shown

_HOLDER = ("service", "host", "pid", "acquired at", "token", "asked for", "lease left", "owner")


def _of(holder: HolderInfo) -> tuple[object, ...]:
    return (
        holder.service,
        holder.host,
        holder.pid,
        holder.acquired_at,
        holder.fencing_token,
        _time(holder.since),
        f"{holder.remaining:.1f} s",
        holder.owner,
    )


def _show_holders(lock: LockInfo, holders: Iterable[HolderInfo]) -> None:
    show_table(_HOLDER, map(_of, holders), title=f"{visible(lock.name)}: {_kind(lock)}, held by")


def _show_graph(graph: WaitGraph) -> None:
    show_table(
        ("who waits", "waiting at", "for lock", "held by", "acquired at"),
        [
            (
                _who(graph.nodes[edge.waiter])
                + ("" if edge.asked_by == edge.waiter else f", which awaits {edge.asked_by}"),
                edge.waiting_at,
                edge.lock,
                _who(graph.nodes[edge.holder]),
                edge.acquired_at,
            )
            for edge in graph.edges
        ],
    )
    for ring in graph.cycles():
        _say(
            "they wait for each other: "
            + ", ".join(f"{edge.waiter} for {edge.lock!r} of {edge.holder}" for edge in ring),
            error=False,
        )


def _who(owner: OwnerInfo) -> str:
    return f"{owner.owner} ({owner.service} {owner.host}:{owner.pid})"


def _kind(lock: LockInfo) -> str:
    return lock.kind if lock.permits is None else f"semaphore of {lock.permits}"


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _say(text: str, *, error: bool = True) -> None:
    (sys.stderr if error else sys.stdout).write(visible(text) + "\n")
