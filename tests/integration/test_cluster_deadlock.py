"""Cycles of waiters over partitions of a cluster.

Promises: a cycle over several partitions, engines and processes ends within a moment with exactly one
refusal, which names its locks, owners, processes and places, and all others go on, those too who only wait
for it; readers and writers count as within a partition, and a semaphore only with all its permits; whoever
asked for its lock last gives up, or as its rule says; what is no cycle is never refused, however much is
going on, nor what was never true at once; partitions that nobody waits in are not begun; notes do not stay
behind; a partition that is away for a while hides nothing for good.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from typing import TYPE_CHECKING

import pytest
from redis.crc import key_slot

from dotmac.platform.errors import DeadlockDetected
from dotmac.platform.testing.topologies import EmbeddedCluster
from support.cluster import PARTITIONS, held_once, partition_of, slot_of
from support.locks import manager_at, python, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from dotmac.platform.connection.embedded import EmbeddedValkey
    from dotmac.platform.distributed_locks import DistributedLockManager
    from dotmac.platform.distributed_locks.lock import DistributedLock


def names_apart(count: int, prefix: str = "lock") -> list[str]:
    """Names of locks of which no two neighbours, in a ring, share a partition."""
    names: list[str] = []
    number = 0
    while len(names) < count:
        name = f"{prefix}:{number}"
        number += 1
        others = {partition_of(other) for other in (names[-1:] + names[:1])}
        if partition_of(name) not in others:
            names.append(name)
    return names


def names_on_other_nodes(nodes: EmbeddedCluster, unique: str, first: EmbeddedValkey) -> tuple[str, str]:
    """Two names at the two nodes that are not this one."""
    found = {nodes.node_of(slot_of(unique, name)).port: name for name in names_apart(40)}
    found.pop(first.port)
    a, b = found.values()
    return a, b


@pytest.fixture(scope="module")
def nodes() -> Iterator[EmbeddedCluster]:
    """A cluster that no test breaks for good."""
    with EmbeddedCluster() as servers:
        yield servers


@pytest.fixture
async def locks(nodes: EmbeddedCluster, unique: str) -> AsyncIterator[DistributedLockManager]:
    async with manager_at(nodes.url, unique, blocking_timeout=60.0) as manager:
        yield manager


@pytest.fixture
async def rival(nodes: EmbeddedCluster, unique: str) -> AsyncIterator[DistributedLockManager]:
    """Another engine, as in another process: its address differs."""
    url = f"{nodes.url}?connect_timeout=4"
    async with manager_at(url, unique, blocking_timeout=60.0) as manager:
        yield manager


class Ring:
    """Workers of which each holds one lock and then waits for the next one's."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.holding = 0
        self.done: list[int] = []
        self.refused: dict[int, DeadlockDetected] = {}
        self.closed_at = 0.0
        self.took = 0.0

    async def work(self, number: int, own: DistributedLock, wanted: DistributedLock) -> None:
        try:
            async with own:
                self.holding += 1
                await until(lambda: self.holding == len(self.names))
                self.closed_at = time.monotonic()
                async with wanted:
                    self.done.append(number)
        except DeadlockDetected as error:
            assert error.retryable
            self.took = time.monotonic() - self.closed_at
            self.refused[number] = error

    async def run(self, managers: Sequence[DistributedLockManager]) -> None:
        size = len(self.names)

        def locks_of(number: int) -> tuple[DistributedLock, DistributedLock]:
            manager = managers[number % len(managers)]
            return (
                manager.acquire_lock(self.names[number]),
                manager.acquire_lock(self.names[(number + 1) % size]),
            )

        # One after another, so that the last one is the youngest.
        async def all_work() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(size):
                    group.create_task(self.work(number, *locks_of(number)))
                    await until(lambda: self.holding == number + 1)  # noqa: B023 - awaited here
                    await asyncio.sleep(0.002)  # ages are told apart by milliseconds

        async with asyncio.timeout(30):
            await all_work()


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize("size", [2, 3, 10, 50])
async def test_a_ring_has_one_refusal_and_it_names_all(
    locks: DistributedLockManager, rival: DistributedLockManager, size: int, engines: int
) -> None:
    ring = Ring(names_apart(size))
    await ring.run([locks, rival][:engines])
    assert list(ring.refused) == [size - 1], "the youngest gives up"
    assert sorted(ring.done) == list(range(size - 1))
    error = ring.refused[size - 1]
    # The youngest waits for the first lock, whose owner waits for the second, and so on.
    assert error.cycle == tuple(ring.names)
    for edge, following in zip(error.edges, [*error.edges[1:], error.edges[0]], strict=True):
        assert edge.holder == following.waiter
        assert edge.process["pid"] > 0
        assert edge.waiting_at == error.edges[0].waiting_at
        assert "test_cluster_deadlock.py:" in edge.waiting_at
        assert "test_cluster_deadlock.py:" in edge.acquired_at
    assert len({edge.waiter for edge in error.edges}) == size
    assert len({edge.waiter.split("/")[0] for edge in error.edges}) == engines
    assert await locks.list_locks() == []


