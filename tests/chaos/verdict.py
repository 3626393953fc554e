"""What rules find."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chaos.history import Attempt, History


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule."""

    rule: str
    at: int
    text: str


@dataclass(slots=True)
class Verdict:
    """What the rules found, and how much there was to look at.

    Args:
        longest_overlap: of two that the limits excuse; nanoseconds.
    """

    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    longest_overlap: int = 0


def by_lock(history: History, *, granted: bool = True) -> dict[str, list[Attempt]]:
    """Requests by the name of the lock; all, or those that were granted."""
    found: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in history.attempts:
        if attempt.held is not None or not granted:
            found[attempt.lock].append(attempt)
    return found


def fence_of(attempt: Attempt) -> int:
    """Its token; 0 if it has none."""
    return attempt.fence or 0


def waited_until(attempt: Attempt) -> int:
    """When its wait was over; for one that was never heard of again, at once."""
    if attempt.held is not None:
        return attempt.held
    return attempt.asked if attempt.ended is None else attempt.ended


def ms(nanoseconds: int) -> str:
    """Milliseconds."""
    return f"{nanoseconds / 1e6:.0f}"
