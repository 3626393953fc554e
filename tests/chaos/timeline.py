"""The faults of a run by kind, and by target and time, found without looking at all of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chaos.history import Fault


class Timeline:
    """Faults that no longer change."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        by_target: dict[str, list[Fault]] = defaultdict(list)
        self._kinds: dict[str, list[Fault]] = defaultdict(list)
        for fault in faults:
            by_target[fault.target].append(fault)
            self._kinds[fault.kind].append(fault)
        self._targets: dict[str, tuple[list[Fault], list[int], list[int]]] = {}
        for target, some in by_target.items():
            some.sort(key=lambda fault: fault.begin)
            begins = [fault.begin for fault in some]
            # How long anything that began up to there lasts: it only grows, so that it can be searched.
            lasts = list(accumulate((fault.end for fault in some), max))
            self._targets[target] = some, begins, lasts

    def between(self, target: str, begin: int, end: int) -> Iterator[Fault]:
        """Those of a target that went on at some time from `begin` to `end`."""
        if target not in self._targets:
            return
        faults, begins, lasts = self._targets[target]
        for fault in faults[bisect_left(lasts, begin) : bisect_right(begins, end)]:
            if fault.end >= begin:
                yield fault

    def of(self, kinds: Iterable[str]) -> list[Fault]:
        """Those of some kinds, from the first to the last."""
        found = [fault for kind in kinds for fault in self._kinds.get(kind, ())]
        return sorted(found, key=lambda fault: fault.begin)
