"""A lock that is lost while its holder still uses it.

Promises: a server that lost its data, or that is gone past the local deadline, ends the body of `async with`
as `LockLost`, at its next await; with `on_lost="flag"` it only says so; `await lock.lost` returns the reason;
nothing that is guarded by the lock's token goes on; a cancellation from elsewhere stays a cancellation; a
loss between the grant and the body is not missed; a waiter keeps waiting through the loss of data, a restart
and a crash of the server, and is served.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.errors import LockError, LockLost, LockNotOwned
from support.locks import Partition, manager_at, until

if TYPE_CHECKING:
    from dotmac.platform.connection.embedded import EmbeddedValkey


def flush(server: EmbeddedValkey) -> None:
    view = Partition(server.url, "any")
    view.client.flushall()
    view.client.close()


async def test_a_body_is_cancelled_into_lock_lost(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        lock = locks.acquire_lock("a", timeout=5)
        stopped_at = None
        with pytest.raises(LockLost, match=r"'a' \(fencing token \d+\) was lost: the server no longer knows"):
            async with lock:
                flush(own_valkey)
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    assert lock.lost
                    assert not lock.held
                    stopped_at = time.monotonic()
                    with pytest.raises(LockLost):
                        _ = lock.fencing_token
                    raise
        assert stopped_at is not None
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert not lock.lost
        async with lock:
            assert lock.held


async def test_the_deadline_passes_while_the_server_is_gone(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        with pytest.raises(LockLost, match="its lease ran out"):
            async with locks.acquire_lock("a", timeout=1.0):
                own_valkey.kill()
                started = time.monotonic()
                await asyncio.sleep(30)
        assert 0.3 < time.monotonic() - started < 3, "a lease of one second ends within about one second"


async def test_the_deadline_passes_while_the_server_is_paused(
    own_valkey: EmbeddedValkey, unique: str
) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        lock = locks.acquire_lock("a", timeout=1.0, on_lost="flag")
        async with lock:
            own_valkey.pause()
            try:
                reason = await asyncio.wait_for(lock.lost, 5)
            finally:
                own_valkey.resume()
            assert "ran out" in reason


async def test_only_flagged(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        async with locks.acquire_lock("a", on_lost="flag") as lock:
            assert not lock.lost
            assert not lock.lost.is_set()
            assert lock.lost.reason is None
            flush(own_valkey)
            async with asyncio.timeout(10):
                reason = await lock.lost
                assert await lock.lost == reason
            assert lock.lost.is_set()
            assert lock.lost.reason == reason
            assert reason in repr(lock.lost)
            assert not lock.held
            with pytest.raises(LockLost):
                await lock.extend()
        assert not lock.lost


async def test_by_hand_nothing_is_cancelled(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        lock = locks.acquire_lock("a")
        await lock.acquire()
        flush(own_valkey)
        async with asyncio.timeout(10):
            await lock.lost
        with pytest.raises(LockLost):
            await lock.release()
        with pytest.raises(LockNotOwned):
            await lock.release()
        await lock.acquire()
        flush(own_valkey)
        async with asyncio.timeout(10):
            await lock.lost
        assert await lock.acquire(), "what was lost can be had again"
        await lock.release()


async def test_a_threads_body_ends_as_lock_lost(own_valkey: EmbeddedValkey, unique: str) -> None:
    locks = manager_at(own_valkey.url, unique)

    def body() -> None:
        with pytest.raises(LockLost), locks.acquire_lock("a") as lock:
            flush(own_valkey)
            deadline = time.monotonic() + 10
            while not lock.lost:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        with locks.acquire_lock("a", on_lost="flag") as lock:
            flush(own_valkey)
            while not lock.lost:
                assert time.monotonic() < deadline + 10
                time.sleep(0.01)

    await asyncio.to_thread(body)
    await locks.aclose()


async def test_a_bodys_own_error_is_not_hidden(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        lock = locks.acquire_lock("a")

        async def fails() -> None:
            async with lock:
                flush(own_valkey)
                try:
                    await asyncio.sleep(30)
                finally:
                    raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            await fails()


async def test_a_cancellation_from_elsewhere_stays_one(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        inside = asyncio.Event()

        async def body() -> None:
            async with locks.acquire_lock("a") as lock:
                inside.set()
                try:
                    await asyncio.sleep(30)
                finally:
                    flush(own_valkey)
                    while not lock.lost:
                        try:
                            await asyncio.sleep(0.01)
                        except asyncio.CancelledError:
                            break

        task = asyncio.create_task(body())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), locks.acquire_lock("a"):
                await asyncio.sleep(30)


async def test_a_loss_between_the_grant_and_the_body_is_not_missed(
    own_valkey: EmbeddedValkey, unique: str
) -> None:
    """The loop stands still while the grant and the loss arrive, so that it learns of both at once."""
    async with manager_at(own_valkey.url, unique) as locks:
        holder = locks.acquire_lock("a")
        await asyncio.to_thread(holder.acquire_sync)
        entered = False

        async def waiter() -> None:
            nonlocal entered
            async with locks.acquire_lock("a"):
                entered = True
                await asyncio.sleep(30)

        task = asyncio.create_task(waiter())
        view = Partition(own_valkey.url, unique)
        await until(lambda: view.queued() == 1)
        release = threading.Thread(target=holder.release_sync)
        release.start()
        release.join()
        deadline = time.monotonic() + 10
        while locks.stats()["held"] != 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        losses = locks.stats()["losses"]
        view.client.flushall()
        view.client.close()
        while locks.stats()["losses"] == losses:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        async with asyncio.timeout(5):
            with pytest.raises(LockLost):
                await task
        assert not entered


@pytest.mark.parametrize("trouble", ["flushall", "restart", "kill", "script flush"])
async def test_a_waiter_is_served_through(own_valkey: EmbeddedValkey, unique: str, trouble: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks, manager_at(own_valkey.url, unique) as _:
        tokens = []
        lock = locks.acquire_lock("a", timeout=1, on_lost="flag")
        await lock.acquire()
        tokens.append(lock.fencing_token)

        async def waiter() -> None:
            async with locks.acquire_lock("a", timeout=1) as other:
                tokens.append(other.fencing_token)

        task = asyncio.create_task(waiter())
        view = Partition(own_valkey.url, unique)
        await until(lambda: view.queued() == 1)
        if trouble == "flushall":
            view.client.flushall()
        elif trouble == "restart":
            await asyncio.to_thread(own_valkey.restart)
        elif trouble == "kill":
            own_valkey.kill()
            await asyncio.to_thread(own_valkey.start)
        else:
            view.client.script_flush()
            view.client.close()
            await lock.release()
        async with asyncio.timeout(20):
            await task
        assert tokens == sorted(set(tokens))
        if trouble != "script flush":
            assert lock.lost
            with pytest.raises(LockLost):
                await lock.release()
        await until(view.empty)
        view.client.close()


async def test_idle_through_a_restart(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        for _ in range(2):
            async with locks.acquire_lock("a", blocking_timeout=10):
                pass
            await asyncio.to_thread(own_valkey.restart)
        async with locks.acquire_lock("a", blocking_timeout=10):
            view = Partition(own_valkey.url, unique)
            assert view.held() == 1
            view.client.script_flush()
            view.client.close()
        async with locks.acquire_lock("a", blocking_timeout=10) as lock:
            assert lock.held


async def test_awaiting_the_loss_leaves_nothing_behind(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        lock = locks.acquire_lock("a")
        with pytest.raises(LockError):
            await lock.lost
        await lock.acquire()
        for _ in range(10):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(lock.lost, 0.001)
        signal = lock.lost
        assert signal._holding is not None
        assert signal._holding._waiters == []
        watching = asyncio.ensure_future(_watch(lock))
        await asyncio.sleep(0)
        await lock.release()
        assert await asyncio.wait_for(watching, 5) is None


async def _watch(lock) -> str | None:
    return await lock.lost
