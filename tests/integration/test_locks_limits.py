"""How long a lock may be held, how long a loop may stand still, and who has to know of a grant.

Promises: after `max_hold` a lock ends, however alive its holder is: the body is cancelled into `LockLost`, a
thread is told, and the next one has it, even while the holder's interpreter is blocked; with `max_loop_stall`
a process whose event loop stands still gives up what it holds, is granted nothing meanwhile (`LoopStalled`),
and recovers; without it the lock is kept; with `wait_replicas` a lock counts once that many replicas know of
it, and is given back where they don't, or where nobody waits for them any more; whoever asked to be told of a
loss is told once, in its loop or in a thread.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.errors import (
    InvalidArgument,
    LockLost,
    LockNotOwned,
    LoopStalled,
    ReplicasMissing,
)
from support.locks import LIMIT, Partition, manager_at, python, until, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from dotmac.platform.distributed_locks import DistributedLockManager
    from support.owners import Owner

    Owners = Callable[..., Owner]


# ---- max_hold


async def test_a_body_is_ended(locks: DistributedLockManager, owner: Owners, partition: Partition) -> None:
    other = owner()
    with pytest.raises(LockLost, match=r"'a' .* was held for longer than max_hold"):
        async with locks.acquire_lock("a", max_hold=0.4) as lock:
            waiting = other.acquire("acquire_lock", "a")
            await until(lambda: partition.queued() == 1)
            await asyncio.sleep(LIMIT)
    assert not lock.held
    assert await waiting, "the engine has given it back"
    await other.release("a")
    assert partition.empty()


async def test_a_thread_is_told(locks: DistributedLockManager, owner: Owners, partition: Partition) -> None:
    other = owner()
    entered, gone = threading.Event(), threading.Event()

    def work() -> str:
        with pytest.raises(LockLost, match="max_hold"), locks.acquire_lock("a", max_hold=0.4) as lock:
            entered.set()
            wait_until(lambda: lock.lost)
            assert not lock.held
            gone.wait(LIMIT)
            return str(lock.lost.reason)
        return str(lock.lost.reason)

    thread = asyncio.create_task(asyncio.to_thread(work))
    await until(entered.is_set)
    assert await other.acquire("acquire_lock", "a"), "while the thread goes on"
    gone.set()
    await thread
    await other.release("a")
    assert partition.empty()


@pytest.mark.parametrize("make", ["read_lock", "write_lock", "semaphore"])
async def test_every_kind_has_an_end(locks: DistributedLockManager, partition: Partition, make: str) -> None:
    more = (2,) if make == "semaphore" else ()
    with pytest.raises(LockLost, match="max_hold"):
        async with getattr(locks, make)("a", *more, max_hold=0.2):
            await asyncio.sleep(LIMIT)
    await until(partition.empty)


async def test_longer_than_its_lease_and_shorter_than_its_limit(
    locks: DistributedLockManager, partition: Partition
) -> None:
    """The limit ends nothing before its time, and an end in time leaves nothing to be ended."""
    async with locks.acquire_lock("a", 0.3, max_hold=30.0) as lock:
        token = lock.fencing_token
        before = locks.stats()["heartbeats"]
        await until(lambda: locks.stats()["heartbeats"] > before + 5)
        assert lock.held
    async with locks.acquire_lock("a", max_hold=30.0) as lock:
        assert lock.fencing_token > token
    assert partition.empty()


BLOCKED = """
import ctypes, sys, threading
from support.locks import manager_at
with manager_at(sys.argv[1], sys.argv[2]) as locks:
    lock = locks.acquire_lock("a", max_hold=1.0)
    lock.acquire_sync()
    print("held")
    sys.stdin.readline()
    # It does not let go of the interpreter until somebody has written.
    ctypes.PyDLL(None).getchar()
    print(lock.held, lock.lost.reason)
