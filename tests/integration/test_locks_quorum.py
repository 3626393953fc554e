"""Locks on a majority of several independent servers.

Promises: one holder at a time among tasks, threads and processes, whatever minority of servers is down, hangs
or comes back; a minority that hangs slows nobody down beyond one request's time; a lock outlives servers that
restart empty one after the other; without a majority none is granted, and who holds one is told within its
lease; later holders' tokens overtake earlier ones'; a cancelled, failed or dropped holder leaves nothing
behind on any server; the interfaces are those of a lock on one server.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.distributed_locks import QuorumLockManager
from dotmac.platform.distributed_locks.config import DistributedLockConfig
from dotmac.platform.errors import (
    DeadlockDetected,
    EngineClosed,
    InvalidArgument,
    LockLost,
    LockNotOwned,
    LockTimeout,
    ServerUnavailable,
)
from support.locks import Partition, python, until, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from dotmac.platform.distributed_locks import QuorumLock

# Longer than any test: a wait for a hanging server would be seen.
ENDLESS = 120.0


class Group:
    """Servers that share nothing."""

    def __init__(self, servers: list[EmbeddedValkey], namespace: str) -> None:
        self.servers, self.namespace = servers, namespace
        self.views = [Partition(server.url, namespace) for server in servers]

    def manager(self, **settings: Any) -> QuorumLockManager:
        settings = {
            "config": DistributedLockConfig(),
            "namespace": self.namespace,
            "request_timeout": 1.0,
        } | settings
        return QuorumLockManager([server.url for server in self.servers], **settings)

    def empty(self) -> bool:
        return all(view.empty() for view in self.views)


@pytest.fixture
def group(request: pytest.FixtureRequest, unique: str) -> Iterator[Group]:
    """As many servers as `indirect` says, else three."""
    with ExitStack() as stack:
        servers = [stack.enter_context(EmbeddedValkey()) for _ in range(getattr(request, "param", 3))]
        made = Group(servers, unique)
        for view in made.views:
            view.used_before()
        yield made
        for server in servers:
            with suppress(ProcessLookupError):
                server.resume()
        for view in made.views:
            view.client.close()


@asynccontextmanager
async def managed(group: Group, **settings: Any) -> AsyncIterator[QuorumLockManager]:
    async with group.manager(**settings) as manager:
        yield manager


def granted(lock: QuorumLock) -> list[bool]:
    return [token is not None for token in lock.fencing_tokens]


async def all_granted(lock: QuorumLock) -> None:
    await until(lambda: all(granted(lock)))


# ---- without faults


@pytest.mark.parametrize("group", [3, 5], indirect=True)
async def test_one_holder_at_a_time(group: Group) -> None:
    inside = most = 0
    seen: tuple[int | None, ...] = (None,) * len(group.servers)
    async with managed(group) as one, managed(group) as other:

        async def work(manager: QuorumLockManager) -> None:
            nonlocal inside, most, seen
            async with manager.acquire_lock("a") as lock:
                inside += 1
                most = max(most, inside)
                assert lock.held
                assert lock.remaining > 0
                tokens = lock.fencing_tokens
                assert not tokens.overtaken(seen)
                assert tokens.overtaken(tuple(token and token + 1 for token in tokens))
                seen = tokens.merged(seen)
                await asyncio.sleep(0.001)
                inside -= 1

        async with asyncio.timeout(60):
            await asyncio.gather(*(work(manager) for manager in (one, other) for _ in range(8)))
        assert most == 1
        await until(group.empty)


@pytest.mark.parametrize("group", [3, 4, 5], indirect=True)
async def test_what_a_majority_is(group: Group) -> None:
    """Somebody else holds some of the servers, as one does who takes part in another round."""
    async with managed(group) as locks:
        most = (len(group.servers) - 1) // 2
        rivals = [manager.acquire_lock("a", owner="rival") for manager in locks.servers.managers]
        for rival in rivals[:most]:
            await rival.acquire()
        async with locks.acquire_lock("a") as lock:
            assert granted(lock) == [False] * most + [True] * (len(group.servers) - most)
        await rivals[most].acquire()
        with pytest.raises(LockTimeout, match=r"not granted by [23] of [345] servers .*held by another"):
            async with locks.acquire_lock("a", blocking_timeout=0.05):
                pytest.fail("it was granted")
        for rival in rivals[: most + 1]:
            await rival.release()


async def test_threads_and_tasks(group: Group) -> None:
    manager = group.manager()
    inside = most = 0

    def work() -> None:
        nonlocal inside, most
        with manager.acquire_lock("a") as lock:
            inside += 1
            most = max(most, inside)
            assert lock.held
            inside -= 1

    async def awork() -> None:
        nonlocal inside, most
        async with manager.acquire_lock("a"):
            inside += 1
            most = max(most, inside)
            inside -= 1

    await asyncio.gather(*(asyncio.to_thread(work) for _ in range(6)), *(awork() for _ in range(6)))
    assert most == 1
    with pytest.raises(InvalidArgument, match="async with"), manager.acquire_lock("a"):
        pass
    await asyncio.to_thread(manager.close)


async def test_by_hand(group: Group) -> None:
    async with managed(group) as locks:
        lock = locks.acquire_lock("a", timeout=5.0)
        assert not lock.held
        for use in (lock.release, lock.extend):
            with pytest.raises(LockNotOwned):
                await use()
        with pytest.raises(LockNotOwned):
            _ = lock.fencing_tokens
        assert await lock.acquire()
        assert "held" in repr(lock)
        with pytest.raises(DeadlockDetected, match="already held by this task"):
            await lock.acquire(blocking=False)
        with pytest.raises(DeadlockDetected):
            await locks.acquire_lock("a").acquire()

        async def elsewhere(**how: Any) -> bool:
            return await locks.acquire_lock("a").acquire(**how)

        assert not await asyncio.create_task(elsewhere(blocking=False))
        assert not await asyncio.create_task(elsewhere(blocking_timeout=0.05))
        await lock.extend(60.0)
        assert lock.remaining > 30
        assert not lock.lost
        told = asyncio.create_task(lock.lost._wait())
        await asyncio.sleep(0)
        await lock.release()
        assert await told is None
        assert not lock.held
        await until(group.empty)

        def by_thread() -> None:
            assert lock.acquire_sync()
            assert lock.held
            lock.extend_sync(20.0)
            lock.release_sync()
            with pytest.raises(LockNotOwned):
                lock.release_sync()

        await asyncio.to_thread(by_thread)
        async with lock:
            await lock.release()
        with pytest.raises(ZeroDivisionError):
            async with lock:
                1 / 0  # noqa: B018
        await until(group.empty)
        with pytest.raises(InvalidArgument, match="leave it out"):
            await lock.acquire(blocking=False, blocking_timeout=1)


async def test_decorated(group: Group) -> None:
    async with managed(group) as locks:

        async def free() -> bool:
            lock = locks.acquire_lock("user:7")
            if await lock.acquire(blocking=False):
                await lock.release()
                return True
            return False

        @locks.with_lock("user:{user_id}", timeout=5.0)
        async def update(user_id: int) -> bool:
            return await asyncio.create_task(free())

        @locks.with_lock(lambda user_id: f"user:{user_id}")
        def blocking(user_id: int) -> int:
            return user_id

        @locks.with_lock("user:{user_id}")
        async def items(user_id: int) -> AsyncIterator[bool]:
            yield await asyncio.create_task(free())

        assert await update(7) is False
        assert await asyncio.to_thread(blocking, 7) == 7
        assert [item async for item in items(7)] == [False]
        assert await free()


async def test_bad_arguments(group: Group) -> None:
    url = group.servers[0].url
    for wrong in (url, None, 3, [], [url], [url, group.servers[1].url], [url, url, group.servers[1].url]):
        with pytest.raises(InvalidArgument, match="redis_urls"):
            QuorumLockManager(wrong)  # type: ignore[arg-type]
    for field, value in (
        ("default_timeout", 0),
        ("blocking_timeout", -1),
        ("request_timeout", 0),
        ("on_lost", "x"),
    ):
        with pytest.raises(InvalidArgument, match=field):
            group.manager(**{field: value})
    manager = group.manager()
    with pytest.raises(InvalidArgument, match="name"):
        manager.acquire_lock("")
    with pytest.raises(InvalidArgument, match="template"):
        manager.with_lock("")
    await manager.aclose()
    await manager.aclose()
    with pytest.raises(EngineClosed):
        manager.acquire_lock("a")


# ---- a minority fails


@pytest.mark.parametrize("group", [3, 5], indirect=True)
async def test_a_minority_that_is_down(group: Group) -> None:
    async with managed(group) as locks:
        async with locks.acquire_lock("before") as before:
            await all_granted(before)
            minority = group.servers[: len(group.servers) // 2]
            for server in minority:
                server.kill()
            for number in range(5):
                async with locks.acquire_lock(f"a{number % 2}") as lock:
                    assert granted(lock).count(True) > len(group.servers) // 2
            assert before.held
            for server in minority:
                server.restart()
            await all_granted(before)  # it takes part again
        await until(group.empty)


async def test_a_minority_that_hangs_is_not_waited_for(group: Group) -> None:
    async with managed(group, request_timeout=ENDLESS) as locks:
        lock = locks.acquire_lock("a")
        async with lock:
            await all_granted(lock)
            group.servers[1].pause()
        for _ in range(3):
            async with lock:
                assert granted(lock) == [True, False, True]
        await asyncio.to_thread(lambda: lock.acquire_sync() and lock.release_sync())
        group.servers[1].resume()
        await until(group.empty)


async def test_a_hanging_server_in_a_contended_round(group: Group) -> None:
    """One of three hangs, one is taken: whether a majority can be had depends on the one that hangs."""
    async with managed(group, request_timeout=0.5) as locks:
        rival = locks.servers.managers[0].acquire_lock("a", owner="rival")
        await rival.acquire()
        group.servers[1].pause()
        async with asyncio.timeout(20):
            with pytest.raises(LockTimeout, match=r"by 2 of 3 servers .*server 0: held by another"):
                async with locks.acquire_lock("a", blocking_timeout=0.2):
                    pytest.fail("it was granted")
            # Now it is known to hang; the next rounds do not wait for it.
            assert locks.servers.doubtful == {1}
            assert not await locks.acquire_lock("a").acquire(blocking=False)
            lock = locks.acquire_lock("a")
            waiter = asyncio.create_task(lock.acquire())
            await asyncio.sleep(0.1)
            group.servers[1].resume()
            assert await waiter, "two are free"
            assert locks.servers.doubtful == set()
            await lock.release()
        await rival.release()


async def test_servers_that_restart_empty_one_after_the_other(group: Group) -> None:
    async with managed(group, default_timeout=3.0) as locks:
        async with locks.acquire_lock("a") as lock:
            await all_granted(lock)
            before = lock.fencing_tokens
            for server, view in zip(group.servers, group.views, strict=True):
                server.kill()
                server.restart()
                # It is taken back there, under the token that it had.
                await until(lambda view=view: view.held() == 1)
                assert lock.fencing_tokens == before
                assert not before.overtaken((None,) * 3)
        await until(group.empty)


# ---- a majority fails


@pytest.mark.parametrize("group", [3, 5], indirect=True)
@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_without_a_majority_a_lock_is_lost(group: Group, how: str) -> None:
    async with managed(group, default_timeout=1.0, request_timeout=0.5) as locks:
        lock, flagged = locks.acquire_lock("a"), locks.acquire_lock("b", on_lost="flag")
        await flagged.acquire()
        stopped = False
        with pytest.raises(LockLost, match=r"lock 'a' was lost: [12] of [35] servers grant it"):
            async with lock:
                await all_granted(lock)
                for server in group.servers[: len(group.servers) // 2 + 1]:
                    getattr(server, how)()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    stopped = True
                    assert lock.lost
                    assert not lock.held
                    with pytest.raises(LockLost):
                        _ = lock.fencing_tokens
                    raise
        assert stopped
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        async with asyncio.timeout(20):
            assert "servers grant it" in await flagged.lost
        with pytest.raises(LockLost):
            await flagged.release()
        with pytest.raises(ServerUnavailable, match=rf"only [12] of {len(group.servers)} servers answer"):
            async with locks.acquire_lock("c"):
                pytest.fail("it was granted")
        for server in group.servers:
            server.resume() if how == "pause" else (server.running() or server.restart())
        async with asyncio.timeout(30):
            while True:
                with suppress(ServerUnavailable):
                    async with locks.acquire_lock("a"):
                        break
        await until(group.empty)


async def test_a_thread_is_told_at_the_end(group: Group) -> None:
    manager = group.manager(default_timeout=1.0, request_timeout=0.5)

    def body() -> None:
        with manager.acquire_lock("a") as lock:
            for server in group.servers[:2]:
                server.kill()
            wait_until(lambda: lock.lost)

    with pytest.raises(LockLost, match="of 3 servers grant it"):
        await asyncio.to_thread(body)
    await manager.aclose()


async def test_a_release_that_is_not_confirmed(group: Group) -> None:
    async with managed(group, request_timeout=0.5, default_timeout=60.0) as locks:
        lock = locks.acquire_lock("a")
        await lock.acquire()
        await all_granted(lock)
        for server in group.servers[:2]:
            server.pause()
        with pytest.raises(ServerUnavailable, match="confirmed by 1 of 3 servers only, 2 are needed"):
            await lock.extend()
        with pytest.raises(ServerUnavailable, match="confirmed by 1 of 3 servers only, 2 are needed"):
            await lock.release()
        for server in group.servers[:2]:
            server.resume()
        await until(group.empty)


async def test_leases_without_renewal_end(group: Group) -> None:
    async with managed(group) as locks:
        lock = locks.acquire_lock("a", timeout=0.5, auto_renewal=False)
        with pytest.raises(LockLost):
            async with lock:
                await asyncio.sleep(30)
        async with lock:
            assert lock.remaining <= 0.5


# ---- nothing is left behind


async def test_cancelled_at_any_moment(group: Group) -> None:
    chance = random.Random(7)
    async with managed(group) as locks:
        async with locks.acquire_lock("warm"):
            pass

        async def work() -> None:
            async with locks.acquire_lock("a"):
                await asyncio.sleep(0.001)

        for _ in range(60):
            tasks = [asyncio.create_task(work()) for _ in range(3)]
            await asyncio.sleep(chance.random() * 0.006)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await until(group.empty)
        async with asyncio.timeout(20), locks.acquire_lock("a"):
            pass


async def test_cancelled_while_servers_hang(group: Group) -> None:
    async with managed(group, request_timeout=ENDLESS) as locks:
        async with locks.acquire_lock("warm") as lock:
            await all_granted(lock)
        for server in group.servers[:2]:
            server.pause()
        task = asyncio.create_task(locks.acquire_lock("a").acquire())
        await until(lambda: group.views[2].held() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(group.views[2].empty)
        for server in group.servers[:2]:
            server.resume()
        await until(group.empty)


async def test_dropped_while_held(group: Group) -> None:
    async with managed(group) as locks:
        lock = locks.acquire_lock("a")
        await lock.acquire()
        dropped = [lock]
        del lock
        with pytest.warns(ResourceWarning, match="'a' was dropped while it was held"):
            dropped.clear()
        await until(group.empty)


async def test_a_closed_manager_tells_its_holders(group: Group) -> None:
    locks = group.manager()
    with pytest.raises(LockLost, match="closed"):
        async with locks.acquire_lock("a"):
            await locks.aclose()
            await asyncio.sleep(30)
    await until(group.empty)


async def test_a_killed_holder(group: Group) -> None:
    script = """
