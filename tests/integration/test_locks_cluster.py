"""Locks and services on a cluster.

Promises: holders exclude each other, waiters are served in order, leases end and are extended, killed
holders are succeeded and cycles within a partition refused, as on one server, whatever partition a name
falls into; lists cover all of them; whoever counts other partitions is refused, as is an address of the
wrong kind; scripts that all nodes forget are sent anew; services are found in any partition; an engine
opens connections only for partitions that are used, and closes all of them in time; clients of clusters are
read, TLS and logins work, and a forked child has an engine of its own.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import redis
import redis.asyncio.cluster
import redis.cluster
import valkey.asyncio.cluster
import valkey.cluster
from redis.crc import key_slot

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.distributed_locks.config import DistributedLockConfig
from dotmac.platform.errors import (
    AuthenticationFailed,
    ConfigurationError,
    DeadlockDetected,
    LockLost,
    LockNotOwned,
    ServerUnavailable,
)
from dotmac.platform.testing.topologies import EmbeddedCluster
from support import permissions
from support.cluster import NAMES, PARTITIONS, View, held_once, owner_of, partition_of, queued
from support.everything import use_everything
from support.locks import killed_holder_is_succeeded, manager_at, python, until, works
from support.proxy import Proxy
from support.registry import make

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def nodes(each_program: str | None) -> Iterator[EmbeddedCluster]:
    """A cluster of every kind of server in turn that no test breaks."""
    with EmbeddedCluster(program=each_program) as servers:
        yield servers


@pytest.fixture
async def locks(nodes: EmbeddedCluster, unique: str) -> AsyncIterator[DistributedLockManager]:
    async with manager_at(nodes.url, unique) as manager:
        yield manager


@pytest.fixture
async def rival(nodes: EmbeddedCluster, unique: str) -> AsyncIterator[DistributedLockManager]:
    """Another session on the same cluster: its address differs, so it has an engine of its own."""
    async with manager_at(f"{nodes.url}?connect_timeout=4", unique) as manager:
        yield manager


async def test_locks_exclude_and_queue_in_every_partition(
    nodes: EmbeddedCluster, locks: DistributedLockManager, rival: DistributedLockManager, unique: str
) -> None:
    assert len({partition_of(name) for name in NAMES}) > 20
    assert len({owner_of(nodes, unique, name).port for name in NAMES}) == 3

    async def use(name: str) -> None:
        served: list[int] = []
        tokens: list[int] = []

        async def wait(number: int) -> None:
            async with (locks, rival)[number % 2].acquire_lock(name) as lock:
                served.append(number)
                tokens.append(lock.fencing_token)

        async with locks.acquire_lock(name) as lock:
            tokens.append(lock.fencing_token)
            assert not await rival.acquire_lock(name).acquire(blocking=False)
            tasks = []
            for number in range(3):
                tasks.append(asyncio.create_task(wait(number)))
                await until(lambda: queued(nodes, unique, name) == number + 1)  # noqa: B023 - awaited here
        await asyncio.gather(*tasks)
        assert served == [0, 1, 2]
        assert tokens == sorted(set(tokens))

    # One name per partition, so that each queue can be looked at.
    chosen = {partition_of(name): name for name in NAMES}
    await asyncio.gather(*map(use, list(chosen.values())[:12]))
    assert await locks.list_locks() == []


async def test_lists_and_counters_cover_all_partitions(
    nodes: EmbeddedCluster, locks: DistributedLockManager, rival: DistributedLockManager, unique: str
) -> None:
    held = [locks.acquire_lock(name) for name in NAMES]
    assert all(await asyncio.gather(*(lock.acquire() for lock in held)))
    used = {partition_of(name) for name in NAMES} | {0}
    stats = locks.stats()
    assert (stats["partitions"], stats["connections"], stats["held"]) == (len(used), len(used), len(NAMES))
    assert stats["open"]
    assert sorted(info.name for info in await rival.list_locks()) == sorted(NAMES)
    assert sorted(info.name for info in await asyncio.to_thread(rival.list_locks_sync)) == sorted(NAMES)
    await asyncio.gather(*(lock.release() for lock in held))
    assert await rival.list_locks() == []
    assert rival.stats()["partitions"] == PARTITIONS
    before = time.monotonic()
    await rival.aclose()
    assert time.monotonic() - before < 2
    for partition in range(PARTITIONS):
        node = nodes.node_of(key_slot(f"{unique}:{partition}".encode()))
        assert nodes.client(node).hlen(f"{{{unique}:{partition}}}:h") == 0


async def test_leases_end_and_are_extended(
    nodes: EmbeddedCluster, locks: DistributedLockManager, rival: DistributedLockManager, unique: str
) -> None:
    renewed = locks.acquire_lock("renewed", timeout=0.6)
    fixed = locks.acquire_lock("fixed", auto_renewal=False, timeout=0.6)
    assert await renewed.acquire()
    assert await fixed.acquire()
    await renewed.extend(0.8)
    async with rival.acquire_lock("fixed"):
        assert fixed.lost
        with pytest.raises(LockLost):
            await fixed.release()
    assert not await rival.acquire_lock("renewed").acquire(blocking=False)
    await renewed.release()
    with pytest.raises(LockNotOwned):
        await renewed.release()
    view = View(nodes, unique, "renewed")
    assert view.empty()
    view.client.close()


async def test_a_loss_is_told_to_its_own_holder(
    locks: DistributedLockManager, rival: DistributedLockManager
) -> None:
    """Numbers of leases are unique over partitions."""
    held = {name: locks.acquire_lock(name, on_lost="flag") for name in NAMES}
    assert all(await asyncio.gather(*(lock.acquire() for lock in held.values())))
    gone = set(NAMES[7::10])
    assert len({partition_of(name) for name in gone}) > 1
    assert await asyncio.gather(*map(rival.force_release, gone)) == [1] * len(gone)
    await until(lambda: all(held[name].lost for name in gone))
    assert {name for name, lock in held.items() if lock.lost} == gone
    await asyncio.gather(*(lock.release() for name, lock in held.items() if name not in gone))


async def test_waits_end_by_time_and_by_cancellation(
    nodes: EmbeddedCluster, locks: DistributedLockManager, rival: DistributedLockManager, unique: str
) -> None:
    for name in NAMES[:5]:
        async with rival.acquire_lock(name):
            pass  # connected: the short patience below is for the lock alone
        async with locks.acquire_lock(name):
            assert not await rival.acquire_lock(name).acquire(blocking_timeout=0.05)
            waiting = asyncio.create_task(rival.acquire_lock(name).acquire())
            await until(lambda: queued(nodes, unique, name) == 1)  # noqa: B023 - awaited in this turn
            waiting.cancel()
            await until(lambda: queued(nodes, unique, name) == 0)  # noqa: B023 - awaited in this turn


def test_threads_use_it_too(nodes: EmbeddedCluster, unique: str) -> None:
    with manager_at(nodes.url, unique) as locks:
        for name in NAMES[:8]:
            with locks.acquire_lock(name) as lock:
                assert lock.held
                assert not locks.acquire_lock(name, blocking_timeout=0).acquire_sync()
        assert locks.list_locks_sync() == []


async def test_a_killed_holder_is_succeeded(
    nodes: EmbeddedCluster, locks: DistributedLockManager, unique: str
) -> None:
    await killed_holder_is_succeeded(locks, nodes.url, unique)


async def test_a_cycle_within_a_partition_is_refused(
    nodes: EmbeddedCluster, locks: DistributedLockManager, rival: DistributedLockManager, unique: str
) -> None:
    ready = asyncio.Event()

    async def other() -> None:
        async with rival.acquire_lock("b{x}"):
            ready.set()
            async with rival.acquire_lock("a{x}"):
                pass

    async with locks.acquire_lock("a{x}"):
        waiting = asyncio.create_task(other())
        await ready.wait()
        await until(lambda: queued(nodes, unique, "a{x}") == 1)
        async with locks.acquire_lock("b{x}"):
            with pytest.raises(DeadlockDetected) as caught:  # the one who got its lock last
                await waiting
        assert set(caught.value.cycle) == {"a{x}", "b{x}"}


async def test_scripts_that_all_nodes_forget_are_sent_anew(
    nodes: EmbeddedCluster, locks: DistributedLockManager, unique: str
) -> None:
    for name in NAMES[:10]:
        await works(locks, name)
    async with locks.acquire_lock("held", timeout=5.0):
        waiting = asyncio.create_task(works(locks, "held"))
        await until(lambda: queued(nodes, unique, "held") == 1)
        for node in nodes.nodes:
            nodes.client(node).script_flush()
    await waiting
    for name in NAMES[:10]:
        await works(locks, name)
    assert locks.stats()["losses"] == 0


async def test_whoever_counts_other_partitions_is_refused(nodes: EmbeddedCluster, unique: str) -> None:
    async with manager_at(nodes.url, unique) as locks:
        await works(locks)
    for name in ("a", "user:1", "user:2"):
        async with manager_at(f"{nodes.url}?partitions=16", unique) as locks:
            with pytest.raises(ConfigurationError, match=r"partitions: 16 .* has 64 "):
                await locks.acquire_lock(name).acquire()
    async with manager_at(f"{nodes.url}?partitions=16", f"{unique}-other") as locks:
        await works(locks)
        assert locks.stats()["partitions"] == 16
    config = DistributedLockConfig(partitions=8)
    async with DistributedLockManager(nodes.url, config=config, namespace=f"{unique}-third") as locks:
        await works(locks)
        assert locks.stats()["partitions"] == 8
        # Registrations are spread as the locks of the namespace are.
        async with make(nodes.url, f"{unique}-third") as registry:
            with pytest.raises(ConfigurationError, match=r"partitions: 64 .* has 8 "):
                await registry.list_services()


async def test_an_address_of_the_wrong_kind_is_refused(nodes: EmbeddedCluster, unique: str) -> None:
    async with manager_at(nodes.nodes[0].url, unique) as locks:
        with pytest.raises(ConfigurationError, match=r"node of a cluster.*redis\+cluster://host1,host2"):
            await locks.acquire_lock("a").acquire()
    with EmbeddedValkey() as other:
        async with manager_at(f"redis+cluster://127.0.0.1:{other.port}", unique) as locks:
            with pytest.raises(
                ConfigurationError, match=f"127.0.0.1:{other.port}.*no node of a cluster.*redis://"
            ):
                await locks.acquire_lock("user:1").acquire()
        # One that is something else, among nodes, does no harm.
        async with manager_at(f"{nodes.url},127.0.0.1:{other.port}", unique) as locks:
            await works(locks)


async def test_where_no_node_answers_each_is_named(unique: str) -> None:
    with EmbeddedValkey() as other:
        port = other.port
    async with manager_at(f"redis+cluster://127.0.0.1:{port}?request_timeout=1", unique) as locks:
        for name in ("a", "user:1"):
            with pytest.raises(ServerUnavailable, match=f"no node says .*127.0.0.1:{port}: .*refused"):
                await locks.acquire_lock(name).acquire()


async def test_one_node_is_enough_to_find_the_others(nodes: EmbeddedCluster, unique: str) -> None:
    url = f"redis+cluster://127.0.0.1:{nodes.nodes[1].port}"
    async with manager_at(url, unique) as locks:
        for name in NAMES[:10]:
            await works(locks, name)


async def test_services_are_found_in_every_partition(nodes: EmbeddedCluster, unique: str) -> None:
    names = [f"service-{number}" for number in range(12)]
    async with make(nodes.url, unique) as here, make(f"{nodes.url}?connect_timeout=4", unique) as there:
        for name in names:
            assert await there.discover_services(name) == []
        made = [
            await here.register_service(name, "1.0", "127.0.0.1", 8000, ttl=5.0, metadata={"n": 1})
            for name in names
        ]
        for name, instance in zip(names, made, strict=True):
            found: list[str] = []
            async with asyncio.timeout(10):
                # The change is announced: nothing has to be read by hand.
                while found != [instance.id]:
                    found = [one.id for one in await there.discover_services(name)]
                    await asyncio.sleep(0.01)
        assert sorted(await there.list_services()) == sorted(names)
        assert await here.deregister_service(made[0])
        async with asyncio.timeout(10):
            while await there.discover_services(names[0]):
                await asyncio.sleep(0.01)
        assert sorted(await there.list_services()) == sorted(names[1:])


async def test_health_is_watched_in_every_partition(nodes: EmbeddedCluster, unique: str) -> None:
    names = [f"service-{number}" for number in range(6)]
    async with make(
        nodes.url, unique, health_check_interval=0.1, health_check_timeout=0.5, health_check_fall=1
    ) as registry:
        for name in names:
            await registry.register_service(
                name, "1.0", "127.0.0.1", 1, health_check_url="http://127.0.0.1:1/health", ttl=5.0
            )
        await registry.start_health_monitoring()
        async with asyncio.timeout(20):
            for name in names:
                while await registry.discover_services(name):
                    await asyncio.sleep(0.05)


def test_a_plain_client_sees_where_the_names_are(nodes: EmbeddedCluster, unique: str) -> None:
    """The documented rule: CLUSTER KEYSLOT of the name, modulo the number of partitions."""
    client = nodes.client(nodes.nodes[0])
    with manager_at(nodes.url, unique) as locks:
        for name in ("foo", "orders", "user:42", "cart:{42}", "Straße"):
            with locks.acquire_lock(name):
                partition = client.execute_command("CLUSTER", "KEYSLOT", name) % PARTITIONS
                key = f"{{{unique}:{partition}}}:h"
                node = nodes.node_of(client.execute_command("CLUSTER", "KEYSLOT", key))
                assert nodes.client(node).hexists(key, name)


CLIENTS = [
    redis.cluster.RedisCluster,
    redis.asyncio.cluster.RedisCluster,
    valkey.cluster.ValkeyCluster,
    valkey.asyncio.cluster.ValkeyCluster,
]


@pytest.mark.parametrize("kind", CLIENTS, ids=lambda kind: kind.__module__)
async def test_clients_of_clusters_are_accepted(nodes: EmbeddedCluster, unique: str, kind: type) -> None:
    client = kind(host="127.0.0.1", port=nodes.nodes[0].port)
    lock = DistributedLock(client, "user:1", timeout=5.0, namespace=unique)
    assert await lock.acquire()
    view = View(nodes, unique, "user:1")
    assert view.held() == 1
    await lock.release()
    assert view.empty()
    view.client.close()
    async with manager_at(client, unique) as locks:
        await works(locks, "user:2")
    async with make(client, unique) as registry:
        await registry.register_service("api", "1.0", "127.0.0.1", 1)
        assert list(await registry.list_services()) == ["api"]
    if "asyncio" in kind.__module__:
        await client.aclose()
    else:
        client.close()


def tell(nodes: EmbeddedCluster, *command: str) -> None:
    for node in nodes.nodes:
        nodes.client(node).execute_command(*command)


def member(nodes: EmbeddedCluster, namespace: str, without: str = "") -> str:
    """The address for a user with the rights that are listed for clusters, without one of them."""
    tell(nodes, "ACL", "SETUSER", namespace, "on", ">pw", *permissions.rules(namespace, without, "member"))
    return nodes.url.replace("://", f"://{namespace}:pw@") + "?partitions=4"


async def test_the_rights_that_are_listed_are_enough(nodes: EmbeddedCluster, unique: str) -> None:
    url = member(nodes, unique)
    assert await use_everything(url, unique) == []
    tell(nodes, "SCRIPT", "FLUSH")
    assert await use_everything(url, unique) == []
    for node in nodes.nodes:
        assert nodes.client(node).acl_log() == []
        nodes.client(node).acl_log_reset()


async def test_none_of_those_that_only_clusters_need_is_listed_in_vain(
    nodes: EmbeddedCluster, unique: str
) -> None:
    only = sorted(set(permissions.listed("member")) - set(permissions.listed()))
    assert len(only) == 5

    async def untold(number: int, rule: str) -> bool:
        namespace = f"{unique}-{number}"
        wrong = await use_everything(member(nodes, namespace, rule), namespace)
        return not any(rule[1:].partition("|")[0] in str(error).lower() for error in wrong)

    results = await asyncio.gather(*(untold(number, rule) for number, rule in enumerate(only)))
    assert [rule for rule, silent in zip(only, results, strict=True) if silent] == []
    for node in nodes.nodes:
        nodes.client(node).acl_log_reset()


async def test_a_wrong_password_is_told(nodes: EmbeddedCluster, unique: str) -> None:
    async with manager_at(nodes.url.replace("://", "://app:nonsense@"), unique) as locks:
        with pytest.raises(AuthenticationFailed, match="WRONGPASS") as caught:
            await locks.acquire_lock("user:1").acquire()
        assert "nonsense" not in str(caught.value)


async def test_a_cluster_over_tls(certificates: Path, unique: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    client = f"tls_cert={certificates}/client.pem&tls_key={certificates}/client.key"
    with ExitStack() as stack:
        servers = stack.enter_context(EmbeddedCluster())
        proxies = [stack.enter_context(Proxy(node.url, context)) for node in servers.nodes]
        ports = {proxy.port for proxy in proxies}
        for node, proxy in zip(servers.nodes, proxies, strict=True):
            servers.client(node).config_set("cluster-announce-port", proxy.port)
        # The nodes tell each other by and by.
        await until(lambda: all(announced(servers.client(node)) == ports for node in servers.nodes))
        url = f"rediss+cluster://localhost:{min(ports)}?{client}"
        async with manager_at(f"{url}&tls_ca={certificates}/ca.pem", unique) as locks:
            for name in NAMES[:12]:
                await held_once(locks, name)
            await works(locks)
            for proxy in proxies:
                proxy.drop()
            await works(locks)
        async with manager_at(f"{url}&tls_ca={certificates}/other.pem&request_timeout=1", unique) as locks:
            with pytest.raises(ServerUnavailable, match="certificate"):
                await locks.acquire_lock("a").acquire()


def announced(client: redis.Redis) -> set[int]:
    return {int(place.rpartition(":")[2]) for place in client.cluster("NODES")}


FORKING = """
import os, sys
from support.locks import killed_holder_is_succeeded, manager_at
locks = manager_at(sys.argv[1], sys.argv[2])
names = [f"user:{n}" for n in range(8)]
held = [locks.acquire_lock(name) for name in names]
for lock in held:
    assert lock.acquire_sync()
child = os.fork()
if child == 0:
    for name in names:
        assert not locks.acquire_lock(name, blocking_timeout=0).acquire_sync()
    with locks.acquire_lock("own of the child"):
        pass
    locks.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert all(lock.held for lock in held)
print("held")
"""


async def test_a_forked_child_has_partitions_of_its_own(nodes: EmbeddedCluster, unique: str) -> None:
    process = python(FORKING, nodes.url, unique)
    said, errors = await asyncio.to_thread(process.communicate)
    assert (process.returncode, said) == (0, "held\n"), errors
    # The parent gave everything back at its exit.
    assert [queued(nodes, unique, name) for name in NAMES[:8]] == [0] * 8
    async with manager_at(nodes.url, unique) as locks:
        assert await locks.list_locks() == []
