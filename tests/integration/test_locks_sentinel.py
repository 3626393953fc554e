"""Locks on a primary that sentinels name.

Promises: the primary is found through any sentinel that answers, with passwords of its own for both kinds of
servers and over TLS; a switch is followed at once, also while the old primary still answers or hangs; what is
held and waited for goes on at the new primary; where no sentinel helps, the error names each of them and what
it said; clients that `Sentinel.master_for` made are read.
"""

from __future__ import annotations

import asyncio

import pytest
import redis
import redis.asyncio.sentinel
import redis.sentinel
import valkey.asyncio.sentinel
import valkey.sentinel

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.distributed_locks import DistributedLock
from dotmac.platform.errors import AuthenticationFailed, ServerUnavailable
from dotmac.platform.testing.topologies import EmbeddedSentinels
from support.locks import Partition, manager_at, until, works
from support.permissions import listed

SENTINELS = [redis.sentinel, redis.asyncio.sentinel, valkey.sentinel, valkey.asyncio.sentinel]


async def test_what_is_held_and_waited_for_goes_on(valkey_sentinels: EmbeddedSentinels, unique: str) -> None:
    async with manager_at(valkey_sentinels.url, unique) as locks:
        tokens = [await works(locks)]
        for _ in range(2):
            async with locks.acquire_lock("held", timeout=15.0) as lock:
                token = lock.fencing_token
                waiter = asyncio.create_task(works(locks, "held"))
                view = Partition(valkey_sentinels.primary().url, unique)
                await until(lambda: view.queued() == 1)  # noqa: B023 - awaited in this turn
                view.client.close()
                new = await asyncio.to_thread(valkey_sentinels.failover)
                tokens.append(await works(locks))
                assert lock.fencing_token == token
                assert not waiter.done()
                view = Partition(new.url, unique)
                assert view.held() == 1
                assert view.queued() == 1
            assert await waiter > token
            assert view.empty()
            view.client.close()
        assert tokens == sorted(set(tokens))
        assert locks.stats()["losses"] == 0


async def test_a_primary_that_hangs_is_left_when_it_is_replaced(
    valkey_sentinels: EmbeddedSentinels, unique: str
) -> None:
    """Not only when an answer is overdue: that would be a minute here."""
    url = f"{valkey_sentinels.url}?request_timeout=60&connect_timeout=60"
    async with manager_at(url, unique) as locks:
        before = await works(locks)
        old = valkey_sentinels.primary()
        old.pause()
        try:
            assert await works(locks) > before
            assert valkey_sentinels.primary() is not old
        finally:
            old.resume()


async def test_a_primary_that_only_the_holder_still_reaches_is_left(unique: str) -> None:
    """The sentinels are shut out of the old primary: nobody tells it or its clients that it was replaced."""
    watcher = ("sentinel auth-user mymaster watcher", "sentinel auth-pass mymaster w")
    with EmbeddedSentinels(
        args=("--user", "watcher", "on", ">w", "~*", "&*", "+@all"), sentinel_config=watcher
    ) as servers:
        async with manager_at(servers.url, unique) as locks:
            async with locks.acquire_lock("held", timeout=20.0) as lock:
                token = lock.fencing_token
                old = servers.primary()
                await asyncio.to_thread(servers.await_replicas)
                # Whoever is in as the default user stays; the sentinels are thrown out and can't come back.
                servers.client(old).execute_command("ACL", "SETUSER", "default", "off")
                servers.client(old).execute_command("ACL", "DELUSER", "watcher")
                new = await asyncio.to_thread(servers.await_switch, old)
                assert servers.client(old).execute_command("ROLE")[0] == "master"
                view = Partition(new.url, unique)
                # The heartbeats go to the new primary: its session there is younger than the old one's.
                await until(lambda: locks.stats()["connections"] > 1)
                assert await works(locks) > token
                assert lock.fencing_token == token
                assert view.held() == 1
            assert view.empty()
            view.client.close()


async def test_one_sentinel_of_three_is_enough(valkey_sentinels: EmbeddedSentinels, unique: str) -> None:
    first, second, third = valkey_sentinels.sentinels
    first.pause()
    second.kill()
    async with manager_at(valkey_sentinels.url, unique) as locks:
        await works(locks)
        # It stays enough while connected, and the others are taken up again when they are back.
        first.resume()
        second.restart()
        third.kill()
        view = Partition(valkey_sentinels.primary().url, unique)
        view.client.client_kill_filter(_type="pubsub", skipme=True)
        await works(locks)
        view.client.close()


