"""Locks and services on a cluster that changes while they are used.

Promises: what is held and waited for goes on while slots move, key by key or at once, and while replicas
take over from primaries that are told to yield, die, or hang; tokens go on increasing; where nobody takes
over, the leases in question end in time, their holders are told, and the others go on; many partitions that
lose their server at once ask together where to go, and an engine that is closed meanwhile closes in time.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
import redis

from dotmac.platform.errors import LockLost, ServerUnavailable
from dotmac.platform.testing.topologies import EmbeddedCluster
from support.cluster import NAMES, View, copied, held_once, owner_of, queued, slot_of
from support.locks import manager_at, until, works
from support.registry import make

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def cluster(each_program: str | None) -> Iterator[EmbeddedCluster]:
    """Three primaries with a replica each, of every kind of server in turn, which this test may break."""
    with EmbeddedCluster(replicas=1, program=each_program) as servers:
        yield servers


async def test_what_is_held_and_waited_for_goes_on_while_a_slot_moves(
    cluster: EmbeddedCluster, unique: str
) -> None:
    async with manager_at(cluster.url, unique) as locks:
        tokens = [await works(locks)]
        for _ in range(3):
            async with locks.acquire_lock("a", timeout=15.0) as lock:
                token = lock.fencing_token
                waiter = asyncio.create_task(held_once(locks, "a"))
                await until(lambda: queued(cluster, unique, "a") == 1)
                old, slot = owner_of(cluster, unique, "a"), slot_of(unique, "a")
                new = next(node for node in cluster._primaries() if node is not old)
                await asyncio.to_thread(cluster.begin_migration, slot, new)
                # The slot is served by nobody now; whoever asks waits until it is.
                later = asyncio.create_task(held_once(locks, "a"))
                await asyncio.sleep(0.5)
                assert not waiter.done()
                assert not later.done()
                assert lock.held
                await asyncio.to_thread(cluster.finish_migration, slot, new)
                view = View(cluster, unique, "a")
                await until(lambda: view.queued() == 2)  # noqa: B023 - awaited in this turn
                assert view.held() == 1
                assert lock.held
                assert lock.fencing_token == token
            tokens += [token, await waiter, await later]
            await until(view.empty)
            view.client.close()
        assert tokens == sorted(set(tokens))
        assert locks.stats()["losses"] == 0


async def test_many_locks_go_on_while_their_slots_move(cluster: EmbeddedCluster, unique: str) -> None:
    async with manager_at(cluster.url, unique) as locks:
        held = {name: locks.acquire_lock(name, timeout=20.0) for name in NAMES[:12]}
        assert all(await asyncio.gather(*(lock.acquire() for lock in held.values())))
        tokens = {name: lock.fencing_token for name, lock in held.items()}
        for name in list(held)[:4]:
            old = owner_of(cluster, unique, name)
            new = next(node for node in cluster._primaries() if node is not old)
            await asyncio.to_thread(cluster.migrate_slot, slot_of(unique, name), new)
        for name, lock in held.items():
            await lock.extend(21.0)
            assert lock.fencing_token == tokens[name]
            await lock.release()
        assert await locks.list_locks() == []
        for name in NAMES[:12]:
            assert await works(locks, name) > tokens[name]
        assert locks.stats()["losses"] == 0


async def test_a_replica_takes_over_from_a_primary_that_yields(cluster: EmbeddedCluster, unique: str) -> None:
    async with manager_at(cluster.url, unique) as locks:
        async with locks.acquire_lock("a", timeout=20.0) as lock:
            token = lock.fencing_token
            waiter = asyncio.create_task(works(locks, "a"))
            await until(lambda: queued(cluster, unique, "a") == 1)
            old = owner_of(cluster, unique, "a")
            new = await asyncio.to_thread(cluster.failover, old)
            assert owner_of(cluster, unique, "a") is new
            view = View(cluster, unique, "a")
            assert (view.held(), view.queued()) == (1, 1)
            # The holder speaks to the new primary before its lease would have ended.
            await lock.extend(20.0)
            assert lock.fencing_token == token
            assert not waiter.done()
        assert await waiter > token
        await until(view.empty)
        view.client.close()
        assert locks.stats()["losses"] == 0


async def test_a_replica_takes_over_from_a_primary_that_dies(cluster: EmbeddedCluster, unique: str) -> None:
    async with manager_at(cluster.url, unique) as locks:
        held = {name: locks.acquire_lock(name, timeout=30.0) for name in NAMES[:12]}
        assert all(await asyncio.gather(*(lock.acquire() for lock in held.values())))
        tokens = {name: lock.fencing_token for name, lock in held.items()}
        waiter = asyncio.create_task(held_once(locks, "user:0"))
        await until(lambda: queued(cluster, unique, "user:0") == 1)
        old = owner_of(cluster, unique, "user:0")
        # What it acknowledged has reached its replica, so nothing may be lost.
        await copied(cluster, old)
        old.kill()
        await asyncio.to_thread(cluster.await_takeover, old, slot_of(unique, "user:0"))
        for name, lock in held.items():
            await lock.extend(31.0)
            assert lock.fencing_token == tokens[name]
        assert not waiter.done()
        for lock in held.values():
            await lock.release()
        assert await waiter > tokens["user:0"]
        assert locks.stats()["losses"] == 0
        await works(locks, "user:1")


async def test_a_lease_that_ends_before_the_replica_takes_over_is_lost_to_its_holder(unique: str) -> None:
    """Nobody takes over where there is no replica; the other partitions' locks go on."""
    with EmbeddedCluster(args=("--cluster-require-full-coverage", "no")) as servers:
        async with manager_at(f"{servers.url}?request_timeout=1", unique) as locks:
            by_port: dict[int, str] = {owner_of(servers, unique, name).port: name for name in NAMES}
            dying, living = list(by_port.values())[:2]
            await works(locks, dying)
            async with locks.acquire_lock(living, timeout=1.5) as other:
                with pytest.raises(LockLost):
                    async with locks.acquire_lock(dying, timeout=1.5):
                        owner_of(servers, unique, dying).kill()
                        await asyncio.sleep(30)
                assert other.held
                with pytest.raises(ServerUnavailable):
                    await locks.acquire_lock(dying).acquire()
            await held_once(locks, living)


