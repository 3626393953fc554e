"""One adapter for each library that is measured: the lock that its users would write, as a context manager.

Asynchronous ones share a connection pool of 50 where they take a client of redis-py. A peer that can't be
imported or started is reported by its name and the reason; see `started`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from floor import Floor as _Floor
from stand import why

from dotmac.platform.distributed_locks import DistributedLockManager
from dotmac.platform.distributed_locks.config import DistributedLockConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from stand import Server

CONNECTIONS = 50
FOREVER = 10**9
START_LIMIT = 20.0


class Peer:
    """A library. `start` and `stop` frame the use of `lock`, in one loop or thread."""

    name: ClassVar[str]
    sync: ClassVar[bool] = False
    fair: ClassVar[bool] = False
    fenced: ClassVar[bool] = False
    renews: ClassVar[bool] = False

    def lock(self, name: str, lease: float) -> Any:
        """A lock to enter once; it waits without limit."""
        raise NotImplementedError

    def renewed(self, name: str, lease: float) -> Any:
        """The same, renewed for as long as it is held, by libraries that do that only when asked."""
        return self.lock(name, lease)

    @staticmethod
    def leases(server: Server, prefix: str) -> dict[str, float]:
        """What the server says is held under names that begin so, and seconds that each lease has left."""
        return _by_key(server, prefix)


class AsyncPeer(Peer):
    """For event loops."""

    async def start(self, port: int) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    if TYPE_CHECKING:

        def lock(self, name: str, lease: float) -> AbstractAsyncContextManager[Any]: ...


class SyncPeer(Peer):
    """For threads."""

    sync = True

    def start(self, port: int) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    if TYPE_CHECKING:

        def lock(self, name: str, lease: float) -> AbstractContextManager[Any]: ...


def _by_key(server: Server, prefix: str, before: str = "", behind: str = "") -> dict[str, float]:
    keys = list(server.client.scan_iter(match=f"{before}{prefix}*{behind}", count=5000))
    with server.client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.pttl(key)
        left = dict(zip(keys, pipe.execute(), strict=True))
    return {key.removeprefix(before).removesuffix(behind): ms / 1000 for key, ms in left.items() if ms > 0}


# ---- this library


def _manager(port: int, **settings: Any) -> DistributedLockManager:
    # Not from the environment of whoever runs this.
    return DistributedLockManager(f"redis://127.0.0.1:{port}/0", config=DistributedLockConfig(), **settings)


def _listed(server: Server, prefix: str) -> dict[str, float]:
    with _manager(server.port) as manager:
        found = manager.list_locks_sync()
        return {lock.name: lock.remaining for lock in found if lock.name.startswith(prefix)}


class Dotmac(AsyncPeer):
    name, fair, fenced, renews = "dotmac", True, True, True
    leases = staticmethod(_listed)

    async def start(self, port: int) -> None:
        self.manager = _manager(port)

    def lock(self, name: str, lease: float) -> AbstractAsyncContextManager[Any]:
        return self.manager.acquire_lock(name, lease)

    async def stop(self) -> None:
        await self.manager.aclose()


class DotmacPipelined(Dotmac):
    """Leaves without waiting for the server's word."""

    name = "dotmac pipelined"

    async def start(self, port: int) -> None:
        self.manager = _manager(port, release="pipelined")


class DotmacSync(SyncPeer):
    name, fair, fenced, renews = "dotmac sync", True, True, True
    leases = staticmethod(_listed)

    def start(self, port: int) -> None:
        self.manager = _manager(port)

    def lock(self, name: str, lease: float) -> AbstractContextManager[Any]:
        return self.manager.acquire_lock(name, lease)

    def stop(self) -> None:
        self.manager.close()


# ---- asynchronous peers


class Floor(AsyncPeer):
    name, fair, fenced = "floor", True, True

    async def start(self, port: int) -> None:
        self._floor = _Floor()
        await self._floor.start(port)

    def lock(self, name: str, lease: float) -> AbstractAsyncContextManager[Any]:
        return self._floor.lock(name, lease)

    async def stop(self) -> None:
        await self._floor.stop()


class _OverRedisPy(AsyncPeer):
    async def start(self, port: int) -> None:
        import redis.asyncio as redis

        pool = redis.BlockingConnectionPool(
            host="127.0.0.1", port=port, max_connections=CONNECTIONS, timeout=None
        )
        self.client = redis.Redis(connection_pool=pool)

    async def stop(self) -> None:
        await self.client.aclose()
        await self.client.connection_pool.disconnect()


class RedisPy(_OverRedisPy):
    name = "redis-py"

    def lock(self, name: str, lease: float) -> AbstractAsyncContextManager[Any]:
        return self.client.lock(name, timeout=lease)


