"""Looking at locks and taking them away.

Promises: every held lock is listed once, however many pages and partitions they fill, with all who hold it
and how many wait; one lock is shown with its queue in order, with kinds, priorities and places in the code;
a lock that is taken away is lost to its holder, who is told, and goes to the next in the queue; a token of an
earlier holder takes nothing away; who waits for whom comes out as a graph, rings included; what cannot be
asked is a typed error; all of it with and without an event loop, and on a cluster.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform._native import Asking
from dotmac.platform.distributed_locks import LockInfo
from dotmac.platform.errors import InvalidArgument, LockLost, ServerUnavailable
from dotmac.platform.testing.topologies import EmbeddedCluster
from support.cluster import NAMES, partition_of
from support.locks import Partition, manager_at, until, wait_until

if TYPE_CHECKING:
    from dotmac.platform.connection.embedded import EmbeddedValkey
    from dotmac.platform.distributed_locks import DistributedLockManager


async def ask(
    locks: DistributedLockManager,
    name: str,
    owner: str,
    kind: str = "exclusive",
    *,
    permits: int = 0,
    priority: int = 0,
    place: str = "",
) -> Any:
    """A lock as the engine grants it: of any kind, for any owner and place. Dropped, it is given back."""
    side = await locks._link.side()
    asking = Asking(kind, permits, priority, "youngest", None)
    told = lambda _whose, result, _detail: result  # noqa: E731
    return await side.bridge.acquire(name, owner, 10.0, False, None, place, asking, told, None, None)


async def waiting(locks: DistributedLockManager, view: Partition, *asked: Any) -> list[asyncio.Task[Any]]:
    """Tasks that wait, one behind the other."""
    before = view.queued()
    tasks = []
    for number, one in enumerate(asked, 1):
        tasks.append(asyncio.create_task(one))
        await until(lambda: view.queued() == before + number)  # noqa: B023 - awaited here
    return tasks


async def called_off(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_thousand_locks_are_listed_once_each(locks: DistributedLockManager) -> None:
    names = [f"n{number}" for number in range(1000)]
    held = {name: locks.acquire_lock(name) for name in names}
    await asyncio.gather(*(lock.acquire() for lock in held.values()))
    for found in (await locks.list_locks(), await asyncio.to_thread(locks.list_locks_sync)):
        assert sorted(info.name for info in found) == sorted(names)
        assert all(info.fencing_token == held[info.name].fencing_token for info in found)
        assert {(info.kind, info.permits, len(info.holders), info.waiters) for info in found} == {
            ("exclusive", None, 1, 0)
        }
    await asyncio.gather(*(lock.release() for lock in held.values()))
    assert await locks.list_locks(queues=True) == []


async def test_many_readers_are_one_lock(locks: DistributedLockManager) -> None:
    """Over several pages."""
    leases = [await ask(locks, "read", f"=reader-{n}", "shared", place=f"r.py:{n}") for n in range(600)]
    permits = [await ask(locks, "few", f"=one-{n}", "semaphore", permits=3) for n in range(2)]
    found = {info.name: info for info in await locks.list_locks()}
    assert set(found) == {"read", "few"}
    read, few = found["read"], found["few"]
    assert (read.kind, read.permits, few.kind, few.permits) == ("shared", None, "semaphore", 3)
    assert [one.fencing_token for one in read.holders] == [lease.fence for lease in leases]
    assert [one.owner for one in read.holders] == [f"=reader-{n}" for n in range(600)]
    assert read.holders[7].acquired_at == "r.py:7"
    assert [one.fencing_token for one in few.holders] == [lease.fence for lease in permits]
    shown = await locks.get_lock("read")
    assert shown is not None
    assert [one.owner for one in shown.holders] == [one.owner for one in read.holders]


async def test_one_lock_with_its_queue(locks: DistributedLockManager, partition: Partition) -> None:
    before = int(time.time() * 1000) - 1
    lease = await ask(locks, "a", "=holder", place="here.py:1")
    tasks = await waiting(
        locks,
        partition,
        ask(locks, "a", "=writer", place="writer.py:2"),
        ask(locks, "a", "=reader", "shared", priority=-5),
        ask(locks, "a", "=urgent", priority=20),
    )
    for info in (await locks.get_lock("a"), await asyncio.to_thread(locks.get_lock_sync, "a")):
        assert isinstance(info, LockInfo)
        (holder,) = info.holders
        assert (info.name, info.kind, info.waiters) == ("a", "exclusive", 3)
        assert (holder.owner, holder.fencing_token, holder.acquired_at) == (
            "=holder",
            lease.fence,
            "here.py:1",
        )
        assert (holder.pid, 0 < holder.remaining <= 10) == (os.getpid(), True)
        assert before <= holder.since <= time.time() * 1000
        # The first holder's are the lock's own.
        assert (info.owner, info.session, info.host, info.pid, info.service) == (
            holder.owner,
            holder.session,
            holder.host,
            holder.pid,
            holder.service,
        )
        assert (info.fencing_token, info.since, info.remaining) == (
            holder.fencing_token,
            holder.since,
            holder.remaining,
        )
        assert [(one.position, one.owner, one.kind, one.priority) for one in info.queue] == [
            (1, "=urgent", "exclusive", 20),
            (2, "=writer", "exclusive", 0),
            (3, "=reader", "shared", -5),
        ]
        assert info.queue[1].waiting_at == "writer.py:2"
        assert all(before <= one.since and one.pid == os.getpid() for one in info.queue)
        assert json.loads(json.dumps(info.to_dict()))["holders"][0]["owner"] == "=holder"
    (listed,) = await locks.list_locks(queues=True)
    assert listed.queue == info.queue
    assert await locks.get_lock("b") is None
    await called_off(tasks)


async def test_a_long_queue_is_shown_in_part(locks: DistributedLockManager, partition: Partition) -> None:
    lease = await ask(locks, "a", "=holder")
    tasks = [asyncio.create_task(ask(locks, "a", f"=w{number}")) for number in range(250)]
    await until(lambda: partition.queued() == 250)
    info = await locks.get_lock("a")
    assert info is not None
    assert (info.waiters, len(info.queue)) == (250, 100)
    (listed,) = await locks.list_locks(queues=True)
    assert listed.queue[:100] == info.queue
    assert [one.owner for one in listed.queue] == [f"=w{number}" for number in range(250)]
    assert [one.position for one in listed.queue] == list(range(1, 251))
    assert listed.fencing_token == lease.fence
    await called_off(tasks)


async def test_what_is_taken_away_goes_to_the_next(
    locks: DistributedLockManager, partition: Partition
) -> None:
    order: list[str] = []

    async def hold() -> None:
        async with locks.acquire_lock("a") as lock:
            order.append("held")
            try:
                await asyncio.sleep(30)
            finally:
                order.append(f"told: {lock.lost.reason}")

    async def wait(number: int) -> None:
        async with locks.acquire_lock("a"):
            order.append(f"next {number}")

    holder = asyncio.create_task(hold())
    await until(lambda: order)
    tasks = await waiting(locks, partition, wait(1), wait(2))
    assert await locks.force_release("a") == 1
    with pytest.raises(LockLost, match="released by force"):
        await holder
    await asyncio.gather(*tasks)
    assert order[0] == "held"
    assert sorted(order[1:]) == ["next 1", "next 2", "told: it was released by force"]
    assert order.index("next 1") < order.index("next 2")
    assert await locks.force_release("a") == 0
    assert partition.empty()


async def test_a_thread_is_told(locks: DistributedLockManager) -> None:
    entered, reasons = threading.Event(), []

    def body() -> None:
        with pytest.raises(LockLost, match="released by force"), locks.acquire_lock("a") as lock:
            entered.set()
            wait_until(lambda: lock.lost)
            reasons.append(lock.lost.reason)

    thread = threading.Thread(target=body)
    thread.start()
    await asyncio.to_thread(entered.wait)
    assert await asyncio.to_thread(locks.force_release_sync, "a") == 1
    await asyncio.to_thread(thread.join)
    assert reasons == ["it was released by force"]


async def test_only_the_holder_that_is_meant(locks: DistributedLockManager) -> None:
    async with locks.acquire_lock("a") as lock:
        earlier = lock.fencing_token
    async with locks.acquire_lock("a") as lock:
        assert await locks.force_release("a", earlier) == 0
        assert await locks.force_release("b", lock.fencing_token) == 0
        assert lock.held
    readers = [await ask(locks, "read", f"=reader-{number}", "shared") for number in range(3)]
    assert await locks.force_release("read", readers[1].fence) == 1
    await until(lambda: not readers[1].held)
    assert (readers[0].held, readers[2].held) == (True, True)
    info = await locks.get_lock("read")
    assert info is not None
    assert [one.owner for one in info.holders] == ["=reader-0", "=reader-2"]
    assert await locks.force_release("read") == 2
    await until(lambda: not readers[0].held and not readers[2].held)


async def test_a_chain_is_a_graph_without_a_ring(locks: DistributedLockManager, partition: Partition) -> None:
    assert (await locks.wait_graph()).edges == ()
    held = [
        await ask(locks, "l0", "=a", place="a.py:1"),
        await ask(locks, "l1", "=b", place="b.py:1"),
        await ask(locks, "read", "=r1", "shared"),
        await ask(locks, "read", "=r2", "shared"),
    ]
    tasks = await waiting(
        locks,
        partition,
        ask(locks, "l0", "=b", place="b.py:2"),
        ask(locks, "l1", "=c", place="c.py:1"),
        ask(locks, "l1", "=d"),
        ask(locks, "read", "=c2"),
    )
    graph = await locks.wait_graph()
    assert [(edge.waiter, edge.lock, edge.holder) for edge in graph.edges] == [
        ("=b", "l0", "=a"),
        ("=c", "l1", "=b"),
        ("=d", "l1", "=b"),
        ("=c2", "read", "=r1"),
        ("=c2", "read", "=r2"),
    ]
    assert (graph.edges[0].waiting_at, graph.edges[0].acquired_at) == ("b.py:2", "a.py:1")
    assert set(graph.nodes) == {"=a", "=b", "=c", "=d", "=c2", "=r1", "=r2"}
    assert {node.pid for node in graph.nodes.values()} == {os.getpid()}
    assert graph.cycles() == []
    assert await asyncio.to_thread(locks.wait_graph_sync) == graph
    assert json.loads(json.dumps(graph.to_dict()))["cycles"] == []
    assert all(lease.held for lease in held)
    await called_off(tasks)


async def test_a_ring_that_nobody_looked_for_comes_out(
    valkey_url: str, unique: str, partition: Partition
) -> None:
    """Without detection a deadlock lasts until somebody looks."""
    async with manager_at(valkey_url, unique, deadlock_detection=False) as locks:
        done: list[int] = []

        async def work(number: int) -> None:
            async with locks.acquire_lock(f"l{number}"):
                await until(lambda: partition.held() == 3)
                async with locks.acquire_lock(f"l{(number + 1) % 3}"):
                    done.append(number)

        tasks = [asyncio.create_task(work(number)) for number in range(3)]
        await until(lambda: partition.queued() == 3)
        graph = await locks.wait_graph()
        (ring,) = graph.cycles()
        assert sorted(edge.lock for edge in ring) == ["l0", "l1", "l2"]
        assert all(
            edge.holder == after.waiter for edge, after in zip(ring, (*ring[1:], ring[0]), strict=True)
        )
        assert graph.to_dot().count("color=red") == 3
        assert await locks.force_release("l0") == 1
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [LockLost, type(None), type(None)]
        assert sorted(done) == [1, 2]


async def test_whoever_awaits_one_that_waits_is_in_the_graph(
    locks: DistributedLockManager, partition: Partition
) -> None:
    lease = await ask(locks, "a", "=holder")
    side = await locks._link.side()
    told = lambda _whose, result, _detail: result  # noqa: E731
    answers = []

    async def wait() -> Any:
        answers.append(side.bridge.acquire("a", "=child", 10.0, False, None, "", None, told, None, None))
        return await answers[0]

    tasks = await waiting(locks, partition, wait())
    answers[0].awaited(["=parent"])
    await until(lambda: len(locks.wait_graph_sync().edges) == 2)
    graph = await locks.wait_graph()
    assert [(edge.waiter, edge.holder, edge.asked_by) for edge in graph.edges] == [
        ("=child", "=holder", "=child"),
        ("=parent", "=holder", "=child"),
    ]
    info = await locks.get_lock("a")
    assert info is not None
    assert info.queue[0].awaited_by == ("=parent",)
    assert info.fencing_token == lease.fence
    await called_off(tasks)


async def test_what_is_waited_for_while_nobody_may_hold_it(own_valkey: EmbeddedValkey, unique: str) -> None:
    """A server that has just started lets nobody have anything for a moment."""
    async with manager_at(own_valkey.url, unique) as locks, manager_at(own_valkey.url, unique) as observer:
        task = asyncio.create_task(ask(locks, "a", "=first", "semaphore", permits=2))
        view = Partition(own_valkey.url, unique)
        await until(lambda: view.queued() == 1)
        info = await observer.get_lock("a")
        assert info is not None
        assert (info.kind, info.permits, info.holders, info.waiters) == ("semaphore", 2, (), 1)
        assert (info.owner, info.pid, info.fencing_token, info.remaining) == ("", 0, 0, 0.0)
        assert info.queue[0].owner == "=first"
        assert [one.name for one in await observer.list_locks(queues=True)] == ["a"]
        assert (await observer.wait_graph()).edges == ()
        await task
        view.client.close()


async def test_bad_arguments(locks: DistributedLockManager) -> None:
    for name in ("", "a\0b", 7, "x" * 1025):
        with pytest.raises(InvalidArgument, match="name"):
            await locks.get_lock(name)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="name"):
            locks.force_release_sync(name)  # type: ignore[arg-type]
    for token in (0, -1, True, "7", 1.5, 1 << 63):
        with pytest.raises(InvalidArgument, match="fencing_token"):
            await locks.force_release("a", token)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="fencing_token"):
            locks.force_release_sync("a", token)  # type: ignore[arg-type]


async def test_a_server_that_is_away(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique, request_timeout=0.5) as locks:
        await locks.list_locks()
        own_valkey.kill()
        for call in (locks.list_locks, locks.wait_graph):
            with pytest.raises(ServerUnavailable):
                await call()
        for named in (locks.get_lock, locks.force_release):
            with pytest.raises(ServerUnavailable, match="lock 'a'"):
                await named("a")
        for blocking in (locks.list_locks_sync, locks.wait_graph_sync):
            with pytest.raises(ServerUnavailable):
                await asyncio.to_thread(blocking)


async def test_on_a_cluster(unique: str) -> None:
    with EmbeddedCluster() as nodes:
        async with (
            manager_at(nodes.url, unique) as locks,
            manager_at(f"{nodes.url}?connect_timeout=4", unique) as rival,
        ):
            held = {name: locks.acquire_lock(name, on_lost="flag") for name in NAMES}
            await asyncio.gather(*(lock.acquire() for lock in held.values()))
            wanted = [rival.acquire_lock(name) for name in NAMES[:10]]
            queue = [asyncio.create_task(lock.acquire()) for lock in wanted]

            async def all_wait() -> list[LockInfo]:
                while True:
                    found = await rival.list_locks(queues=True)
                    if sum(info.waiters for info in found) == 10:
                        return found

            async with asyncio.timeout(20):
                found = {info.name: info for info in await all_wait()}
            assert set(found) == set(NAMES)
            assert {name for name, info in found.items() if info.queue} == set(NAMES[:10])
            blocking = await asyncio.to_thread(rival.list_locks_sync)
            assert {info.name: info.fencing_token for info in blocking} == {
                name: lock.fencing_token for name, lock in held.items()
            }
            graph = await rival.wait_graph()
            assert sorted(edge.lock for edge in graph.edges) == sorted(NAMES[:10])
            assert await asyncio.to_thread(rival.wait_graph_sync) == graph
            assert len({partition_of(name) for name in NAMES[:10]}) > 3
            info = await rival.get_lock(NAMES[0])
            assert info is not None
            assert (info.fencing_token, info.waiters) == (held[NAMES[0]].fencing_token, 1)
            taken = await asyncio.gather(*map(rival.force_release, NAMES[:10]))
            assert taken == [1] * 10
            async with asyncio.timeout(20):
                assert all(await asyncio.gather(*queue))
            await until(lambda: all(held[name].lost for name in NAMES[:10]))
            assert not any(held[name].lost for name in NAMES[10:])