"""


async def test_while_the_interpreter_is_blocked(
    owner: Owners, partition: Partition, valkey_url: str, unique: str
) -> None:
    other = owner()
    blocked = python(BLOCKED, valkey_url, unique)
    assert await asyncio.to_thread(blocked.stdout.readline) == "held\n"
    waiting = other.acquire("acquire_lock", "a")
    await until(lambda: partition.queued() == 1)
    blocked.stdin.write("block\n")
    blocked.stdin.flush()
    assert await waiting
    assert blocked.poll() is None
    out, err = await asyncio.to_thread(blocked.communicate, "go on\n")
    assert (blocked.returncode, out) == (0, "False it was held for longer than max_hold\n"), err
    await other.release("a")


# ---- max_loop_stall


@pytest.fixture
async def guarded(valkey_url: str, unique: str) -> AsyncIterator[DistributedLockManager]:
    async with manager_at(valkey_url, unique, max_loop_stall=0.3) as manager:
        yield manager


def holder_of(partition: Partition, name: str) -> str:
    return str(partition.client.hget(f"{partition.tag}:h", name)).split("\0")[2:3][0]


async def test_a_blocked_loop_loses_its_lock_and_recovers(
    guarded: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    other = owner("process")
    lock = guarded.acquire_lock("a", 1.0)
    await lock.acquire()
    mine = holder_of(partition, "a")
    waiting = other.acquire("acquire_lock", "a")
    await until(lambda: partition.queued() == 1)
    blocked, refused = threading.Event(), threading.Event()

    def thread() -> None:
        blocked.wait(LIMIT)

        def stalled() -> bool:
            try:
                with guarded.acquire_lock("b"):
                    return False
            except LoopStalled as error:
                assert error.retryable
                return True

        wait_until(stalled)
        refused.set()

    worker = asyncio.create_task(asyncio.to_thread(thread))
    await asyncio.sleep(0)
    blocked.set()
    # Not awaited: the loop stands still.
    wait_until(lambda: holder_of(partition, "a") != mine)
    assert refused.is_set() or refused.wait(LIMIT)
    assert lock.lost
    assert not lock.held
    await worker
    assert await waiting
    with pytest.raises(LockLost):
        await lock.release()

    async def recovered() -> bool:
        try:
            async with guarded.acquire_lock("c") as again:
                return again.held
        except LoopStalled:
            return False

    async with asyncio.timeout(LIMIT):
        while not await recovered():
            await asyncio.sleep(0)
    await other.release("a")
    assert await lock.acquire()
    await lock.release()
    assert partition.empty()


async def test_a_body_learns_of_it_when_the_loop_turns(
    guarded: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    other = owner("process")
    with pytest.raises(LockLost):
        async with guarded.acquire_lock("a", 1.0):
            mine = holder_of(partition, "a")
            waiting = other.acquire("acquire_lock", "a")
            await until(lambda: partition.queued() == 1)
            wait_until(lambda: holder_of(partition, "a") != mine)
            await asyncio.sleep(LIMIT)
    assert await waiting
    await other.release("a")


async def test_a_loop_that_turns_keeps_its_lock(
    guarded: DistributedLockManager, partition: Partition
) -> None:
    async with guarded.acquire_lock("a", 0.6) as lock:
        before = guarded.stats()["heartbeats"]
        await until(lambda: guarded.stats()["heartbeats"] > before + 6)
        assert lock.held
    assert partition.empty()


async def test_a_blocked_loop_that_holds_nothing_stalls_nobody(
    guarded: DistributedLockManager, partition: Partition
) -> None:
    """The guard ends with the lease; and a thread's lease has none."""
    async with guarded.acquire_lock("a"):
        pass
    locked = threading.Event()

    def thread() -> None:
        with guarded.acquire_lock("b", 0.5) as lock:
            before = guarded.stats()["heartbeats"]
            wait_until(lambda: guarded.stats()["heartbeats"] > before + 6)
            assert lock.held
        locked.set()

    worker = asyncio.create_task(asyncio.to_thread(thread))
    await asyncio.sleep(0)
    wait_until(locked.is_set)
    await worker
    assert partition.empty()


