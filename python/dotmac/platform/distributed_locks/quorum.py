"""Locks on several independent servers, held while a majority of them grants it.

Each server knows a lock of its own, with a lease, a session and fencing tokens; none knows of the others. A
holder takes them in rounds: all at once, and if a majority can't be had, none, until after a pause by chance.
So a minority of servers may be down, hang or lose its data. What is given up for that: the queue (whoever
comes at the right moment wins), the detection of deadlocks, and the single number as a fencing token.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal, Self

from dotmac.platform._closing import Closing
from dotmac.platform.connection import background
from dotmac.platform.distributed_locks.arguments import (
    check_name,
    check_on_lost,
    check_patience,
    check_timeout,
    patience_of,
)
from dotmac.platform.distributed_locks.decorator import locked
from dotmac.platform.distributed_locks.holding import LostSignal
from dotmac.platform.distributed_locks.lock import refuse_in_loop
from dotmac.platform.distributed_locks.manager import DistributedLockManager
from dotmac.platform.distributed_locks.quorum_holding import QuorumHolding, Servers
from dotmac.platform.distributed_locks.scopes import Scope, Scoped
from dotmac.platform.errors import (
    DeadlockDetected,
    EngineClosed,
    InvalidArgument,
    LockTimeout,
    ServerUnavailable,
)
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from dotmac.platform.distributed_locks.config import DistributedLockConfig
    from dotmac.platform.distributed_locks.decorator import Decorator
    from dotmac.platform.distributed_locks.quorum_token import QuorumToken

__all__ = ["QuorumLock", "QuorumLockManager"]

_log = get_logger(__name__)
_FEWEST = 3


class QuorumLock(Scoped[QuorumHolding]):
    """A lock on a majority of servers, for `async with`, `with`, or by hand. Made by `QuorumLockManager`."""

    __slots__ = ("__weakref__", "_manager", "_on_lost", "_patience", "_renewal", "timeout")

    def __init__(
        self,
        manager: QuorumLockManager,
        name: str,
        timeout: float,
        patience: float | None,
        *,
        renewal: bool,
        on_lost: Literal["cancel", "flag"],
    ) -> None:
        self._begin(name, None)
        self._manager, self.timeout, self._patience = manager, timeout, patience
        self._renewal, self._on_lost = renewal, on_lost

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        for held in list(getattr(self, "_held", {}).values()):
            if not held.over:
                held.forget()
                warnings.warn(
                    f"lock {self.name!r} was dropped while it was held",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )

    def __repr__(self) -> str:
        return f"<QuorumLock {self.name!r} timeout={self.timeout:g} {'held' if self.held else 'not held'}>"

    # ---- what is known of it

    @property
    def held(self) -> bool:
        """True while this task or thread holds it and a majority of its leases stands, judged now."""
        held = self._mine()
        return held is not None and held.held

    @property
    def fencing_tokens(self) -> QuorumToken:
        """The tokens of this holding, one per server; see `QuorumToken` for how to compare them.

        Raises: LockLost: too few leases are left. LockNotOwned: it is not held.
        """
        return self._valid(self._seen()).token

    @property
    def remaining(self) -> float:
        """Seconds until too few leases are left, if no further heartbeat is confirmed."""
        return self._valid(self._seen()).remaining

    @property
    def lost(self) -> LostSignal:
        """Whether it is lost; awaitable."""
        return LostSignal(self._seen())

    # ---- asynchronous

    async def acquire(self, *, blocking: bool = True, blocking_timeout: float | None = None) -> bool:
        """Acquires the lock.

        Args:
            blocking: False for one round only.
            blocking_timeout: seconds to try, instead of the lock's own.
        Returns: True when it is held, False when it was not to be had in that time.
        Raises: ServerUnavailable: too few servers answer. DeadlockDetected: this task holds it already.
        """
        try:
            await self._acquire(patience_of(blocking, blocking_timeout, self._patience))
        except LockTimeout:
            return False
        return True

    async def release(self) -> None:
        """Gives the lock back; returns when a majority of servers has confirmed it.

        The others are told as soon as they answer, also if this is cancelled.

        Raises: LockLost: it was lost before. LockNotOwned: it is not held.
            ServerUnavailable: too few have confirmed it in time.
        """
        await _on_background(self._taken().release())

    async def extend(self, timeout: float | None = None) -> None:
        """Sets the length of the leases anew, from now on.

        Args: timeout: seconds; None for the lock's own.
        Raises: LockLost: it has ended. LockNotOwned: it is not held. ServerUnavailable: too few answers.
        """
        length = self.timeout if timeout is None else check_timeout(timeout)
        await _on_background(self._valid(self._handle()).extend(length))

    async def __aenter__(self) -> Self:
        held = await self._acquire(self._patience)
        held.enter(self._on_lost)
        if held.loss() is not None:
            self._taken()
            raise held.lost_error()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._left(error)
        if held is None:
            return
        try:
            await _on_background(held.release())
        except ServerUnavailable as problem:
            self._unconfirmed(problem, error)

    # ---- synchronous

    def acquire_sync(self, *, blocking: bool = True, blocking_timeout: float | None = None) -> bool:
        """`acquire` for threads without an event loop."""
        try:
            self._acquire_sync(patience_of(blocking, blocking_timeout, self._patience))
        except LockTimeout:
            return False
        return True

    def release_sync(self) -> None:
        """`release` for threads without an event loop."""
        background.submit(self._taken().release()).result()

    def extend_sync(self, timeout: float | None = None) -> None:
        """`extend` for threads without an event loop."""
        length = self.timeout if timeout is None else check_timeout(timeout)
        background.run(self._valid(self._handle()).extend(length))

    def __enter__(self) -> Self:
        refuse_in_loop(self.name)
        self._acquire_sync(self._patience).enter(self._on_lost)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._left(error)
        if held is None:
            return
        try:
            background.submit(held.release()).result()
        except ServerUnavailable as problem:
            self._unconfirmed(problem, error)

    # ---- inside

    async def _acquire(self, patience: float | None) -> QuorumHolding:
        scope = self._first_asking()
        held = self._new(asyncio.get_running_loop())
        try:
            await asyncio.wrap_future(background.submit(held.acquire(patience)))
        except BaseException:
            # It may have been granted while this was cancelled.
            held.forget()
            raise
        return self._got(scope, held)

    def _acquire_sync(self, patience: float | None) -> QuorumHolding:
        scope = self._first_asking()
        held = self._new(None)
        try:
            background.run(held.acquire(patience))
        except BaseException:
            held.forget()
            raise
        return self._got(scope, held)

    def _new(self, loop: asyncio.AbstractEventLoop | None) -> QuorumHolding:
        servers = self._manager.servers
        return QuorumHolding(servers, self.name, self.timeout, renewal=self._renewal, loop=loop)

    def _first_asking(self) -> Scope:
        """Who asks; refuses one that would wait for itself, as nobody else would notice."""
        scope = self._asking()
        known = self._manager.holders.get((self.name, scope))
        if known is not None and not known.inherited and known.held:
            raise DeadlockDetected(
                f"lock {self.name!r} is already held by this task or thread, which would wait for itself",
                [self.name],
            )
        return scope

    def _got(self, scope: Scope, held: QuorumHolding) -> QuorumHolding:
        self._manager.holders[self.name, scope] = held
        return self._granted_to(scope, held)

    def _taken(self) -> QuorumHolding:
        held = self._take()
        self._manager.forget(held)
        return held

    def _left(self, error: BaseException | None) -> QuorumHolding | None:
        """What is to be given back at the end of a body, which raised `error` if anything."""
        held = self._leave()
        if held is None:
            return None
        self._manager.forget(held)
        lost = held.leave(error)
        held.settle()
        return None if lost else held

    def _unconfirmed(self, problem: ServerUnavailable, error: BaseException | None) -> None:
        if error is None:
            problem.add_note("the engines repeat the release until the servers have answered")
            raise problem
        _log.warning("release not confirmed", lock=self.name, result=str(problem))


class QuorumLockManager(Closing):
    """Locks on a majority of independent servers.

    Opens nothing until it is used, and works in every event loop, thread and forked child from then on.

    Args:
        redis_urls: three servers or more, which share nothing: no replication, no storage, no machine. An odd
            number; a fourth server makes three out of four necessary. Everybody who uses these locks names
            the same servers in the same order. A client will do in place of a URL.
        config: settings; arguments win over it, and it wins over the environment.
        default_timeout: length of a lease where none is given, seconds.
        blocking_timeout: seconds to try for a lock where nothing else is given; None without limit.
        auto_renewal: renew leases, and take them again on servers that come back.
        on_lost: "cancel" or "flag"; see `DistributedLock`.
        namespace: first part of the servers' keys.
        request_timeout: seconds that a server may take for an answer; one that takes longer counts as down,
            and is not waited for again before it has answered.

    Raises: InvalidArgument, ConfigurationError: an argument or a setting can't be used.
    """

    def __init__(
        self,
        redis_urls: Sequence[object],
        *,
        config: DistributedLockConfig | None = None,
        default_timeout: float | None = None,
        blocking_timeout: float | None = None,
        auto_renewal: bool | None = None,
        on_lost: Literal["cancel", "flag"] | None = None,
        namespace: str | None = None,
        request_timeout: float | None = None,
    ) -> None:
        if config is None:
            from dotmac.platform.core.unified_config import get_config

            config = get_config().distributed_locks
        if request_timeout is None:
            request_timeout = config.request_timeout
        else:
            check_timeout(request_timeout, "request_timeout")
        self._timeout = check_timeout(
            config.default_timeout if default_timeout is None else default_timeout, "default_timeout"
        )
        self._patience = check_patience(
            config.blocking_timeout if blocking_timeout is None else blocking_timeout
        )
        self._renewal = config.auto_renewal_enabled if auto_renewal is None else auto_renewal
        self._on_lost = check_on_lost(config.on_lost if on_lost is None else on_lost)
        managers = [
            DistributedLockManager(
                url,
                config=config,
                deadlock_detection=False,
                namespace=namespace,
                request_timeout=request_timeout,
            )
            for url in _checked_servers(redis_urls)
        ]
        self.servers = Servers(managers, request_timeout)
        self.holders: dict[tuple[str, Scope], QuorumHolding] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"<QuorumLockManager of {len(self.servers)} servers>"

    def acquire_lock(
        self,
        name: str,
        timeout: float | None = None,
        *,
        blocking_timeout: float | None = None,
        auto_renewal: bool | None = None,
        on_lost: Literal["cancel", "flag"] | None = None,
    ) -> QuorumLock:
        """A lock for `async with` or `with`.

        Args:
            name: name of the lock, 1 to 1,024 bytes of UTF-8.
            timeout: length of its leases, seconds; None for the manager's.
            blocking_timeout: seconds to try; 0 for one round; None for the manager's.
            auto_renewal, on_lost: as in `DistributedLock`.
        Returns: the lock, not acquired yet: that happens on entering.
        Raises: InvalidArgument: an argument is out of its range. On entering: LockTimeout, ServerUnavailable,
            DeadlockDetected. On leaving: LockLost, ServerUnavailable.
        """
        if self._closed:
            raise EngineClosed("this manager was closed; make a new one")
        return QuorumLock(
            self,
            check_name(name),
            self._timeout if timeout is None else check_timeout(timeout),
            self._patience if blocking_timeout is None else check_patience(blocking_timeout),
            renewal=self._renewal if auto_renewal is None else auto_renewal,
            on_lost=self._on_lost if on_lost is None else check_on_lost(on_lost),
        )

    def with_lock(
        self,
        template: str | Callable[..., str],
        timeout: float | None = None,
        *,
        blocking_timeout: float | None = None,
        auto_renewal: bool | None = None,
        on_lost: Literal["cancel", "flag"] | None = None,
    ) -> Decorator:
        """`DistributedLockManager.with_lock` on a majority of servers."""
        if timeout is not None:
            check_timeout(timeout)
        check_patience(blocking_timeout)

        def make(name: str) -> QuorumLock:
            return self.acquire_lock(
                name, timeout, blocking_timeout=blocking_timeout, auto_renewal=auto_renewal, on_lost=on_lost
            )

        return locked(template, make)

    def stats(self) -> list[dict[str, Any]]:
        """Counters of this process's engines, one per server, in the order of `redis_urls`."""
        return [manager.stats() for manager in self.servers.managers]

    def forget(self, held: QuorumHolding) -> None:
        """The holding is over."""
        for key in [key for key, known in self.holders.items() if known is held]:
            del self.holders[key]

    async def aclose(self) -> None:
        """Leaves all servers; what is held is lost to its holders, who are told. Idempotent."""
        self._closed = True
        await asyncio.gather(*(manager.aclose() for manager in self.servers.managers))

    def close(self) -> None:
        """`aclose` for threads without an event loop."""
        self._closed = True
        for manager in self.servers.managers:
            manager.close()


async def _on_background(work: Any) -> None:
    """Waits for the background loop; what was begun there goes on if this is cancelled."""
    await asyncio.shield(asyncio.wrap_future(background.submit(work)))


def _checked_servers(redis_urls: Any) -> list[object]:
    allowed = f"give {_FEWEST} URLs or clients of different servers, or more"
    if isinstance(redis_urls, str | bytes) or not hasattr(redis_urls, "__iter__"):
        raise InvalidArgument("redis_urls", redis_urls, allowed)
    servers = list(redis_urls)
    texts = [server for server in servers if isinstance(server, str)]
    if len(servers) < _FEWEST or len(set(texts)) < len(texts):
        raise InvalidArgument("redis_urls", [str(server) for server in servers], allowed)
    return servers
