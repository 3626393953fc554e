"""The lock manager: locks by name, as context managers and decorators, and a look at who holds what."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from dotmac.platform._closing import Closing
from dotmac.platform.connection.clients import target_from_client
from dotmac.platform.connection.engine import Link
from dotmac.platform.distributed_locks import administration
from dotmac.platform.distributed_locks.arguments import (
    check_count,
    check_name,
    check_names,
    check_on_lost,
    check_owner,
    check_patience,
    check_priority,
    check_release,
    check_timeout,
    check_victim,
)
from dotmac.platform.distributed_locks.decorator import locked
from dotmac.platform.distributed_locks.lock import DistributedLock
from dotmac.platform.distributed_locks.several import SeveralLocks
from dotmac.platform.distributed_locks.terms import Terms
from dotmac.platform.distributed_locks.transfer import read_offer
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dotmac.platform.distributed_locks.config import DistributedLockConfig
    from dotmac.platform.distributed_locks.decorator import Decorator
    from dotmac.platform.distributed_locks.info import LockInfo, WaitGraph
    from dotmac.platform.distributed_locks.terms import Kind, Victim

__all__ = ["DistributedLockManager"]

_log = get_logger(__name__)

_TIMEOUTS = 100
_blank = object.__new__


class TryArguments(TypedDict, total=False):
    """Further arguments of a lock that is not waited for; see `DistributedLockManager.acquire_lock`."""

    auto_renewal: bool | None
    on_lost: Literal["cancel", "flag"] | None
    owner: str | None
    release: Literal["confirmed", "pipelined"] | None
    reentrant: bool
    priority: int
    max_hold: float | None


class LockArguments(TryArguments, total=False):
    """Further arguments of every lock; see `DistributedLockManager.acquire_lock`."""

    blocking_timeout: float | None


class DistributedLockManager(Closing):
    """Locks on one server, or on a cluster.

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
        release: "confirmed" or "pipelined"; see `DistributedLock`.
        on_release_failed: called with the lock's name, its fencing token and the reason when a pipelined
            release was not confirmed in time, or found that the lease had ended before; in the event loop
            that released it, or in a thread of the platform's where a thread did.
        deadlock_victim: whose wait ends where one would close a cycle: "youngest" (who got its lock of the
            cycle last), "lowest_priority", "fewest_locks", or "self" (the one that closes it).
        wait_replicas: how many replicas have to know of a grant before it counts; 0 asks none.
        max_loop_stall: seconds for which the event loop of a holder may stand still; then the whole process
            stops its heartbeats, and rather loses what it holds than keeps it while it hangs. None: it never
            does.

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
        release: Literal["confirmed", "pipelined"] | None = None,
        on_release_failed: Callable[[str, int, str], None] | None = None,
        deadlock_victim: Victim | None = None,
        wait_replicas: int | None = None,
        max_loop_stall: float | None = None,
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
                partitions=config.partitions,
            )
        else:
            target = target_from_client(redis_url)
            self._link = Link(target=target, namespace=namespace, partitions=config.partitions)
        self._terms = Terms(
            self._link,
            check_timeout(
                config.default_timeout if default_timeout is None else default_timeout, "default_timeout"
            ),
            check_patience(config.blocking_timeout if blocking_timeout is None else blocking_timeout),
            not (config.auto_renewal_enabled if auto_renewal is None else auto_renewal),
            check_on_lost(config.on_lost if on_lost is None else on_lost),
            config.deadlock_detection_enabled if deadlock_detection is None else deadlock_detection,
            check_release(config.release if release is None else release),
            victim=check_victim(config.deadlock_victim if deadlock_victim is None else deadlock_victim),
            replicas=check_count(
                config.wait_replicas if wait_replicas is None else wait_replicas, "wait_replicas", 0
            ),
            max_loop_stall=_optional(
                config.max_loop_stall if max_loop_stall is None else max_loop_stall, "max_loop_stall"
            ),
        )
        self._by_timeout: dict[float, Terms] = {}
        self._link.report = _reporter(on_release_failed)

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
        release: Literal["confirmed", "pipelined"] | None = None,
        reentrant: bool = False,
        priority: int = 0,
        max_hold: float | None = None,
    ) -> DistributedLock:
        """A lock for `async with` or `with`.

        Args:
            name: name of the lock, 1 to 1,024 bytes of UTF-8.
            timeout: length of the lease, seconds; None for the manager's.
            blocking_timeout: seconds to wait at most; 0 only tries; None for the manager's.
            auto_renewal, on_lost, owner, release: as in `DistributedLock`; None for the manager's.
            reentrant, priority, max_hold: as in `DistributedLock`.
        Returns: the lock, not acquired yet: that happens on entering.
        Raises: InvalidArgument: an argument is out of its range. On entering: LockTimeout, DeadlockDetected,
            ServerUnavailable. On leaving: LockLost, ServerUnavailable.
        """
        terms = self._terms
        if timeout is not None:
            known = self._by_timeout.get(timeout) if type(timeout) is float else None
            terms = self._for(timeout) if known is None else known
        if not (blocking_timeout is None and auto_renewal is None and on_lost is None and release is None):
            terms = replace(
                terms,
                patience=terms.patience if blocking_timeout is None else check_patience(blocking_timeout),
                fixed=terms.fixed if auto_renewal is None else not auto_renewal,
                on_lost=terms.on_lost if on_lost is None else check_on_lost(on_lost),
                pipelined=terms.pipelined if release is None else check_release(release),
            )
        # Anything else than the whole number 0 is to be checked, be it as false as that.
        if reentrant or priority or type(priority) is not int or max_hold is not None:
            terms = replace(
                terms,
                reentrant=reentrant,
                priority=check_priority(priority),
                max_hold=_optional(max_hold, "max_hold"),
            )
        return self._made(name, owner, terms)

    def read_lock(
        self, name: str, timeout: float | None = None, **more: Unpack[LockArguments]
    ) -> DistributedLock:
        """A lock that any number of readers hold at once, and nobody else beside them.

        A reader that comes after a writer has begun to wait waits behind it.

        Args: as `acquire_lock`. Returns, Raises: as `acquire_lock`; LockMismatch: the name is a semaphore's.
        """
        return self._of_kind("shared", 0, name, timeout, more)

    def write_lock(
        self, name: str, timeout: float | None = None, **more: Unpack[LockArguments]
    ) -> DistributedLock:
        """The lock of one writer: readers of the same name keep it out, and it keeps them out.

        Args, Returns, Raises: as `acquire_lock`.
        """
        return self.acquire_lock(name, timeout, **more)

    def semaphore(
        self, name: str, permits: int, timeout: float | None = None, **more: Unpack[LockArguments]
    ) -> DistributedLock:
        """A lock that `permits` may hold at once.

        Args:
            name, timeout: as `acquire_lock`, and so are all others.
            permits: how many, 1 to 1,000,000; everybody has to name the same number.
        Returns, Raises: as `acquire_lock`; LockMismatch: the name is in use with another number, or as a
            lock.
        """
        return self._of_kind("semaphore", check_count(permits, "permits"), name, timeout, more)

    def try_lock(
        self, name: str, timeout: float | None = None, **more: Unpack[TryArguments]
    ) -> DistributedLock:
        """A lock that is not waited for: entering it raises LockTimeout where somebody else holds it.

        Args: as `acquire_lock`.
        """
        return self.acquire_lock(name, timeout, blocking_timeout=0.0, **more)

    def acquire_locks(
        self, names: Iterable[str], timeout: float | None = None, **more: Unpack[LockArguments]
    ) -> SeveralLocks:
        """Several locks, of which all are held or none.

        Args:
            names: names of the locks, in any order; they are acquired in the order of the names, so that two
                that want the same ones never wait for one another.
            timeout: as `acquire_lock`, and so are all others; `blocking_timeout` is for all of them together.
        Returns: the locks, not acquired yet: that happens on entering.
        """
        found = check_names(names)
        patience = more.pop("blocking_timeout", None)
        patience = self._terms.patience if patience is None else check_patience(patience)

        def make(name: str, left: float | None) -> DistributedLock:
            lock = self.acquire_lock(name, timeout, **more)
            terms = lock._terms  # noqa: SLF001 - one of its makers
            return (
                lock
                if terms.patience == left
                else self._made(name, more.get("owner"), replace(terms, patience=left))
            )

        make(found[0], patience)  # so that wrong arguments are found here
        return SeveralLocks(found, make, patience)

    async def adopt(
        self, token: str, timeout: float | None = None, **more: Unpack[LockArguments]
    ) -> DistributedLock:
        """Takes over a lock that its holder has offered, in this process or another; nobody gets in between.

        Args:
            token: what `DistributedLock.offer` returned.
            timeout: as `acquire_lock`, and so are all others.
        Returns: the lock, held under the same fencing token; give it back with `release()`.
        Raises: LockNotOffered: the offer has run out, or somebody else took it over. InvalidArgument: it is
            no token. ServerUnavailable: the server's side failed.
        """
        offer = read_offer(token)
        lock = self._of_kind(offer.kind, offer.permits, offer.name, timeout, more)
        await lock._take_over(offer.fence)  # noqa: SLF001 - one of its makers
        return lock

    def adopt_sync(
        self, token: str, timeout: float | None = None, **more: Unpack[LockArguments]
    ) -> DistributedLock:
        """`adopt` for threads without an event loop."""
        offer = read_offer(token)
        lock = self._of_kind(offer.kind, offer.permits, offer.name, timeout, more)
        lock._take_over_sync(offer.fence)  # noqa: SLF001 - one of its makers
        return lock

    def _of_kind(
        self, kind: Kind, permits: int, name: str, timeout: float | None, more: LockArguments
    ) -> DistributedLock:
        lock = self.acquire_lock(name, timeout, **more)
        return self._made(name, more.get("owner"), replace(lock._terms, kind=kind, permits=permits))  # noqa: SLF001

    def _made(self, name: str, owner: str | None, terms: Terms) -> DistributedLock:
        if owner is not None:
            check_owner(owner)
        # Its own constructor would check everything anew, for every acquisition.
        lock = _blank(DistributedLock)
        lock._become(check_name(name), owner, terms)  # noqa: SLF001
        return lock

    def _for(self, timeout: float) -> Terms:
        """The manager's terms with another timeout. Few are in use, so that they are checked once."""
        terms = replace(self._terms, timeout=check_timeout(timeout))
        if len(self._by_timeout) < _TIMEOUTS:
            self._by_timeout[terms.timeout] = terms
        return terms

    def with_lock(
        self,
        template: str | Callable[..., str],
        timeout: float | None = None,
        **more: Unpack[LockArguments],
    ) -> Decorator:
        """Decorates a function so that each call holds a lock.

        Args:
            template: name of the lock; `{parameter}`, `{parameter.attribute}` and `{parameter[key]}` are
                filled from the call's arguments. Or a function that returns the name: it is given, by name,
                those of the call's arguments that its own parameters name, and with `**rest` all others.
                Checked when the function is decorated.
            timeout: as in `acquire_lock`, and so are all others.
        Returns: a decorator for functions, methods and generators, synchronous or asynchronous, that keeps
            signature and kind. A generator holds the lock from its first item until it is exhausted, closed
            or dropped; if the lock is lost between two items, its `yield` raises LockLost.
            An asynchronous function that a Celery worker calls without a running loop is run to its end.
        Raises: InvalidArgument: the template does not fit the function, or an argument is out of its range.
        """

        def make(name: str) -> DistributedLock:
            return self.acquire_lock(name, timeout, **more)

        make("checked")  # so that wrong arguments are found here
        return locked(template, make)

    async def list_locks(self, *, queues: bool = False) -> list[LockInfo]:
        """Every lock that is held in this namespace.

        Args: queues: also who waits, in `LockInfo.queue`, and locks that are waited for and held by nobody.
        Returns: a list in no particular order; a lock that changes hands meanwhile may be missing or old.
        Raises: ServerUnavailable, ServerRefused: the server's side failed.
        """
        await self._link.side()  # an embedded server starts in a thread, not in the call of `engine`
        partitions = self._link.engine().partitions
        return await administration.run(
            self._link, administration.listing(partitions, queues=queues), "listing locks"
        )

    def list_locks_sync(self, *, queues: bool = False) -> list[LockInfo]:
        """`list_locks` for threads without an event loop."""
        operation = administration.listing(self._link.engine().partitions, queues=queues)
        return administration.run_sync(self._link, operation, "listing locks")

    async def get_lock(self, name: str) -> LockInfo | None:
        """One lock: who holds it, and the first 100 who wait for it, in their order.

        Args: name: the lock.
        Returns: None where nobody holds it or waits for it.
        Raises: InvalidArgument: no lock can have that name.
            ServerUnavailable, ServerRefused: the server's side failed.
        """
        operation = administration.showing(check_name(name))
        return await administration.run(self._link, operation, f"looking at lock {name!r}")

    def get_lock_sync(self, name: str) -> LockInfo | None:
        """`get_lock` for threads without an event loop."""
        operation = administration.showing(check_name(name))
        return administration.run_sync(self._link, operation, f"looking at lock {name!r}")

    async def force_release(self, name: str, fencing_token: int | None = None) -> int:
        """Takes a lock away from its holders, who are told, and hands it to those who wait.

        A holder's body ends as `LockLost` at its next await, a thread's at its end; what it still does until
        then, or does in other systems afterwards, only the fencing token keeps from them.

        Args:
            name: the lock.
            fencing_token: only from the holder with this token; None for all who hold it now.
        Returns: from how many it was taken: 0 where nobody holds it, or nobody with that token any more. Too
            low where the answer was lost on its way and the engine had to ask again.
        Raises: InvalidArgument: no lock can have that name, or no holding that token.
            ServerUnavailable, ServerRefused: the server's side failed.
        """
        operation = administration.forcing(check_name(name), administration.check_token(fencing_token))
        return await administration.run(self._link, operation, f"taking lock {name!r} away")

    def force_release_sync(self, name: str, fencing_token: int | None = None) -> int:
        """`force_release` for threads without an event loop."""
        operation = administration.forcing(check_name(name), administration.check_token(fencing_token))
        return administration.run_sync(self._link, operation, f"taking lock {name!r} away")

    async def wait_graph(self) -> WaitGraph:
        """Who waits for whom in this namespace.

        Returns: the graph, read while locks may change: see `WaitGraph`.
        Raises: ServerUnavailable, ServerRefused: the server's side failed.
        """
        await self._link.side()
        operation = administration.graphing(self._link.engine().partitions)
        return await administration.run(self._link, operation, "reading who waits")

    def wait_graph_sync(self) -> WaitGraph:
        """`wait_graph` for threads without an event loop."""
        operation = administration.graphing(self._link.engine().partitions)
        return administration.run_sync(self._link, operation, "reading who waits")

    def stats(self) -> dict[str, Any]:
        """Counters of this process's engine since it started: heartbeats, losses, connections, leases.

        `failed_releases` counts the pipelined releases that were not confirmed, or came too late.
        """
        return self._link.engine().stats()

    async def aclose(self) -> None:
        """Leaves the server: what this process still holds through it is given back. Idempotent."""
        await self._link.aclose()

    def close(self) -> None:
        """`aclose` for threads without an event loop."""
        self._link.close()


def _optional(seconds: float | None, field: str) -> float | None:
    return None if seconds is None else check_timeout(seconds, field)


def _reporter(told: Callable[[str, int, str], None] | None) -> Callable[[str, int, Any], None]:
    """What is done about a release that failed while nobody waited for it."""

    def report(name: str, token: int, result: Any) -> None:
        reason = _REASONS[result[0] if isinstance(result, tuple) else "ended"]
        _log.warning("release failed", lock=name, fencing_token=token, reason=reason)
        if told is not None:
            told(name, token, reason)

    return report


_REASONS = defaultdict(
    lambda: "the server refused it; the engine repeats it",
    ended="the lease had ended before",
    unavailable="no connection to the server; the engine repeats it until it is answered",
    no_answer="no answer in time; the engine repeats it until it is answered",
)
