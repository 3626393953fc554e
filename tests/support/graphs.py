"""What the server ought to know of holders and waiters, in Python, and whether that is a deadlock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Request:
    """Somebody asks for a lock.

    Args:
        owner: who.
        lock: which.
        mode: "x" for one holder, "s" for a reader, "k" for a permit.
        priority: higher ones first.
        number: in the order in which they were made.
    """

    owner: str
    lock: str
    mode: str
    priority: int
    number: int


@dataclass
class Graph:
    """Who holds what, and who waits for what.

    Args:
        permits: how many each semaphore has; other names are locks.
    """

    permits: dict[str, int]
    held: dict[str, list[Request]] = field(default_factory=dict)
    queues: dict[str, list[Request]] = field(default_factory=dict)

    def ask(self, request: Request) -> bool:
        """Whether it is granted at once; else it waits from here on."""
        queue = self.queues.setdefault(request.lock, [])
        if self._fits(request) and not any(one.priority >= request.priority for one in queue):
            self.held.setdefault(request.lock, []).append(request)
            return True
        queue.append(request)
        queue.sort(key=lambda one: (-one.priority, one.number))
        return False

    def release(self, request: Request) -> list[Request]:
        """Those who get something for it."""
        self.held[request.lock].remove(request)
        return self._serve(request.lock)

    def give_up(self, request: Request) -> list[Request]:
        """The same for one that waits no longer."""
        self.queues[request.lock].remove(request)
        return self._serve(request.lock)

    def waiting(self) -> list[Request]:
        return [request for queue in self.queues.values() for request in queue]

    def edges(self) -> Iterator[tuple[str, str, str]]:
        """Who waits for whom, and for what."""
        for request in self.waiting():
            for holder in self.held.get(request.lock, ()):
                yield request.owner, holder.owner, request.lock

    def stuck(self) -> set[str]:
        """Owners that can never go on: those left when everybody who can has gone on and given back."""
        waits = {request.owner: request for request in self.waiting()}
        assert len(waits) == len(self.waiting()), "an owner waits for one thing at a time"
        stuck = set(waits)
        changed = True
        while changed:
            changed = False
            for owner in list(stuck):
                request = waits[owner]
                among = [holder.owner in stuck for holder in self.held[request.lock]]
                if not (all(among) if request.lock in self.permits else any(among)):
                    stuck.discard(owner)
                    changed = True
        self._agree(stuck)
        return stuck

    def _agree(self, stuck: set[str]) -> None:
        """What somebody else's algorithms say of the same."""
        graph = nx.DiGraph((waiter, holder) for waiter, holder, _ in self.edges())
        in_cycles: set[str] = set()
        for component in nx.strongly_connected_components(graph):
            one = next(iter(component))
            if len(component) > 1 or graph.has_edge(one, one):
                in_cycles |= component
        if not any(request.lock in self.permits for request in self.waiting()):
            # Each waits for all: stuck is whoever is in a cycle, or waits for one who is.
            reach = in_cycles.union(*(nx.ancestors(graph, one) for one in in_cycles))
            assert stuck == reach
        if stuck:
            assert in_cycles, "no deadlock without a cycle"

    def _fits(self, request: Request) -> bool:
        holders = self.held.get(request.lock, [])
        if request.lock in self.permits:
            return len(holders) < self.permits[request.lock]
        return not holders or (request.mode == "s" and all(one.mode == "s" for one in holders))

    def _serve(self, lock: str) -> list[Request]:
        served = []
        queue = self.queues.get(lock, [])
        while queue and self._fits(queue[0]):
            served.append(queue.pop(0))
            self.held.setdefault(lock, []).append(served[-1])
        return served
