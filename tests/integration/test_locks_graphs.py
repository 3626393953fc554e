"""Cycles of many shapes, and random ones against an oracle.

Promises: a ring of any number of owners, tasks or threads of several processes, is found when it is closed
and costs one of them its wait, after which all others go on; readers that hold a lock together are all waited
for, permits of a semaphore only if all of them are in the cycle; who gives up is who the policy says; in
random graphs of owners, locks, readers and semaphores every deadlock is found in the step that closes it,
none is reported that is not there, each is true in all of its edges, and nobody is stuck afterwards.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import os
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform._native import LockCall
from dotmac.platform.errors import DeadlockDetected
from support.graphs import Graph, Request
from support.locks import LIMIT, Partition, manager_at, python, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
    from support.owners import Owner

    Owners = Callable[..., Owner]


@pytest.mark.parametrize("size", [2, 3, 10, 50])
async def test_rings_of_tasks(owner: Owners, partition: Partition, size: int) -> None:
    owners = [owner() for _ in range(size)]
    for number, one in enumerate(owners):
        assert await one.acquire("acquire_lock", f"l{number}")
    asked = []
    for number in reversed(range(1, size)):
        asked.append(owners[number].acquire("acquire_lock", f"l{(number + 1) % size}"))
        await until(lambda: partition.queued() == len(asked))
    assert not any(one.done() for one in asked)
    asked.append(owners[0].acquire("acquire_lock", "l1"))
    # The one that got its lock last, whose wait was the first.
    with pytest.raises(DeadlockDetected) as caught:
        await asyncio.wait_for(asked[0], LIMIT)
    assert caught.value.cycle == ("l0", *(f"l{number}" for number in range(1, size)))
    edges = caught.value.edges
    assert all(edges[at].holder == edges[(at + 1) % size].waiter for at in range(size))
    assert {edge.process["pid"] for edge in edges} == {os.getpid()}
    for number in reversed(range(1, size)):
        await owners[number].release(f"l{number}")
        assert await asked[size - number]
        await owners[number - 1].release(f"l{number}")
    await owners[0].release("l0")
    assert partition.empty()


RING = """
import json, sys, threading, redis
from dotmac.platform._native import LockCall
from dotmac.platform.errors import DeadlockDetected
from support.locks import LIMIT, manager_at, wait_until
url, namespace = sys.argv[1:3]
size, first, step = map(int, sys.argv[3:])
counts = redis.Redis.from_url(url)
outcomes = []

def work(number):
    with locks.acquire_lock(f"l{number}"):
        counts.incr(namespace + "-holding")
        wait_until(lambda: int(counts.get(namespace + "-holding")) == size, 60)
        try:
            with locks.acquire_lock(f"l{(number + 1) % size}", blocking_timeout=60):
                outcomes.append([])
        except DeadlockDetected as error:
            outcomes.append([list(error.cycle), [edge.process["pid"] for edge in error.edges]])

with manager_at(url, namespace) as locks:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(first, size, step)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize(("size", "processes"), [(2, 2), (3, 3), (10, 2), (50, 3)])
async def test_rings_over_processes(
    partition: Partition, valkey_url: str, unique: str, size: int, processes: int
) -> None:
    rings = [
        python(RING, valkey_url, unique, str(size), str(first), str(processes)) for first in range(processes)
    ]
    outcomes: list[list[Any]] = []
    for ring in rings:
        out, err = await asyncio.to_thread(ring.communicate)
        assert ring.returncode == 0, err
        outcomes += json.loads(out)
    assert len(outcomes) == size
    (refused,) = [outcome for outcome in outcomes if outcome]
    cycle, pids = refused
    assert sorted(cycle) == sorted(f"l{number}" for number in range(size))
    assert set(pids) == {ring.pid for ring in rings}
    assert partition.empty()


