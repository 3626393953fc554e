"""Whose lock it is: one lock object is used by several tasks and threads, each a holder of its own."""

from __future__ import annotations

import itertools
import threading
from typing import Generic, TypeVar

from dotmac.platform.distributed_locks.holding import Body, current_task
from dotmac.platform.errors import LockNotOwned

__all__ = ["Scope", "Scoped"]

H = TypeVar("H", bound=Body)
Scope = str | int
_thread = threading.local()
_thread_numbers = itertools.count(1)
_NOBODY: frozenset[Scope] = frozenset()
_marking = threading.Lock()


class Scoped(Generic[H]):
    """A lock's holdings by scope: the task or the thread that acquired it, or the owner that was named."""

    __slots__ = ("_by_hand", "_grants", "_held", "_owner", "name")

    def _begin(self, name: str, owner: str | None) -> None:
        self.name = name
        self._owner = owner
        self._held: dict[Scope, H] = {}
        # Scopes whose context is still open while its lock was given back by hand.
        self._by_hand: frozenset[Scope] = _NOBODY
        self._grants = 0

    def _scope(self) -> Scope:
        """Who is asking: a task, a thread, or the token that was given."""
        if self._owner is not None:
            return f"={self._owner}"
        task = current_task()
        return _of_thread() if task is None else id(task)

    def _asking(self) -> Scope:
        """Who asks for the lock now. What it lost and never gave back ends here."""
        scope = self._scope()
        if self._grants:
            self._end_lost(scope)
        return scope

    def _end_lost(self, scope: Scope) -> None:
        if scope in self._by_hand:
            self._mark(closed=scope)
        before = self._held.get(scope)
        if before is not None and before.loss() is not None:
            del self._held[scope]
            before.settle()

    def _granted_to(self, scope: Scope, held: H) -> H:
        self._grants += 1
        self._held[scope] = held
        return held

    def _mine(self) -> H | None:
        """What this task, thread or token holds, or what a task that has ended acquired for it."""
        held = self._held.get(self._scope())
        if held is None and len(self._held) == 1:
            only = next(iter(self._held.values()))
            if only.holder is not None and only.holder.done():
                # asyncio.wait_for and gather acquire in tasks of their own.
                return only
        return held

    def _seen(self) -> H | None:
        """The same; for tasks that a holder has started, also the only holding that this object ever had.

        Once it has had several, what another task holds now may not be what this one was started under.
        """
        held = self._mine()
        if held is None and self._grants == 1 and self._held:
            held = next(iter(self._held.values()))
        return held

    def _handle(self) -> H | None:
        """What `release` and `extend` are about: as with a file, whoever has the object may close it."""
        held = self._mine()
        if held is None and len(self._held) == 1:
            held = next(iter(self._held.values()))
        return held

    def _valid(self, held: H | None) -> H:
        if held is None:
            raise self._not_owned()
        if not held.held:
            raise held.lost_error()
        return held

    def _take(self) -> H:
        held = self._handle()
        if held is None:
            raise self._not_owned()
        for scope in [scope for scope, known in self._held.items() if known is held]:
            del self._held[scope]
            if held.entered:
                self._mark(by_hand=scope)
        held.settle()
        return held

    def _leave(self) -> H | None:
        """The holding whose context ends here; None if it was given back by hand before."""
        scope = self._scope()
        held = self._held.pop(scope, None)
        return self._leave_other(scope) if held is None else held

    def _leave_other(self, scope: Scope) -> H | None:
        if scope in self._by_hand:
            self._mark(closed=scope)
            return None
        # Entered in another task or thread, as fixtures and dependencies are.
        for other, known in list(self._held.items()):
            if known.entered:
                return self._held.pop(other)
        return None

    def _mark(self, *, by_hand: Scope | None = None, closed: Scope | None = None) -> None:
        with _marking:
            if by_hand is not None:
                self._by_hand |= {by_hand}
            if closed is not None:
                self._by_hand -= {closed}

    def _not_owned(self) -> LockNotOwned:
        return LockNotOwned(
            f"lock {self.name!r} is not held by this task or thread"
            + ("; to use it across them, give both the same owner=" if self._held else "")
        )


def _of_thread() -> Scope:
    number: int | None = getattr(_thread, "number", None)
    if number is None:
        number = _thread.number = next(_thread_numbers)
    return f"t{number}"
