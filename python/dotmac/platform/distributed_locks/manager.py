"""The lock manager: locks by name, as context managers and decorators, and a look at who holds what."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from dotmac.platform.connection.clients import target_from_client
from dotmac.platform.connection.engine import Link, failure
from dotmac.platform.distributed_locks.arguments import (
    check_name,
    check_on_lost,
    check_patience,
    check_timeout,
)
from dotmac.platform.distributed_locks.decorator import locked
from dotmac.platform.distributed_locks.lock import DistributedLock

if TYPE_CHECKING:
    from types import TracebackType

    from dotmac.platform.distributed_locks.config import DistributedLockConfig
    from dotmac.platform.distributed_locks.decorator import Decorator

__all__ = ["DistributedLockManager", "LockInfo"]

_PAGE = 200


@dataclass(frozen=True, slots=True)
class LockInfo:
    """One held lock, as the server knows it.

    Args:
        name: the lock.
        owner: session and scope of the holder.
        session: the holder's session.
        host, pid, service: the holder's process.
        fencing_token: of the holding.
        since: when it was asked for, milliseconds since 1970 by the holder's wall clock.
        remaining: seconds that the lease has left before the next renewal.
        waiters: how many are in the queue.
    """

    name: str
    owner: str
    session: str
    host: str
    pid: int
    service: str
    fencing_token: int
    since: int
    remaining: float
    waiters: int


class DistributedLockManager:
    """Locks on one server.

    Opens nothing until it is used, so it may be made at import time, and works in every event loop,
    thread and forked child from then on.

    Args:
        redis_url: the server; None takes the configuration's. A redis-py or valkey-py client will do too.
        config: settings; arguments win over it, and it wins over the environment.
        default_timeout: length of a lease where none is given, seconds.
        blocking_timeout: seconds to wait for a lock where nothing else is given; None waits without limit.
        auto_renewal: renew leases; see `DistributedLock`.
        deadlock_detection: refuse a wait that would close a cycle.
        on_lost: "cancel" or "flag"; see `DistributedLock`.
        namespace: first part of the server's keys.
        request_timeout: seconds that the server may take for an answer.

    Raises: InvalidArgument, ConfigurationError: an argument or a setting can't be used.
    """

    def __init__(
        self,
        redis_url: object = None,
        *,
        config: DistributedLockConfig | None = None,
        default_timeout: float | None = None,
        blocking_timeout: float | None = None,
        auto_renewal: bool | None = None,
        deadlock_detection: bool | None = None,
        on_lost: Literal["cancel", "flag"] | None = None,
        namespace: str | None = None,
        request_timeout: float | None = None,
    ) -> None:
        if config is None:
            from dotmac.platform.core.unified_config import get_config

            config = get_config().distributed_locks
        namespace = config.namespace if namespace is None else namespace
        request_timeout = (
            config.request_timeout
            if request_timeout is None
            else check_timeout(request_timeout, "request_timeout")
        )
        if redis_url is None:
            redis_url = config.redis_url
        if redis_url is None:
            from dotmac.platform.core.unified_config import get_config

            everything = get_config()
            redis_url = everything.distributed_locks.redis_url or everything.get_redis_url()
        if isinstance(redis_url, str):
            self._link = Link(
                redis_url,
                namespace=namespace,
                request_timeout=request_timeout,
                connect_timeout=config.connect_timeout,
            )
        else:
            self._link = Link(target=target_from_client(redis_url), namespace=namespace)
        self._timeout = check_timeout(
            config.default_timeout if default_timeout is None else default_timeout, "default_timeout"
        )
        self._patience = check_patience(
            config.blocking_timeout if blocking_timeout is None else blocking_timeout
        )
        self._renewal = config.auto_renewal_enabled if auto_renewal is None else auto_renewal
        self._detect = config.deadlock_detection_enabled if deadlock_detection is None else deadlock_detection
        self._on_lost = check_on_lost(config.on_lost if on_lost is None else on_lost)

    def __repr__(self) -> str:
        return f"<DistributedLockManager {self._link.where}>"

    def acquire_lock(
        self,
        name: str,
        timeout: float | None = None,
        *,
        blocking_timeout: float | None = None,
        auto_renewal: bool | None = None,
        on_lost: Literal["cancel", "flag"] | None = None,
        owner: str | None = None,
    ) -> DistributedLock:
        """A lock for `async with` or `with`.

        Args:
            name: name of the lock, 1 to 1,024 bytes of UTF-8.
            timeout: length of the lease, seconds; None for the manager's.
            blocking_timeout: seconds to wait at most; 0 only tries; None for the manager's.
            auto_renewal, on_lost, owner: as in `DistributedLock`.
        Returns: the lock, not acquired yet: that happens on entering.
        Raises: InvalidArgument: an argument is out of its range. On entering: LockTimeout, DeadlockDetected,
            ServerUnavailable. On leaving: LockLost, ServerUnavailable.
        """
        return DistributedLock._checked(  # noqa: SLF001 - its other constructor
            self._link,
            check_name(name),
            self._timeout if timeout is None else check_timeout(timeout),
            self._patience if blocking_timeout is None else check_patience(blocking_timeout),
            fixed=not (self._renewal if auto_renewal is None else auto_renewal),
            on_lost=self._on_lost if on_lost is None else check_on_lost(on_lost),
            owner=None if owner is None else check_name(owner, "owner"),
            detect=self._detect,
        )

    def with_lock(
        self,
        template: str,
        timeout: float | None = None,
        *,
        blocking_timeout: float | None = None,
        auto_renewal: bool | None = None,
        on_lost: Literal["cancel", "flag"] | None = None,
    ) -> Decorator:
        """Decorates a function so that each call holds a lock.

        Args:
            template: name of the lock; `{parameter}`, `{parameter.attribute}` and `{parameter[key]}` are
                filled from the call's arguments. Checked when the function is decorated.
            timeout, blocking_timeout, auto_renewal, on_lost: as in `acquire_lock`.
        Returns: a decorator for functions and methods, synchronous or asynchronous, that keeps the signature.
            An asynchronous one that a Celery worker calls without a running loop is run to its end.
        Raises: InvalidArgument: the template does not fit the function, or an argument is out of its range.
        """
        check_name(template, "template")
        if timeout is not None:
            check_timeout(timeout)
        check_patience(blocking_timeout)

        def make(name: str) -> DistributedLock:
            return self.acquire_lock(
                name, timeout, blocking_timeout=blocking_timeout, auto_renewal=auto_renewal, on_lost=on_lost
            )

        return locked(template, make)

    async def list_locks(self) -> list[LockInfo]:
        """Every lock that is held in this namespace.

        Returns: a list in no particular order; a lock that changes hands meanwhile may be missing or old.
        Raises: ServerUnavailable, ServerRefused: the server's side failed.
        """
        side = await self._link.side()
        found: dict[str, LockInfo] = {}
        cursor = "0"
        while True:
            reply = await side.bridge.list_locks(cursor, _PAGE)
            cursor = self._page(reply, found)
            if cursor == "0":
                return list(found.values())

    def list_locks_sync(self) -> list[LockInfo]:
        """`list_locks` for threads without an event loop."""
        engine = self._link.engine()
        found: dict[str, LockInfo] = {}
        cursor = "0"
        while True:
            cursor = self._page(engine.list_locks(cursor, _PAGE), found)
            if cursor == "0":
                return list(found.values())

    def stats(self) -> dict[str, Any]:
        """Counters of this process's engine since it started: heartbeats, losses, connections, leases."""
        return self._link.engine().stats()

    async def aclose(self) -> None:
        """Leaves the server: what this process still holds through it is given back. Idempotent."""
        await self._link.aclose()

    def close(self) -> None:
        """`aclose` for threads without an event loop."""
        self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _page(self, reply: Any, found: dict[str, LockInfo]) -> str:
        if isinstance(reply, tuple):
            raise failure(reply, "listing locks", self._link)
        cursor, *rows = reply
        for at in range(0, len(rows), 8):
            name, owner, session, who, fence, since, left, waiters = (
                _text(cell) for cell in rows[at : at + 8]
            )
            process = json.loads(who)
            found[name] = LockInfo(
                name=name,
                owner=owner,
                session=session,
                host=process.get("host", ""),
                pid=process.get("pid", 0),
                service=process.get("service", ""),
                fencing_token=int(fence),
                since=int(since),
                remaining=int(left) / 1000,
                waiters=int(waiters),
            )
        return _text(cursor)


def _text(cell: bytes | int) -> str:
    return cell.decode() if isinstance(cell, bytes) else str(cell)