async def test_all_readers_are_waited_for(owner: Owners, partition: Partition) -> None:
    first, second, writer = owner(), owner(), owner()
    assert await writer.acquire("write_lock", "y")
    assert await first.acquire("read_lock", "x")
    assert await second.acquire("read_lock", "x")
    reading = first.acquire("read_lock", "y")
    await until(lambda: partition.queued() == 1)
    writing = writer.acquire("write_lock", "x")
    with pytest.raises(DeadlockDetected) as caught:
        await reading
    assert caught.value.cycle == ("y", "x")
    await first.release("x")
    assert partition.queued() == 1, "the other reader is still there"
    await second.release("x")
    assert await writing
    await writer.release("x")
    await writer.release("y")
    assert partition.empty()


async def test_a_reader_behind_a_writer_is_in_the_cycle(owner: Owners, partition: Partition) -> None:
    """It waits for the writer, and so for the reader that holds the lock and wants what it has."""
    reader, writer, behind = owner(), owner(), owner()
    assert await behind.acquire("acquire_lock", "z")
    assert await reader.acquire("read_lock", "x")
    writing = writer.acquire("write_lock", "x")
    await until(lambda: partition.queued() == 1)
    reading = behind.acquire("read_lock", "x")
    await until(lambda: partition.queued() == 2)
    with pytest.raises(DeadlockDetected) as caught:
        await reader.acquire("acquire_lock", "z")
    assert caught.value.cycle == ("z", "x")
    await reader.release("x")
    assert await writing
    await writer.release("x")
    assert await reading
    await behind.release("x")
    await behind.release("z")
    assert partition.empty()


async def test_a_permit_outside_of_the_cycle_resolves_it(owner: Owners, partition: Partition) -> None:
    first, second, other = owner(), owner(), owner()
    assert await other.acquire("acquire_lock", "y")
    assert await first.acquire("semaphore", "s", 2)
    assert await second.acquire("semaphore", "s", 2)
    permit = other.acquire("semaphore", "s", 2)
    await until(lambda: partition.queued() == 1)
    asked = first.acquire("acquire_lock", "y")
    await until(lambda: partition.queued() == 2)
    assert not permit.done()
    assert not asked.done()
    with pytest.raises(DeadlockDetected) as caught:
        await second.acquire("acquire_lock", "y")
    assert caught.value.cycle == ("y", "s")
    await second.release("s")
    assert await permit
    await other.release("s")
    await other.release("y")
    assert await asked
    await first.release("y")
    await first.release("s")
    assert partition.empty()


async def test_a_semaphore_can_wait_for_itself(locks: DistributedLockManager, partition: Partition) -> None:
    async with locks.semaphore("s", 2), locks.semaphore("s", 2):
        with pytest.raises(DeadlockDetected, match="already held by this task"):
            await locks.semaphore("s", 2).acquire()
    assert partition.empty()


@pytest.mark.parametrize("kind", ["task", "thread"])
@pytest.mark.parametrize(
    ("policy", "gives_up"), [("youngest", 2), ("lowest_priority", 1), ("fewest_locks", 1), ("self", 0)]
)
async def test_who_gives_up(
    owner: Owners,
    partition: Partition,
    valkey_url: str,
    unique: str,
    policy: str,
    gives_up: int,
    kind: str,
) -> None:
    """Three in a ring got their locks in the order of their numbers; the first closes it."""
    async with manager_at(valkey_url, unique, deadlock_victim=policy) as locks:
        owners = [owner(kind, locks) for _ in range(3)]
        for number, (one, count) in enumerate(zip(owners, [3, 2, 4], strict=True)):
            for other in range(1, count):
                assert await one.acquire("acquire_lock", f"o{number}{other}")
        for number, one in enumerate(owners):
            assert await one.acquire("acquire_lock", f"l{number}")
        asked: dict[int, Any] = {}
        for number, priority in ((2, 0), (1, -1), (0, 0)):
            name = f"l{(number + 1) % 3}"
            asked[number] = owners[number].acquire("acquire_lock", name, priority=priority)
            if number:
                await until(lambda: partition.queued() == len(asked))
        with pytest.raises(DeadlockDetected) as caught:
            await asyncio.wait_for(asked.pop(gives_up), LIMIT)
        assert caught.value.cycle[0] == f"l{(gives_up + 1) % 3}"
        assert not any(one.done() for one in asked.values())
        number = gives_up
        for _ in range(2):
            await owners[number].release(f"l{number}")
            number = (number - 1) % 3
            assert await asked[number]
        await owners[number].release(f"l{(number + 1) % 3}")


