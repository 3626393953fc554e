"""Leaving a lock without waiting for the server's word.

Promises: `release="pipelined"` (argument, manager, setting) leaves at once, in loops and threads, whether the
server answers or not; the release goes ahead of what follows, so the next one in another process gets the
lock, never while somebody is still inside; the engine repeats it through a killed or paused server; one that
was not confirmed in time, or found the lease ended, is counted, logged and told to `on_release_failed`, in
the loop that left or in a thread; nothing is told of one that is confirmed; a process that ends at once has
given its lock back; by default leaving waits.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING

import pytest
import redis
import uvloop

from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.distributed_locks.config import DistributedLockConfig
from dotmac.platform.errors import InvalidArgument
from support.locks import Partition, manager_at, python, until, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.connection.embedded import EmbeddedValkey

AT_ONCE = 0.3  # seconds; an answer of a paused server takes longer


class Told:
    """What `on_release_failed` was called with, and in which thread."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, int, str]] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, name: str, token: int, reason: str) -> None:
        self.failures.append((name, token, reason))
        self.threads.append(threading.current_thread())


def pipelined(url: str, namespace: str, told: Told, **settings: object) -> DistributedLockManager:
    return manager_at(url, namespace, release="pipelined", on_release_failed=told, **settings)


@pytest.mark.parametrize("make", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_loop_leaves_a_paused_server_at_once(
    own_valkey: EmbeddedValkey, unique: str, make: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    told = Told()

    async def main() -> None:
        async with pipelined(own_valkey.url, unique, told) as locks:
            by_hand = locks.acquire_lock("b")
            await by_hand.acquire()
            async with locks.acquire_lock("a"):
                own_valkey.pause()
                left = time.monotonic()
            await by_hand.release()
            assert time.monotonic() - left < AT_ONCE
            assert not by_hand.held
            own_valkey.resume()
            async with asyncio.timeout(10), locks.acquire_lock("a"), locks.acquire_lock("b"):
                pass
            await until(lambda: locks.stats()["unanswered"] == 0)
            assert locks.stats()["failed_releases"] == 0

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(main())
    assert told.failures == []


def test_a_thread_leaves_a_paused_server_at_once(own_valkey: EmbeddedValkey, unique: str) -> None:
    told = Told()
    with pipelined(own_valkey.url, unique, told) as locks:
        by_hand = locks.acquire_lock("b")
        by_hand.acquire_sync()
        with locks.acquire_lock("a"):
            own_valkey.pause()
            left = time.monotonic()
        by_hand.release_sync()
        assert time.monotonic() - left < AT_ONCE
        own_valkey.resume()
        with locks.acquire_lock("a", blocking_timeout=10), locks.acquire_lock("b", blocking_timeout=10):
            pass
    assert told.failures == []


async def test_by_default_leaving_waits(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(own_valkey.url, unique) as locks:
        resume = threading.Timer(AT_ONCE, own_valkey.resume)
        async with locks.acquire_lock("a"):
            own_valkey.pause()
            left = time.monotonic()
            resume.start()
        assert time.monotonic() - left >= AT_ONCE * 0.9
        resume.join()


@pytest.mark.parametrize("trouble", ["kill", "pause"])
async def test_a_release_is_repeated_until_it_is_answered(
    own_valkey: EmbeddedValkey, unique: str, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    async with pipelined(own_valkey.url, unique, told, request_timeout=0.5) as locks:
        async with locks.acquire_lock("a") as lock:
            token = lock.fencing_token
            if trouble == "kill":
                own_valkey.kill()
            else:
                own_valkey.pause()
        with caplog.at_level(logging.WARNING):
            await until(lambda: told.failures)
        ((name, of, reason),) = told.failures
        assert (name, of) == ("a", token)
        assert reason.endswith("the engine repeats it until it is answered")
        assert told.threads == [threading.current_thread()]
        assert locks.stats()["failed_releases"] == 1
        assert any("release failed lock='a'" in record.getMessage() for record in caplog.records)
        if trouble == "kill":
            await asyncio.to_thread(own_valkey.start)
        else:
            own_valkey.resume()
        view = Partition(own_valkey.url, unique)
        async with asyncio.timeout(20), locks.acquire_lock("a", blocking_timeout=15) as lock:
            assert lock.fencing_token > token
            assert view.held() == 1
        await until(lambda: locks.stats()["unanswered"] == 0)
        await until(view.empty)
        view.client.close()
    assert len(told.failures) == 1


async def test_a_lease_that_has_ended_is_told(valkey_url: str, unique: str, partition: Partition) -> None:
    told = Told()
    async with pipelined(valkey_url, unique, told) as locks, pipelined(valkey_url, unique, Told()) as other:
        async with locks.acquire_lock("a") as lock:
            token = lock.fencing_token
            partition.client.hdel(f"{partition.tag}:h", "a")
        await until(lambda: told.failures)
        assert told.failures == [("a", token, "the lease had ended before")]
        assert told.threads == [threading.current_thread()]
        async with other.acquire_lock("b"):
            partition.client.hdel(f"{partition.tag}:h", "b")
        await until(lambda: locks.stats()["failed_releases"] == 2)
        await asyncio.sleep(0.05)
        assert len(told.failures) == 1, "another manager's release is not this one's"

        def blocking() -> None:
            with locks.acquire_lock("c"):
                partition.client.hdel(f"{partition.tag}:h", "c")
            wait_until(lambda: len(told.failures) == 2)

        await asyncio.to_thread(blocking)
        assert told.failures[1][0] == "c"
        assert told.threads[1] is not threading.current_thread()


async def test_without_a_callback_it_is_counted(valkey_url: str, unique: str, partition: Partition) -> None:
    async with manager_at(valkey_url, unique) as locks:
        async with locks.acquire_lock("a", release="pipelined"):
            partition.client.hdel(f"{partition.tag}:h", "a")
        await until(lambda: locks.stats()["failed_releases"] == 1)


async def test_a_callback_that_fails_keeps_nothing_from_others(
    valkey_url: str, unique: str, partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", odd.append)

    def fails(*_: object) -> None:
        raise ValueError("odd")

    async with manager_at(valkey_url, unique, on_release_failed=fails) as locks:
        async with locks.acquire_lock("a", release="pipelined"):
            partition.client.hdel(f"{partition.tag}:h", "a")
        async with locks.acquire_lock("b"):
            pass
        await until(lambda: odd)


RIVAL = """
import asyncio, sys
import redis
from support.locks import manager_at

async def main(url, namespace, times):
    inside = redis.Redis.from_url(url)
    async with manager_at(url, namespace, release="pipelined") as locks:
        async with locks.acquire_lock("other"):
            print("ready")
        sys.stdin.readline()
        for _ in range(times):
            async with locks.acquire_lock("a") as lock:
                alone = inside.incr(namespace + ":inside") == 1
                print(lock.fencing_token, int(alone))
                inside.decr(namespace + ":inside")
    inside.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


async def test_processes_hand_it_over(valkey_url: str, unique: str, partition: Partition) -> None:
    times = 300
    rivals = [python(RIVAL, valkey_url, unique, str(times)) for _ in range(2)]
    for rival in rivals:
        assert rival.stdout is not None
        assert await asyncio.to_thread(rival.stdout.readline) == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("\n")
        rival.stdin.flush()
    tokens = []
    for rival in rivals:
        out, err = await asyncio.to_thread(rival.communicate)
        assert rival.returncode == 0, err
        lines = [tuple(map(int, line.split())) for line in out.splitlines()]
        assert len(lines) == times
        assert all(alone for _, alone in lines), "two were inside"
        mine = [token for token, _ in lines]
        assert mine == sorted(set(mine))
        tokens.append(mine)
    assert not set(tokens[0]) & set(tokens[1])
    # Each waits while the other is inside, so that they take turns.
    turns = sorted((token, who) for who, mine in enumerate(tokens) for token in mine)
    changes = sum(one[1] != next_[1] for one, next_ in itertools.pairwise(turns))
    assert changes > times / 10
    await until(partition.empty)


LAST = """
import asyncio, sys
from support.locks import manager_at

async def main():
    async with manager_at(sys.argv[1], sys.argv[2]).acquire_lock("a", 600.0, release="pipelined"):
        pass

asyncio.run(main())
"""


async def test_a_process_that_ends_at_once(valkey_url: str, unique: str, partition: Partition) -> None:
    process = python(LAST, valkey_url, unique)
    _, err = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, err
    assert partition.empty()


async def test_where_it_is_said(valkey_url: str, unique: str) -> None:
    config = DistributedLockConfig(release="pipelined")
    made = DistributedLockManager(valkey_url, config=config, namespace=unique)
    assert made.acquire_lock("a")._terms.pipelined
    assert not made.acquire_lock("a", release="confirmed")._terms.pipelined
    assert not manager_at(valkey_url, unique).acquire_lock("a", 5.0)._terms.pipelined
    with pytest.raises(InvalidArgument, match="release"):
        made.acquire_lock("a", release="never")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="release"):
        DistributedLock(valkey_url, "a", release="never")  # type: ignore[arg-type]
    async with DistributedLock(valkey_url, "a", namespace=unique, release="pipelined") as lock:
        assert lock.held
    await lock.aclose()
    client = redis.Redis.from_url(valkey_url)
    assert not client.hexists(f"{{{unique}:0}}:h", "a")
    client.close()
