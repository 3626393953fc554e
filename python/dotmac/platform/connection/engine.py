"""The Python side of the engine: one per process and server, one bridge per event loop, anew after a fork.

A `Link` is what a service keeps. It may be made at import time: it opens nothing, and finds or starts the
engine of the process in which it is used. Services with the same target and namespace share one engine.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotmac.platform import _native, _semconv
from dotmac.platform.connection.embedded import aresolve_redis, resolve_redis
from dotmac.platform.connection.sides import Holding, LoopSide, Report, ReportThread
from dotmac.platform.connection.urls import DEFAULT_TIMEOUT, EMBEDDED, RedisTarget, mask_url, parse_redis_url
from dotmac.platform.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EngineClosed,
    InvalidArgument,
    RequestTimeout,
    ServerRefused,
    ServerUnavailable,
)
from dotmac.platform.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Link", "failure"]

_link_numbers = itertools.count(1)
_EXIT_LIMIT = 1.0
_CLOSE_LIMIT = 5.0
_NAMESPACE = re.compile(r"[!-9;-z|~]{1,128}")


class _Shared:
    """One engine of this process and everybody who uses it."""

    def __init__(self, key: tuple[RedisTarget, str]) -> None:
        target, namespace = key
        self.key = key
        self.users = 0
        self.native = _native.Engine(
            _described(target),
            namespace=namespace,
            session=secrets.token_hex(8),
            who=_who(),
            chance=secrets.randbits(64),
        )
        # By number of the link: who wants to know of releases that failed while nobody waited for them.
        self.reports: dict[int, Report] = {}
        self._of_threads: ReportThread | None = None
        # By number of the lease: what a thread holds and wants to be told of.
        self.told: dict[int, Holding] = {}
        self._sides: dict[int, LoopSide] = {}
        # Sides of closed loops under which something is still held.
        self._left: list[LoopSide] = []

    def side(self, loop: asyncio.AbstractEventLoop) -> LoopSide:
        side = self._sides.get(id(loop))
        if side is None or side.loop is not loop:
            with _process.lock:
                self.drop_closed_loops()
                side = self._sides[id(loop)] = LoopSide(self.native, loop, self.reports)
        return side

    def drop_closed_loops(self) -> None:
        """Nobody is left in a closed loop: what it asked for is withdrawn, what it was granted given back."""
        for number in [n for n, s in self._sides.items() if s.loop.is_closed()]:
            side = self._sides.pop(number)
            # Nobody can hold up a loop that is closed.
            side.bridge.guard(0.0)
            side.bridge.abandon()
            self._left.append(side)
        if self._left:
            self._left = [side for side in self._left if side.holdings]

    def held_by(self, link: Link) -> list[Holding]:
        """What event loops hold through a link."""
        sides = [*self._sides.values(), *self._left]
        return [held for side in sides for held in list(side.holdings.values()) if held.link is link]

    def of_threads(self) -> _native.Bridge:
        """What tells threads of releases that failed while nobody waited for them."""
        if self._of_threads is None:
            with _process.lock:
                if self._of_threads is None:
                    thread = ReportThread(_native.Bridge(self.native, None, self.told, self.reports))
                    thread.start()
                    self._of_threads = thread
        return self._of_threads.bridge

    def close(self, limit: float) -> None:
        """Ends the engine and lets go of every loop. Blocks for `limit` seconds at most."""
        try:
            self.native.close(limit)
        finally:
            for side in self._sides.values():
                side.detach()
            self._sides.clear()
            if self._of_threads is not None:
                self._of_threads.closed = True
                self._of_threads.bridge.drain()


class _Process:
    """What belongs to this process. A forked child starts anew; what was the parent's is kept, untouched."""

    def __init__(self) -> None:
        self.generation = 0
        self.lock = threading.Lock()
        self.engines: dict[tuple[RedisTarget, str], _Shared] = {}
        self.of_parents: list[Any] = []
        self.forgotten: deque[tuple[_Shared, int, int]] = deque()
        self.before = {"heartbeats": 0, "late_heartbeats": 0, "reregistered": 0, "picks": 0}
        self.reported = False

    def count(self, what: str) -> int:
        """The sum of one of the engines' counters, the closed ones' included."""
        with self.lock:
            return self.before[what] + sum(int(s.native.stats()[what]) for s in self.engines.values())

    def report(self) -> None:
        """Once per process: the engines' counters, under their names."""
        if not self.reported:
            self.reported = True
            metrics.observe(_semconv.LOCK_HEARTBEATS, lambda: self.count("heartbeats"))
            metrics.observe(_semconv.LOCK_LATE_HEARTBEATS, lambda: self.count("late_heartbeats"))
            metrics.observe(_semconv.REGISTRY_REREGISTRATIONS, lambda: self.count("reregistered"))
            metrics.observe(_semconv.REGISTRY_PICKS, lambda: self.count("picks"))

    def leave(self, shared: _Shared) -> _Shared | None:
        """One user less; the engine, if that was the last and it has to be closed."""
        with self.lock:
            shared.users -= 1
            if shared.users:
                return None
            self.engines.pop(shared.key, None)
            stats = shared.native.stats()
            for what in self.before:
                self.before[what] += int(stats[what])
            return shared

    def forget(self, shared: _Shared, generation: int, link: int) -> None:
        """A link was dropped without being closed. This runs wherever the collector happened to run, perhaps
        inside of a lock, so it is only noted here."""
        self.forgotten.append((shared, generation, link))

    def tidy(self) -> None:
        """Does what `forget` has noted."""
        while self.forgotten:
            shared, generation, link = self.forgotten.popleft()
            shared.reports.pop(link, None)
            if generation == self.generation and (last := self.leave(shared)) is not None:
                threading.Thread(target=last.close, args=(_CLOSE_LIMIT,), daemon=True).start()

    def in_child(self) -> None:
        self.lock = threading.Lock()
        self.of_parents.append(self.engines)
        self.engines = {}
        self.before = dict.fromkeys(self.before, 0)
        self.generation += 1


