"""Read and write locks, semaphores, priorities, and locks that are not waited for.

Promises: readers hold a lock together, a writer holds it alone, and a reader behind a waiting writer waits,
until that one gives up, or its process dies; a reader whose process died does not keep a writer out; no more
than its permits hold a semaphore, be they tasks, threads or processes, and a permit that is given back goes
to the next in order; a name serves one kind and one number of permits at a time; higher priorities are served
first, those of one priority in their order; what is only tried never waits; all of it in tasks, threads,
several loops and as decorators; an argument that is wrong is refused by name.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.errors import InvalidArgument, LockMismatch, LockTimeout
from support.locks import HOLDER, LIMIT, Partition, manager_at, python, until, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.distributed_locks import DistributedLockManager
    from support.owners import Owner

    Owners = Callable[..., Owner]

WRITER = """
import sys
from support.locks import manager_at
manager_at(sys.argv[1], sys.argv[2]).write_lock("a", 3.0).acquire_sync()
"""
KINDS = pytest.mark.parametrize("kind", ["task", "thread", "process"])


@KINDS
async def test_readers_together_a_writer_alone(owner: Owners, partition: Partition, kind: str) -> None:
    first, second, third, writer, other = (owner(kind) for _ in range(5))
    assert await first.acquire("read_lock", "a")
    assert await second.acquire("read_lock", "a")
    writing = writer.acquire("write_lock", "a")
    await until(lambda: partition.queued() == 1)
    reading = third.acquire("read_lock", "a")
    await until(lambda: partition.queued() == 2)
    await first.release("a")
    assert partition.queued() == 2, "one reader is left"
    await second.release("a")
    assert await writing
    assert not await other.acquire("read_lock", "a", blocking_timeout=0)
    assert not await other.acquire("acquire_lock", "a", blocking_timeout=0)
    assert partition.queued() == 1
    await writer.release("a")
    assert await reading
    assert not await other.acquire("write_lock", "a", blocking_timeout=0)
    assert await other.acquire("read_lock", "a", blocking_timeout=0)
    await third.release("a")
    await other.release("a")
    assert partition.empty()


@KINDS
async def test_a_writer_that_gives_up_lets_readers_in(owner: Owners, partition: Partition, kind: str) -> None:
    holder, writer, reader = (owner(kind) for _ in range(3))
    assert await holder.acquire("read_lock", "a")
    writing = writer.acquire("write_lock", "a", **({} if kind == "task" else {"blocking_timeout": 1.0}))
    await until(lambda: partition.queued() == 1)
    reading = reader.acquire("read_lock", "a")
    await until(lambda: partition.queued() == 2)
    if kind == "task":
        writer.give_up()
        with pytest.raises(asyncio.CancelledError):
            await writing
    else:
        assert not await writing
    assert await reading
    await reader.release("a")
    await holder.release("a")
    assert partition.empty()


async def test_a_writer_that_dies_lets_readers_in(valkey_url: str, unique: str, partition: Partition) -> None:
    """Readers of another process hold the lock all the time."""
    partition.used_before()
    async with (
        manager_at(valkey_url, unique) as locks,
        # Its address differs, so it is a session of its own.
        manager_at(f"{valkey_url}?connect_timeout=4", unique) as other,
        locks.read_lock("a", 3.0),
    ):
        writer = python(WRITER, valkey_url, unique)
        await until(lambda: partition.queued() == 1)
        reader = other.read_lock("a", 3.0)
        reading = asyncio.create_task(reader.acquire())
        await until(lambda: partition.queued() == 2)
        writer.kill()
        writer.communicate()
        assert await asyncio.wait_for(reading, LIMIT)
        await reader.release()


@pytest.mark.parametrize("turn", range(4))
async def test_all_readers_follow_a_writer_that_died(
    valkey_url: str, unique: str, partition: Partition, turn: int
) -> None:
    """Whichever of them finds that it has died."""
    partition.used_before()
    async with (
        manager_at(valkey_url, unique) as locks,
        manager_at(f"{valkey_url}?connect_timeout=4", unique) as other,
    ):
        holder = python(HOLDER, valkey_url, unique)
        assert holder.stdout is not None
        await asyncio.to_thread(holder.stdout.readline)
        readers = [locks.read_lock("a", 2.0), other.read_lock("a", 2.0)]
        reading = []
        for number, reader in enumerate(readers, 1):
            reading.append(asyncio.create_task(reader.acquire()))
            await until(lambda number=number: partition.queued() == number)
        await asyncio.sleep(0.1 * turn)
        holder.kill()
        holder.communicate()
        assert await asyncio.wait_for(reading[0], LIMIT)
        assert await asyncio.wait_for(reading[1], 2.0)
        for reader in readers:
            await reader.release()


async def test_dead_readers_do_not_keep_a_writer_out(owner: Owners, partition: Partition) -> None:
    living, writer, dead = owner(), owner(), [owner("process"), owner("process")]
    for one in [living, *dead]:
        assert await one.acquire("read_lock", "a", 1.0)
    writing = writer.acquire("write_lock", "a")
    await until(lambda: partition.queued() == 1)
    await living.release("a")
    for one in dead:
        one.process.kill()
    assert await writing
    await writer.release("a")
    assert not partition.queued()


@KINDS
async def test_permits_go_to_the_next_in_order(owner: Owners, partition: Partition, kind: str) -> None:
    owners = [owner(kind) for _ in range(6)]
    asked = []
    for number, one in enumerate(owners):
        asked.append(one.acquire("semaphore", "s", 2))
        if number < 2:
            assert await asked[number]
        await until(lambda: partition.queued() == max(0, len(asked) - 2))
    for leaves, comes in [(1, 2), (2, 3), (0, 4), (4, 5)]:
        await owners[leaves].release("s")
        assert await asked[comes]
        assert not any(one.done() for one in asked[comes + 1 :])
    await owners[3].release("s")
    await owners[5].release("s")
    assert partition.empty()


async def test_tasks_and_threads_respect_the_permits(
    locks: DistributedLockManager, partition: Partition
) -> None:
    inside, most, counting = 0, 0, threading.Lock()

    def count(by: int) -> None:
        nonlocal inside, most
        with counting:
            inside += by
            most = max(most, inside)

    async def task() -> None:
        async with locks.semaphore("s", 3, blocking_timeout=LIMIT):
            count(1)
            await until(lambda: most == 3)
            count(-1)

    def thread() -> None:
        with locks.semaphore("s", 3, blocking_timeout=LIMIT):
            count(1)
            wait_until(lambda: most == 3)
            count(-1)

    await asyncio.gather(*(task() for _ in range(10)), *(asyncio.to_thread(thread) for _ in range(4)))
    assert (inside, most) == (0, 3)
    assert partition.empty()


CROWD = """
import sys, threading, redis
from support.locks import LIMIT, manager_at, wait_until
url, namespace = sys.argv[1:]
counts = redis.Redis.from_url(url)

