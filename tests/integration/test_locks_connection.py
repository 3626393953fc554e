"""Locks over connections of every kind, and over connections that break.

Promises: a connection that is killed with requests in flight, or cut after a command ran and before its
answer came, grants nothing twice, leaks nothing and fails nobody who can wait; TCP, Unix sockets,
passwords, database numbers and the clients of redis-py and valkey-py all reach the lock; wrong credentials
are told apart from a server that is away; a server that refuses to serve is not hammered.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import redis
import redis.asyncio
import valkey
import valkey.asyncio

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.distributed_locks import DistributedLock
from dotmac.platform.errors import AuthenticationFailed, ServerUnavailable
from support.locks import Partition, manager_at, until, works
from support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dotmac.platform.distributed_locks.lock import DistributedLock as Lock


# ---- broken connections


async def test_killed_with_requests_in_flight(own_valkey: EmbeddedValkey, unique: str) -> None:
    view = Partition(own_valkey.url, unique)
    async with manager_at(own_valkey.url, unique) as locks:
        inside = done = 0

        async def work(number: int) -> None:
            nonlocal inside, done
            for _ in range(30):
                async with locks.acquire_lock(f"l{number % 4}", timeout=5) as lock:
                    token = lock.fencing_token
                    await asyncio.sleep(0.001)
                    assert lock.fencing_token == token
                done += 1

        async def kill() -> None:
            while True:
                await asyncio.sleep(0.05)
                view.client.client_kill_filter(_type="pubsub", skipme=True)

        killer = asyncio.create_task(kill())
        async with asyncio.timeout(60):
            await asyncio.gather(*(work(number) for number in range(20)))
        killer.cancel()
        assert done == 600
        assert locks.stats()["connections"] > 2, "the connection was never killed"
        assert locks.stats()["losses"] == 0
        assert inside == 0
        await until(view.empty)
    view.client.close()


@pytest.fixture
def proxy(valkey_url: str) -> Iterator[Proxy]:
    with Proxy(valkey_url) as between:
        yield between


async def test_cut_before_the_answer_to_an_acquire(proxy: Proxy, partition: Partition, unique: str) -> None:
    async with manager_at(proxy.url, unique) as locks:
        await works(locks)
        for wait in (True, False):
            name = f"cut-{wait}"
            proxy.cut_reply_to(name.encode())
            lock = locks.acquire_lock(name)
            assert await lock.acquire(blocking=wait) is True
            assert proxy.cut.is_set()
            assert partition.held() == 1, "granted twice, or not at all"
            await lock.release()
            assert partition.empty()
        assert locks.stats()["connections"] == 3


async def test_cut_before_the_answer_to_a_release(proxy: Proxy, partition: Partition, unique: str) -> None:
    async with manager_at(proxy.url, unique) as locks:
        lock = locks.acquire_lock("cut")
        await lock.acquire()
        proxy.cut_reply_to(b"cut")
        await lock.release()
        assert proxy.cut.is_set()
        assert partition.empty()
        async with locks.acquire_lock("cut"):
            proxy.cut_reply_to(b"cut")
        assert proxy.cut.is_set()
        assert partition.empty()


async def test_cut_while_queued_keeps_the_place(proxy: Proxy, partition: Partition, unique: str) -> None:
    order: list[int] = []
    async with manager_at(proxy.url, unique) as locks:

        async def wait(number: int) -> None:
            async with locks.acquire_lock("cut"):
                order.append(number)

        async with locks.acquire_lock("cut"):
            proxy.cut_reply_to(b"cut")
            tasks = []
            for number in range(5):
                tasks.append(asyncio.create_task(wait(number)))
                await until(lambda: partition.queued() == len(tasks))
            assert proxy.cut.is_set()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
        assert order == list(range(5))
        await until(partition.empty)


async def test_cut_while_cancelling(proxy: Proxy, partition: Partition, unique: str) -> None:
    async with manager_at(proxy.url, unique) as locks:
        async with locks.acquire_lock("cut"):
            task = asyncio.create_task(locks.acquire_lock("cut").acquire())
            await until(lambda: partition.queued() == 1)
            proxy.cut_reply_to(b"cut")
            task.cancel()
            await until(proxy.cut.is_set)
            await until(lambda: partition.queued() == 0)
        await until(partition.empty)
        # A cancellation whose acquire had been granted meanwhile: nobody else learns of that lease.
        proxy.cut_reply_to(b"free")
        task = asyncio.create_task(locks.acquire_lock("free").acquire())
        await until(proxy.cut.is_set)
        task.cancel()
        await asyncio.wait({task})
        del task
        await until(partition.empty)


async def test_a_held_lock_survives_a_short_cut(proxy: Proxy, unique: str) -> None:
    async with manager_at(proxy.url, unique) as locks:
        async with locks.acquire_lock("a", timeout=1.0) as lock:
            token = lock.fencing_token
            for _ in range(3):
                proxy.drop()
                await asyncio.sleep(0.5)
            assert lock.fencing_token == token
        assert locks.stats()["connections"] > 1


# ---- who may come in, and where


async def test_passwords_and_users(unique: str) -> None:
    with EmbeddedValkey(args=("--requirepass", "s e:c/r@et")) as server:
        place = server.url.removeprefix("redis://")
        right = f"redis://:s%20e%3Ac%2Fr%40et@{place}"
        async with manager_at(right, unique) as locks:
            await works(locks)
            assert "s%20e" not in repr(locks)
        for wrong in (f"redis://{place}", f"redis://:nonsense@{place}", f"redis://nobody:nonsense@{place}"):
            async with manager_at(f"{wrong}?request_timeout=2", unique) as locks:
                with pytest.raises(AuthenticationFailed, match="check user, password") as caught:
                    await locks.acquire_lock("a").acquire()
                assert "nonsense" not in str(caught.value)


async def test_a_refusing_server_is_not_hammered(own_valkey: EmbeddedValkey, unique: str) -> None:
    """A heartbeat that is refused ends the connection; the next tries come slower and slower."""
    view = Partition(own_valkey.url, unique)
    view.client.config_set("maxmemory", "1")
    before = view.client.info("stats")["total_connections_received"]
    async with manager_at(f"{own_valkey.url}?request_timeout=3", unique) as locks:
        with pytest.raises(ServerUnavailable, match="OOM"):
            await locks.acquire_lock("a").acquire()
        assert view.client.info("stats")["total_connections_received"] - before < 20
        view.client.config_set("maxmemory", "0")
        await works(locks)
    view.client.close()


async def test_unix_socket_and_database_numbers(own_valkey: EmbeddedValkey, unique: str) -> None:
    plain = own_valkey.unix_url.partition("?")[0]
    async with (
        manager_at(plain, unique) as zero,
        manager_at(f"{plain}?db=3", unique) as three,
        manager_at(own_valkey.url.removesuffix("/0") + "/3", unique) as also_three,
    ):
        await works(zero)
        async with zero.acquire_lock("a"), three.acquire_lock("a"):
            assert await asyncio.create_task(also_three.acquire_lock("a").acquire(blocking=False)) is False
            assert await also_three.list_locks()
    async with manager_at(f"{plain}?db=99&request_timeout=1", unique) as locks:
        with pytest.raises(AuthenticationFailed, match="database 99"):
            await locks.acquire_lock("a").acquire()


# ---- clients


@pytest.mark.parametrize("module", [redis, redis.asyncio, valkey, valkey.asyncio], ids=lambda m: m.__name__)
async def test_clients_are_read_but_never_used(own_valkey: EmbeddedValkey, unique: str, module) -> None:
    kind = module.Redis if hasattr(module, "Redis") else module.Valkey
    for client in (
        kind(host="127.0.0.1", port=own_valkey.port, db=2),
        kind(unix_socket_path=str(own_valkey.socket), db=2),
        module.ConnectionPool(host="127.0.0.1", port=own_valkey.port, db=2),
    ):
        lock: Lock = DistributedLock(client, "a", timeout=5.0, namespace=unique)
        assert await lock.acquire()
        view = Partition(own_valkey.url.removesuffix("/0") + "/2", unique)
        assert view.held() == 1
        await lock.release()
        assert view.empty()
        view.client.close()
        async with manager_at(client, unique) as locks:
            await works(locks)
        pool = getattr(client, "connection_pool", client)
        assert not getattr(pool, "_in_use_connections", None)
        closing = (
            client.aclose()
            if hasattr(client, "aclose")
            else client.close()
            if hasattr(client, "close")
            else None
        )
        if asyncio.iscoroutine(closing):
            await closing


async def test_a_request_made_when_the_server_is_back_is_in_time(
    own_valkey: EmbeddedValkey, unique: str
) -> None:
    """However long it was away, the next attempt to connect comes well within one request's timeout."""
    async with manager_at(own_valkey.url, unique, request_timeout=0.8) as locks:
        for away in (0.5, 2.0, 3.0):
            async with locks.acquire_lock("a"):
                pass
            own_valkey.kill()
            await asyncio.sleep(away)
            await asyncio.to_thread(own_valkey.restart)
            async with locks.acquire_lock("a"):
                pass