_process = _Process()
os.register_at_fork(after_in_child=_process.in_child)


class Link:
    """A service's way to its engine.

    Args:
        redis_url: `redis://`, `rediss://`, `valkey://`, `valkeys://`, `unix://`, `redis+sentinel://`,
            `rediss+sentinel://`, `redis+cluster://`, `rediss+cluster://` or `embedded://`; or give
        target: a target that was read already (from a client).
        namespace: first part of every key, so that applications can share a server.
        request_timeout: seconds that an answer may take; the URL's own setting wins.
        connect_timeout: seconds to connect within; the URL's own setting wins.
        partitions: how many a cluster has; the URL's own setting wins; None for the default.

    Raises: InvalidArgument: the URL or the namespace can't be used.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        target: RedisTarget | None = None,
        namespace: str = "dotmac",
        request_timeout: float | None = None,
        connect_timeout: float | None = None,
        partitions: int | None = None,
    ) -> None:
        if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
            raise InvalidArgument(
                "namespace",
                namespace,
                "it must be 1 to 128 printable ASCII characters other than space, : { }",
            )
        self._namespace = namespace
        self._request_timeout, self._connect_timeout = request_timeout, connect_timeout
        self._partitions = partitions
        self._url = redis_url
        self._target = target if target is None else target.with_partitions(partitions)
        if target is None:
            if redis_url is None:
                raise InvalidArgument("redis_url", None, "give redis_url or a client")
            if not (isinstance(redis_url, str) and redis_url.startswith(EMBEDDED)):
                self._target = self._read(redis_url)
        self.number = next(_link_numbers)
        # Told of releases through this link that failed while nobody waited for them.
        self.report: Report | None = None
        # What threads hold through this link, by number of the lease.
        self.of_threads: dict[int, Holding] = {}
        # What may be acquired again by the same owner, by owner and name.
        self.reentrant: dict[tuple[str | int, str], Any] = {}
        self._side: LoopSide | None = None
        self._closed = False
        self._born = -1
        self._shared: _Shared | None = None
        self._forgotten: weakref.finalize[..., Link] | None = None

    def __repr__(self) -> str:
        return f"Link({self.where!r}, namespace={self._namespace!r})"

    @property
    def where(self) -> str:
        """The server's address, password masked."""
        return str(self._target) if self._target is not None else mask_url(self._url or "")

    @property
    def request_timeout(self) -> float:
        """Seconds that an answer may take."""
        if self._target is not None:
            return self._target.request_timeout
        return self._request_timeout or DEFAULT_TIMEOUT

    def engine(self) -> _native.Engine:
        """The engine of this process, started if need be. Blocks while an embedded server starts."""
        if self._born == _process.generation and self._shared is not None:
            self._shared.drop_closed_loops()
            return self._shared.native
        return self._attach(resolve_redis).native

    def ready_side(self) -> LoopSide | None:
        """The running loop's side, if nothing has to be waited for."""
        loop = asyncio.get_running_loop()
        side = self._side
        if side is not None and side.loop is loop and self._born == _process.generation:
            return side
        shared = self._shared
        if self._born != _process.generation or shared is None:
            if self._target is None:
                return None
            shared = self._attach(resolve_redis)
        side = self._side = shared.side(loop)
        return side

    def tell_in_thread(self, number: int, held: Holding) -> None:
        """What a thread holds is told of its loss, in a thread of the platform's."""
        self.threads_side()
        if self._shared is not None:
            self._shared.told[number] = held

    def tell_no_more(self, number: int) -> None:
        """It is over."""
        if self._shared is not None:
            self._shared.told.pop(number, None)

    def threads_side(self) -> _native.Bridge:
        """Where threads release what they don't wait for."""
        shared = self._shared
        if self._born != _process.generation or shared is None:
            shared = self._attach(resolve_redis)
        return shared.of_threads()

    @property
    def held(self) -> list[Holding]:
        """What is held through this link: forfeited when it is closed."""
        of_loops = [] if self._shared is None else self._shared.held_by(self)
        return [*self.of_threads.values(), *of_loops]

    async def side(self) -> LoopSide:
        """The running loop's side; an embedded server starts in a thread meanwhile."""
        side = self.ready_side()
        if side is None:
            assert self._url is not None
            resolved = await aresolve_redis(self._url)
            side = self._attach(lambda _: resolved).side(asyncio.get_running_loop())
        return side

    async def aclose(self) -> None:
        """Leaves the engine. What is held through this link is lost to its holders, who are told, and given
        back. The last link to leave closes the engine. Idempotent."""
        shared = self._leave()
        if shared is not None:
            await asyncio.to_thread(shared.close, _CLOSE_LIMIT)

    def close(self) -> None:
        """The same, blocking."""
        shared = self._leave()
        if shared is not None:
            shared.close(_CLOSE_LIMIT)

    @property
    def closed(self) -> bool:
        """True after `aclose` or `close`."""
        return self._closed

    # ---- inside

    def _read(self, url: str) -> RedisTarget:
        target = parse_redis_url(url).with_timeouts(self._connect_timeout, self._request_timeout)
        return target.with_partitions(self._partitions)

    def _attach(self, resolve: Callable[[str], str]) -> _Shared:
        if self._closed:
            raise EngineClosed("this service was closed; make a new one")
        _process.tidy()
        target = self._target if self._target is not None else self._read(resolve(self._url or ""))
        with _process.lock:
            if self._born == _process.generation and self._shared is not None:
                return self._shared
            key = (target, self._namespace)
            shared = _process.engines.get(key)
            if shared is None:
                shared = _process.engines[key] = _Shared(key)
                _process.report()
            shared.users += 1
            if self._shared is not None:
                self.of_threads, self.reentrant = {}, {}  # those were the parent's
            self._shared, self._born, self._side = shared, _process.generation, None
            if self.report is not None:
                shared.reports[self.number] = self.report
            self._forgotten = weakref.finalize(
                self, _process.forget, shared, _process.generation, self.number
            )
            self._forgotten.atexit = False
            return shared

    def _leave(self) -> _Shared | None:
        self._closed = True
        with _process.lock:
            shared = self._shared if self._born == _process.generation else None
            held = self.held if shared is not None else []
            self._shared = self._side = None
        if shared is None:
            return None
        shared.reports.pop(self.number, None)
        if self._forgotten is not None:
            self._forgotten.detach()
        for holding in held:
            holding.forfeit("the service that it was acquired from was closed")
        self.of_threads.clear()
        _process.tidy()
        return _process.leave(shared)