class Pottery(_OverRedisPy):
    name = "pottery"

    async def start(self, port: int) -> None:
        from pottery import AIORedlock

        self._lock = AIORedlock
        await super().start(port)

    def lock(self, name: str, lease: float) -> AbstractAsyncContextManager[Any]:
        return self._lock(key=name, masters={self.client}, auto_release_time=lease)


class RedlockNg(_OverRedisPy):
    name = "redlock-ng"

    async def start(self, port: int) -> None:
        from redlock import AsyncRedlock

        await super().start(port)
        self._manager = AsyncRedlock([f"redis://127.0.0.1:{port}/0"])
        # The same pool as the others: its own gives up after a tenth of a second.
        self._manager.client.instances = [self.client]

    def lock(self, name: str, lease: float) -> AbstractAsyncContextManager[Any]:
        return self._manager.lock(name, int(lease * 1000), blocking=True)


class RedisFifoLock(_OverRedisPy):
    name, fair, fenced, renews = "redis-fifo-lock", True, True, True

    async def start(self, port: int) -> None:
        import redis.asyncio as redis
        from redis_fifo_lock import FifoLock

        self._fifo, self._locks = FifoLock, {}
        # It logs an error wherever a renewal is late.
        logging.getLogger("redis_fifo_lock").setLevel(logging.CRITICAL)
        # A waiter blocks a connection of its own.
        self.client = redis.Redis(host="127.0.0.1", port=port, max_connections=FOREVER, socket_timeout=None)

    def lock(self, name: str, lease: float) -> AbstractAsyncContextManager[Any]:
        # Made once per name, for it asks the server for its settings before the first use.
        lock = self._locks.get((name, lease))
        if lock is None:
            lock = self._locks[name, lease] = self._fifo(self.client, name, lease_ms=int(lease * 1000))
        return lock.hold()

    @staticmethod
    def leases(server: Server, prefix: str) -> dict[str, float]:
        return _by_key(server, prefix, "{", "}:h")


class Aioredlock(AsyncPeer):
    name, renews = "aioredlock", True

    async def start(self, port: int) -> None:
        from aioredlock import Aioredlock as Manager

        self._make, self._managers = Manager, {}
        self._where = [{"host": "127.0.0.1", "port": port, "minsize": 1, "maxsize": CONNECTIONS}]

    def _manager(self, lease: float) -> Any:
        # The length of a renewed lease is the manager's.
        if lease not in self._managers:
            self._managers[lease] = self._make(self._where, retry_count=FOREVER, internal_lock_timeout=lease)
        return self._managers[lease]

    @asynccontextmanager
    async def lock(self, name: str, lease: float) -> AsyncIterator[Any]:
        manager = self._manager(lease)
        lock = await manager.lock(name, lock_timeout=lease)
        try:
            yield lock
        finally:
            await manager.unlock(lock)

    @asynccontextmanager
    async def renewed(self, name: str, lease: float) -> AsyncIterator[Any]:
        manager = self._manager(lease)
        lock = await manager.lock(name)
        try:
            yield lock
        finally:
            await manager.unlock(lock)

    async def stop(self) -> None:
        for manager in self._managers.values():
            await manager.redis.clear_connections()


class Coredis(AsyncPeer):
    name = "coredis"

    async def start(self, port: int) -> None:
        import coredis
        from coredis.patterns.lock import Lock

        self._lock = Lock
        self.client = await coredis.Redis(host="127.0.0.1", port=port).__aenter__()

    def lock(self, name: str, lease: float) -> AbstractAsyncContextManager[Any]:
        return self._lock(self.client, name, timeout=lease)

    async def stop(self) -> None:
        await self.client.__aexit__(None, None, None)


class Glide(AsyncPeer):
    """It has no lock: SET NX PX and a compare-and-delete script, as its users write it."""

    name = "valkey-glide"

    async def start(self, port: int) -> None:
        import glide

        self.glide = glide
        self.client = await glide.GlideClient.create(
            glide.GlideClientConfiguration(
                [glide.NodeAddress("127.0.0.1", port)], request_timeout=10_000, inflight_requests_limit=5000
            )
        )
        self.script = glide.Script(
            "if redis.call('get',KEYS[1])==ARGV[1] then return redis.call('del',KEYS[1]) end return 0"
        )

    @asynccontextmanager
    async def lock(self, name: str, lease: float) -> AsyncIterator[str]:
        token = uuid.uuid4().hex
        free = self.glide.ConditionalChange.ONLY_IF_DOES_NOT_EXIST
        expiry = self.glide.ExpirySet(self.glide.ExpiryType.MILLSEC, int(lease * 1000))
        # The server has no event to wait for: a tenth of a second, as redis-py waits.
        while not await self.client.set(  # noqa: ASYNC110
            name, token, conditional_set=free, expiry=expiry
        ):
            await asyncio.sleep(0.1)
        try:
            yield token
        finally:
            await self.client.invoke_script(self.script, keys=[name], args=[token])

    async def stop(self) -> None:
        await self.client.close()