async def test_resolution_takes_a_moment(
    locks: DistributedLockManager, rival: DistributedLockManager
) -> None:
    for size in (2, 10, 50):
        times = []
        for attempt in range(20 if size < 50 else 6):
            ring = Ring(names_apart(size, f"{size}-{attempt}"))
            await ring.run([locks, rival])
            assert len(ring.refused) == 1
            times.append(ring.took * 1000)
        print(f"ring of {size}: p50 {statistics.median(times):.0f} ms, slowest {max(times):.0f} ms")
        assert statistics.median(times) < 2000


PARTNER = """
import asyncio, json, sys
from dotmac.platform.errors import DeadlockDetected
from support.locks import manager_at

async def work(locks, own, wanted, ready, go):
    async with locks.acquire_lock(own):
        ready.release()
        await go.wait()
        try:
            async with locks.acquire_lock(wanted):
                return "done"
        except DeadlockDetected as error:
            return list(error.cycle)

async def main():
    async with manager_at(sys.argv[1], sys.argv[2], blocking_timeout=60.0) as locks:
        pairs, go, ready = json.loads(sys.argv[3]), asyncio.Event(), asyncio.Semaphore(0)
        tasks = [asyncio.create_task(work(locks, *pair, ready, go)) for pair in pairs]
        for _ in pairs:
            await ready.acquire()
        print("holding")
        await asyncio.to_thread(sys.stdin.readline)
        go.set()
        print(json.dumps(await asyncio.gather(*tasks)))

asyncio.run(main())
"""


