"""A lock that is lost while its holder still uses it.

Promises: a lock that is taken away by force, or whose server is gone past the local deadline, ends the body
of `async with` as `LockLost`, at its next await; with `on_lost="flag"` it only says so; `await lock.lost`
returns the reason; nothing that is guarded by the lock's token goes on; a cancellation from elsewhere stays a
cancellation; a loss between the grant and the body is not missed; a holder keeps its lock, and a waiter its
place, through the loss of data, a restart and a crash of the server.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.errors import LockError, LockLost, LockNotOwned
from support.locks import Partition, manager_at, until, wait_until

if TYPE_CHECKING:
    from dotmac.platform.connection.embedded import EmbeddedValkey
    from dotmac.platform.distributed_locks import DistributedLockManager


async def test_a_body_is_cancelled_into_lock_lost(locks: DistributedLockManager) -> None:
    lock = locks.acquire_lock("a", timeout=5)
    stopped_at = None
    with pytest.raises(LockLost, match=r"'a' \(fencing token \d+\) was lost: it was released by force"):
        async with lock:
            taken = asyncio.create_task(locks.force_release("a"))
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                assert lock.lost
                assert not lock.held
                stopped_at = time.monotonic()
                with pytest.raises(LockLost):
                    _ = lock.fencing_token
                raise
    assert await taken == 1
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


async def test_only_flagged(locks: DistributedLockManager) -> None:
    async with locks.acquire_lock("a", on_lost="flag") as lock:
        assert not lock.lost
        assert not lock.lost.is_set()
        assert lock.lost.reason is None
        await locks.force_release("a")
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


async def test_by_hand_nothing_is_cancelled(locks: DistributedLockManager) -> None:
    lock = locks.acquire_lock("a")
    await lock.acquire()
    await locks.force_release("a")
    async with asyncio.timeout(10):
        await lock.lost
    with pytest.raises(LockLost):
        await lock.release()
    with pytest.raises(LockNotOwned):
        await lock.release()
    await lock.acquire()
    await locks.force_release("a")
    async with asyncio.timeout(10):
        await lock.lost
    assert await lock.acquire(), "what was lost can be had again"
    await lock.release()


async def test_a_threads_body_ends_as_lock_lost(locks: DistributedLockManager) -> None:
    def body() -> None:
        with pytest.raises(LockLost), locks.acquire_lock("a") as lock:
            assert locks.force_release_sync("a") == 1
            wait_until(lambda: lock.lost)
        with locks.acquire_lock("a", on_lost="flag") as lock:
            assert locks.force_release_sync("a") == 1
            wait_until(lambda: lock.lost)

    await asyncio.to_thread(body)


async def test_a_bodys_own_error_is_not_hidden(locks: DistributedLockManager) -> None:
    lock = locks.acquire_lock("a")

    async def fails() -> None:
        async with lock:
            try:
                await locks.force_release("a")
                await asyncio.sleep(30)
            finally:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fails()


async def test_a_cancellation_from_elsewhere_stays_one(locks: DistributedLockManager) -> None:
    inside = asyncio.Event()

    async def body() -> None:
        async with locks.acquire_lock("a") as lock:
            inside.set()
            try:
                await asyncio.sleep(30)
            finally:
                taken = asyncio.create_task(locks.force_release("a"))
                while not lock.lost:
                    try:
                        await asyncio.sleep(0.01)
                    except asyncio.CancelledError:
                        break
                await taken

    task = asyncio.create_task(body())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2), locks.acquire_lock("a"):
            await asyncio.sleep(30)


async def test_a_loss_between_the_grant_and_the_body_is_not_missed(
    locks: DistributedLockManager, partition: Partition
) -> None:
    """The loop stands still while the grant and the loss arrive, so that it learns of both at once."""
    holder = locks.acquire_lock("a")
    await asyncio.to_thread(holder.acquire_sync)
    entered = False

    async def waiter() -> None:
        nonlocal entered
        async with locks.acquire_lock("a"):
            entered = True
            await asyncio.sleep(30)

    task = asyncio.create_task(waiter())
    await until(lambda: partition.queued() == 1)
    release = threading.Thread(target=holder.release_sync)
    release.start()
    release.join()
    wait_until(lambda: locks.stats()["held"] == 1)
    losses = locks.stats()["losses"]
    assert locks.force_release_sync("a") == 1
    wait_until(lambda: locks.stats()["losses"] > losses)
    async with asyncio.timeout(5):
        with pytest.raises(LockLost):
            await task
    assert not entered


@pytest.mark.parametrize("trouble", ["flushall", "restart", "kill", "script flush"])
async def test_holder_and_waiter_go_on_through(own_valkey: EmbeddedValkey, unique: str, trouble: str) -> None:
    async with manager_at(own_valkey.url, unique, default_timeout=10) as locks:
        tokens = []
        lock = locks.acquire_lock("a", on_lost="flag")
        await lock.acquire()
        tokens.append(lock.fencing_token)

        async def waiter() -> None:
            async with locks.acquire_lock("a") as other:
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
        await until(lambda: (view.held(), view.queued()) == (1, 1))
        assert not lock.lost
        assert lock.fencing_token == tokens[0]
        assert not task.done()
        await lock.release()
        async with asyncio.timeout(20):
            await task
        assert tokens == sorted(set(tokens))
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


async def test_awaiting_the_loss_leaves_nothing_behind(locks: DistributedLockManager) -> None:
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
