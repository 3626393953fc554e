"""What becomes of locks, loops and engines when something of theirs is closed or dropped.

Promises: closing a manager tells the holders of its locks before others get them; another task's holding is
not taken for one's own; engines opened one after another leave no descriptor behind, and a closed one no
connection, whoever still refers to it; a dropped lock or link leaves no lock and no engine behind; what a
closed loop asked for is withdrawn; a loss is told to a loop that awaits it also where a thread acquired; a
server that is busy for a while refuses nobody.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
import redis.asyncio

from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.errors import LockLost
from support.locks import manager_at, until

if TYPE_CHECKING:
    from dotmac.platform.connection.embedded import EmbeddedValkey


async def test_closing_a_manager_tells_its_holders(valkey_url: str, unique: str) -> None:
    manager, other = manager_at(valkey_url, unique), manager_at(valkey_url, unique)
    entered = asyncio.Event()

    async def hold() -> None:
        async with manager.acquire_lock("a"):
            entered.set()
            await asyncio.sleep(30)

    task = asyncio.create_task(hold())
    await entered.wait()
    await manager.aclose()
    with pytest.raises(LockLost, match="closed"):
        await asyncio.wait_for(task, 5)
    async with other.acquire_lock("a", blocking_timeout=5):
        pass
    await other.aclose()


async def test_a_task_that_never_acquired_does_not_hold(
    locks: DistributedLockManager,
) -> None:
    shared = locks.acquire_lock("a")
    entered, done = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with shared:
            entered.set()
            await done.wait()

    task = asyncio.create_task(hold())
    await entered.wait()
    assert not shared.held
    done.set()
    await task


async def test_managers_in_turn_leave_no_descriptor(valkey_url: str, unique: str) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def one() -> None:
        async with manager_at(valkey_url, unique) as manager, manager.acquire_lock("a"):
            pass

    await one()
    before = count()
    for _ in range(10):
        await one()
    await until(lambda: count() <= before)


async def test_a_closed_manager_has_left_the_server(own_valkey: EmbeddedValkey, unique: str) -> None:
    manager = manager_at(own_valkey.url, unique)
    async with manager.acquire_lock("a"):
        bridge = (await manager._link.side()).bridge  # as a traceback may keep it
    await manager.aclose()
    with redis.Redis.from_url(own_valkey.url) as client:
        await until(lambda: len(client.client_list()) == 1, 5)
    del bridge


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_dropped_lock_is_given_back(locks: DistributedLockManager) -> None:
    lock = locks.acquire_lock("a")
    await lock.acquire()
    del lock
    gc.collect()
    async with locks.acquire_lock("a", blocking_timeout=5):
        pass


async def test_a_dropped_link_ends_its_engine(own_valkey: EmbeddedValkey, unique: str) -> None:
    def connections() -> int:
        with redis.Redis.from_url(own_valkey.url) as client:
            return len(client.client_list()) - 1

    client = redis.asyncio.Redis.from_url(own_valkey.url)
    lock = DistributedLock(client, "a", namespace=unique)
    await lock.acquire()
    await lock.release()
    assert connections() == 1
    del lock
    gc.collect()
    # The next use of the library does what the collector could only note.
    manager = manager_at(own_valkey.url, f"{unique}-2")
    await manager.list_locks()
    await until(lambda: connections() == 1)
    await manager.aclose()
    await client.aclose()


def test_what_a_closed_loop_asked_for_is_withdrawn(valkey_url: str, unique: str) -> None:
    with manager_at(valkey_url, unique) as manager:
        holder = manager.acquire_lock("a")
        assert holder.acquire_sync()
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(manager.acquire_lock("a").acquire())
        waiting._log_destroy_pending = False
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()
        holder.release_sync()
        with manager.acquire_lock("a", blocking_timeout=5):
            pass


async def test_a_loss_is_told_where_a_thread_acquired(locks: DistributedLockManager) -> None:
    lock = locks.acquire_lock("a")
    thread = threading.Thread(target=lock.acquire_sync)
    thread.start()
    await asyncio.to_thread(thread.join)
    watching = asyncio.ensure_future(lock.lost)
    await asyncio.sleep(0.05)
    assert await locks.force_release("a") == 1
    assert "by force" in (await asyncio.wait_for(watching, 10) or "")


async def test_a_busy_server_is_waited_for(own_valkey: EmbeddedValkey, unique: str) -> None:
    """BUSY while a connection is made is no matter of credentials."""
    async with manager_at(own_valkey.url, unique) as manager:
        with redis.Redis.from_url(own_valkey.url) as client:
            client.config_set("busy-reply-threshold", 50)
        spin = "local e = redis.call('TIME')[1] + 2 while tonumber(redis.call('TIME')[1]) < e do end return 1"
        spinning = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            f"import redis; redis.Redis.from_url({own_valkey.url!r}).eval({spin!r}, 0)",
        )
        await asyncio.sleep(0.5)
        async with manager.acquire_lock("a", blocking_timeout=10):
            pass
        assert await spinning.wait() == 0
