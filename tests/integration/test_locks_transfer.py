"""Handing a lock over.

Promises: an offered lock goes to whoever has the token, in this process or another, under the same fencing
token, and to nobody else as long as the offer stands, however many wait; its giver holds it no longer; a
token serves once; an offer that nobody takes up goes to the next in the queue; read locks and permits are
handed over as they are, beside those of others; what is no token is refused as such.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.errors import InvalidArgument, LockLost, LockNotOffered, LockNotOwned
from support.locks import LIMIT, Partition, manager_at, python, until
from support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.distributed_locks import DistributedLockManager
    from support.owners import Owner

    Owners = Callable[..., Owner]

ADOPTER = """
import sys
from support.locks import manager_at
with manager_at(sys.argv[1], sys.argv[2]) as locks:
    lock = locks.adopt_sync(sys.stdin.readline().rstrip(chr(10)))
    print(lock.name, lock.fencing_token, lock.held)
    sys.stdin.readline()
    lock.release_sync()
    print("given back")
"""


async def test_in_one_process(locks: DistributedLockManager, partition: Partition) -> None:
    lock = locks.acquire_lock("a")
    await lock.acquire()
    fence = lock.fencing_token
    token = await lock.offer()
    assert not lock.held
    with pytest.raises(LockNotOwned):
        _ = lock.fencing_token
    with pytest.raises(LockNotOwned):
        await lock.release()
    with pytest.raises(LockNotOwned):
        await lock.offer()
    assert partition.held() == 1
    taken = await locks.adopt(token, 7.0)
    assert (taken.name, taken.timeout, taken.held, taken.fencing_token) == ("a", 7.0, True, fence)
    await taken.release()
    assert partition.empty()


async def test_between_threads(locks: DistributedLockManager, partition: Partition) -> None:
    def give() -> tuple[str, int]:
        lock = locks.acquire_lock("a")
        lock.acquire_sync()
        fence = lock.fencing_token
        token = lock.offer_sync()
        assert not lock.held
        with pytest.raises(LockNotOwned):
            lock.release_sync()
        return token, fence

    def take(token: str) -> int:
        lock = locks.adopt_sync(token)
        assert lock.held
        fence = lock.fencing_token
        lock.release_sync()
        return fence

    token, fence = await asyncio.to_thread(give)
    assert await asyncio.to_thread(take, token) == fence
    assert partition.empty()


async def test_out_of_a_body(locks: DistributedLockManager, partition: Partition) -> None:
    async with locks.acquire_lock("a") as lock:
        token = await lock.offer()
        assert not lock.held
    taken = await locks.adopt(token)
    assert taken.held, "leaving the body gives nothing back"
    await taken.release()
    assert partition.empty()


async def test_to_another_process_past_those_who_wait(
    locks: DistributedLockManager, owner: Owners, partition: Partition, valkey_url: str, unique: str
) -> None:
    waiter, trier = owner(), owner("process")
    lock = locks.acquire_lock("a")
    await lock.acquire()
    fence = lock.fencing_token
    waiting = waiter.acquire("acquire_lock", "a", priority=4999)
    await until(lambda: partition.queued() == 1)
    adopter = python(ADOPTER, valkey_url, unique)
    token = await lock.offer(LIMIT)
    assert partition.queued() == 1
    assert not await trier.acquire("try_lock", "a")
    adopter.stdin.write(f"{token}\n")
    adopter.stdin.flush()
    assert await asyncio.to_thread(adopter.stdout.readline) == f"a {fence} True\n"
    assert partition.queued() == 1
    assert not await trier.acquire("try_lock", "a")
    assert not waiting.done()
    out, err = await asyncio.to_thread(adopter.communicate, "\n")
    assert (adopter.returncode, out) == (0, "given back\n"), err
    assert await waiting
    assert waiter.held["a"].fencing_token > fence
    await waiter.release("a")
    assert partition.empty()


async def test_an_adopter_that_dies_loses_it_to_those_who_wait(
    locks: DistributedLockManager, owner: Owners, partition: Partition, valkey_url: str, unique: str
) -> None:
    waiter = owner()
    lock = locks.acquire_lock("a", 1.0)
    await lock.acquire()
    waiting = waiter.acquire("acquire_lock", "a")
    await until(lambda: partition.queued() == 1)
    adopter = python(ADOPTER.replace("rstrip(chr(10))", "rstrip(chr(10)), 1.0"), valkey_url, unique)
    adopter.stdin.write(f"{await lock.offer(LIMIT)}\n")
    adopter.stdin.flush()
    assert (await asyncio.to_thread(adopter.stdout.readline)).endswith("True\n")
    adopter.kill()
    assert await waiting
    await waiter.release("a")


async def test_what_was_taken_over_is_kept_alive(
    locks: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    """For longer than the offer stood, and longer than its lease."""
    waiter = owner()
    lock = locks.acquire_lock("a")
    await lock.acquire()
    waiting = waiter.acquire("acquire_lock", "a")
    await until(lambda: partition.queued() == 1)
    taken = await locks.adopt(await lock.offer(0.3), 0.5)
    heartbeats = locks.stats()["heartbeats"]
    begun = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() - begun > 1.2)
    assert locks.stats()["heartbeats"] > heartbeats
    assert taken.held
    assert not waiting.done()
    await taken.release()
    assert await waiting
    await waiter.release("a")


async def test_a_token_serves_once(locks: DistributedLockManager, partition: Partition) -> None:
    lock = locks.acquire_lock("a")
    await lock.acquire()
    token = await lock.offer()
    takers = await asyncio.gather(*(locks.adopt(token) for _ in range(5)), return_exceptions=True)
    (taken,) = [one for one in takers if not isinstance(one, LockNotOffered)]
    assert not isinstance(taken, BaseException)
    with pytest.raises(LockNotOffered, match="'a' is not offered") as caught:
        await locks.adopt(token)
    assert not caught.value.retryable
    with pytest.raises(LockNotOffered):
        await asyncio.to_thread(locks.adopt_sync, token)
    again = await taken.offer()
    assert again == token, "the holding is the same one"
    last = await locks.adopt(again)
    assert not taken.held
    await last.release()
    with pytest.raises(LockNotOffered):
        await locks.adopt(token)
    assert partition.empty()


async def test_an_offer_runs_out(locks: DistributedLockManager, owner: Owners, partition: Partition) -> None:
    waiter = owner()
    lock = locks.acquire_lock("a")
    await lock.acquire()
    fence = lock.fencing_token
    waiting = waiter.acquire("acquire_lock", "a")
    await until(lambda: partition.queued() == 1)
    token = await lock.offer(0.3)
    assert await waiting, "the next in the queue"
    assert waiter.held["a"].fencing_token > fence
    with pytest.raises(LockNotOffered):
        await locks.adopt(token)
    await waiter.release("a")
    assert await lock.acquire(), "the giver may have it again"
    await lock.release()
    assert partition.empty()


async def test_an_offer_that_ran_out_is_free_for_all(locks: DistributedLockManager, owner: Owners) -> None:
    lock, other = locks.acquire_lock("a"), owner()
    await lock.acquire()
    token = await lock.offer(0.1)
    assert await other.acquire("acquire_lock", "a")
    with pytest.raises(LockNotOffered):
        await locks.adopt(token)
    await other.release("a")


async def test_an_offer_that_nobody_takes_up_leaves_nothing_behind(
    locks: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    """Whatever else the lock was looked at for meanwhile, whose end came first."""
    beside, writer = owner(), owner()
    lock = locks.read_lock("a")
    await lock.acquire()
    assert await beside.acquire("read_lock", "a", 0.5)
    await lock.offer(2.0)
    assert not await writer.acquire("write_lock", "a", blocking_timeout=0.1)
    await asyncio.sleep(1.0)
    await beside.release("a")
    assert partition.held() == 2, "the lock, and who has offered it"
    await until(partition.empty)


async def test_an_offer_that_comes_too_late_leaves_the_lock_free(
    valkey_url: str, unique: str, owner: Owners, partition: Partition
) -> None:
    """The server refuses it; and the heartbeat behind it must not bring the lease to life again, which nobody
    would give back."""
    with Proxy(valkey_url) as proxy:
        async with manager_at(proxy.url, unique) as cut_off:
            lock = cut_off.acquire_lock("a", 1.0)
            await lock.acquire()
            heartbeats = cut_off.stats()["heartbeats"]
            await until(lambda: cut_off.stats()["heartbeats"] > heartbeats)
            proxy.stall()
            await asyncio.sleep(0.05)
            offering = asyncio.create_task(lock.offer(5.0))
            await asyncio.sleep(1.4)
            proxy.flow()
            with pytest.raises(LockLost):
                await offering
            other = owner()
            assert await asyncio.wait_for(other.acquire("acquire_lock", "a"), 5)
            await other.release("a")
            assert partition.empty()


@pytest.mark.parametrize(("length", "within"), [(0.5, 20.0), (60.0, 2.0)])
async def test_an_extension_that_an_offer_has_overtaken(
    valkey_url: str, unique: str, owner: Owners, partition: Partition, length: float, within: float
) -> None:
    """Both were lost with the connection, and the offer is sent again first: it stands for its own time."""
    with Proxy(valkey_url) as proxy:
        async with manager_at(proxy.url, unique) as locks, manager_at(valkey_url, unique) as adopter:
            lock = locks.acquire_lock("a", 10.0)
            await lock.acquire()
            proxy.stall()
            await asyncio.sleep(0.05)
            extending = asyncio.ensure_future(lock.extend(length))
            await asyncio.sleep(0.05)
            offering = asyncio.ensure_future(lock.offer(within))
            await asyncio.sleep(0.05)
            proxy.drop()
            proxy.flow()
            _, token = await asyncio.gather(extending, offering, return_exceptions=True)
            assert isinstance(token, str)
            if within > length:
                await asyncio.sleep(length + 0.2)
                await (await adopter.adopt(token)).release()
            else:
                waiter = owner()
                assert await asyncio.wait_for(waiter.acquire("acquire_lock", "a"), within + 2)
                await waiter.release("a")
    assert partition.empty()


@pytest.mark.parametrize(
    ("make", "more", "beside"),
    [("read_lock", (), "read_lock"), ("semaphore", (2,), "semaphore")],
)
async def test_those_that_several_hold(
    locks: DistributedLockManager,
    owner: Owners,
    partition: Partition,
    make: str,
    more: tuple[int, ...],
    beside: str,
) -> None:
    other, late = owner(), owner()
    lock = getattr(locks, make)("a", *more)
    await lock.acquire()
    fence = lock.fencing_token
    assert await other.acquire(beside, "a", *more)
    late_one: dict[str, Any] = {"blocking_timeout": 0}
    token = await lock.offer()
    late_kind = ("write_lock", "a") if make == "read_lock" else (make, "a", *more)
    assert not await late.acquire(*late_kind, **late_one), "it counts while it is offered"
    taken = await locks.adopt(token)
    assert (taken.held, taken.fencing_token) == (True, fence)
    await other.release("a")
    if make == "read_lock":
        assert not await late.acquire(*late_kind, **late_one)
    else:
        assert await late.acquire(*late_kind, **late_one)
        await late.release("a")
    await taken.release()
    assert partition.empty()


async def test_what_was_lost_cannot_be_offered(locks: DistributedLockManager, partition: Partition) -> None:
    lock = locks.acquire_lock("a", max_hold=0.2)
    await lock.acquire()
    await asyncio.wait_for(lock.lost, LIMIT)
    with pytest.raises(LockLost):
        await lock.offer()
    with pytest.raises(LockNotOwned):
        await locks.acquire_lock("b").offer()
    for within in (0, -1, "1", float("inf")):
        with pytest.raises(InvalidArgument, match="^within: "):
            await lock.offer(within)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="^within: "):
            lock.offer_sync(within)  # type: ignore[arg-type]
    await until(partition.empty)


BAD = [
    None, 7, b"1:exclusive:0:a", "", "a", "1:exclusive:0", "x:exclusive:0:a", "1:exclusive:x:a",
    "1:other:0:a",
    "1:exclusive:0:", "-1:exclusive:0:a", "1:exclusive:0:a\0", "²:exclusive:0:a", f"{'9' * 30}:exclusive:0:a",
    "1:semaphore:0:a", "1:exclusive:1:a", f"1:semaphore:{'9' * 5000}:a",
]  # fmt: skip


@pytest.mark.parametrize("token", BAD, ids=repr)
async def test_what_is_no_token(locks: DistributedLockManager, token: object) -> None:
    with pytest.raises(InvalidArgument, match="^token: "):
        await locks.adopt(token)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="^token: "):
        locks.adopt_sync(token)  # type: ignore[arg-type]


async def test_tokens_of_nothing(locks: DistributedLockManager, owner: Owners, partition: Partition) -> None:
    with pytest.raises(LockNotOffered):
        await locks.adopt("1:exclusive:0:a")
    holder = owner()
    assert await holder.acquire("acquire_lock", "a:b")
    fence = holder.held["a:b"].fencing_token
    with pytest.raises(LockNotOffered):
        await locks.adopt(f"{fence}:exclusive:0:a:b")
    assert partition.held() == 1
    await holder.release("a:b")


async def test_whoever_waits_for_what_is_offered_does_not_wait_for_its_giver(
    locks: DistributedLockManager, owner: Owners, partition: Partition
) -> None:
    other = owner()
    assert await other.acquire("acquire_lock", "b")
    given, wanted = locks.acquire_lock("a"), locks.acquire_lock("b")
    await given.acquire()
    token = await given.offer()
    behind = other.acquire("acquire_lock", "a")
    await until(lambda: partition.queued() == 1)
    assert not await wanted.acquire(blocking_timeout=0.3), "no cycle: whoever adopts it goes on"
    await (await locks.adopt(token)).release()
    assert await behind
    await other.release("a")
    await other.release("b")
