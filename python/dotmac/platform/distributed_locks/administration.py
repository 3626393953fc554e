"""What administrators ask and do about locks: who holds, who waits, who is in whose way, taking away.

Each operation is written once, as a generator: it yields calls that may go out side by side, is sent their
answers, and returns what it found. `run` and `run_sync` drive it, in an event loop and in a thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from dotmac.platform._native import LockCall
from dotmac.platform.connection.engine import failure
from dotmac.platform.distributed_locks.info import (
    HolderInfo,
    LockInfo,
    OwnerInfo,
    WaitEdge,
    WaiterInfo,
    WaitGraph,
)
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from dotmac.platform.connection.engine import Link
    from dotmac.platform.distributed_locks.info import LockKind

__all__ = ["Operation", "check_token", "forcing", "graphing", "listing", "run", "run_sync", "showing"]

T = TypeVar("T")
Operation = Generator[Sequence[LockCall], Sequence[list[Any]], T]

_PAGE = 200
_SHOWN_WAITERS = 100
_THREADS = 16
_KINDS: dict[str, LockKind] = {"x": "exclusive", "s": "shared", "k": "semaphore"}
_HOLDER_CELLS, _WAITER_CELLS = 10, 9
# A waiter's rank begins with this less its priority, in four digits, so that text sorts as the queue does.
_USUAL_RANK = 5000


# ---- operations


def listing(partitions: int, *, queues: bool = False) -> Operation[list[LockInfo]]:
    """Every lock that is held; with `queues` also who waits for each, and locks that are only waited for."""
    locks = _locks((yield from _pages(partitions, LockCall.holders, _HOLDER_CELLS)))
    if queues:
        waiting = yield from _pages(partitions, LockCall.waiters, _WAITER_CELLS)
        for name, rows in _queues(waiting).items():
            locks[name] = _with_queue(locks.get(name), rows, _waiters(rows))
    return list(locks.values())


def showing(name: str) -> Operation[LockInfo | None]:
    """One lock and the first of its queue; None where nobody holds it or waits for it."""
    holders, waiters = yield (LockCall.holders_of(name), LockCall.queue_of(name, _SHOWN_WAITERS + 1))
    lock = _locks(_rows(holders, _HOLDER_CELLS)).get(name)
    rows = list(_rows(waiters, _WAITER_CELLS))
    if not rows:
        return lock
    return _with_queue(lock, rows, _waiters(rows[:_SHOWN_WAITERS]))


def forcing(name: str, fencing_token: int | None) -> Operation[int]:
    """Takes a lock away from those who hold it, or from the one with that token; from how many."""
    if fencing_token is None:
        (holders,) = yield (LockCall.holders_of(name),)
        tokens = [int(row[5]) for row in _rows(holders, _HOLDER_CELLS)]
    else:
        tokens = [fencing_token]
    if not tokens:
        return 0
    # Each by its token: the engine repeats a call whose answer was lost, and must not take the next holder's.
    taken = yield [LockCall.force(name, token) for token in tokens]
    return sum(len(fences) for fences in taken)


def graphing(partitions: int) -> Operation[WaitGraph]:
    """Who waits for whom."""
    waiting = _queues((yield from _pages(partitions, LockCall.waiters, _WAITER_CELLS)))
    held = _locks((yield from _pages(partitions, LockCall.holders, _HOLDER_CELLS)) if waiting else ())
    nodes: dict[str, OwnerInfo] = {}
    edges: list[WaitEdge] = []
    for name in sorted(waiting):
        holders = held[name].holders if name in held else ()
        for holder in holders:
            _name_owner(nodes, holder, holder.owner)
        for waiter in _waiters(waiting[name]):
            for owner in (waiter.owner, *waiter.awaited_by):
                _name_owner(nodes, waiter, owner)
                edges += [_edge(owner, name, waiter, holder) for holder in holders]
    return WaitGraph(nodes, tuple(edges))


def check_token(token: Any) -> int | None:
    """A fencing token, a whole number from 1 to 2**63 - 1, or None for any."""
    if token is None:
        return None
    if isinstance(token, int) and not isinstance(token, bool) and 0 < token < 1 << 63:
        return token
    raise InvalidArgument("fencing_token", token, "it must be a whole number from 1 to 2**63 - 1, or None")


# ---- driving them


async def run(link: Link, operation: Operation[T], what: str) -> T:
    """Drives an operation in this event loop.

    Args:
        link: the way to the server.
        operation: one of the above.
        what: what is attempted, for the text of an error.
    Returns: what the operation returns.
    Raises: ServerUnavailable, RequestTimeout, AuthenticationFailed, ServerRefused: the server's side failed.
    """
    side = await link.side()
    try:
        calls = next(operation)
        while True:
            answers = await asyncio.gather(*map(side.bridge.call, calls))
            calls = operation.send(_checked(answers, link, what))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def run_sync(link: Link, operation: Operation[T], what: str) -> T:
    """`run` for threads without an event loop."""
    engine = link.engine()
    try:
        calls = next(operation)
        while True:
            if len(calls) == 1:
                answers: list[Any] = [engine.call(calls[0])]
            else:
                with ThreadPoolExecutor(min(len(calls), _THREADS)) as threads:
                    answers = list(threads.map(engine.call, calls))
            calls = operation.send(_checked(answers, link, what))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def _checked(answers: Sequence[Any], link: Link, what: str) -> Sequence[list[Any]]:
    for answer in answers:
        if isinstance(answer, tuple):
            raise failure(answer, what, link)
    return answers


# ---- what the answers say


def _pages(
    partitions: int, call: Callable[[int, str, int], LockCall], width: int
) -> Operation[list[list[str]]]:
    """All rows of all partitions, which are read side by side, page by page."""
    found: list[list[str]] = []
    cursors = dict.fromkeys(range(partitions), "0")
    while cursors:
        answers = yield [call(partition, cursor, _PAGE) for partition, cursor in cursors.items()]
        for partition, answer in zip(list(cursors), answers, strict=True):
            found += _rows(answer, width)
            cursors[partition] = _text(answer[0])
            if cursors[partition] == "0":
                del cursors[partition]
    return found


def _rows(answer: list[Any], width: int) -> Iterator[list[str]]:
    for at in range(1, len(answer), width):
        yield [_text(cell) for cell in answer[at : at + width]]


def _text(cell: bytes | int) -> str:
    return cell.decode(errors="replace") if isinstance(cell, bytes) else str(cell)


def _locks(rows: Iterable[list[str]]) -> dict[str, LockInfo]:
    """The locks by name. A scan may name a lock twice, the second time perhaps after it changed hands."""
    found: dict[str, tuple[str, dict[int, HolderInfo], int]] = {}
    for name, mode, owner, session, who, fence, since, left, waiters, place in rows:
        holder = HolderInfo(
            owner, session, *_process(who), int(fence), int(since), max(int(left), 0) / 1000, place
        )
        known = found.get(name)
        holders = {} if known is None or mode == "x" or known[0] != mode else known[1]
        holders[holder.fencing_token] = holder
        found[name] = mode, holders, int(waiters)
    return {
        name: LockInfo(
            name, _kind(mode), _permits(mode), tuple(holders[fence] for fence in sorted(holders)), waiters
        )
        for name, (mode, holders, waiters) in found.items()
    }


def _queues(rows: Iterable[list[str]]) -> dict[str, list[list[str]]]:
    """Who waits for what, by lock, each request once and in its place."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for row in rows:
        found.setdefault(row[0], {})[row[7], row[5]] = row
    return {name: [queue[place] for place in sorted(queue)] for name, queue in found.items()}


