"""What an answer says that is not a lease, as an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dotmac.platform import _semconv
from dotmac.platform.connection.engine import failure
from dotmac.platform.errors import (
    DeadlockDetected,
    DeadlockEdge,
    LockMismatch,
    LockNotOffered,
    LockTimeout,
    LoopStalled,
)
from dotmac.platform.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dotmac.platform.connection.engine import Link

__all__ = ["refusal"]

_CELLS = 6
_KINDS = {"x": "a lock with one holder", "s": "a lock that readers share"}


def refusal(name: str, result: tuple[str, Any], waited: float, link: Link) -> Exception:
    """The error for what happened in place of a grant.

    Args:
        name: the lock.
        result: what the engine answered: a kind and its detail.
        waited: seconds since it was asked for.
        link: where.
    """
    kind, detail = result
    if kind in ("not_free", "timed_out"):
        metrics.counter(_semconv.LOCK_CONTENTIONS).add(1)
        metrics.counter(_semconv.LOCK_TIMEOUTS).add(1)
        if kind == "timed_out":
            return LockTimeout(f"lock {name!r} was not granted within {waited:.2f} s (blocking_timeout)")
        return LockTimeout(
            f"lock {name!r} is held by another, whose lease has {detail:.1f} s left unless renewed"
        )
    if kind == "stalled" and not link.closed:
        link.engine()  # a loop that was closed meanwhile holds nobody up any more
    made = _MADE.get(kind)
    if made is not None:
        return made(name, detail)
    return failure(result, f"acquiring lock {name!r}", link)


def _edges(cells: Sequence[str]) -> Iterator[DeadlockEdge]:
    for at in range(0, len(cells), _CELLS):
        lock, waiter, process, waiting_at, holder, acquired_at = cells[at : at + _CELLS]
        yield DeadlockEdge(lock, waiter, json.loads(process), waiting_at, holder, acquired_at)


def _deadlock(name: str, cells: Sequence[str]) -> DeadlockDetected:
    metrics.counter(_semconv.LOCK_DEADLOCKS).add(1)
    edges = list(_edges(cells))
    # It begins where this one waits.
    at = next((at for at, edge in enumerate(edges) if edge.lock == name), 0)
    edges = [*edges[at:], *edges[:at]]
    cycle = [edge.lock for edge in edges]
    if len(edges) == 1:
        (edge,) = edges
        whose = "this task or thread" if edge.waiter == edge.holder else "a task that awaits this one"
        text = f"lock {name!r} is already held by {whose}, which would wait for itself"
        if edge.acquired_at:
            text += f"; it was acquired at {edge.acquired_at}"
        return DeadlockDetected(text, cycle, edges)
    ring = " → ".join(repr(lock) for lock in [*cycle, cycle[0]])
    steps = "; ".join(
        f"{edge.waiter} waits for {edge.lock!r} at {edge.waiting_at or 'an unknown place'}, "
        f"held by {edge.holder} since {edge.acquired_at or 'an unknown place'}"
        for edge in edges
    )
    return DeadlockDetected(f"waiting for lock {name!r} would close a cycle: {ring} ({steps})", cycle, edges)


def _mismatch(name: str, kind: str) -> LockMismatch:
    used = _KINDS.get(kind) or f"a semaphore of {kind[1:]} permits"
    return LockMismatch(f"{name!r} is in use as {used}; use another name, or the same kind everywhere")


def _not_offered(name: str, _: None) -> LockNotOffered:
    return LockNotOffered(f"lock {name!r} is not offered under this token, or not any more")


def _stalled(name: str, _: None) -> LoopStalled:
    return LoopStalled(
        f"acquiring lock {name!r}: an event loop of this process stood still for too long (max_loop_stall), "
        "so nothing is granted until it turns again"
    )


_MADE: dict[str, Callable[[str, Any], Exception]] = {
    "deadlock": _deadlock,
    "mismatch": _mismatch,
    "not_offered": _not_offered,
    "stalled": _stalled,
}
