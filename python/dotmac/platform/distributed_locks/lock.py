"""One lock: acquire, hold, learn that it is lost, give back.

The lease itself lives in the engine, which renews it whatever this interpreter does. A lock object holds no
connection and no loop: it may be made at import time and used from several loops and threads, each of which
is a holder or a waiter of its own.

The file is long because the asynchronous and the synchronous form of each step stand beside one another:
what one of them does, the other has to do as well.
"""

from __future__ import annotations

import time
import warnings
from asyncio import get_running_loop
from collections.abc import Coroutine
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from dotmac.platform import _semconv
from dotmac.platform._native import Answer, Asking, Engine
from dotmac.platform.connection.clients import target_from_client
from dotmac.platform.connection.engine import Link, failure
from dotmac.platform.distributed_locks.arguments import (
    check_name,
    check_on_lost,
    check_owner,
    check_patience,
    check_priority,
    check_release,
    check_timeout,
    patience_of,
)
from dotmac.platform.distributed_locks.callers import asker, here
from dotmac.platform.distributed_locks.holding import Holding, LostSignal, current_task, task_in
from dotmac.platform.distributed_locks.refusals import refusal
from dotmac.platform.distributed_locks.replication import confirmed, confirmed_sync
from dotmac.platform.distributed_locks.scopes import Scope, Scoped
from dotmac.platform.distributed_locks.terms import Terms
from dotmac.platform.distributed_locks.transfer import offer_token
from dotmac.platform.errors import ForkedHandle, InvalidArgument, LockTimeout, ReplicasMissing
from dotmac.platform.observability import tracing
from dotmac.platform.observability.wanted import wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType

    from dotmac.platform.connection.sides import LoopSide

__all__ = ["DistributedLock", "LostSignal", "refuse_in_loop"]

T = TypeVar("T")