def _waiters(rows: Iterable[list[str]]) -> tuple[WaiterInfo, ...]:
    """The first of a queue, in their order."""
    return tuple(_waiter(row, position) for position, row in enumerate(rows, 1))


def _waiter(row: list[str], position: int) -> WaiterInfo:
    _, mode, owners, session, who, request, since, rank, place = row
    owner, *awaiting = owners.split("\1")
    return WaiterInfo(
        owner,
        session,
        *_process(who),
        kind=_kind(mode),
        position=position,
        priority=_USUAL_RANK - int(rank[:4]),
        since=int(since),
        waiting_at=place,
        request=request,
        awaited_by=tuple(awaiting),
    )


def _with_queue(lock: LockInfo | None, rows: list[list[str]], queue: tuple[WaiterInfo, ...]) -> LockInfo:
    """The lock with its queue. Nobody may hold what is waited for where a server has just lost its data."""
    if lock is None:
        name, mode = rows[0][:2]
        return LockInfo(name, _kind(mode), _permits(mode), (), len(rows), queue)
    return replace(lock, waiters=max(lock.waiters, len(rows)), queue=queue)


def _edge(owner: str, lock: str, waiter: WaiterInfo, holder: HolderInfo) -> WaitEdge:
    return WaitEdge(
        _known_as(owner),
        lock,
        waiter.kind,
        _known_as(holder.owner),
        waiter.request,
        waiter.waiting_at,
        holder.acquired_at,
        _known_as(waiter.owner),
    )


def _kind(mode: str) -> LockKind:
    return _KINDS[mode[0]]


def _permits(mode: str) -> int | None:
    return int(mode[1:]) if mode.startswith("k") else None


def _process(who: str) -> tuple[str, int, str]:
    known = json.loads(who)
    return known.get("host", ""), known.get("pid", 0), known.get("service", "")


def _known_as(owner: str) -> str:
    """The owner as the graph names it. Without detection each request has an owner of its own, the task's or
    thread's with a mark behind it, and it is here that its cycles come out."""
    return owner if owner.startswith("=") else owner.partition("#")[0]


def _name_owner(nodes: dict[str, OwnerInfo], info: OwnerInfo, owner: str) -> None:
    known_as = _known_as(owner)
    nodes.setdefault(known_as, OwnerInfo(known_as, info.session, info.host, info.pid, info.service))