import sys, time
from dotmac.platform.distributed_locks import QuorumLockManager
from dotmac.platform.distributed_locks.config import DistributedLockConfig
locks = QuorumLockManager(sys.argv[2:], config=DistributedLockConfig(), namespace=sys.argv[1])
with locks.acquire_lock("a", timeout=1.0) as lock:
    while not all(lock.fencing_tokens):
        time.sleep(0.01)
    print(*lock.fencing_tokens)
    time.sleep(600)
"""
    process = python(script, group.namespace, *(server.url for server in group.servers))
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    tokens = [int(token) for token in line.split()]
    async with managed(group) as locks:
        assert not await locks.acquire_lock("a").acquire(blocking=False)
        process.kill()
        async with asyncio.timeout(30), locks.acquire_lock("a") as lock:
            assert not lock.fencing_tokens.overtaken(tokens)


async def test_a_forked_child_starts_anew(group: Group) -> None:
    script = """
import os, sys
from dotmac.platform.distributed_locks import QuorumLockManager
from dotmac.platform.distributed_locks.config import DistributedLockConfig
from dotmac.platform.errors import ForkedHandle
locks = QuorumLockManager(sys.argv[2:], config=DistributedLockConfig(), namespace=sys.argv[1])
lock = locks.acquire_lock("a")
lock.acquire_sync()
child = os.fork()
if child == 0:
    try:
        lock.release_sync()
    except ForkedHandle as error:
        assert str(os.getpid()) in str(error)
        assert not locks.acquire_lock("a").acquire_sync(blocking=False)
        with locks.acquire_lock("b"):
            os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert lock.held