async def test_where_no_sentinel_helps_each_is_named(unique: str) -> None:
    with (
        EmbeddedSentinels(replicas=0, sentinels=2) as servers,
        EmbeddedValkey() as other,
        EmbeddedSentinels(replicas=0, sentinels=1, service="another") as stranger,
    ):
        one, two = servers.sentinels
        two.kill()
        places = [f"127.0.0.1:{server.port}" for server in (one, two, other, stranger.sentinels[0])]
        url = f"redis+sentinel://{','.join(places)}"
        async with manager_at(f"{url}/elsewhere?request_timeout=1", unique) as locks:
            with pytest.raises(ServerUnavailable) as caught:
                await locks.acquire_lock("a").acquire()
            for place, said in zip(
                places,
                ("knows no such service", "refused", "is no sentinel", "knows no such service"),
                strict=True,
            ):
                assert f"{place}: " in str(caught.value)
                assert said in str(caught.value).partition(f"{place}: ")[2].partition(";")[0]
        async with manager_at(f"{url}/mymaster", unique) as locks:
            await works(locks)
        servers.servers[0].kill()
        async with manager_at(f"{url}/mymaster?request_timeout=1", unique) as locks:
            with pytest.raises(ServerUnavailable, match=f"127.0.0.1:{servers.servers[0].port}: .*refused"):
                await locks.acquire_lock("a").acquire()
        # A sentinel taken for a server, and sentinels that are all something else.
        async with manager_at(f"redis://{places[0]}", unique) as locks:
            with pytest.raises(AuthenticationFailed, match=r"this is a sentinel.*redis\+sentinel://"):
                await locks.acquire_lock("a").acquire()
        async with manager_at(f"redis+sentinel://{places[2]}/mymaster", unique) as locks:
            with pytest.raises(AuthenticationFailed, match=f"{places[2]}: is no sentinel"):
                await locks.acquire_lock("a").acquire()


async def test_a_replica_is_not_taken_for_the_primary(unique: str) -> None:
    """A sentinel that was cut off for a while still names a server that has become a replica."""
    with EmbeddedSentinels(sentinels=1) as servers:
        primary, replica = servers.primary(), servers.replicas()[0]
        servers.client(primary).replicaof("127.0.0.1", replica.port)
        async with manager_at(f"{servers.url}?request_timeout=0.5", unique) as locks:
            with pytest.raises(ServerUnavailable, match=f"127.0.0.1:{primary.port}: not the primary"):
                await locks.acquire_lock("a").acquire()


async def test_passwords_of_servers_and_sentinels(unique: str) -> None:
    with EmbeddedSentinels(
        args=("--user", "app", "on", ">s:1", "~*", "&*", "+@all"),
        sentinel_config=(f"user asker on >a/1 {' '.join(listed('asker'))}",),
    ) as servers:
        places = servers.url.removeprefix("redis+sentinel://").removesuffix("/mymaster/0")
        right = "sentinel_username=asker&sentinel_password=a/1"
        async with manager_at(f"redis+sentinel://app:s%3A1@{places}/mymaster?{right}", unique) as locks:
            await works(locks)
            await asyncio.to_thread(servers.failover)
            await works(locks)
        for login, options in (
            ("app:nonsense@", right),
            ("app:s%3A1@", "sentinel_username=asker&sentinel_password=nonsense"),
        ):
            url = f"redis+sentinel://{login}{places}/mymaster?{options}"
            async with manager_at(url, unique) as locks:
                with pytest.raises(AuthenticationFailed, match="WRONGPASS") as caught:
                    await locks.acquire_lock("a").acquire()
                assert "nonsense" not in str(caught.value)
        # Each command that is listed for the sentinels' user is needed.
        commands = [rule[1:] for rule in listed("asker") if rule.startswith("+")]
        assert len(commands) == 3
        for command in commands:
            for sentinel in servers.sentinels:
                servers.client(sentinel).execute_command("ACL", "SETUSER", "asker", f"-{command}")
            async with manager_at(f"redis+sentinel://app:s%3A1@{places}/mymaster?{right}", unique) as locks:
                with pytest.raises(AuthenticationFailed, match=rf"NOPERM.*{command.replace('|', '.')}"):
                    await locks.acquire_lock("a").acquire()
            for sentinel in servers.sentinels:
                servers.client(sentinel).execute_command("ACL", "SETUSER", "asker", f"+{command}")


async def test_what_master_for_made_is_accepted(valkey_sentinels: EmbeddedSentinels, unique: str) -> None:
    places = [("127.0.0.1", sentinel.port) for sentinel in valkey_sentinels.sentinels]
    for module in SENTINELS:
        sentinel = module.Sentinel(places)
        client = sentinel.master_for("mymaster", db=2)
        lock = DistributedLock(client, module.__name__, timeout=5.0, namespace=unique)
        assert await lock.acquire()
        view = Partition(valkey_sentinels.primary().url.removesuffix("/0") + "/2", unique)
        assert view.held() == 1
        await lock.release()
        assert view.empty()
        view.client.close()
        async with manager_at(client, unique) as locks:
            await works(locks)
        if "asyncio" in module.__name__:
            await client.aclose()
        else:
            client.close()