# ---- synchronous peers


class _OverSyncRedisPy(SyncPeer):
    def start(self, port: int) -> None:
        import redis

        self.client = redis.Redis(host="127.0.0.1", port=port, max_connections=FOREVER)

    def stop(self) -> None:
        self.client.close()


class RedisPySync(_OverSyncRedisPy):
    name = "redis-py sync"

    def lock(self, name: str, lease: float) -> AbstractContextManager[Any]:
        return self.client.lock(name, timeout=lease)


class PythonRedisLock(_OverSyncRedisPy):
    name, renews = "python-redis-lock", True

    def start(self, port: int) -> None:
        import redis_lock

        super().start(port)
        self._lock = redis_lock.Lock
        # It logs an error wherever a lock was lost.
        logging.getLogger("redis_lock").setLevel(logging.CRITICAL)

    def lock(self, name: str, lease: float) -> AbstractContextManager[Any]:
        return self._lock(self.client, name, expire=int(lease))

    def renewed(self, name: str, lease: float) -> AbstractContextManager[Any]:
        return self._lock(self.client, name, expire=int(lease), auto_renewal=True)

    @staticmethod
    def leases(server: Server, prefix: str) -> dict[str, float]:
        return _by_key(server, prefix, "lock:")


class PotterySync(_OverSyncRedisPy):
    name = "pottery sync"

    def start(self, port: int) -> None:
        from pottery import Redlock

        super().start(port)
        self._lock = Redlock

    def lock(self, name: str, lease: float) -> AbstractContextManager[Any]:
        return self._lock(key=name, masters={self.client}, auto_release_time=lease)


class RedlockNgSync(_OverSyncRedisPy):
    name = "redlock-ng sync"

    def start(self, port: int) -> None:
        from redlock import Redlock

        super().start(port)
        self._manager = Redlock([f"redis://127.0.0.1:{port}/0"])
        self._manager.client.instances = [self.client]

    def lock(self, name: str, lease: float) -> AbstractContextManager[Any]:
        return self._manager.lock(name, int(lease * 1000), blocking=True)


ASYNC: tuple[type[AsyncPeer], ...] = (
    Dotmac,
    DotmacPipelined,
    RedisPy,
    Pottery,
    RedlockNg,
    Aioredlock,
    RedisFifoLock,
    Coredis,
    Glide,
    Floor,
)
SYNC: tuple[type[SyncPeer], ...] = (DotmacSync, RedisPySync, PythonRedisLock, PotterySync, RedlockNgSync)
BY_NAME: dict[str, type[AsyncPeer | SyncPeer]] = {kind.name: kind for kind in (*ASYNC, *SYNC)}


def chosen(kinds: Iterable[type], only: list[str] | None) -> list[Any]:
    """The peers among `kinds` that were asked for on the command line."""
    if only is not None and (unknown := set(only) - BY_NAME.keys()):
        raise SystemExit(f"unknown peers {sorted(unknown)}; there are: {', '.join(BY_NAME)}")
    return [kind() for kind in kinds if only is None or kind.name in only]


@asynccontextmanager
async def started(
    peers: list[AsyncPeer], port: int, missing: dict[str, str]
) -> AsyncIterator[list[AsyncPeer]]:
    """The peers that start and do what they should once; why the others don't goes to `missing`."""
    ready: list[AsyncPeer] = []
    for peer in peers:
        try:
            async with asyncio.timeout(START_LIMIT):
                await peer.start(port)
                async with peer.lock("warm", 10.0):
                    pass
        except Exception as error:  # noqa: BLE001 - reported by name
            missing[peer.name] = why(error)
        else:
            ready.append(peer)
    try:
        yield ready
    finally:
        # In reverse: one of them keeps a scope of its task open.
        for peer in reversed(ready):
            await peer.stop()


@contextmanager
def started_sync(peers: list[SyncPeer], port: int, missing: dict[str, str]) -> Iterator[list[SyncPeer]]:
    """The same for threads."""
    ready: list[SyncPeer] = []
    for peer in peers:
        try:
            peer.start(port)
            with peer.lock("warm", 10.0):
                pass
        except Exception as error:  # noqa: BLE001 - reported by name
            missing[peer.name] = why(error)
        else:
            ready.append(peer)
    try:
        yield ready
    finally:
        for peer in ready:
            peer.stop()


def report_missing(missing: dict[str, str]) -> None:
    """Prints which peers were not measured, and why."""
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