async def test_a_bad_policy(valkey_url: str, unique: str) -> None:
    with pytest.raises(ValueError, match="^deadlock_victim: 'oldest' is not allowed"):
        manager_at(valkey_url, unique, deadlock_victim="oldest")


# ---- random graphs

# How many; `LOCK_GRAPHS=10000` for a thorough look.
GRAPHS = int(os.environ.get("LOCK_GRAPHS", "600"))
AT_ONCE = 25
STEPS = 40


class Game:
    """Owners that ask for locks and give them back at random, on the server and in the mirror."""

    def __init__(self, locks: DistributedLockManager, policy: str, seed: int) -> None:
        self.locks, self.policy = locks, policy
        self.chance = chance = random.Random(seed)
        self.owners = [f"{seed}.{n}" for n in range(chance.randint(2, 8))]
        self.names = [f"{seed}.l{n}" for n in range(chance.randint(1, 8))]
        self.graph = Graph({name: chance.randint(1, 3) for name in self.names if chance.random() < 0.3})
        self.asked: dict[Request, tuple[DistributedLock, asyncio.Task[bool]]] = {}
        self.held: dict[Request, DistributedLock] = {}
        self.requests = self.deadlocks = self.longest = 0

    async def play(self) -> None:
        for _ in range(STEPS):
            await self.step()
        for request in list(self.asked):
            if request in self.asked:  # the last one's end has not served it
                await self.give_up(request)
        for request in list(self.held):
            await self.release(request)
        assert not any(self.graph.held.values())

    async def step(self) -> None:
        owner = self.chance.choice(self.owners)
        waits = next((request for request in self.asked if request.owner == owner), None)
        mine = [request for request in self.held if request.owner == owner]
        if waits is not None:
            if self.chance.random() < 0.2:
                await self.give_up(waits)
        elif mine and self.chance.random() < 0.15:
            await self.release(self.chance.choice(mine))
        else:
            await self.ask(owner)
        assert not self.graph.stuck()
        wrong = [(request, task) for request, (_, task) in self.asked.items() if task.done()]
        assert not wrong, "told of what is not so"

    async def ask(self, owner: str) -> None:
        self.requests += 1
        mine = {request.lock for request in self.held if request.owner == owner}
        others = [name for name in self.names if name not in mine or self.chance.random() < 0.05]
        name = self.chance.choice(others or self.names)
        mode = "k" if name in self.graph.permits else self.chance.choice("xxs")
        request = Request(owner, name, mode, self.chance.choice([0, 0, 0, 1, -1]), self.requests)
        how: dict[str, Any] = {"owner": owner, "priority": request.priority, "blocking_timeout": 120.0}
        if mode == "k":
            lock = self.locks.semaphore(name, self.graph.permits[name], **how)
        else:
            lock = (self.locks.read_lock if mode == "s" else self.locks.acquire_lock)(name, **how)
        self.asked[request] = lock, asyncio.create_task(lock.acquire())
        await asyncio.sleep(0)
        if self.graph.ask(request):
            await self.granted([request])
        if self.graph.stuck():
            await self.resolve(request)

    async def release(self, request: Request) -> None:
        await self.held.pop(request).release()
        await self.granted(self.graph.release(request))

    async def give_up(self, request: Request) -> None:
        _, task = self.asked.pop(request)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await self.granted(self.graph.give_up(request))

    async def granted(self, requests: list[Request]) -> None:
        for request in requests:
            lock, task = self.asked.pop(request)
            assert await task
            self.held[request] = lock

    async def resolve(self, closing: Request) -> None:
        """Those who have to give up are told of cycles that are there, and nobody is stuck without them."""
        # Whatever the server said before it answers this has been heard by then.
        side = await self.locks._link.side()
        await side.bridge.call(LockCall.queue_of(closing.lock, 1))
        for _ in range(3):
            await asyncio.sleep(0)
        told = self.told()
        assert told, "a deadlock that is not found"
        # Where one request closes several cycles, each is there until its own victim is gone.
        order = next(filter(self.is_true, itertools.permutations(told.items())), None)
        assert order is not None, "a cycle that is not there"
        for victim, error in order:
            self.is_fair(victim, error, closing)
            self.deadlocks += 1
            self.longest = max(self.longest, len(error.edges))
            del self.asked[victim]
            await self.granted(self.graph.give_up(victim))

    def told(self) -> dict[Request, DeadlockDetected]:
        found = {}
        for request, (_, task) in self.asked.items():
            error = task.exception() if task.done() else None
            if error is not None:
                assert isinstance(error, DeadlockDetected)
                found[request] = error
        return found

    def is_true(self, order: tuple[tuple[Request, DeadlockDetected], ...]) -> bool:
        """If they give up in this order, each is in a cycle until then, and nobody is afterwards."""
        graph = copy.deepcopy(self.graph)
        for victim, error in order:
            edges = [(plain(edge.waiter), plain(edge.holder), edge.lock) for edge in error.edges]
            assert all(edges[at][0] == edges[at - 1][1] for at in range(len(edges))), "a ring"
            assert (edges[0][0], edges[0][2]) == (victim.owner, victim.lock), "that begins with the victim"
            if not ({edge[0] for edge in edges} <= graph.stuck() and set(edges) <= set(graph.edges())):
                return False
            graph.give_up(victim)
        return not graph.stuck()

    def is_fair(self, victim: Request, error: DeadlockDetected, closing: Request) -> None:
        """The one who gives up is who the policy says."""
        waits = {request.owner: request for request in self.asked}
        if self.policy == "self":
            assert victim == closing
        if self.policy == "lowest_priority":
            cycle = [waits[plain(edge.waiter)].priority for edge in error.edges]
            assert victim.priority == min(cycle)
        if self.policy == "youngest":
            fences = [self.fences(plain(edge.holder), edge.lock) for edge in error.edges]
            # Who holds several permits of one semaphore may be meant with any of them.
            assert max(fences[-1]) >= max(min(some) for some in fences)

    def fences(self, owner: str, name: str) -> list[int]:
        return [
            next(iter(lock._held.values())).lease.fence
            for request, lock in self.held.items()
            if (request.owner, request.lock) == (owner, name)
        ]


def plain(owner: str) -> str:
    """The name that a test gave to an owner."""
    return owner.rpartition("=")[2]


@pytest.mark.parametrize("policy", ["youngest", "lowest_priority", "fewest_locks", "self"])
async def test_random_graphs(valkey_url: str, unique: str, policy: str) -> None:
    every = ["youngest", "lowest_priority", "fewest_locks", "self"]
    first, count = every.index(policy) * 1_000_000, GRAPHS // len(every)
    requests = deadlocks = longest = 0
    async with manager_at(valkey_url, unique, deadlock_victim=policy) as locks:
        for start in range(first, first + count, AT_ONCE):
            games = [Game(locks, policy, seed) for seed in range(start, min(start + AT_ONCE, first + count))]
            await asyncio.gather(*(game.play() for game in games))
            requests += sum(game.requests for game in games)
            deadlocks += sum(game.deadlocks for game in games)
            longest = max(longest, *(game.longest for game in games))
    print(f"{count} graphs, {requests} requests, {deadlocks} deadlocks, the longest of {longest} edges")
    assert deadlocks > count, "they are to be about deadlocks"
    assert longest > 3
    view = Partition(valkey_url, unique)
    assert view.empty()
    view.client.close()
