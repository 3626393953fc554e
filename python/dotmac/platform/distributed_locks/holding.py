"""One holder's lease: what is known of it, and who is told when it is lost."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from dotmac.platform import _semconv
from dotmac.platform.errors import ForkedHandle, LockNotOwned
from dotmac.platform.observability import metrics
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Generator

    from dotmac.platform import _native
    from dotmac.platform.connection.engine import Link, LoopSide

__all__ = ["Holding", "LostSignal", "current_task"]

_log = get_logger(__name__)


class LostSignal:
    """Whether, and when, a lock is lost.

    True in a condition once the lease has ended before it was given back. Awaited, it returns the reason when
    the lock is lost, and None when it is given back.
    """

    __slots__ = ("_holding",)

    def __init__(self, holding: Holding | None) -> None:
        self._holding = holding

    def __bool__(self) -> bool:
        return self._holding is not None and self._holding.loss() is not None

    def __repr__(self) -> str:
        return f"<LostSignal {self.reason or 'not lost'}>"

    @property
    def reason(self) -> str | None:
        """Why the lock was lost; None while it is held or after it was given back."""
        return None if self._holding is None else self._holding.loss()

    def is_set(self) -> bool:
        """The same as its truth value."""
        return bool(self)

    def __await__(self) -> Generator[Any, None, str | None]:
        return self._wait().__await__()

    async def _wait(self) -> str | None:
        if self._holding is None:
            raise LockNotOwned("the lock is not held, so it can't be lost")
        return await self._holding.end()


class Holding:
    """One holder's lease. Made when it is granted, settled when it is over."""

    __slots__ = (
        "_settled",
        "_waiters",
        "cancelled",
        "cancelling",
        "entered",
        "holder",
        "lease",
        "link",
        "name",
        "on_lost",
        "reason",
        "side",
        "since",
        "task",
    )

    def __init__(self, name: str, lease: _native.Lease, side: LoopSide | None, link: Link) -> None:
        self.name = name
        self.lease = lease
        self.link = link
        link.holdings[lease.id] = self
        self.side = side
        # Kept, so that no later task gets the id of this one and is taken for the owner.
        self.holder = current_task()
        self.entered = False
        self.task: asyncio.Task[Any] | None = None
        self.on_lost: Literal["cancel", "flag"] = "flag"
        self.cancelling = 0
        self.cancelled = False
        self.reason: str | None = None
        self.since = time.perf_counter()
        self._waiters: list[asyncio.Future[str | None]] = []
        self._settled = False
        if side is not None:
            side.watchers[lease.id] = self.tell

    def loss(self) -> str | None:
        """Why it was lost, if it was."""
        return self.reason or self.lease.loss

    async def end(self) -> str | None:
        """Waits until it is lost, and returns why, or until it is given back: None."""
        reason = self.loss()
        if reason is not None or self._settled:
            return reason
        if self.side is None:
            # Acquired by a thread: this loop is the first that can be told.
            side = await self.link.side()
            side.watchers[self.lease.id] = self.tell
            self.side = side
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        try:
            # It may have been lost, or given back, between the look and the place in the list.
            if self.loss() is not None or self._settled:
                return self.loss()
            return await future
        finally:
            self._waiters.remove(future)

    def tell(self, reason: str | None) -> None:
        """Runs in a loop when the engine reports the loss."""
        if self.reason is None:
            self.reason = reason or "the lease ended"
        metrics.counter(_semconv.LOCK_LOSSES).add(1)
        _log.warning("lock lost", lock=self.name, reason=self.reason)
        self._wake(self.reason)
        if self.on_lost == "cancel" and self.task is not None:
            self.cancelled = True
            self.task.cancel(f"lock {self.name!r} lost: {self.reason}")

    def forfeit(self, reason: str) -> None:
        """The service under it is closed: the holder is told that it is lost, then it is given back.

        A body that still runs is ended and warned of. Giving back what was acquired by hand is what closing
        is for.
        """
        if self.lease.held:
            self.reason = reason
            if not self.entered:
                self._wake(reason)
            elif self.side is not None and self.side.watchers.pop(self.lease.id, None) is not None:
                # A loop that was closed has nobody left who could be told.
                with suppress(RuntimeError):
                    self.side.loop.call_soon_threadsafe(self.tell, reason)
        self.lease.drop()

    def forgotten(self) -> bool:
        """Its lock object is gone: gives it back, if it was held by this process. True if it was."""
        self.settle()
        try:
            held = self.lease.held
            self.lease.drop()
        except ForkedHandle:
            return False
        return held

    def settle(self) -> None:
        """It is over: nobody is told of a loss any more."""
        self._settled = True
        if self.side is not None:
            self.side.watchers.pop(self.lease.id, None)
        self.link.holdings.pop(self.lease.id, None)
        metrics.histogram(_semconv.LOCK_HOLD_DURATION).record(time.perf_counter() - self.since)
        if self._waiters:
            self._wake(self.loss())

    def _wake(self, reason: str | None) -> None:
        for waiter in list(self._waiters):
            with suppress(RuntimeError):
                waiter.get_loop().call_soon_threadsafe(_resolve, waiter, reason)


def current_task() -> asyncio.Task[Any] | None:
    """The task that runs here; None outside of event loops."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _resolve(future: asyncio.Future[str | None], reason: str | None) -> None:
    if not future.done():
        future.set_result(reason)