async def test_a_primary_that_hangs_is_left_when_it_is_replaced(
    cluster: EmbeddedCluster, unique: str
) -> None:
    """Not only when an answer is overdue: that would be a minute here."""
    url = f"{cluster.url}?request_timeout=60&connect_timeout=60"
    async with manager_at(url, unique) as locks:
        await works(locks)
        async with locks.acquire_lock("a", timeout=40.0) as lock:
            token = lock.fencing_token
            old = owner_of(cluster, unique, "a")
            await copied(cluster, old)
            old.pause()
            try:
                async with asyncio.timeout(30):
                    await lock.extend(40.0)
            finally:
                old.resume()
            assert lock.fencing_token == token
        await until(lambda: owner_of(cluster, unique, "a") is not old)
        assert await works(locks) > token


async def test_registrations_go_on_while_slots_move_and_primaries_yield(
    cluster: EmbeddedCluster, unique: str
) -> None:
    async with make(cluster.url, unique) as registry:
        instance = await registry.register_service("api", "1.0", "127.0.0.1", 1, ttl=10.0)
        slot, old = slot_of(unique, "api"), owner_of(cluster, unique, "api")
        new = next(node for node in cluster._primaries() if node is not old)
        await asyncio.to_thread(cluster.migrate_slot, slot, new)
        assert list(await registry.list_services()) == ["api"]
        await asyncio.to_thread(cluster.failover, new)
        assert list(await registry.list_services()) == ["api"]
        await registry.register_service("web", "1.0", "127.0.0.1", 2, ttl=10.0)
        assert await registry.deregister_service(instance)
        assert list(await registry.list_services()) == ["web"]
        assert registry.stats()["reregistered"] == 0


async def test_a_primary_that_is_cut_off_from_the_others_is_left(unique: str) -> None:
    """It still answers its clients, and is the only node that these were told of."""
    with EmbeddedCluster(replicas=1, args=("--enable-debug-command", "yes")) as servers:
        old, other = servers.nodes[:2]
        name = next(name for name in NAMES if owner_of(servers, unique, name) is old)
        slot = slot_of(unique, name)
        async with manager_at(f"redis+cluster://127.0.0.1:{old.port}", unique) as locks:
            async with locks.acquire_lock(name, timeout=20.0) as lock:
                token = lock.fencing_token
                await copied(servers, old)
                servers.client(old).execute_command("DEBUG", "DROP-CLUSTER-PACKET-FILTER", -2)
                await until(lambda: servers._owner(other, slot) != servers.id_of(old))
                assert servers._owner(old, slot) == servers.id_of(old)
                await lock.extend(20.0)
                assert lock.fencing_token == token
            assert await held_once(locks, name) > token
            assert locks.stats()["losses"] == 0


async def test_a_slot_that_moves_at_once(unique: str) -> None:
    """As Valkey 9 can."""
    with EmbeddedCluster() as servers:
        async with manager_at(servers.url, unique) as locks:
            async with locks.acquire_lock("a", timeout=15.0) as lock:
                token = lock.fencing_token
                waiter = asyncio.create_task(held_once(locks, "a"))
                await until(lambda: queued(servers, unique, "a") == 1)
                slot, old = slot_of(unique, "a"), owner_of(servers, unique, "a")
                new = next(node for node in servers.nodes if node is not old)
                try:
                    servers.client(old).execute_command(
                        *("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", servers.id_of(new))
                    )
                except redis.ResponseError as error:
                    pytest.skip(f"this server can't: {error}")
                await until(lambda: servers._owner(old, slot) == servers.id_of(new))
                await lock.extend(15.0)
                assert lock.fencing_token == token
                assert queued(servers, unique, "a") == 1
            assert await waiter > token
            assert locks.stats()["losses"] == 0


async def test_partitions_that_lose_a_node_at_once_ask_together(unique: str) -> None:
    with EmbeddedCluster(replicas=1) as servers:
        async with manager_at(servers.url, unique) as locks:
            await works(locks)  # the list uses all 64 partitions
            dying = servers.nodes[0]
            await copied(servers, dying)

            def asked() -> int:
                stats = [
                    servers.client(node).info("commandstats") for node in servers.nodes if node is not dying
                ]
                return sum(one.get("cmdstat_cluster|slots", {"calls": 0})["calls"] for one in stats)

            before, began = asked(), time.monotonic()
            dying.kill()
            await asyncio.to_thread(servers.await_takeover, dying, 0)
            await works(locks)
            took = time.monotonic() - began
            # Not by each of the 20 partitions there; at most one round in 75 ms, each asking few nodes.
            assert 0 < asked() - before < 30 * took + 10


async def test_closing_does_not_wait_for_a_node_that_is_away(unique: str) -> None:
    with EmbeddedCluster(args=("--cluster-require-full-coverage", "no")) as servers:
        locks = manager_at(servers.url, unique)
        held = [locks.acquire_lock(name, on_lost="flag") for name in NAMES]
        assert all(await asyncio.gather(*(lock.acquire() for lock in held)))
        servers.nodes[0].kill()
        servers.nodes[1].pause()
        try:
            began = time.monotonic()
            await locks.aclose()
            assert time.monotonic() - began < 7
        finally:
            servers.nodes[1].resume()
