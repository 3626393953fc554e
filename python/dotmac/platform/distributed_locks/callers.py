"""Where in the caller's code a lock is asked for, and which tasks wait for the one that asks."""

from __future__ import annotations

import functools
import heapq
import itertools
import sys
import weakref
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator
    from types import CodeType, FrameType

    from dotmac.platform import _native
    from dotmac.platform.connection.sides import LoopSide

__all__ = ["Asker", "asker", "here"]

_PACKAGE = __name__.rpartition(".")[0]
_places: dict[tuple[CodeType, int], str] = {}
_MANY = 4_096
# Seconds: how often the loop looks, and how rarely at a request that waits for long.
_LOOK_EVERY = 0.005
_LAST_LOOK = 1.0


class Asker:
    """A task that has asked for a lock, and the one in whose context it was started.

    Args:
        task: the task.
        before: the other one.
    """

    __slots__ = ("__weakref__", "asking", "before", "children", "holding", "task")

    def __init__(self, task: asyncio.Task[Any], before: Asker | None) -> None:
        self.task = weakref.ref(task)
        self.before = before
        # Locks that it holds.
        self.holding = 0
        # What it has asked for last: the loop's side and the request. Nothing once it was granted.
        self.asking: tuple[LoopSide, _native.Answer[Any]] | None = None
        # Those that were started in its context.
        self.children: weakref.WeakSet[Asker] | None = None
        if before is not None:
            if before.children is None:
                before.children = weakref.WeakSet()
            before.children.add(self)

    def asks(self, side: LoopSide, answer: _native.Answer[Any]) -> None:
        """It has asked. Only where somebody behind it holds a lock can a cycle go through both."""
        self.asking = side, answer
        before = self.before
        while before is not None:
            if before.holding:
                _look_at(self)
                return
            before = before.before

    def begins_to_hold(self) -> None:
        """It holds its first lock: what those ask for who were started before matters from here on."""
        todo = [self]
        while todo:
            for child in list(todo.pop().children or ()):
                if child.asking is not None:
                    _look_at(child)
                todo.append(child)


# Who asked for a lock in this context last.
_asker: ContextVar[Asker | None] = ContextVar("dotmac_lock_asker", default=None)


def here(depth: int) -> str:
    """File and line of the first frame outside of this package, from `depth` frames above on."""
    frame: FrameType | None = sys._getframe(depth)  # noqa: SLF001 - the one way that costs next to nothing
    while frame is not None and (
        frame.f_globals.get("__package__") == _PACKAGE or frame.f_globals.get("__name__") == "contextlib"
    ):
        frame = frame.f_back
    # A task of its own, whose place in the loop says nothing.
    if frame is None or frame.f_globals.get("__package__") == "asyncio":
        return ""
    key = (frame.f_code, frame.f_lineno)
    place = _places.get(key)
    if place is None:
        if len(_places) >= _MANY:
            _places.clear()
        place = _places[key] = f"{frame.f_code.co_filename[-200:]}:{frame.f_lineno}"
    return place


def _look_at(one: Asker) -> None:
    if one.asking is not None:
        side, answer = one.asking
        if side.children is None:
            side.children = Children(side.loop)
        side.children.add(one, answer)


class Children:
    """Requests of tasks that others may await, now or later: who awaits a task waits for what it waits for.

    One for a loop, which looks at each of them ever more rarely while it waits.
    """

    __slots__ = ("_asked", "_looking", "_loop", "_numbers")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._looking = False
        self._numbers = itertools.count()
        # The next to look at first: when, who, the request, and how long to wait until the time after that.
        self._asked: list[tuple[float, int, Asker, _native.Answer[Any], float]] = []

    def add(self, one: Asker, answer: _native.Answer[Any]) -> None:
        """The task has asked."""
        self._put(one, answer, _LOOK_EVERY)
        self._again()

    def _put(self, one: Asker, answer: _native.Answer[Any], pause: float) -> None:
        at = self._loop.time() + pause
        heapq.heappush(self._asked, (at, next(self._numbers), one, answer, min(2 * pause, _LAST_LOOK)))

    def _again(self) -> None:
        if self._asked and not self._looking:
            self._looking = True
            # Those of a moment are looked at together.
            self._loop.call_at(max(self._asked[0][0], self._loop.time() + _LOOK_EVERY / 2), self._look)

    def _look(self) -> None:
        self._looking = False
        now = self._loop.time()
        while self._asked and self._asked[0][0] <= now:
            _, _, one, answer, pause = heapq.heappop(self._asked)
            task, others = one.task(), _ancestors(one)
            by: list[str | int] = []
            if task is not None and others:
                by = [id(other) for other in _awaiting(task, others)]
            if answer.awaited(by):
                self._put(one, answer, pause)
        self._again()


def asker(task: asyncio.Task[Any]) -> Asker:
    """The task as one that asks for locks."""
    known = _asker.get()
    if known is None or known.task() is not task:
        # Those that are over await nobody, and a chain of them would have no end.
        while known is not None and ((before := known.task()) is None or before.done()):
            known = known.before
        known = Asker(task, known)
        _asker.set(known)
    return known


def _ancestors(one: Asker) -> list[asyncio.Task[Any]]:
    """The tasks that hold locks and in whose contexts this one was started, the nearest first."""
    found: list[asyncio.Task[Any]] = []
    before = one.before
    while before is not None:
        task = before.task()
        if task is not None and before.holding:
            found.append(task)
        before = before.before
    return found


def _awaiting(task: asyncio.Task[Any], others: list[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    """Those of the others that can't go on before the task has ended, directly or through tasks between."""
    found: list[asyncio.Task[Any]] = []
    ahead: list[asyncio.Future[Any]] = [task]
    seen = {id(task)}
    while ahead:
        for other in _behind(ahead.pop()):
            if id(other) not in seen:
                seen.add(id(other))
                ahead.append(other)
                found += [one for one in others if one is other]
    return found


def _behind(future: asyncio.Future[Any]) -> Iterator[Any]:
    """What stands still until the future is done: tasks that await it, and futures that its end completes
    (`gather`, `wait`, `wait_for`, `TaskGroup`, `shield`)."""
    if future.done():
        return
    for callback, _ in getattr(future, "_callbacks", None) or ():
        whose = getattr(callback, "__self__", None)
        if getattr(whose, "_fut_waiter", None) is future:
            yield whose  # a task that awaits it
        group = getattr(whose, "_on_completed_fut", None)
        if group is not None:
            yield group
        arguments = callback.args if isinstance(callback, functools.partial) else ()
        for other in [*arguments, *_variables(callback)]:
            if getattr(other, "_asyncio_future_blocking", None) is not None:
                yield other


def _variables(callback: Any) -> list[Any]:
    """What a nested function knows of the one around it."""
    cells = getattr(callback, "__closure__", None)
    if not cells:
        return []
    known = dict(zip(callback.__code__.co_freevars, cells, strict=True))
    try:
        several = known["counter"].cell_contents > 1
        if several and known["return_when"].cell_contents == "FIRST_COMPLETED":
            return []  # of `wait`: another one's end will do
    except (KeyError, ValueError):  # of something else
        pass
    found = []
    for cell in cells:
        with suppress(ValueError):  # it is empty
            found.append(cell.cell_contents)
    return found
