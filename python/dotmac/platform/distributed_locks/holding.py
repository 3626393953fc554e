"""One holder's lease: what is known of it, and who is told when it is lost."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from dotmac.platform import _semconv
from dotmac.platform.connection.engine import failure
from dotmac.platform.errors import ForkedHandle, LockLost, LockNotOwned, ServerUnavailable
from dotmac.platform.observability import metrics
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from dotmac.platform import _native
    from dotmac.platform.connection.engine import Link
    from dotmac.platform.connection.sides import LoopSide
    from dotmac.platform.distributed_locks.callers import Asker

    Scope = str | int

__all__ = ["Body", "Holding", "LostSignal", "current_task", "task_in"]

# The task that runs in the running loop, which is given.
task_in: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None] = asyncio.current_task
if sys.version_info < (3, 12):
    # asyncio's own function is written in C from then on.
    task_in = asyncio.tasks._current_tasks.get  # type: ignore[attr-defined]  # noqa: SLF001

_log = get_logger(__name__)


class LostSignal:
    """Whether, and when, a lock is lost.

    True in a condition once the lease has ended before it was given back. Awaited, it returns the reason when
    the lock is lost, and None when it is given back.
    """

    __slots__ = ("_holding",)

    def __init__(self, holding: Body | None) -> None:
        self._holding = holding

    def __bool__(self) -> bool:
        return self._holding is not None and self._holding.loss() is not None

    def __repr__(self) -> str:
        return f"<LostSignal {self.reason or 'not lost'}>"

    @property
    def reason(self) -> str | None:
        """Why the lock was lost; None while it is held or after it was given back."""
        return None if self._holding is None else self._holding.loss()

    def add_callback(self, callback: Callable[[str], None]) -> None:
        """Calls it with the reason when the lock is lost: in the event loop that acquired it, or in a
        thread of the platform's where a thread did. At once, if it is lost already; never, once it was given
        back.

        Raises: LockNotOwned: the lock is not held.
        """
        if not isinstance(self._holding, Holding):
            raise LockNotOwned("the lock is not held, so it can't be lost")
        self._holding.on_loss(callback)

    def is_set(self) -> bool:
        """The same as its truth value."""
        return bool(self)

    def __await__(self) -> Generator[Any, None, str | None]:
        return self._wait().__await__()

    async def _wait(self) -> str | None:
        if self._holding is None:
            raise LockNotOwned("the lock is not held, so it can't be lost")
        return await self._holding.end()


class Body:
    """What runs under a lock, and how it ends when the lock is lost.

    What most bodies never need is not set when one is made: that is on the path of every acquisition.
    """

    entered = False
    task: asyncio.Task[Any] | None = None
    on_lost: Literal["cancel", "flag"] = "flag"
    cancelling = 0
    cancelled = False
    reason: str | None = None

    def __init__(self, name: str, holder: asyncio.Task[Any] | None, *, asynchronous: bool) -> None:
        self.name = name
        # Kept, so that no later task gets the id of this one and is taken for the owner.
        self.holder = holder
        self.asynchronous = asynchronous

    @property
    def held(self) -> bool:
        """True while the lock has not run out, judged now."""
        raise NotImplementedError

    def loss(self) -> str | None:
        """Why the lock was lost, if it was."""
        return self.reason

    def settle(self) -> None:
        """It is over: nobody is told of a loss any more."""
        raise NotImplementedError

    async def end(self) -> str | None:
        """Waits until the lock is lost, and returns why, or until it is given back: None."""
        raise NotImplementedError

    def lost_error(self) -> LockLost:
        """What its holder is told."""
        return LockLost(f"{self} was lost: {self.loss()}")

    def enter(self, on_lost: Literal["cancel", "flag"]) -> None:
        """The body begins, in this task or thread."""
        self.on_lost, self.entered = on_lost, True
        self._in_this_task()

    def suspend(self) -> None:
        """The body is a generator that has yielded: a loss must not cancel its consumer."""
        self.task = None

    def resume(self) -> LockLost | None:
        """The generator goes on, perhaps in another task; the error for it if the lock was lost meanwhile."""
        self._in_this_task()
        return self.lost_error() if self.on_lost == "cancel" and self.loss() is not None else None

    def end_early(self, reason: str) -> None:
        """The lock is lost: cancels the body, if that is wanted. Runs in its loop."""
        if self.on_lost == "cancel" and self.task is not None:
            self.cancelled = True
            self.task.cancel(f"{self} lost: {reason}")

    def leave(self, error: BaseException | None) -> bool:
        """The body has ended, by `error` if any; True if the lock was lost: nothing is left to give back.

        Raises: LockLost: that is why the body ended, or it ended well without having heard of it.
        """
        task, self.task = self.task, None
        if self.cancelled and task is not None and task is current_task():
            ours = task.uncancel() <= self.cancelling
            if ours and isinstance(error, asyncio.CancelledError):
                raise self.lost_error() from error
        if self.loss() is None:
            return False
        if error is None and self.on_lost == "cancel":
            raise self.lost_error()
        return True  # what the body raised goes first

    def _in_this_task(self) -> None:
        if self.asynchronous:
            self.task = current_task()
            self.cancelling = 0 if self.task is None else self.task.cancelling()


class Holding(Body):
    """One holder's lease. Made when it is asked for, begun when it is granted, settled when it is over."""

    lease: _native.Lease
    timed = False  # somebody reads the metrics
    waited = 0.0  # seconds from asking to the grant, where it is timed
    asker: Asker | None = None
    guarded = False  # the loop may not stand still while it is held
    # Lock objects through which it was entered, where the same owner may do so several times.
    entries: list[int] = []  # noqa: RUF012 - replaced, never changed, where it is used
    _callbacks: list[Callable[[str], None]] | None = None
    _settled = False
    _waiters: list[asyncio.Future[str | None]] | None = None

    def __init__(
        self,
        name: str,
        link: Link,
        side: LoopSide | None,
        holder: asyncio.Task[Any] | None,
        scope: Scope,
    ) -> None:
        # Not by way of `Body`: one call less for each acquisition.
        self.name = name
        self.holder = holder
        self.asynchronous = side is not None
        self.link = link
        self.side = side
        self.scope = scope
        self.since = perf_counter()

    def begin(self, lease: _native.Lease) -> None:
        """It is granted: from here on somebody is told when it is lost."""
        self.lease = lease
        self.number = number = lease.id
        side = self.side
        holdings = self.link.of_threads if side is None else side.holdings
        holdings[number] = self
        one = self.asker
        if one is not None:
            one.asking = None
            one.holding += 1
            if one.holding == 1 and one.children is not None:
                one.begins_to_hold()
        if self.timed:
            now = perf_counter()
            self.waited = now - self.since
            metrics.histogram(_semconv.LOCK_ACQUIRE_DURATION).record(self.waited)
            if lease.place:
                metrics.histogram(_semconv.LOCK_QUEUE_LENGTH).record(lease.place)
                metrics.counter(_semconv.LOCK_CONTENTIONS).add(1)
            self.since = now

    def told(self) -> dict[str, int | float]:
        """What a span says of the grant."""
        return {
            _semconv.LOCK_QUEUE_POSITION: self.lease.place,
            _semconv.LOCK_WAIT_TIME: self.waited,
        }

    def enter(self, on_lost: Literal["cancel", "flag"]) -> None:
        """The body begins, in the task or thread that asked."""
        self.on_lost, self.entered = on_lost, True
        if self.asynchronous and self.holder is not None:
            self.task = self.holder
            self.cancelling = self.holder.cancelling()

    def leave(self, error: BaseException | None) -> bool:
        """As in `Body`, and the end: nobody is told of a loss any more."""
        self.settle()
        if self.cancelled or self.reason is not None or self.lease.loss is not None:
            return super().leave(error)
        self.task = None
        return False

    def __str__(self) -> str:
        return f"lock {self.name!r} (fencing token {self.lease.fence})"

    @property
    def held(self) -> bool:
        return self.lease.held

    def loss(self) -> str | None:
        return self.reason or self.lease.loss

    async def end(self) -> str | None:
        reason = self.loss()
        if reason is not None or self._settled:
            return reason
        if self.side is None:
            # Acquired by a thread: this loop is the first that can be told.
            side = await self.link.side()
            side.holdings[self.number] = self
            self.side = side
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        if self._waiters is None:
            self._waiters = []
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
        self.end_early(self.reason)
        self._call_back(self.reason)

    def on_loss(self, callback: Callable[[str], None]) -> None:
        if self._settled:
            return
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)
        if self.side is None:
            self.link.tell_in_thread(self.number, self)
        # It may have been lost, and those before have been told, before this one was in the list.
        reason = self.loss()
        if reason is not None:
            self._call_back(reason)

    def _call_back(self, reason: str) -> None:
        """Each of them once, also where a thread adds one while another tells them."""
        while self._callbacks:
            try:
                callback = self._callbacks.pop(0)
            except IndexError:
                return
            try:
                callback(reason)
            except Exception:  # noqa: BLE001 - one callback's error must not keep the others from being told
                _log.exception("callback of a lost lock failed", lock=self.name)

    def forfeit(self, reason: str) -> None:
        """The service under it is closed: the holder is told that it is lost, then it is given back.

        A body that still runs is ended and warned of. Giving back what was acquired by hand is what closing
        is for.
        """
        if self.lease.held:
            self.reason = reason
            if not self.entered:
                self._wake(reason)
            elif self.side is not None and self.side.holdings.pop(self.number, None) is not None:
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
        if self._settled:
            return
        self._settled = True
        if self.asker is not None:
            self.asker.holding -= 1
        side, number = self.side, self.number
        if side is not None:
            side.holdings.pop(number, None)
            if self.guarded:
                side.unguard(number)
        if not self.asynchronous:
            self.link.of_threads.pop(number, None)
            if self._callbacks is not None:
                self.link.tell_no_more(number)
        if self.link.reentrant:
            key = (self.scope, self.name)
            if self.link.reentrant.get(key) is self:
                del self.link.reentrant[key]
        if self.timed:
            metrics.histogram(_semconv.LOCK_HOLD_DURATION).record(perf_counter() - self.since)
        if self._waiters is not None:
            self._wake(self.loss())

    def given_back(self, result: Any, error: BaseException | None) -> None:
        """Judges the answer to its release. What the body raised goes first."""
        if result is True:
            return
        if error is not None:
            # At its end the interpreter has closed the engine, which gave everything back, and logs no more.
            if not sys.is_finalizing():
                _log.warning("release not confirmed", lock=self.name, result=str(result))
            return
        if result is False:
            raise self.ended(f"(fencing token {self.lease.fence}) had ended when it was given back")
        failed = failure(result, f"releasing lock {self.name!r}", self.link)
        if isinstance(failed, ServerUnavailable):
            failed.add_note("the engine repeats the release until the server has answered")
        raise failed

    def ended(self, how: str) -> LockLost:
        """The server no longer had it; why, if that is known."""
        return self.lost_error() if self.loss() else LockLost(f"lock {self.name!r} {how}")

    def _wake(self, reason: str | None) -> None:
        for waiter in list(self._waiters or ()):
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
