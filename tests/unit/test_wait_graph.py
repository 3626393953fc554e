"""The graph of who waits for whom.

Promises: one shortest ring comes out for each group of owners that wait for each other, its edges in order, a
ring of one included; chains and semaphores are no rings; a chain of ten thousand is no trouble; what Graphviz
is given is quoted.
"""

from __future__ import annotations

import itertools

from dotmac.platform.distributed_locks import OwnerInfo, WaitEdge, WaitGraph


def graph(*pairs: tuple[str, str, str], kind: str = "exclusive") -> WaitGraph:
    edges = tuple(
        WaitEdge(waiter, lock, kind, holder, f"r{number}", "", "", waiter)  # type: ignore[arg-type]
        for number, (waiter, lock, holder) in enumerate(pairs)
    )
    owners = dict.fromkeys(itertools.chain.from_iterable((waiter, holder) for waiter, _, holder in pairs))
    return WaitGraph({owner: OwnerInfo(owner, "s", "host", 1, "svc") for owner in owners}, edges)


def rings(found: WaitGraph) -> list[list[str]]:
    return [[edge.lock for edge in ring] for ring in found.cycles()]


def test_no_ring() -> None:
    assert rings(graph()) == []
    assert rings(graph(("a", "1", "b"), ("b", "2", "c"), ("a", "3", "c"))) == []


def test_rings_in_order() -> None:
    assert rings(graph(("a", "1", "a"))) == [["1"]]
    assert rings(graph(("c", "3", "a"), ("a", "1", "b"), ("b", "2", "c"), ("x", "1", "b"))) == [
        ["1", "2", "3"]
    ]
    two = graph(("a", "1", "b"), ("b", "2", "a"), ("c", "3", "d"), ("d", "4", "c"), ("b", "5", "c"))
    assert sorted(map(sorted, rings(two))) == [["1", "2"], ["3", "4"]]


def test_the_shortest_way_round() -> None:
    assert rings(graph(("a", "1", "b"), ("b", "2", "c"), ("c", "3", "a"), ("b", "4", "a"))) == [["1", "4"]]


def test_a_semaphore_is_no_ring() -> None:
    assert rings(graph(("a", "1", "b"), ("b", "2", "a"), kind="semaphore")) == []


def test_long_chains() -> None:
    pairs = [(f"o{n}", f"l{n}", f"o{n + 1}") for n in range(10_000)]
    assert rings(graph(*pairs)) == []
    (ring,) = graph(*pairs, ("o10000", "last", "o0")).cycles()
    assert len(ring) == 10_001


def test_dot() -> None:
    dot = graph(("a", 'l"1\n', "b\\"), ("b\\", "2", "a")).to_dot()
    assert dot.splitlines()[:2] == ["digraph locks {", "  node [shape=box];"]
    assert '"a" -> "b\\\\" [label="l\\"1\\\\x0a", color=red];' in dot
    assert '"a" [label="a\\nsvc host:1"];' in dot
