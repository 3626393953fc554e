"""On what terms a lock is held: the same for many locks of a manager."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dotmac.platform import _native

if TYPE_CHECKING:
    from dotmac.platform.connection.engine import Link

__all__ = ["Kind", "Terms", "Victim"]

Kind = Literal["exclusive", "shared", "semaphore"]
Victim = Literal["youngest", "lowest_priority", "fewest_locks", "self"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What was asked for, checked.

    Args:
        link: the way to the server.
        timeout: length of the lease, seconds.
        patience: seconds to wait; None without limit, 0 only tries.
        fixed: the lease is not renewed.
        on_lost: what becomes of the body of a lost lock.
        detect: refuse waits that close a cycle.
        pipelined: leaving does not wait for the server.
        kind, permits: how many may hold it.
        priority: who is served first.
        victim: who gives up where a wait closes a cycle.
        max_hold: seconds after which the lease ends, renewed or not.
        reentrant: the same task or thread may hold it several times.
        replicas: how many replicas have to know of a grant.
        max_loop_stall: seconds for which the event loop may stand still while it holds the lock.
    """

    link: Link
    timeout: float
    patience: float | None
    fixed: bool
    on_lost: Literal["cancel", "flag"]
    detect: bool
    pipelined: bool
    kind: Kind = "exclusive"
    permits: int = 0
    priority: int = 0
    victim: Victim = "youngest"
    max_hold: float | None = None
    reentrant: bool = False
    replicas: int = 0
    max_loop_stall: float | None = None
    # What of it is not usual, as the engine takes it.
    asking: _native.Asking | None = field(init=False, compare=False, default=None)
    # Nothing has to be done around an acquisition in Python.
    plain: bool = field(init=False, compare=False, default=True)

    def __post_init__(self) -> None:
        usual = (self.kind, self.priority, self.victim, self.max_hold) == ("exclusive", 0, "youngest", None)
        if not usual:
            object.__setattr__(self, "asking", self.asked())
        plain = not (self.reentrant or self.replicas or self.max_loop_stall)
        object.__setattr__(self, "plain", plain)

    def asked(self, offered: int | None = None, *, numbered: bool = False) -> _native.Asking:
        """The same for the engine; `offered` is the fence under which the lock is taken over, `numbered` asks
        for the place in the queue."""
        return _native.Asking(
            self.kind, self.permits, self.priority, self.victim, self.max_hold, offered, numbered
        )
