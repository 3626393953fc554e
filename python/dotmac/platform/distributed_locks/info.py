"""What is known of locks: who holds them, who waits for them, and who waits for whom."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["HolderInfo", "LockInfo", "OwnerInfo", "WaitEdge", "WaitGraph", "WaiterInfo"]

LockKind = Literal["exclusive", "shared", "semaphore"]


@dataclass(frozen=True, slots=True)
class OwnerInfo:
    """An owner and the process that asked in its name.

    Args:
        owner: `session/scope`, the scope being a task or a thread, or `=token`.
        session: the process's session on the server.
        host, pid, service: the process.
    """

    owner: str
    session: str
    host: str
    pid: int
    service: str


@dataclass(frozen=True, slots=True)
class HolderInfo(OwnerInfo):
    """One who holds a lock.

    Args:
        owner, session, host, pid, service: as in `OwnerInfo`.
        fencing_token: of this holding.
        since: when it was asked for, milliseconds since 1970 by the holder's wall clock.
        remaining: seconds that the lease has left unless it is renewed.
        acquired_at: file and line, `report.py:42`; empty where that is not known.
    """

    fencing_token: int
    since: int
    remaining: float
    acquired_at: str


@dataclass(frozen=True, slots=True)
class WaiterInfo(OwnerInfo):
    """One who waits for a lock.

    Args:
        owner, session, host, pid, service: as in `OwnerInfo`.
        kind: what is asked for: "exclusive", "shared" or "semaphore".
        position: in the queue, from 1.
        priority: higher ones are served first; 0 is usual.
        since: when it was asked for, milliseconds since 1970 by the waiter's wall clock.
        waiting_at: file and line; empty where that is not known.
        request: the request's name on the server.
        awaited_by: owners that can't go on either until this one has the lock: they await its task.
    """

    kind: LockKind
    position: int
    priority: int
    since: int
    waiting_at: str
    request: str
    awaited_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LockInfo:
    """One lock, as the server knows it.

    What one holder has is there as attributes of the lock as well, which are the first holder's: `owner`,
    `session`, `host`, `pid`, `service`, `fencing_token`, `since`, `remaining`. Where nobody holds it these
    are empty or 0.

    Args:
        name: the lock.
        kind: how it is held, or asked for by the first who waits: "exclusive", "shared" or "semaphore".
        permits: how many may hold a semaphore; None for the other kinds.
        holders: everybody who holds it, the first one first.
        waiters: how many are in the queue.
        queue: who they are, in their order: the first 100 from `get_lock`, none from `list_locks` unless
            they are asked for.
    """

    name: str
    kind: LockKind
    permits: int | None
    holders: tuple[HolderInfo, ...]
    waiters: int
    queue: tuple[WaiterInfo, ...] = ()

    @property
    def owner(self) -> str:
        """The first holder's owner."""
        return self.holders[0].owner if self.holders else ""

    @property
    def session(self) -> str:
        """The first holder's session."""
        return self.holders[0].session if self.holders else ""

    @property
    def host(self) -> str:
        """The first holder's host."""
        return self.holders[0].host if self.holders else ""

    @property
    def pid(self) -> int:
        """The first holder's process."""
        return self.holders[0].pid if self.holders else 0

    @property
    def service(self) -> str:
        """The first holder's service."""
        return self.holders[0].service if self.holders else ""

    @property
    def fencing_token(self) -> int:
        """The first holder's fencing token."""
        return self.holders[0].fencing_token if self.holders else 0

    @property
    def since(self) -> int:
        """When the first holder asked for it, milliseconds since 1970."""
        return self.holders[0].since if self.holders else 0

    @property
    def remaining(self) -> float:
        """Seconds that the first holder's lease has left unless it is renewed."""
        return self.holders[0].remaining if self.holders else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON may have it, the first holder's attributes included."""
        first = {
            name: getattr(self, name)
            for name in ("owner", "session", "host", "pid", "service", "fencing_token", "since", "remaining")
        }
        return {**asdict(self), **first}


@dataclass(frozen=True, slots=True)
class WaitEdge:
    """One owner waits for a lock that another one holds.

    Args:
        waiter: the owner that waits.
        lock: for what.
        kind: how it is asked for.
        holder: the owner that holds it.
        request: the waiting request's name on the server.
        waiting_at, acquired_at: where the one asked and the other acquired: file and line, or empty.
        asked_by: the owner that asked, where `waiter` only awaits its task; else `waiter` itself.
    """

    waiter: str
    lock: str
    kind: LockKind
    holder: str
    request: str
    waiting_at: str
    acquired_at: str
    asked_by: str