class DistributedLock(Scoped[Holding]):
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
        reentrant: the same task, thread or owner may acquire it again while it holds it, and gives it back
            with the last release. Without it that is a deadlock, and reported as one at once.
        priority: higher ones are served first, -4,999 to 4,999; those of one priority in their order.
        max_hold: seconds after which the lease ends, renewed or not, and the holder is told; None: never.
        release: "confirmed" waits on leaving until the server has answered; "pipelined" returns when the
            release is on its way, which the engine then repeats until it is answered.

    Raises: InvalidArgument: an argument is out of its range. UnreadableClient: the client can't be read.
    """

    __slots__ = ("__weakref__", "_terms")

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
        reentrant: bool = False,
        priority: int = 0,
        max_hold: float | None = None,
        release: Literal["confirmed", "pipelined"] = "confirmed",
    ) -> None:
        if isinstance(redis_client, str):
            link = Link(redis_client, namespace=namespace)
        else:
            link = Link(target=target_from_client(redis_client), namespace=namespace)
        terms = Terms(
            link,
            check_timeout(10.0 if timeout is None else timeout),
            check_patience(blocking_timeout),
            not auto_renewal,
            check_on_lost(on_lost),
            detect_deadlocks,
            check_release(release),
            priority=check_priority(priority),
            max_hold=None if max_hold is None else check_timeout(max_hold, "max_hold"),
            reentrant=reentrant,
        )
        self._become(check_name(name), None if owner is None else check_owner(owner), terms)

    def _become(self, name: str, owner: str | None, terms: Terms) -> None:
        self._begin(name, owner)
        self._terms = terms

    def __del__(self) -> None:
        # Nobody can give it back any more, and the engine would renew it for as long as the process lives.
        try:
            if not self._held:
                return
        except AttributeError:  # its arguments were refused
            return
        for held in list(self._held.values()):
            if held.entries:
                # Others may have been entered with the same holding.
                held.entries = [entry for entry in held.entries if entry != id(self)]
                if held.entries:
                    continue
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
    def timeout(self) -> float:
        """Length of the lease, seconds."""
        return self._terms.timeout

    @property
    def held(self) -> bool:
        """True while this task or thread holds it, itself or by a task that it awaited, and the lease has not
        run out, judged now. What other tasks hold through the same object does not count."""
        held = self._mine()
        return held is not None and held.held

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
        patience = patience_of(blocking, blocking_timeout, self._terms.patience)
        side = await self._terms.link.side()
        try:
            with tracing.span(_semconv.SPAN_LOCK_ACQUIRE) as span:
                held = await self._hold(side, patience)
                span.set_attributes(held.told())
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
        if self._terms.reentrant and self._leave_inner(None):
            return
        held = self._take()
        await self._leave_slowly(held, None)

    async def extend(self, timeout: float | None = None) -> None:
        """Sets the length of the lease anew, from now on.

        Args: timeout: seconds; None for the lock's own. A lease without renewal ends that long after now.
        Raises: LockLost: it has ended. LockNotOwned: it is not held. ServerUnavailable: no answer in time.
        """
        length = self.timeout if timeout is None else check_timeout(timeout)
        held = self._valid(self._handle())
        side = await self._terms.link.side()
        self._extended(held, await side.bridge.extend(held.lease, int(length * 1e6)))

    # Not coroutines, but functions that return what is to be awaited: a coroutine for each would be a good
    # part of what a lock costs.
    def __aenter__(self) -> Coroutine[Any, Any, Self]:
        terms = self._terms
        side = terms.link.ready_side()
        if side is None or not terms.plain or wanted():
            return self._enter_slowly()
        return self._ask(side, terms.patience, DistributedLock._entered)

    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Coroutine[Any, Any, None]:
        loop = get_running_loop()
        if self._terms.reentrant and self._leave_inner(error):
            return _NOTHING
        held = self._held.pop(id(task_in(loop)), None)
        if held is None:
            held = self._leave()
        if held is None or held.leave(error):
            return _NOTHING
        side = held.side
        if side is None or side.loop is not loop:
            return self._leave_slowly(held, error)
        if self._terms.pipelined:
            side.bridge.release_soon(held.lease, held.link.number)
            return _NOTHING
        return side.bridge.release(held.lease, Holding.given_back, held, error)

    async def aclose(self) -> None:
        """Leaves the server, for a lock that was made from a client or a URL; what it holds is given back.

        A lock of a manager shares the manager's way to the server and closes that.
        """
        await self._terms.link.aclose()

    # ---- synchronous

    def acquire_sync(self, *, blocking: bool = True, blocking_timeout: float | None = None) -> bool:
        """`acquire` for threads without an event loop."""
        try:
            self._acquire_sync(patience_of(blocking, blocking_timeout, self._terms.patience))
        except LockTimeout:
            return False
        return True

    def release_sync(self) -> None:
        """`release` for threads without an event loop."""
        if not (self._terms.reentrant and self._leave_inner(None)):
            self._give_back_sync(self._take(), None)

    def extend_sync(self, timeout: float | None = None) -> None:
        """`extend` for threads without an event loop."""
        length = self.timeout if timeout is None else check_timeout(timeout)
        held = self._valid(self._handle())
        self._extended(held, self._terms.link.engine().extend(held.lease, int(length * 1e6)))

    def __enter__(self) -> Self:
        refuse_in_loop(self.name)
        held = self._acquire_sync(self._terms.patience)
        if not held.entered:
            held.enter(self._terms.on_lost)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terms.reentrant and self._leave_inner(error):
            return
        held = self._leave()
        if held is not None and not held.leave(error):
            self._give_back_sync(held, error)

    # ---- from process to process

    async def offer(self, within: float = 30.0) -> str:
        """Gives the lock up to whoever takes it over with the token, in this process or another: see
        `DistributedLockManager.adopt`. From here on it is not held here; nobody gets in between.

        Args: within: seconds for which the offer stands; then the lock goes to those who wait.
        Returns: the token.
        Raises: LockLost: it had ended. LockNotOwned: it is not held. ServerUnavailable: no answer in time;
            the engine repeats the offer until it is answered.
        """
        length = check_timeout(within, "within")
        held = self._take()
        side = await self._terms.link.side()
        return self._offered(held, await side.bridge.offer(held.lease, length))

    def offer_sync(self, within: float = 30.0) -> str:
        """`offer` for threads without an event loop."""
        length = check_timeout(within, "within")
        held = self._take()
        return self._offered(held, self._terms.link.engine().offer(held.lease, length))

    # ---- inside

    def _ask(
        self,
        side: LoopSide,
        patience: float | None,
        told: Callable[[Self, Any, Holding], T],
        *,
        timed: bool = False,
        asking: Asking | None = None,
    ) -> Answer[T]:
        """Asks for the lock in this loop: what is to be awaited, once, in the task that asks."""
        terms = self._terms
        task = task_in(side.loop)
        scope: Scope = self._scope() if task is None or self._owner is not None else id(task)
        if self._grants:
            self._end_lost(scope)
        held = Holding(self.name, terms.link, side, task, scope)
        if timed:
            held.timed = True
        owner = scope if terms.detect else _nobody_elses(scope)
        if asking is None:
            asking = terms.asked(numbered=True) if timed else terms.asking
        answer = side.bridge.acquire(
            self.name, owner, terms.timeout, terms.fixed, patience, here(2), asking, told, self, held
        )
        if task is not None:
            held.asker = one = asker(task)
            # One that gives up by itself does not hold up those who await it for ever.
            if one.before is not None and patience is None and terms.detect:
                one.asks(side, answer)
        return answer

    async def _take_over(self, fence: int) -> None:
        """Holds it under the fence under which it was offered."""
        side = await self._terms.link.side()
        asking = self._terms.asked(offered=fence)
        await self._ask(side, 0.0, DistributedLock._granted, timed=wanted(), asking=asking)
        await self._secure(side, self._held[self._scope()])

    def _take_over_sync(self, fence: int) -> None:
        """The same without an event loop."""
        engine = self._terms.link.engine()
        asking = self._terms.asked(offered=fence)
        self._secure_sync(self._ask_sync(engine, 0.0, timed=False, asking=asking))

    async def _hold(self, side: LoopSide, patience: float | None) -> Holding:
        """Acquires it, with all that is not usual: again by its own holder, on replicas, under a guard."""
        terms = self._terms
        held = self._again() if terms.reentrant else None
        if held is not None:
            return held
        await self._ask(side, patience, DistributedLock._granted, timed=wanted())
        held = self._held[self._scope()]
        await self._secure(side, held)
        return held

    async def _secure(self, side: LoopSide, held: Holding) -> None:
        """What has to be done about a grant before it counts."""
        terms = self._terms
        if terms.replicas:
            try:
                result = await confirmed(side.bridge, held.lease, terms)
            except BaseException:
                self._give_up(held)
                raise
            self._replicated(held, result)
        if terms.max_loop_stall is not None:
            held.guarded = True
            side.guard(held.number, terms.max_loop_stall)

    def _secure_sync(self, held: Holding) -> None:
        """The same without an event loop."""
        terms = self._terms
        if not terms.replicas:
            return
        try:
            result = confirmed_sync(terms.link.engine(), held.lease, terms)
        except BaseException:
            self._give_up(held)
            raise
        self._replicated(held, result)

    async def _enter_slowly(self) -> Self:
        """The same, where the engine has to be found first, or somebody wants to know how long it takes."""
        side = await self._terms.link.side()
        with tracing.span(_semconv.SPAN_LOCK_ACQUIRE) as span:
            held = await self._hold(side, self._terms.patience)
            span.set_attributes(held.told())
        if not held.entered:
            held.enter(self._terms.on_lost)
            self._not_lost_meanwhile(held)
        return self

    async def _leave_slowly(self, held: Holding, error: BaseException | None) -> None:
        """Gives it back by hand, or in another loop or thread than the one that acquired it."""
        side = await self._terms.link.side()
        if self._terms.pipelined:
            side.bridge.release_soon(held.lease, held.link.number)
        else:
            await side.bridge.release(held.lease, Holding.given_back, held, error)

    def _acquire_sync(self, patience: float | None) -> Holding:
        terms = self._terms
        engine = terms.link.engine()
        held = self._again() if terms.reentrant else None
        if held is not None:
            return held
        timed = wanted()
        asking = terms.asked(numbered=True) if timed else terms.asking
        with tracing.span(_semconv.SPAN_LOCK_ACQUIRE) as span:
            held = self._ask_sync(engine, patience, timed=timed, asking=asking)
            span.set_attributes(held.told())
        self._secure_sync(held)
        return held

    def _ask_sync(
        self, engine: Engine, patience: float | None, *, timed: bool, asking: Asking | None
    ) -> Holding:
        """Asks for the lock and waits for the answer, in a thread."""
        terms = self._terms
        scope = self._asking()
        held = Holding(self.name, terms.link, None, current_task(), scope)
        held.timed = timed
        owner = scope if terms.detect else _nobody_elses(scope)
        result = engine.acquire(self.name, owner, terms.timeout, terms.fixed, patience, here(2), asking)
        self._granted(result, held)
        return held

    def _give_back_sync(self, held: Holding, error: BaseException | None) -> None:
        link = self._terms.link
        if self._terms.pipelined:
            link.threads_side().release_soon(held.lease, link.number)
        else:
            held.given_back(link.engine().release(held.lease), error)

    def _granted(self, result: Any, held: Holding) -> None:
        """The answer is here: a lease, or what happened instead."""
        if type(result) is tuple:
            raise refusal(self.name, result, perf_counter() - held.since, self._terms.link)
        try:
            held.begin(result)
        except BaseException:
            # Nobody would give it back.
            result.drop()
            raise
        self._grants += 1
        self._held[held.scope] = held
        if self._terms.reentrant:
            held.entries = [id(self)]
            self._terms.link.reentrant[held.scope, self.name] = held

    def _entered(self, result: Any, held: Holding) -> Self:
        """The same for `async with`: its body begins."""
        self._granted(result, held)
        held.enter(self._terms.on_lost)
        self._not_lost_meanwhile(held)
        return self

    def _not_lost_meanwhile(self, held: Holding) -> None:
        """Lost between the grant and here."""
        if held.lease.loss is not None:
            self._take()
            raise held.lost_error()

    def _again(self) -> Holding | None:
        """What the same owner holds of this lock already, entered once more."""
        scope = self._scope()
        held: Holding | None = self._terms.link.reentrant.get((scope, self.name))
        if held is None or not held.held:
            return None
        held.entries.append(id(self))
        if scope not in self._held:
            self._grants += 1
            self._held[scope] = held
        return held

    def _leave_inner(self, error: BaseException | None) -> bool:
        """One entry of several is over; False if it was the last, so that the lock has to be given back."""
        scope = self._scope()
        held = self._held.get(scope)
        if held is None or id(self) not in held.entries:
            return False
        held.entries.remove(id(self))
        if not held.entries:
            return False
        if id(self) not in held.entries:
            del self._held[scope]
        if error is None and held.on_lost == "cancel" and held.loss() is not None:
            raise held.lost_error()
        return True

    def _replicated(self, held: Holding, result: Any) -> None:
        count = self._terms.replicas
        if isinstance(result, int) and result >= count:
            return
        self._give_up(held)
        if isinstance(result, int):
            raise ReplicasMissing(
                f"lock {self.name!r}: {result} of {count} replicas know of the grant; it was given back"
            )
        raise failure(result, f"waiting for the replicas of lock {self.name!r}", self._terms.link)

    def _give_up(self, held: Holding) -> None:
        """Gives back what was granted and does not count."""
        self._held.pop(held.scope, None)
        held.settle()
        held.lease.drop()

    def _offered(self, held: Holding, result: Any) -> str:
        if result is True:
            return offer_token(self.name, held.lease.fence, self._terms)
        if result is False:
            raise held.ended("had ended before it was offered")
        raise failure(result, f"offering lock {self.name!r}", self._terms.link)

    def _extended(self, held: Holding, result: Any) -> None:
        if result is True:
            return
        if result is False:
            raise held.ended("had ended before the extension")
        raise failure(result, f"extending lock {self.name!r}", self._terms.link)


class _Nothing(Coroutine[Any, None, None]):
    """Awaited, it is over at once."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        yield from ()

    def send(self, _: None) -> Any:
        raise StopIteration

    def throw(self, kind: Any, value: Any = None, _: Any = None) -> Any:
        raise kind if value is None else value

    def close(self) -> None:
        """Nothing to do."""


_NOTHING = _Nothing()
# So that `create_task(lock.__aenter__())` and `wait_for` take it, as they take what `async def` gives.
Coroutine.register(Answer)


def _nobody_elses(scope: Scope) -> str:
    """An owner that is nobody else's is in no cycle."""
    return f"{scope}#{time.monotonic_ns():x}"


def refuse_in_loop(name: str) -> None:
    """Refuses to wait in a thread whose event loop would stand still meanwhile."""
    try:
        get_running_loop()
    except RuntimeError:
        return
    raise InvalidArgument(
        "with", name, "a running event loop would be blocked while waiting; write `async with` here"
    )
