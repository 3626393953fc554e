"""A server that loses its data while locks are held.

Promises: whether it is emptied, or restarted or killed without its data, of a thousand held locks none is
lost and of a thousand waiters each keeps its place, for sessions take back what they held; fencing tokens go
on increasing; a newcomer waits for that on a server that has just started, about a second, and on an older
one not at all; a release during the outage is no loss; a holder that comes back after somebody else, or too
late, is told that its lock is lost.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.errors import LockLost
from support.clock import LIBRARY, MISSING, ClockedValkey
from support.locks import Partition, manager_at, until
from support.proxy import Proxy

if TYPE_CHECKING:
    from pathlib import Path

    from dotmac.platform.connection.embedded import EmbeddedValkey

COUNT = 1000
QUEUES, LENGTH = 50, 20
YOUNG = 5.0  # seconds for which a server counts as just started


async def lose_data(server: EmbeddedValkey, how: str) -> None:
    """The server goes on without anything that it knew."""
    if how == "flushall":
        view = Partition(server.url, "any")
        view.client.flushall()
        view.client.close()
    elif how == "restart":
        await asyncio.to_thread(server.restart)
    else:
        server.kill()
        await asyncio.to_thread(server.start)


async def grow_old(server: EmbeddedValkey) -> None:
    """Waits until the server no longer counts as just started."""
    view = Partition(server.url, "any")
    await until(lambda: view.client.info("server")["uptime_in_seconds"] >= YOUNG)
    view.client.close()


@pytest.mark.parametrize("how", ["flushall", "restart", "kill"])
async def test_a_thousand_holders_and_waiters_lose_nothing(
    own_valkey: EmbeddedValkey, unique: str, how: str
) -> None:
    url = own_valkey.url
    async with (
        manager_at(url, unique, default_timeout=20) as locks,
        # Its address differs, so it is a session of its own.
        manager_at(f"{url}?connect_timeout=4", unique, default_timeout=20) as rival,
    ):
        held = {f"n{number}": locks.acquire_lock(f"n{number}") for number in range(COUNT)}
        await asyncio.gather(*(lock.acquire() for lock in held.values()))
        before = {name: lock.fencing_token for name, lock in held.items()}
        served: dict[str, list[int]] = {f"n{number}": [] for number in range(QUEUES)}
        tokens: dict[str, list[int]] = {name: [before[name]] for name in served}

        async def wait(name: str, number: int) -> None:
            async with (locks, rival)[number % 2].acquire_lock(name) as lock:
                served[name].append(number)
                tokens[name].append(lock.fencing_token)

        view = Partition(url, unique)
        waiting: list[asyncio.Task[None]] = []
        for number in range(LENGTH):
            waiting += [asyncio.create_task(wait(name, number)) for name in served]
            await until(lambda: view.queued() == len(waiting))  # noqa: B023 - awaited here

        await lose_data(own_valkey, how)
        await until(lambda: (view.held(), view.queued()) == (COUNT, QUEUES * LENGTH))
        assert {name: lock.fencing_token for name, lock in held.items()} == before
        assert not any(task.done() for task in waiting)

        async with asyncio.timeout(30):
            await asyncio.gather(*(lock.release() for lock in held.values()))
            await asyncio.gather(*waiting)
        assert all(order == list(range(LENGTH)) for order in served.values())
        assert all(found == sorted(set(found)) for found in tokens.values())
        assert locks.stats()["losses"] == rival.stats()["losses"] == 0
        await until(view.empty)
        view.client.close()


async def test_fencing_tokens_go_on_increasing(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        tokens = []
        for how in ("flushall", "kill", "flushall"):
            async with locks.acquire_lock("kept") as kept:
                tokens.append(kept.fencing_token)
                await lose_data(own_valkey, how)
                async with locks.acquire_lock("other") as other:
                    tokens.append(other.fencing_token)
                assert not kept.lost
    assert tokens == sorted(set(tokens))


async def test_a_newcomer_waits_for_a_second_at_most(own_valkey: EmbeddedValkey, unique: str) -> None:
    async def first_lock(namespace: str) -> float:
        async with manager_at(own_valkey.url, namespace) as locks:
            started = time.monotonic()
            async with locks.acquire_lock("a"):
                return time.monotonic() - started

    await asyncio.to_thread(own_valkey.restart)
    assert 0.5 < await first_lock(unique) < 2.5, "others may have to take their locks back"
    await grow_old(own_valkey)
    assert await first_lock(f"{unique}-later") < 0.5


@pytest.mark.parametrize("how", ["flushall", "restart"])
async def test_a_release_during_the_outage_is_no_loss(
    own_valkey: EmbeddedValkey, unique: str, how: str
) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        held = [locks.acquire_lock(f"n{number}") for number in range(100)]
        await asyncio.gather(*(lock.acquire() for lock in held))
        if how == "restart":
            own_valkey.kill()
            releases = [asyncio.create_task(lock.release()) for lock in held]
            await asyncio.sleep(0.2)
            await asyncio.to_thread(own_valkey.start)
        else:
            await lose_data(own_valkey, how)
            releases = [asyncio.create_task(lock.release()) for lock in held]
        async with asyncio.timeout(20):
            await asyncio.gather(*releases)
        view = Partition(own_valkey.url, unique)
        await until(view.empty)
        view.client.close()


async def test_a_holder_that_comes_back_after_another_is_told(
    own_valkey: EmbeddedValkey, unique: str
) -> None:
    await grow_old(own_valkey)
    with Proxy(own_valkey.url) as proxy:
        async with (
            manager_at(proxy.url, unique, default_timeout=60) as cut_off,
            manager_at(own_valkey.url, unique) as locks,
        ):
            lock, kept = (cut_off.acquire_lock(name, on_lost="flag") for name in ("a", "b"))
            await lock.acquire()
            await kept.acquire()
            proxy.stall()
            await lose_data(own_valkey, "flushall")
            async with locks.acquire_lock("a", blocking_timeout=10) as other:
                assert other.fencing_token > lock.fencing_token
                assert not lock.lost, "it has not heard of anything"
                proxy.flow()
                proxy.drop()
                reason = await asyncio.wait_for(lock.lost, 10)
                assert reason is not None
                assert "no longer knows" in reason
                assert other.held
            with pytest.raises(LockLost):
                await lock.release()
            assert not kept.lost, "nobody else has it"
            await kept.release()


@pytest.mark.slow
async def test_a_holder_that_comes_back_too_late_is_told(own_valkey: EmbeddedValkey, unique: str) -> None:
    """Ten seconds after the loss others may have had the lock and given it back."""
    with Proxy(own_valkey.url) as proxy:
        async with (
            manager_at(proxy.url, unique, default_timeout=60) as cut_off,
            manager_at(own_valkey.url, unique) as locks,
        ):
            lock = cut_off.acquire_lock("a", on_lost="flag")
            await lock.acquire()
            # The server is young, so this was granted out of the queue, and has to be claimed.
            await until(lambda: lock.remaining > 30)
            proxy.stall()
            await lose_data(own_valkey, "flushall")
            async with locks.acquire_lock("a", blocking_timeout=10):
                pass
            await asyncio.sleep(11)
            proxy.flow()
            proxy.drop()
            assert "no longer knows" in (await asyncio.wait_for(lock.lost, 10) or "")
            with pytest.raises(LockLost):
                await lock.release()


@pytest.mark.parametrize("make", ["read_lock", "semaphore"])
async def test_who_asks_in_the_grace_joins_those_who_take_back(
    own_valkey: EmbeddedValkey, unique: str, make: str
) -> None:
    view = Partition(own_valkey.url, unique)
    more = {"read_lock": {}, "semaphore": {"permits": 3}}[make]
    async with (
        manager_at(own_valkey.url, unique) as locks,
        manager_at(f"{own_valkey.url}?connect_timeout=4", unique) as other,
        getattr(locks, make)("a", timeout=5.0, **more),
        other.acquire_lock("b"),
    ):
        view.client.flushall()
        await until(lambda: view.held() == 3)
        late = getattr(other, make)("a", timeout=5.0, **more)
        assert await asyncio.wait_for(late.acquire(), 8)
        await late.release()
    view.client.close()


@pytest.mark.skipif(LIBRARY is None, reason=MISSING)
@pytest.mark.parametrize("known", [True, False], ids=["session kept", "session lost"])
async def test_tokens_increase_though_the_first_one_was_lost(
    tmp_path: Path, unique: str, known: bool
) -> None:
    """The data are of the same life, from before the first token was given out, and the clock is behind."""
    with ClockedValkey(tmp_path / "valkey") as server:
        view = Partition(server.url, unique)
        view.used_before()
        async with manager_at(server.url, unique) as locks:
            await locks.list_locks()
            await until(lambda: view.sessions() == 1)
            if not known:
                view.client.delete(f"{view.tag}:s", f"{view.tag}:x")
            view.client.save()
            tokens = []
            for _ in range(2):
                async with locks.acquire_lock("a") as lock:
                    tokens.append(lock.fencing_token)
                if len(tokens) == 1:
                    server.kill()
                    server.clock.step(-60)
                    await asyncio.to_thread(server.start)
            assert tokens[0] < tokens[1]
        view.client.close()


@pytest.mark.skipif(LIBRARY is None, reason=MISSING)
async def test_newcomers_stand_behind_all_places_of_the_lost_data(tmp_path: Path, unique: str) -> None:
    """Also behind those that are not taken up again yet, though the server's clock was set back meanwhile."""
    with ClockedValkey(tmp_path / "valkey") as server, Proxy(server.url) as proxy:
        view = Partition(server.url, unique)

        def places() -> list[str]:
            return [member.split("\0")[1] for member in view.client.zrange(f"{view.tag}:q", 0, -1)]

        server.clock.step(3600)
        async with (
            manager_at(server.url, unique) as locks,
            manager_at(proxy.url, unique) as cut_off,
            locks.acquire_lock("a"),
        ):
            first = asyncio.create_task(cut_off.acquire_lock("a").acquire())
            await until(lambda: len(places()) == 1)
            [place] = places()
            # Everybody has heard of that place.
            await asyncio.sleep(1.5)
            proxy.stall()
            server.clock.step(0)
            await lose_data(server, "flushall")
            await until(lambda: view.held() == 1)
            newcomer = asyncio.create_task(locks.acquire_lock("a").acquire())
            await until(lambda: len(places()) == 1)
            proxy.flow()
            await until(lambda: len(places()) == 2)
            assert places()[0] == place, "its place is kept"
            for waiting in (first, newcomer):
                waiting.cancel()
        view.client.close()