def failure(result: tuple[str, Any], what: str, link: Link) -> Exception:
    """The error for a result that is not a success.

    Args:
        result: what the engine answered: a kind and its detail.
        what: what was attempted, for the text.
        link: where.
    """
    kind, detail = result
    where = link.where
    errors: dict[str, tuple[type[Exception], str]] = {
        "unavailable": (
            ServerUnavailable,
            f"no connection to the server ({detail}); check that it runs at {where}",
        ),
        "no_answer": (
            RequestTimeout,
            f"no answer from {where} within {link.request_timeout:g} s (request_timeout)",
        ),
        "denied": (
            AuthenticationFailed,
            f"the server refuses this client ({detail}); check user, password, database and ACL of {where}",
        ),
        "misconfigured": (ConfigurationError, f"{where} is not what it is said to be ({detail})"),
        "refused": (ServerRefused, f"the server at {where} answered: {detail}"),
        "closed": (EngineClosed, "the service was closed meanwhile"),
    }
    error, said = errors.get(kind, (ServerRefused, f"unexpected result {result!r}"))
    return error(f"{what}: {said}")


def _described(target: RedisTarget) -> dict[str, Any]:
    """A target as the engine reads it; times in microseconds."""
    return {
        "path": target.path,
        "host": target.host,
        "port": target.port,
        "db": target.db,
        "username": target.username,
        "password": target.password,
        "tls": target.kind == "tls",
        "tls_ca": target.tls_ca,
        "tls_cert": target.tls_cert,
        "tls_key": target.tls_key,
        "tls_server_name": target.tls_server_name,
        "tls_insecure": target.tls_insecure,
        "connect_timeout": int(target.connect_timeout * 1e6),
        "request_timeout": int(target.request_timeout * 1e6),
        "service": target.service,
        "sentinels": [_described(sentinel) for sentinel in target.sentinels],
        "cluster": [_described(node) for node in target.cluster],
        "partitions": target.partitions or 1,
    }


def _who() -> str:
    """Who this process is, for those who look at the list of locks or instances."""
    service = os.environ.get("APP_NAME") or Path(sys.argv[0]).name or "python"
    started = int(time.time() * 1000)
    return json.dumps(
        {"host": socket.gethostname(), "pid": os.getpid(), "service": service[:120], "started": started}
    )


@atexit.register
def _at_exit() -> None:
    """Leases are given back, within a bound, rather than left to run out."""
    with _process.lock:
        engines = list(_process.engines.values())
        _process.engines.clear()
    for shared in engines:
        if shared.native.pid == os.getpid():
            shared.close(_EXIT_LIMIT)