def work():
    for _ in range(10):
        with locks.semaphore("s", 3, blocking_timeout=LIMIT):
            seen.append(counts.incr(namespace + "-inside"))
            counts.lpush(namespace + "-seen", seen[-1])
            # Until it was full once, so that processes meet.
            wait_until(lambda: b"3" in counts.lrange(namespace + "-seen", 0, -1))
            counts.decr(namespace + "-inside")

seen = []
with manager_at(url, namespace) as locks:
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(len(seen), max(seen))
"""


async def test_processes_respect_the_permits(valkey_url: str, unique: str, partition: Partition) -> None:
    crowds = [python(CROWD, valkey_url, unique) for _ in range(2)]
    seen = []
    for crowd in crowds:
        out, err = await asyncio.to_thread(crowd.communicate)
        assert crowd.returncode == 0, err
        count, most = map(int, out.split())
        assert count == 40
        seen.append(most)
    assert max(seen) == 3
    assert partition.empty()


@pytest.mark.parametrize(
    ("held", "asked", "used"),
    [
        (("semaphore", "a", 2), ("semaphore", "a", 3), "a semaphore of 2 permits"),
        (("semaphore", "a", 1), ("acquire_lock", "a"), "a semaphore of 1 permits"),
        (("semaphore", "a", 2), ("read_lock", "a"), "a semaphore of 2 permits"),
        (("acquire_lock", "a"), ("semaphore", "a", 1), "a lock with one holder"),
        (("write_lock", "a"), ("semaphore", "a", 2), "a lock with one holder"),
        (("read_lock", "a"), ("semaphore", "a", 2), "a lock that readers share"),
    ],
)
async def test_one_kind_at_a_time(
    owner: Owners, partition: Partition, held: tuple[Any, ...], asked: tuple[Any, ...], used: str
) -> None:
    holder, task, thread = owner(), owner(), owner("thread")
    assert await holder.acquire(*held)
    for other in (task, thread):
        with pytest.raises(LockMismatch, match=used) as caught:
            await other.acquire(*asked)
        assert not caught.value.retryable
        with pytest.raises(LockMismatch):
            await other.acquire(*asked, blocking_timeout=0)
    await holder.release("a")
    assert await task.acquire(*asked), "free again for any kind"
    await task.release("a")
    assert partition.empty()


@pytest.mark.parametrize("kind", ["task", "thread"])
@pytest.mark.parametrize(("make", "more"), [("acquire_lock", ()), ("write_lock", ()), ("semaphore", (1,))])
async def test_higher_priorities_first(
    owner: Owners, partition: Partition, kind: str, make: str, more: tuple[int, ...]
) -> None:
    priorities = [0, 5, -4999, 4999, 5, 0]
    holder, *others = (owner(kind) for _ in range(1 + len(priorities)))
    assert await holder.acquire(make, "a", *more)
    asked = []
    for one, priority in zip(others, priorities, strict=True):
        asked.append(one.acquire(make, "a", *more, priority=priority))
        await until(lambda: partition.queued() == len(asked))
    before = holder
    for at in (3, 1, 4, 0, 5, 2):
        await before.release("a")
        assert await asked[at], "the next in order"
        assert sum(one.done() for one in asked) == len(asked) - partition.queued()
        before = others[at]
    await before.release("a")
    assert partition.empty()


async def test_a_reader_of_a_higher_priority_passes_a_writer(owner: Owners, partition: Partition) -> None:
    first, writer, same, higher = (owner() for _ in range(4))
    assert await first.acquire("read_lock", "a")
    writing = writer.acquire("write_lock", "a", priority=2)
    await until(lambda: partition.queued() == 1)
    assert not await same.acquire("read_lock", "a", blocking_timeout=0, priority=2)
    assert await higher.acquire("read_lock", "a", blocking_timeout=0, priority=3)
    await first.release("a")
    assert partition.queued() == 1
    await higher.release("a")
    assert await writing
    await writer.release("a")


@pytest.mark.parametrize("priority", [5000, -5000, 1.0, True, False, "1", "", None, 10**30])
@pytest.mark.parametrize("make", ["acquire_lock", "read_lock", "write_lock", "try_lock", "with_lock"])
async def test_bad_priorities(locks: DistributedLockManager, make: str, priority: object) -> None:
    with pytest.raises(InvalidArgument, match="^priority: .* from -4999 to 4999") as caught:
        getattr(locks, make)("a", priority=priority)
    assert caught.value.field == "priority"


@pytest.mark.parametrize("permits", [0, -1, 1.0, True, "2", None, 1_000_001])
async def test_bad_permits(locks: DistributedLockManager, permits: object) -> None:
    with pytest.raises(InvalidArgument, match="^permits: .* from 1 to 1,000,000"):
        locks.semaphore("a", permits)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_hold", [0, -1, 0.05, "1", float("nan"), 10**9, True])
@pytest.mark.parametrize("make", ["acquire_lock", "read_lock", "with_lock"])
async def test_bad_limits(locks: DistributedLockManager, make: str, max_hold: object) -> None:
    with pytest.raises(InvalidArgument, match="^max_hold: "):
        getattr(locks, make)("a", max_hold=max_hold)


async def test_a_decorator_knows_the_arguments_of_a_lock(locks: DistributedLockManager) -> None:
    for wrong in ({"on_lost": "explode"}, {"blocking_timeout": -1}, {"owner": ""}, {"release": "later"}):
        with pytest.raises(InvalidArgument, match=f"^{next(iter(wrong))}: "):
            locks.with_lock("a", **wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="^timeout: "):
        locks.with_lock("a", 0)
    with pytest.raises(TypeError, match="patience"):
        locks.with_lock("a", patience=1)  # type: ignore[call-arg]


TRIES = pytest.mark.parametrize(
    ("make", "more"), [("acquire_lock", ()), ("read_lock", ()), ("write_lock", ()), ("semaphore", (1,))]
)


@TRIES
async def test_what_is_only_tried_never_waits(
    locks: DistributedLockManager, owner: Owners, partition: Partition, make: str, more: tuple[int, ...]
) -> None:
    holder = owner()
    assert await holder.acquire("semaphore" if more else "write_lock", "a", *more)

    async def tried(**how: Any) -> None:
        lock = getattr(locks, make)("a", *more, blocking_timeout=0)
        with pytest.raises(LockTimeout, match="is held by another"):
            async with lock:
                pytest.fail("two holders")
        assert not await lock.acquire()
        lock = getattr(locks, make)("a", *more)
        assert not await lock.acquire(blocking=False)
        assert not await lock.acquire(blocking_timeout=0)
        assert not await lock.acquire(blocking_timeout=0.05)
        with pytest.raises(InvalidArgument, match="leave it out when blocking is False"):
            await lock.acquire(blocking=False, blocking_timeout=1)

    def tried_by_a_thread() -> None:
        lock = getattr(locks, make)("a", *more, blocking_timeout=0)
        with pytest.raises(LockTimeout, match="is held by another"), lock:
            pytest.fail("two holders")
        assert not lock.acquire_sync()
        lock = getattr(locks, make)("a", *more)
        assert not lock.acquire_sync(blocking=False)
        assert not lock.acquire_sync(blocking_timeout=0.05)
        with pytest.raises(InvalidArgument, match="leave it out when blocking is False"):
            lock.acquire_sync(blocking=False, blocking_timeout=1)

    await tried()
    await asyncio.to_thread(tried_by_a_thread)
    assert not partition.queued()
    await holder.release("a")
    lock = getattr(locks, make)("a", *more)
    assert await lock.acquire(blocking=False)
    await lock.release()
    await asyncio.to_thread(lambda: lock.acquire_sync(blocking=False) and lock.release_sync())
    assert partition.empty()


async def test_try_lock(locks: DistributedLockManager, owner: Owners) -> None:
    async with locks.try_lock("a", 5.0, on_lost="flag") as lock:
        assert (lock.held, lock.timeout) == (True, 5.0)
    other = owner()
    assert await other.acquire("acquire_lock", "a")
    with pytest.raises(LockTimeout, match="is held by another"):
        async with locks.try_lock("a"):
            pytest.fail("two holders")

    def thread() -> None:
        with pytest.raises(LockTimeout), locks.try_lock("a"):
            pytest.fail("two holders")

    await asyncio.to_thread(thread)
    with pytest.raises(TypeError, match="blocking_timeout"):
        locks.try_lock("a", blocking_timeout=1)  # type: ignore[call-arg]


async def test_over_several_loops(valkey_url: str, unique: str, partition: Partition) -> None:
    locks = manager_at(valkey_url, unique, blocking_timeout=LIMIT)
    met = threading.Barrier(3)
    inside: list[int] = []

    async def work(number: int) -> None:
        async with locks.read_lock("a"):
            # All loops are readers at once.
            await asyncio.to_thread(met.wait, LIMIT)
        async with locks.write_lock("a"):
            inside.append(number)
            assert inside == [number]
            inside.remove(number)
        async with locks.semaphore("s", 2):
            inside.append(number)
            assert len(inside) <= 2
            inside.remove(number)

    def loop(number: int) -> None:
        asyncio.run(work(number))

    await asyncio.gather(*(asyncio.to_thread(loop, number) for number in range(3)))
    await locks.aclose()
    assert partition.empty()


async def test_decorators(locks: DistributedLockManager, owner: Owners, partition: Partition) -> None:
    order: list[str] = []

    @locks.with_lock("a", reentrant=True, max_hold=60.0)
    async def depth(left: int) -> int:
        return 1 + await depth(left - 1) if left else 0

    @locks.with_lock("a", reentrant=True)
    def depth_of_thread(left: int) -> int:
        return 1 + depth_of_thread(left - 1) if left else 0

    @locks.with_lock("a", priority=7, blocking_timeout=LIMIT)
    async def first() -> None:
        order.append("first")

    @locks.with_lock("a", blocking_timeout=LIMIT, release="pipelined", owner="second")
    async def second() -> None:
        order.append("second")

    assert await depth(3) == 3
    assert await asyncio.to_thread(depth_of_thread, 3) == 3
    holder = owner()
    assert await holder.acquire("acquire_lock", "a")
    calls = [asyncio.create_task(second())]
    await until(lambda: partition.queued() == 1)
    calls.append(asyncio.create_task(first()))
    await until(lambda: partition.queued() == 2)
    await holder.release("a")
    await asyncio.gather(*calls)
    assert order == ["first", "second"]
    await until(partition.empty)