async def test_without_it_a_blocked_loop_keeps_its_lock(
    locks: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    other = owner("process")
    async with locks.acquire_lock("a", 0.5) as lock:
        waiting = other.acquire("acquire_lock", "a")
        await until(lambda: partition.queued() == 1)
        before = locks.stats()["heartbeats"]
        wait_until(lambda: locks.stats()["heartbeats"] > before + 8)
        assert lock.held
        assert partition.queued() == 1
    assert await waiting
    await other.release("a")


async def test_what_was_taken_over_is_guarded_too(
    guarded: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    other = owner("process")
    lock = guarded.acquire_lock("a", 1.0)
    await lock.acquire()
    taken = await guarded.adopt(await lock.offer(), 1.0)
    mine = holder_of(partition, "a")
    waiting = other.acquire("acquire_lock", "a")
    await until(lambda: partition.queued() == 1)
    wait_until(lambda: holder_of(partition, "a") != mine)
    assert taken.lost
    assert await waiting
    with pytest.raises(LockLost):
        await taken.release()
    await other.release("a")


@pytest.mark.parametrize("limit", [0, -1, "1", 0.01, float("nan")])
async def test_bad_stalls(valkey_url: str, unique: str, limit: object) -> None:
    with pytest.raises(InvalidArgument, match="^max_loop_stall: "):
        manager_at(valkey_url, unique, max_loop_stall=limit)


# ---- wait_replicas


@pytest.fixture
def replica(own_valkey: EmbeddedValkey) -> Iterator[EmbeddedValkey]:
    """A replica of `own_valkey`."""
    args = ("--replicaof", f"127.0.0.1 {own_valkey.port}", "--repl-ping-replica-period", "1")
    view = Partition(own_valkey.url, "any")
    view.client.config_set("repl-diskless-sync-delay", 0)
    with EmbeddedValkey(args=args) as server:
        wait_until(lambda: view.client.info("replication")["connected_slaves"] == 1)
        yield server
    view.client.close()


@pytest.fixture
async def replicated(own_valkey: EmbeddedValkey, unique: str) -> AsyncIterator[DistributedLockManager]:
    async with manager_at(own_valkey.url, unique, wait_replicas=1, request_timeout=2.0) as manager:
        yield manager


async def test_a_replica_knows_of_the_grant(
    replicated: DistributedLockManager, own_valkey: EmbeddedValkey, replica: EmbeddedValkey, unique: str
) -> None:
    there = Partition(replica.url, unique)
    for make in ("acquire_lock", "read_lock"):
        async with getattr(replicated, make)("a") as lock:
            assert lock.held
            assert there.held(), "the replica knows of it before the body begins"
        lock = getattr(replicated, make)("a")
        assert await lock.acquire()
        assert there.held()
        await lock.release()

        def thread(make: str = make) -> None:
            with getattr(replicated, make)("a") as lock:
                assert lock.held
                assert there.held()

        await asyncio.to_thread(thread)
    there.client.close()


async def test_a_replica_that_is_gone(
    replicated: DistributedLockManager, own_valkey: EmbeddedValkey, replica: EmbeddedValkey, unique: str
) -> None:
    here = Partition(own_valkey.url, unique)
    async with replicated.acquire_lock("a"):
        pass
    replica.kill()
    lock = replicated.acquire_lock("a")
    with pytest.raises(ReplicasMissing, match="lock 'a': 0 of 1 replicas know of the grant") as caught:
        async with lock:
            pytest.fail("nobody knows of it")
    assert caught.value.retryable
    assert not lock.held
    with pytest.raises(ReplicasMissing):
        await lock.acquire()

    def thread() -> None:
        with pytest.raises(ReplicasMissing):
            lock.acquire_sync()
        with pytest.raises(ReplicasMissing), lock:
            pytest.fail("nobody knows of it")

    await asyncio.to_thread(thread)
    await until(here.empty)
    replica.start()
    wait_until(lambda: here.client.info("replication")["connected_slaves"] == 1)
    async with lock:
        assert lock.held
    here.client.close()


async def test_more_replicas_than_there_are(
    own_valkey: EmbeddedValkey, replica: EmbeddedValkey, unique: str
) -> None:
    here = Partition(own_valkey.url, unique)
    async with manager_at(own_valkey.url, unique, wait_replicas=2, request_timeout=1.0) as locks:
        with pytest.raises(ReplicasMissing, match="1 of 2 replicas"):
            await locks.acquire_lock("a").acquire()
        with pytest.raises(ReplicasMissing, match="1 of 2 replicas"):
            async with locks.acquire_locks(["a", "b"]):
                pytest.fail("too few know of it")
        await until(here.empty)
    here.client.close()


@pytest.mark.parametrize("form", ["context", "by hand"])
async def test_cancelled_while_the_replica_is_awaited(
    own_valkey: EmbeddedValkey, replica: EmbeddedValkey, unique: str, form: str
) -> None:
    here = Partition(own_valkey.url, unique)
    async with manager_at(own_valkey.url, unique, wait_replicas=1, request_timeout=30.0) as locks:
        async with locks.acquire_lock("a"):
            pass
        replica.pause()
        lock = locks.acquire_lock("a")
        task = asyncio.create_task(lock.acquire() if form == "by hand" else lock.__aenter__())
        # It is granted, and the replica is waited for, again and again.
        await until(lambda: here.client.info("clients")["blocked_clients"])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(here.empty)
        assert not lock.held
        replica.resume()
        async with lock:
            assert lock.held
    here.client.close()


async def test_leases_are_renewed_while_the_replica_is_awaited(
    own_valkey: EmbeddedValkey, replica: EmbeddedValkey, unique: str
) -> None:
    async with (
        manager_at(own_valkey.url, unique, wait_replicas=1, request_timeout=30.0) as locks,
        locks.acquire_lock("a", 2.0) as lock,
    ):
        replica.pause()
        # One after another on one connection, that many waits of the server would outlast the lease.
        others = [locks.acquire_lock(f"other-{number}") for number in range(300)]
        waiting = [asyncio.create_task(other.acquire()) for other in others]
        before = locks.stats()["heartbeats"]
        await until(lambda: locks.stats()["heartbeats"] > before + 10)
        assert lock.held
        assert not any(task.done() for task in waiting)
        replica.resume()
        assert all(await asyncio.gather(*waiting))
        for other in others:
            await other.release()


@pytest.mark.parametrize("count", [-1, 1.0, "1", True])
async def test_bad_counts(valkey_url: str, unique: str, count: object) -> None:
    with pytest.raises(InvalidArgument, match="^wait_replicas: "):
        manager_at(valkey_url, unique, wait_replicas=count)


# ---- who is told


async def test_callbacks_in_a_loop(locks: DistributedLockManager, partition: Partition) -> None:
    told: list[tuple[str, str, int]] = []

    def note(who: str) -> Callable[[str], None]:
        return lambda reason: told.append((who, reason, threading.get_ident()))

    def fails(reason: str) -> None:
        told.append(("fails", reason, 0))
        raise ValueError(reason)

    lock = locks.acquire_lock("a", max_hold=0.3)
    await lock.acquire()
    signal = lock.lost
    signal.add_callback(note("first"))
    signal.add_callback(fails)
    signal.add_callback(note("second"))
    await until(lambda: len(told) == 3)
    reason = "it was held for longer than max_hold"
    assert signal.reason == reason
    assert told == [
        ("first", reason, threading.get_ident()),
        ("fails", reason, 0),
        ("second", reason, threading.get_ident()),
    ]
    signal.add_callback(note("late"))
    assert told[3:] == [("late", reason, threading.get_ident())], "at once"
    with pytest.raises(LockLost):
        await lock.release()
    signal.add_callback(note("too late"))
    await until(partition.empty)
    assert len(told) == 4


async def test_callbacks_are_called_once_however_late_the_loop(locks: DistributedLockManager) -> None:
    """It is lost while the loop does something else, and only asked about before that is told."""
    told: list[str] = []
    lock = locks.acquire_lock("a", max_hold=0.2)
    await lock.acquire()
    lock.lost.add_callback(told.append)
    wait_until(lambda: lock.lost)
    lock.lost.add_callback(told.append)
    assert len(told) == 2
    await lock.lost
    await asyncio.sleep(0)
    async with locks.acquire_lock("b"):
        assert len(told) == 2
    with pytest.raises(LockLost):
        await lock.release()


async def test_callbacks_of_a_thread(locks: DistributedLockManager, partition: Partition) -> None:
    told: list[tuple[str, int]] = []
    here = threading.get_ident()

    def work() -> int:
        with pytest.raises(LockLost), locks.acquire_lock("a", max_hold=0.3) as lock:
            lock.lost.add_callback(lambda reason: told.append((reason, threading.get_ident())))
            wait_until(lambda: told)
            lock.lost.add_callback(lambda reason: told.append((reason, threading.get_ident())))
        return threading.get_ident()

    thread = await asyncio.to_thread(work)
    assert [reason for reason, _ in told] == ["it was held for longer than max_hold"] * 2
    assert told[0][1] not in (thread, here), "while the thread is busy"
    assert told[1][1] == thread, "at once"
    await until(partition.empty)


async def test_callbacks_of_what_was_given_back(locks: DistributedLockManager) -> None:
    told: list[str] = []
    for lock in (locks.acquire_lock("a", max_hold=0.3), locks.acquire_lock("b", max_hold=0.3)):
        async with lock:
            signal = lock.lost
            signal.add_callback(told.append)

    def thread() -> None:
        with locks.acquire_lock("a", max_hold=0.3) as lock:
            lock.lost.add_callback(told.append)
        assert not locks._link._shared.told, "nothing is kept of it"  # type: ignore[union-attr]

    await asyncio.to_thread(thread)
    last = locks.acquire_lock("c", max_hold=0.4)
    await last.acquire()
    await last.lost
    assert not told, "those would have been told before"
    with pytest.raises(LockNotOwned, match="it can't be lost"):
        locks.acquire_lock("a").lost.add_callback(told.append)
    with pytest.raises(LockLost):
        await last.release()