@dataclass(frozen=True, slots=True)
class WaitGraph:
    """Who waits for whom.

    It is read page by page while the locks change, so it need not have been true as a whole at any one
    moment. A cycle that is really there stays until somebody gives up: read again to be sure of it.

    Args:
        nodes: everybody who holds something that is waited for, or waits, by owner.
        edges: from each who waits to each holder of what it waits for. Those ahead in a queue wait for the
            same holders and have no edges between them.
    """

    nodes: Mapping[str, OwnerInfo]
    edges: tuple[WaitEdge, ...]

    def cycles(self) -> list[tuple[WaitEdge, ...]]:
        """Owners who wait for each other in a ring.

        Semaphores are left out: whoever waits for one goes on when any of its holders gives it back.

        Returns: for each group of owners that wait for each other, one shortest ring: its edges in their
            order, the holder of each being the waiter of the next, of the last that of the first.
        """
        ahead: dict[str, list[WaitEdge]] = {}
        for edge in self.edges:
            if edge.kind != "semaphore":
                ahead.setdefault(edge.waiter, []).append(edge)
        return [
            _ring(group, ahead)
            for group in _groups(ahead)
            if len(group) > 1 or any(edge.holder in group for owner in group for edge in ahead.get(owner, ()))
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON may have it: `nodes`, `edges`, `cycles`."""
        return {
            "nodes": [asdict(node) for node in self.nodes.values()],
            "edges": [asdict(edge) for edge in self.edges],
            "cycles": [[asdict(edge) for edge in ring] for ring in self.cycles()],
        }

    def to_dot(self) -> str:
        """In the language of Graphviz; the edges of cycles are red."""
        ringed = {id(edge) for ring in self.cycles() for edge in ring}
        lines = ["digraph locks {", "  node [shape=box];"]
        for owner, node in self.nodes.items():
            process = f"{node.service} {node.host}:{node.pid}"
            lines.append(f"  {_quoted(owner)} [label={_quoted(owner, process)}];")
        for edge in self.edges:
            colour = ", color=red" if id(edge) in ringed else ""
            label = _quoted(edge.lock, *(place for place in (edge.waiting_at,) if place))
            lines.append(f"  {_quoted(edge.waiter)} -> {_quoted(edge.holder)} [label={label}{colour}];")
        return "\n".join([*lines, "}"]) + "\n"


def _groups(ahead: Mapping[str, list[WaitEdge]]) -> Iterator[set[str]]:
    """Owners that can reach each other (Tarjan 1972), without recursion: chains may be long."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()

    def begin(owner: str) -> tuple[str, Iterator[WaitEdge]]:
        order[owner] = lowest[owner] = len(order)
        stack.append(owner)
        on_stack.add(owner)
        return owner, iter(ahead.get(owner, ()))

    for start in ahead:
        path = [] if start in order else [begin(start)]
        while path:
            owner, edges = path[-1]
            edge = next(edges, None)
            if edge is not None:
                if edge.holder not in order:
                    path.append(begin(edge.holder))
                elif edge.holder in on_stack:
                    lowest[owner] = min(lowest[owner], order[edge.holder])
                continue
            path.pop()
            if path:
                lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[owner])
            if lowest[owner] == order[owner]:
                group: set[str] = set()
                while owner not in group:
                    group.add(stack.pop())
                on_stack -= group
                yield group


def _ring(group: set[str], ahead: Mapping[str, list[WaitEdge]]) -> tuple[WaitEdge, ...]:
    """The shortest way from the group's first owner back to itself, by those of the group."""
    start = min(group)
    came: dict[str, WaitEdge] = {}
    queue = deque([start])
    while start not in came:
        for edge in ahead[queue.popleft()]:
            if edge.holder in group and edge.holder not in came:
                came[edge.holder] = edge
                queue.append(edge.holder)
    ring = [came[start]]
    while ring[-1].waiter != start:
        ring.append(came[ring[-1].waiter])
    return tuple(reversed(ring))


def _quoted(*lines: str) -> str:
    """A string of Graphviz."""
    return '"' + "\\n".join(line.translate(_ESCAPED) for line in lines) + '"'


# Control characters have no place in a label, and Graphviz reads a backslash as the start of an escape.
_ESCAPED = {**{code: f"\\\\x{code:02x}" for code in [*range(32), 127]}, ord('"'): '\\"', ord("\\"): "\\\\"}
