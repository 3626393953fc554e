"""One lock: acquire, hold, learn that it is lost, give back.

The lease itself lives in the engine, which renews it whatever this interpreter does. A lock object holds no
connection and no loop: it may be made at import time and used from several loops and threads, each of which
is a holder or a waiter of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Literal, Self

from dotmac.platform import _semconv
from dotmac.platform.connection.clients import target_from_client
from dotmac.platform.connection.engine import Link, LoopSide, failure
from dotmac.platform.distributed_locks.arguments import (
    check_name,
    check_on_lost,
    check_patience,
    check_timeout,
)
from dotmac.platform.distributed_locks.holding import Holding, LostSignal, current_task
from dotmac.platform.errors import (
    DeadlockDetected,
    ForkedHandle,
    InvalidArgument,
    LockLost,
    LockNotOwned,
    LockTimeout,
    ServerUnavailable,
)
from dotmac.platform.observability import metrics, tracing
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["DistributedLock", "LostSignal"]

_log = get_logger(__name__)
_thread = threading.local()
_thread_numbers = itertools.count(1)


class DistributedLock:
    """A lock on one name, for `async with`, `with`, or by hand.

    Args:
        redis_client: a redis-py or valkey-py client (only its connection parameters are read) or a URL.
        name: name of the lock, 1 to 1,024 bytes of UTF-8.
        timeout: length of the lease, seconds, 0.1 to 30 days. The engine renews it about three times per
            lease for as long as the process lives; it is how long others wait after this process died.
        blocking_timeout: seconds to wait for the lock at most; None waits without limit, 0 only tries.
        auto_renewal: False for a lease that ends after `timeout`, whatever the holder does.
        on_lost: "cancel" ends an `async with` body by cancelling it into `LockLost`; "flag" only sets `lost`.
        owner: a token that names the owner instead of the task or thread that acquires.
        namespace: first part of the server's keys; locks of different namespaces never meet.
        detect_deadlocks: refuse a wait that would close a cycle.

    Raises: InvalidArgument: an argument is out of its range. UnreadableClient: the client can't be read.
    """

    __slots__ = (
        "__weakref__",
        "_by_hand",
        "_detect",
        "_fixed",
        "_grants",
        "_held",
        "_link",
        "_on_lost",
        "_owner",
        "_patience",
        "name",
        "timeout",
    )

    def __init__(
        self,
        redis_client: object,
        name: str,
        timeout: float | None = None,
        *,
        blocking_timeout: float | None = None,
        auto_renewal: bool = True,
        on_lost: Literal["cancel", "flag"] = "cancel",
        owner: str | None = None,
        namespace: str = "dotmac",
        detect_deadlocks: bool = True,
    ) -> None:
        if isinstance(redis_client, str):
            link = Link(redis_client, namespace=namespace)
        else:
            link = Link(target=target_from_client(redis_client), namespace=namespace)
        self._become(
            link,
            check_name(name),
            check_timeout(10.0 if timeout is None else timeout),
            check_patience(blocking_timeout),
            not auto_renewal,
            check_on_lost(on_lost),
            None if owner is None else check_name(owner, "owner"),
            detect_deadlocks,
        )

    @classmethod
    def _checked(
        cls,
        link: Link,
        name: str,
        timeout: float,
        patience: float | None,
        *,
        fixed: bool,
        on_lost: Literal["cancel", "flag"],
        owner: str | None,
        detect: bool,
    ) -> Self:
        """For the manager, which has checked the arguments: this is on the path of every acquisition."""
        lock = cls.__new__(cls)
        lock._become(link, name, timeout, patience, fixed, on_lost, owner, detect)  # noqa: SLF001 - a second constructor
        return lock

    def _become(
        self,
        link: Link,
        name: str,
        timeout: float,
        patience: float | None,
        fixed: bool,
        on_lost: Literal["cancel", "flag"],
        owner: str | None,
        detect: bool,
    ) -> None:
        self._link, self.name, self.timeout, self._patience = link, name, timeout, patience
        self._fixed, self._on_lost, self._owner, self._detect = fixed, on_lost, owner, detect
        self._held: dict[str | int, Holding] = {}
        # Scopes whose context is still open while its lock was given back by hand.
        self._by_hand: set[str | int] = set()
        self._grants = 0

    def __del__(self) -> None:
        # Nobody can give it back any more, and the engine would renew it for as long as the process lives.
        for held in list(getattr(self, "_held", {}).values()):
            if held.forgotten():
                warnings.warn(
                    f"lock {self.name!r} was dropped while it was held",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )

    def __repr__(self) -> str:
        try:
            state = "held" if self.held else "not held"
        except ForkedHandle:
            state = "held by the parent process"
        return f"<DistributedLock {self.name!r} timeout={self.timeout:g} {state}>"

    # ---- what is known of it

    @property
    def held(self) -> bool:
        """True while this task or thread holds it, itself or by a task that it awaited, and the lease has not
        run out, judged now. What other tasks hold through the same object does not count."""
        held = self._mine()
        return held is not None and held.lease.held

    @property
    def fencing_token(self) -> int:
        """The token of this holding: larger than that of every earlier holder of this lock.

        Tasks and threads that the holder started see it too, where the lock object was acquired only once.

        Raises: LockLost: the lease has ended. LockNotOwned: it is not held.
        """
        return self._valid(self._seen()).lease.fence

    @property
    def remaining(self) -> float:
        """Seconds until the lease ends if no further heartbeat is confirmed."""
        return self._valid(self._seen()).lease.remaining

    @property
    def lost(self) -> LostSignal:
        """Whether it is lost; awaitable."""
        return LostSignal(self._seen())

    # ---- asynchronous

    async def acquire(self, *, blocking: bool = True, blocking_timeout: float | None = None) -> bool:
        """Acquires the lock.

        Args:
            blocking: False only tries.
            blocking_timeout: seconds to wait at most, instead of the lock's own.
        Returns: True when it is held, False when it was not to be had in that time.
        Raises:
            DeadlockDetected: waiting would have closed a cycle; also when this task holds it already.
            ServerUnavailable, RequestTimeout, AuthenticationFailed, ServerRefused: the server's side failed.
        """
        try:
            await self._acquire(self._wait_for(blocking, blocking_timeout))
        except LockTimeout:
            return False
        return True

    async def release(self) -> None:
        """Gives the lock back; returns when the server has confirmed it.

        If it is cancelled, or the server does not answer in time, the engine repeats the release until it is
        answered.

        Raises: LockLost: the lease had ended before. LockNotOwned: it is not held.
            ServerUnavailable: the server could not confirm it in time.
        """
        held = self._take()
        side = await self._link.side()
        self._released(held, await side.bridge.release(held.lease))

    async def extend(self, timeout: float | None = None) -> None:
        """Sets the length of the lease anew, from now on.

        Args: timeout: seconds; None for the lock's own. A lease without renewal ends that long after now.
        Raises: LockLost: it has ended. LockNotOwned: it is not held. ServerUnavailable: no answer in time.
        """
        length = self.timeout if timeout is None else check_timeout(timeout)
        held = self._valid(self._handle())
        side = await self._link.side()
        self._extended(held, await side.bridge.extend(held.lease, int(length * 1e6)))

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        held = await self._acquire(self._patience)
        held.task, held.on_lost = task, self._on_lost
        held.cancelling = 0 if task is None else task.cancelling()
        held.entered = True
        if held.loss() is not None:
            # Lost between the grant and here.
            self._take()
            raise self._lost_error(held)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._leave()
        if held is None:
            return
        task, held.task = held.task, None
        held.settle()
        if held.cancelled and task is not None and task is asyncio.current_task():
            ours = task.uncancel() <= held.cancelling
            if ours and isinstance(error, asyncio.CancelledError):
                raise self._lost_error(held) from error
        if self._was_lost(held, error):
            return
        side = held.side
        if side is None or side.loop is not asyncio.get_running_loop():
            side = await self._link.side()
        self._released(held, await side.bridge.release(held.lease), error)

    async def aclose(self) -> None:
        """Leaves the server, for a lock that was made from a client or a URL; what it holds is given back.

        A lock of a manager shares the manager's way to the server and closes that.
        """
        await self._link.aclose()

    # ---- synchronous

    def acquire_sync(self, *, blocking: bool = True, blocking_timeout: float | None = None) -> bool:
        """`acquire` for threads without an event loop."""
        try:
            self._acquire_sync(self._wait_for(blocking, blocking_timeout))
        except LockTimeout:
            return False
        return True

    def release_sync(self) -> None:
        """`release` for threads without an event loop."""
        held = self._take()
        self._released(held, self._link.engine().release(held.lease))

    def extend_sync(self, timeout: float | None = None) -> None:
        """`extend` for threads without an event loop."""
        length = self.timeout if timeout is None else check_timeout(timeout)
        held = self._valid(self._handle())
        self._extended(held, self._link.engine().extend(held.lease, int(length * 1e6)))

    def __enter__(self) -> Self:
        _refuse_in_loop(self.name)
        self._acquire_sync(self._patience).entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._leave()
        if held is None:
            return
        held.settle()
        if not self._was_lost(held, error):
            self._released(held, self._link.engine().release(held.lease), error)

    # ---- inside

    def _wait_for(self, blocking: bool, blocking_timeout: float | None) -> float | None:
        if not blocking:
            if blocking_timeout is not None:
                raise InvalidArgument(
                    "blocking_timeout", blocking_timeout, "leave it out when blocking is False"
                )
            return 0.0
        return self._patience if blocking_timeout is None else check_patience(blocking_timeout)

    def _scope(self) -> str | int:
        """Who is asking: a task, a thread, or the token that was given."""
        if self._owner is not None:
            return f"={self._owner}"
        task = current_task()
        if task is not None:
            return id(task)
        number: int | None = getattr(_thread, "number", None)
        if number is None:
            number = _thread.number = next(_thread_numbers)
        return f"t{number}"

    def _mine(self) -> Holding | None:
        """What this task, thread or token holds, or what a task that has ended acquired for it."""
        held = self._held.get(self._scope())
        if held is None and len(self._held) == 1:
            only = next(iter(self._held.values()))
            if only.holder is not None and only.holder.done():
                # asyncio.wait_for and gather acquire in tasks of their own.
                return only
        return held

    def _seen(self) -> Holding | None:
        """The same; for tasks that a holder has started, also the only holding that this object ever had.

        Once it has had several, what another task holds now may not be what this one was started under.
        """
        held = self._mine()
        if held is None and self._grants == 1 and self._held:
            held = next(iter(self._held.values()))
        return held

    def _handle(self) -> Holding | None:
        """What `release` and `extend` are about: as with a file, whoever has the object may close it."""
        held = self._mine()
        if held is None and len(self._held) == 1:
            held = next(iter(self._held.values()))
        return held

    def _valid(self, held: Holding | None) -> Holding:
        if held is None:
            raise self._not_owned()
        if not held.lease.held:
            raise self._lost_error(held)
        return held

    def _take(self) -> Holding:
        held = self._handle()
        if held is None:
            raise self._not_owned()
        for scope in [scope for scope, known in self._held.items() if known is held]:
            del self._held[scope]
            if held.entered:
                self._by_hand.add(scope)
        held.settle()
        return held

    def _leave(self) -> Holding | None:
        """The holding whose context ends here; None if it was given back by hand before."""
        scope = self._scope()
        held = self._held.pop(scope, None)
        if held is None and scope in self._by_hand:
            self._by_hand.remove(scope)
        elif held is None:
            # Entered in another task or thread, as fixtures and dependencies are.
            for other, known in list(self._held.items()):
                if known.entered:
                    return self._held.pop(other)
        return held

    def _not_owned(self) -> LockNotOwned:
        return LockNotOwned(
            f"lock {self.name!r} is not held by this task or thread"
            + ("; to use it across them, give both the same owner=" if self._held else "")
        )

    def _lost_error(self, held: Holding) -> LockLost:
        return LockLost(f"lock {self.name!r} (fencing token {held.lease.fence}) was lost: {held.loss()}")

    def _before(self, patience: float | None) -> tuple[str | int, tuple[str, int, bool, bool, int | None]]:
        scope = self._scope()
        self._by_hand.discard(scope)
        before = self._held.get(scope)
        if before is not None and before.loss() is not None:
            # A holding that was lost and never given back ends when the lock is asked for again.
            del self._held[scope]
            before.settle()
        owner = f"{scope:x}" if type(scope) is int else str(scope)
        if not self._detect:
            # An owner that is nobody else's is in no cycle.
            owner = f"{owner}#{time.monotonic_ns():x}"
        waits = patience is None or patience > 0
        limit = int(patience * 1e6) if patience and waits else None
        return scope, (owner, int(self.timeout * 1e6), self._fixed, waits, limit)

    async def _acquire(self, patience: float | None) -> Holding:
        side = self._link.ready_side()
        if side is None:
            side = await self._link.side()
        scope, ask = self._before(patience)
        started = time.perf_counter()
        with tracing.span(_semconv.SPAN_LOCK_ACQUIRE):
            future, request = side.bridge.acquire(self.name, *ask)
            try:
                result = await future
            except BaseException:
                if not future.done() or future.cancelled():
                    side.bridge.cancel(request)
                elif not isinstance(result := future.result(), tuple):
                    # Granted while we were cancelled.
                    result.drop()
                raise
            return self._granted(scope, result, side, started)

    def _acquire_sync(self, patience: float | None) -> Holding:
        engine = self._link.engine()
        scope, ask = self._before(patience)
        started = time.perf_counter()
        with tracing.span(_semconv.SPAN_LOCK_ACQUIRE):
            return self._granted(scope, engine.acquire(self.name, *ask), None, started)

    def _granted(self, scope: str | int, result: Any, side: LoopSide | None, started: float) -> Holding:
        if type(result) is tuple:
            raise self._refusal(result, time.perf_counter() - started)
        metrics.histogram(_semconv.LOCK_ACQUIRE_DURATION).record(time.perf_counter() - started)
        self._grants += 1
        held = self._held[scope] = Holding(self.name, result, side, self._link)
        return held

    def _refusal(self, result: tuple[str, Any], waited: float) -> Exception:
        kind, detail = result
        if kind == "not_free":
            metrics.counter(_semconv.LOCK_CONTENTIONS).add(1)
            metrics.counter(_semconv.LOCK_TIMEOUTS).add(1)
            return LockTimeout(
                f"lock {self.name!r} is held by another, whose lease has {detail:.1f} s left unless renewed"
            )
        if kind == "timed_out":
            metrics.counter(_semconv.LOCK_CONTENTIONS).add(1)
            metrics.counter(_semconv.LOCK_TIMEOUTS).add(1)
            return LockTimeout(f"lock {self.name!r} was not granted within {waited:.2f} s (blocking_timeout)")
        if kind == "deadlock":
            metrics.counter(_semconv.LOCK_DEADLOCKS).add(1)
            if len(detail) == 1:
                return DeadlockDetected(
                    f"lock {self.name!r} is already held by this task or thread, which would wait for itself",
                    detail,
                )
            ring = " → ".join(repr(name) for name in [*detail, detail[0]])
            return DeadlockDetected(f"waiting for lock {self.name!r} would close a cycle: {ring}", detail)
        return failure(result, f"acquiring lock {self.name!r}", self._link)

    def _was_lost(self, held: Holding, error: BaseException | None) -> bool:
        """At the end of a body: True if nothing is left to give back. What the body raised goes first."""
        if held.loss() is None:
            return False
        if error is None and self._on_lost == "cancel":
            raise self._lost_error(held)
        return True

    def _released(self, held: Holding, result: Any, error: BaseException | None = None) -> None:
        """Judges the answer to a release. What the body raised goes first."""
        if result is True:
            return
        if error is not None:
            _log.warning("release not confirmed", lock=self.name, result=str(result))
            return
        if result is False:
            raise self._ended(held, f"(fencing token {held.lease.fence}) had ended when it was given back")
        failed = failure(result, f"releasing lock {self.name!r}", self._link)
        if isinstance(failed, ServerUnavailable):
            failed.add_note("the engine repeats the release until the server has answered")
        raise failed

    def _extended(self, held: Holding, result: Any) -> None:
        if result is True:
            return
        if result is False:
            raise self._ended(held, "had ended before the extension")
        raise failure(result, f"extending lock {self.name!r}", self._link)

    def _ended(self, held: Holding, how: str) -> LockLost:
        """The server no longer had it; why, if that is known."""
        return self._lost_error(held) if held.loss() else LockLost(f"lock {self.name!r} {how}")


def _refuse_in_loop(name: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise InvalidArgument(
        "with", name, "a running event loop would be blocked while waiting; write `async with` here"
    )