@pytest.mark.parametrize("size", [2, 10, 50])
async def test_over_two_processes(nodes: EmbeddedCluster, unique: str, size: int) -> None:
    names = names_apart(size)
    pairs = [(name, names[(number + 1) % size]) for number, name in enumerate(names)]
    processes = [python(PARTNER, nodes.url, unique, json.dumps(pairs[start::2])) for start in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "holding\n"
    ended = await asyncio.gather(*(asyncio.to_thread(process.communicate, "\n", 60) for process in processes))
    results = [result for out, err in ended for result in json.loads(out or repr(err))]
    refusals = [result for result in results if result != "done"]
    assert len(results) == size
    assert len(refusals) == 1, results
    assert sorted(refusals[0]) == sorted(names)


async def test_those_who_wait_for_a_cycle_are_not_refused(
    locks: DistributedLockManager, rival: DistributedLockManager
) -> None:
    ring = Ring(names_apart(3))
    outside = 0

    async def wait(manager: DistributedLockManager, name: str) -> None:
        nonlocal outside
        await until(lambda: ring.holding == 3)
        async with manager.acquire_lock(name):
            outside += 1

    async with asyncio.TaskGroup() as group:
        for name in ring.names:
            for manager in (locks, rival):
                group.create_task(wait(manager, name))
        await ring.run([locks, rival])
    assert (len(ring.refused), len(ring.done), outside) == (1, 2, 6)


async def test_readers_and_writers(locks: DistributedLockManager, rival: DistributedLockManager) -> None:
    """Two readers of one lock, each with a lock that a writer of it holds, or wants."""
    shared, own = names_apart(2)
    both_read = asyncio.Event()
    refused: list[str] = []

    async def other_reader() -> None:
        async with locks.read_lock(shared):
            await both_read.wait()
            await asyncio.sleep(0.3)

    async def reader() -> None:
        try:
            async with locks.read_lock(shared):
                both_read.set()
                async with locks.acquire_lock(own):
                    pass
        except DeadlockDetected:
            refused.append("reader")

    async def writer() -> None:
        try:
            async with rival.acquire_lock(own):
                await both_read.wait()
                async with rival.acquire_lock(shared):
                    pass
        except DeadlockDetected as error:
            refused.append("writer")
            assert set(error.cycle) == {shared, own}

    async with asyncio.timeout(30):
        writing = asyncio.create_task(writer())
        await asyncio.sleep(0.2)
        await asyncio.gather(other_reader(), reader(), writing)
    assert len(refused) == 1


@pytest.mark.parametrize("free", [True, False])
async def test_a_semaphore_counts_with_all_its_permits(
    locks: DistributedLockManager, rival: DistributedLockManager, *, free: bool
) -> None:
    shared, a, b = names_apart(3)
    ready = 0
    refused: list[str] = []
    until_then = asyncio.Event()

    async def hold(manager: DistributedLockManager, wanted: str | None) -> None:
        nonlocal ready
        try:
            async with manager.semaphore(shared, permits=2):
                ready += 1
                await until(lambda: ready == 3)
                if wanted is None:
                    await until_then.wait()
                else:
                    async with manager.acquire_lock(wanted):
                        pass
        except DeadlockDetected:
            refused.append(str(wanted))

    async def want() -> None:
        nonlocal ready
        try:
            async with rival.acquire_lock(a), rival.acquire_lock(b):
                ready += 1
                await until(lambda: ready == 3)
                async with rival.semaphore(shared, permits=2):
                    pass
        except DeadlockDetected as error:
            assert shared in error.cycle
            refused.append(shared)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(want())
        group.create_task(hold(locks, a))
        group.create_task(hold(rival, None if free else b))
        if free:
            await until(lambda: ready == 3)
            await asyncio.sleep(1.0)
            assert refused == [], "the other permit can still be given back"
            until_then.set()
    assert len(refused) == (0 if free else 1)


@pytest.mark.parametrize("policy", ["youngest", "lowest_priority", "fewest_locks", "self"])
async def test_one_gives_up_by_every_rule(nodes: EmbeddedCluster, unique: str, policy: str) -> None:
    names = names_apart(3)
    refused: list[int] = []
    holding = 0

    async def work(number: int) -> None:
        nonlocal holding
        try:
            async with manager.acquire_lock(names[number]):
                holding += 1
                await until(lambda: holding == 3)
                wanted = manager.acquire_lock(names[(number + 1) % 3], priority=5 - number % 2 * 10)
                async with wanted:
                    pass
        except DeadlockDetected:
            refused.append(number)

    async with (
        manager_at(nodes.url, unique, deadlock_victim=policy, blocking_timeout=60.0) as manager,
        asyncio.timeout(30),
        asyncio.TaskGroup() as group,
    ):
        for number in range(3):
            group.create_task(work(number))
            await until(lambda: holding == number + 1)  # noqa: B023 - awaited here
            await asyncio.sleep(0.002)
    assert refused == [1 if policy == "lowest_priority" else 2]


async def test_a_named_owner_of_two_processes(
    locks: DistributedLockManager, rival: DistributedLockManager
) -> None:
    """The same owner holds in one process and waits in another."""
    a, b = names_apart(2)

    async def wait(lock: DistributedLock) -> None:
        async with lock:
            pass

    first, second = locks.acquire_lock(a, owner="one"), locks.acquire_lock(b, owner="two")
    assert await first.acquire()
    assert await second.acquire()
    async with asyncio.timeout(30):
        waiting = asyncio.create_task(wait(rival.acquire_lock(b, owner="one")))
        with pytest.raises(DeadlockDetected) as caught:
            await rival.acquire_lock(a, owner="two").acquire()
        assert {edge.waiter for edge in caught.value.edges} == {"=one", "=two"}
        await second.release()
        await waiting
    await first.release()


async def test_no_cycle_is_never_refused(
    locks: DistributedLockManager, rival: DistributedLockManager
) -> None:
    """Many lock in one order, hold and wait for longer than a moment, and change hands all the time."""
    names = names_apart(12)
    chance = random.Random(7)
    ends = time.monotonic() + 6
    taken = 0

    async def work(manager: DistributedLockManager) -> None:
        nonlocal taken
        while time.monotonic() < ends:
            chosen = sorted(chance.sample(range(12), 3))
            kinds = [
                chance.choice((manager.acquire_lock, manager.acquire_lock, manager.read_lock)) for _ in chosen
            ]
            async with kinds[0](names[chosen[0]]), kinds[1](names[chosen[1]]), kinds[2](names[chosen[2]]):
                taken += 1
                await asyncio.sleep(chance.random() * 0.02)

    async with asyncio.timeout(60):
        await asyncio.gather(*(work((locks, rival)[number % 2]) for number in range(60)))
    assert taken > 100


async def test_what_was_never_true_at_once_is_no_cycle(
    nodes: EmbeddedCluster, locks: DistributedLockManager, rival: DistributedLockManager, unique: str
) -> None:
    """`a` waits for `b` no more when `b` begins to wait for `a`, and whoever looks has seen both."""
    first = nodes.node_of(key_slot(f"{unique}:0".encode()))
    slow_name, two = names_on_other_nodes(nodes, unique, first)
    one, other = f"one{{{slow_name}}}", f"other{{{slow_name}}}"
    slow = nodes.client(nodes.node_of(slot_of(unique, one)))

    def noted() -> int:
        return int(nodes.client(first).zcard(f"{{{unique}:0}}:nw"))

    async with asyncio.timeout(30):
        # Where a server is young, everybody waits at first.
        for name in (one, two):
            await held_once(locks, name)
        await until(lambda: noted() == 0)
        async with locks.acquire_lock(one, owner="a"), rival.acquire_lock(other, owner="c"):
            second = rival.acquire_lock(two, owner="b")
            assert await second.acquire()
            # So that `b` is looked for there.
            third, fourth = rival.acquire_lock(other, owner="b"), rival.acquire_lock(one, owner="b")
            elsewhere = asyncio.create_task(third.acquire())
            await until(lambda: noted() == 1)
            slow.execute_command("CLIENT", "PAUSE", 700, "ALL")  # type: ignore[no-untyped-call]
            asks = asyncio.create_task(fourth.acquire())
            await asyncio.sleep(0.02)
            fifth = locks.acquire_lock(two, owner="a")
            waits = asyncio.create_task(fifth.acquire())
            # The edge is read, and the reader hangs at the slow node.
            await until(lambda: noted() == 2)
            await asyncio.sleep(0.1)
            await second.release()
            assert await waits
            assert not asks.done()
            await asyncio.to_thread(slow.ping)
            await asyncio.sleep(0.5)
            assert not asks.done()
            await fifth.release()
        assert await asks
        assert await elsewhere
        await third.release()
        await fourth.release()


async def test_only_partitions_that_are_waited_in_are_begun(
    nodes: EmbeddedCluster, locks: DistributedLockManager, rival: DistributedLockManager, unique: str
) -> None:
    ring = Ring(names_apart(4))
    await ring.run([locks, rival])
    used = {0} | {partition_of(name) for name in ring.names}
    assert locks.stats()["partitions"] <= len(used)
    assert len(used) < PARTITIONS
    node = nodes.node_of(key_slot(f"{unique}:0".encode()))

    def notes() -> list[int]:
        return [nodes.client(node).zcard(f"{{{unique}:0}}:{key}") for key in ("nw", "nt")]

    # They are taken back where one would be chased again.
    await until(lambda: notes() == [0, 0])


async def test_a_partition_that_is_away_hides_nothing_for_good(
    nodes: EmbeddedCluster, locks: DistributedLockManager, rival: DistributedLockManager, unique: str
) -> None:
    """The cycle closes while the notes are gone, the scripts too, and their partition answers nobody."""
    first = nodes.node_of(key_slot(f"{unique}:0".encode()))
    a, b = names_on_other_nodes(nodes, unique, first)
    ring = Ring([a, b])
    running = asyncio.create_task(ring.run([locks, rival]))
    await until(lambda: ring.holding == 2)
    for node in nodes.nodes:
        nodes.client(node).script_flush()
    nodes.client(first).delete(f"{{{unique}:0}}:nw", f"{{{unique}:0}}:nt")
    nodes.client(first).execute_command("CLIENT", "PAUSE", 1500, "ALL")  # type: ignore[no-untyped-call]
    await running
    assert (len(ring.refused), len(ring.done)) == (1, 1)
