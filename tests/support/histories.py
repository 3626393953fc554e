"""Histories made by hand, for the judge of `make chaos`."""

from __future__ import annotations

from typing import Any

from chaos.checker import check
from chaos.history import SECOND, Attempt, History, Write

START = 1_000 * SECOND


def at(seconds: float) -> int:
    return START + int(seconds * SECOND)


def attempt(
    worker: str,
    asked: float,
    held: float | None = None,
    left: float | None = None,
    fence: int | None = None,
    how: str = "released",
    **changed: Any,
) -> Attempt:
    """A request that was held from `held` to `left`, looking all the time; seconds after the start."""
    facts: dict[str, Any] = {
        "worker": f"worker-{worker}-0",
        "number": int(asked * 1000),
        "lock": "a",
        "kind": "exclusive",
        "cost": 1,
        "capacity": 1,
        "timeout": 2 * SECOND,
        "fixed": False,
        "patience": None,
        "asked": at(asked),
        "how": how,
    }
    if held is not None and left is not None:
        facts |= {"held": at(held), "fence": fence, "acted": at(left), "promised": at(left), "left": at(left)}
    ended = left if left is not None else asked + 0.1
    return Attempt(**{**facts, "ended": at(ended), **changed})


def good() -> History:
    """Two workers in turn, with a write each, and one that gives up."""
    history = History(
        attempts=[
            attempt("00", 0.0, 0.1, 1.0, 11),
            attempt("01", 0.5, 1.1, 2.0, 12),
            attempt("02", 1.2, how="timeout", patience=SECOND // 10),
            attempt("00", 2.5, 2.6, 3.0, 13),
        ],
        writes=[Write(at(0.5), "a", "write", 11, True), Write(at(1.5), "a", "write", 12, True)],
        calm=at(4),
        end=at(10),
    )
    for worker in ("00", "01", "02"):
        process = history.process(f"worker-{worker}-0")
        process.said_goodbye, process.status = True, 0
    return history


def rules(history: History) -> list[str]:
    return [violation.rule for violation in check(history).violations]


def together(capacity: int, *costs: int) -> History:
    history = good()
    history.attempts = [
        attempt(f"{n:02}", 0, 0.1 + n / 100, 1, 10 + n, cost=cost, capacity=capacity, kind=f"of {cost}")
        for n, cost in enumerate(costs)
    ]
    history.writes = []
    for n in range(len(costs)):
        process = history.process(f"worker-{n:02}-0")
        process.said_goodbye, process.status = True, 0
    return history


def overtaken() -> History:
    """The first has asked two seconds before the second, and is granted after it."""
    history = good()
    history.writes = []
    history.attempts = [
        attempt("00", 0.0, 0.1, 5.0, 11),
        attempt("01", 1.0, 6.1, 7.0, 13),
        attempt("02", 3.0, 5.1, 6.0, 12),
    ]
    history.calm = None
    return history