lock.release_sync()
locks.close()
print("done")
"""
    process = python(script, group.namespace, *(server.url for server in group.servers))
    out, err = await asyncio.to_thread(process.communicate)
    assert (out, err) == ("done\n", "")


# ---- all at once


@pytest.mark.parametrize("group", [5], indirect=True)
async def test_never_two_holders_while_minorities_fail(group: Group) -> None:
    """Servers hang and come back, a minority at a time; those who hold meanwhile overlap nowhere."""
    chance = random.Random(20)
    spans: list[tuple[float, float]] = []
    refused = 0
    seen: tuple[int | None, ...] = (None,) * 5
    loop = asyncio.get_running_loop()
    ending = threading.Event()

    async def work(locks: QuorumLockManager) -> None:
        nonlocal refused, seen
        while not ending.is_set():
            try:
                async with locks.acquire_lock("a") as lock:
                    begin, tokens = loop.time(), lock.fencing_tokens
                    assert not tokens.overtaken(seen)
                    seen = tokens.merged(seen)
                    await asyncio.sleep(0.002)
                    if lock.held:
                        spans.append((begin, loop.time()))
            except (LockLost, ServerUnavailable):
                refused += 1

    def fail() -> None:
        for _ in range(12):
            unlucky = chance.sample(group.servers, 2)
            for server in unlucky:
                server.pause()
            ending.wait(chance.random() * 0.5)
            for server in unlucky:
                server.resume()
            ending.wait(chance.random() * 0.05)

    managers = [group.manager(default_timeout=0.5, request_timeout=0.3) for _ in range(3)]
    workers = [asyncio.create_task(work(manager)) for manager in managers for _ in range(2)]
    await asyncio.to_thread(fail)
    ending.set()
    await asyncio.gather(*workers)
    spans.sort()
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end <= begin
    assert len(spans) > 20
    for manager in managers:
        await manager.aclose()
    await until(group.empty)
