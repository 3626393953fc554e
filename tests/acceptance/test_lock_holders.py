"""Holders that block, stop, fork or end.

Promises: a lock stays its holder's while the holder's event loop is blocked, and while one C call holds the
interpreter; a process that was stopped for longer than its lease has lost the lock to one with a higher
fencing token, and is told so before it can use the token again; waiters get a dead holder's lock when its
lease has ended; a forked child starts anew at once and leaves its
parent's locks alone; two hundred interpreters that end in the middle of everything end as they should.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from support.locks import TESTS, Partition, manager_at, python, until, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dotmac.platform.distributed_locks import DistributedLockManager

LINE_LIMIT = 60.0


def line(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints."""
    assert process.stdout is not None
    text = process.stdout.readline()
    if not text:
        process.wait(LINE_LIMIT)
        assert process.stderr is not None
        pytest.fail(process.stderr.read())
    return text.rstrip("\n")


def finish(process: subprocess.Popen[str], said: str = "") -> list[str]:
    """The lines left; the process has to end well and say no more than `said` on stderr."""
    out, err = process.communicate(timeout=LINE_LIMIT)
    assert process.returncode == 0, err
    assert err.startswith(said)
    assert said or not err
    return out.splitlines()


@pytest.fixture
def locks(valkey_url: str, unique: str) -> Iterator[DistributedLockManager]:
    with manager_at(valkey_url, unique) as manager:
        yield manager


@pytest.fixture
def partition(valkey_url: str, unique: str) -> Iterator[Partition]:
    view = Partition(valkey_url, unique)
    yield view
    view.client.close()


BLOCKED = """
import asyncio, ctypes, sys, time
from support.locks import manager_at

async def main():
    async with manager_at(sys.argv[1], sys.argv[2]).acquire_lock("a", timeout=2.0) as lock:
        print(lock.fencing_token)
        time.sleep(6)
        print("slept")
        ctypes.PyDLL(None).usleep(6_000_000)  # PyDLL keeps the interpreter's lock during the call
        print(lock.fencing_token)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_blocked_holder_still_holds(locks: DistributedLockManager, valkey_url: str, unique: str) -> None:
    holder = python(BLOCKED, valkey_url, unique)
    token = int(line(holder))
    started = time.monotonic()
    lock = locks.acquire_lock("a", timeout=2.0)
    tries = 0
    while time.monotonic() - started < 11:
        assert lock.acquire_sync(blocking_timeout=0.5) is False
        tries += 1
    assert tries >= 15
    assert lock.acquire_sync(blocking_timeout=20)
    assert time.monotonic() - started > 11.5
    assert lock.fencing_token > token
    lock.release_sync()
    assert finish(holder) == ["slept", str(token)]


STOPPED = """
import asyncio, sys
from support.locks import manager_at
from dotmac.platform.errors import LockLost

async def main():
    lock = manager_at(sys.argv[1], sys.argv[2]).acquire_lock("a", timeout=1.0, on_lost=sys.argv[3])
    try:
        async with lock:
            print(lock.fencing_token)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
            try:
                print("used", lock.fencing_token)
            except LockLost as error:
                print("told", bool(lock.lost), lock.held)
                await asyncio.sleep(5 if sys.argv[3] == "cancel" else 0)
                print("body ended")
    except LockLost:
        print("left as lost")

asyncio.run(main())
"""


@pytest.mark.parametrize("on_lost", ["cancel", "flag"])
def test_a_stopped_holder_has_lost_the_lock_and_is_told(
    locks: DistributedLockManager, valkey_url: str, unique: str, on_lost: str
) -> None:
    holder = python(STOPPED, valkey_url, unique, on_lost)
    token = int(line(holder))
    holder.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    with locks.acquire_lock("a", timeout=1.0, blocking_timeout=20) as lock:
        assert 0.5 < time.monotonic() - stopped < 3, "lease and one heartbeat"
        assert lock.fencing_token > token
        # Three lease times; the line is there already when it wakes.
        time.sleep(max(0.0, 3 - (time.monotonic() - stopped)))
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
        holder.send_signal(signal.SIGCONT)
        rest = finish(holder, said="lock lost")
        assert lock.held, "the first holder gave the second one's lock back"
    if on_lost == "cancel":
        # Cancelled at once, or at the body's next await if it got as far as that.
        assert rest in (["left as lost"], ["told True False", "left as lost"])
    else:
        assert rest == ["told True False", "body ended"]


KILLED = """
import sys
from support.locks import manager_at
lock = manager_at(sys.argv[1], sys.argv[2]).acquire_lock("a", timeout=1.0)
lock.acquire_sync()
print("held")
sys.stdin.readline()
"""


async def test_waiters_get_a_dead_holders_lock_when_its_lease_has_ended(
    valkey_url: str, unique: str, partition: Partition
) -> None:
    """Not only when its session has: that is kept for longer. Their own heartbeats see to it, one each."""
    order = []
    async with manager_at(valkey_url, unique) as locks:

        async def wait(number: int) -> None:
            async with locks.acquire_lock("a", timeout=20):
                order.append((number, time.monotonic()))

        holder = python(KILLED, valkey_url, unique)
        assert line(holder) == "held"
        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(wait(number)))
            await until(lambda: partition.queued() == len(tasks))
        await asyncio.sleep(1.5)
        assert order == [], "a living holder keeps it"
        holder.kill()
        holder.communicate()
        ended = time.monotonic()
        await asyncio.gather(*tasks)
    assert [number for number, _ in order] == [0, 1, 2]
    assert order[-1][1] - ended < 4


FORKS = """
import asyncio, multiprocessing, os, sys
from support.locks import manager_at
from dotmac.platform.errors import ForkedHandle

url, namespace = sys.argv[1:]
inherited = manager_at(url, namespace)
held = inherited.acquire_lock("parents", timeout=1.0)
born = os.getpid()
free = inherited.acquire_lock("free")

def handles():
    assert "parent" in repr(held)
    release = held.release_sync if os.getpid() % 2 else lambda: asyncio.run(held.release())
    for use in (lambda: held.fencing_token, lambda: held.held, lambda: held.remaining, held.extend_sync,
                lambda: asyncio.run(held.extend()), release):
        try:
            use()
        except ForkedHandle as error:
            assert str(os.getpid()) in str(error) and str(born) in str(error), error
        else:
            raise AssertionError("a parent's handle worked in the child")

def child():
    with inherited.acquire_lock("of-child") as lock, free:
        assert lock.held and inherited.stats()["held"] == 2, inherited.stats()
    assert inherited.acquire_lock("parents").acquire_sync(blocking=False) is False
    async def main():
        async with manager_at(url, namespace).acquire_lock("of-child"), inherited.acquire_lock("also"):
            pass
    asyncio.run(main())
    if os.getppid() == born:
        handles()
    assert inherited.acquire_lock("parents").acquire_sync(blocking=False) is False

def forked(depth=1):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            if depth:
                assert forked(depth - 1) == 0
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

async def main():
    async with inherited.acquire_lock("of-loop"):
        assert forked() == 0
        worker = multiprocessing.get_context("fork").Process(target=child)
        worker.start()
        await asyncio.to_thread(worker.join)
        assert worker.exitcode == 0
        await asyncio.sleep(0.1)

held.acquire_sync()
token = held.fencing_token
assert forked() == 0
asyncio.run(main())
assert held.fencing_token == token
held.release_sync()
print("parent well")
"""


def test_a_forked_child_starts_anew(valkey_url: str, unique: str, partition: Partition) -> None:
    process = python(FORKS, valkey_url, unique)
    assert finish(process) == ["parent well"]
    wait_until(partition.empty)


ENDS = """
import asyncio, os, sys, threading
url, namespace, kind, number = sys.argv[1:]
from dotmac.platform.distributed_locks import DistributedLock
def make(name, timeout=10):
    return DistributedLock(url, name, timeout=timeout, namespace=namespace)
name = "n" + number
module_level = make(name + "-m", timeout=0.15)

async def hold(lock):
    async with lock:
        await asyncio.sleep(60)

async def main():
    lock = make(name, timeout=0.15)
    await lock.acquire()
    await module_level.acquire()
    waiting = [asyncio.create_task(hold(make(name))) for _ in range(5)]
    await asyncio.sleep(0.05 + int(number) % 7 * 0.01)
    if kind == "exit":
        sys.exit(7)
    if kind == "error":
        raise KeyError("on purpose")
    if kind == "thread":
        thread = threading.Thread(target=make(name).acquire_sync, daemon=True)
        thread.start()
        await asyncio.sleep(0.02)
    if kind == "running":
        loop = asyncio.get_running_loop()
        loop.stop()
        await asyncio.sleep(60)
    if kind == "abandon":
        for task in waiting:
            task.cancel()

if kind == "running":
    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    loop.run_forever()
    task._log_destroy_pending = False
    for other in asyncio.all_tasks(loop):
        other._log_destroy_pending = False
elif kind == "sync":
    module_level.acquire_sync()
    sys.exit(3)
else:
    asyncio.run(main())
"""
STATUS = {"plain": 0, "exit": 7, "error": 1, "thread": 0, "running": 0, "abandon": 0, "sync": 3}


@pytest.mark.slow
def test_two_hundred_interpreters_end_in_the_middle_of_everything(
    valkey_url: str, unique: str, partition: Partition
) -> None:
    def one(number: int) -> tuple[str, int, str]:
        kind = list(STATUS)[number % len(STATUS)]
        done = subprocess.run(
            [sys.executable, "-c", ENDS, valkey_url, unique, kind, str(number)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "PYTHONPATH": TESTS},
        )
        return kind, done.returncode, done.stderr

    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(one, range(200)))
    print(f"200 interpreters ended in {time.monotonic() - started:.0f} s")
    for kind, status, text in results:
        said = text
        if kind == "error":
            assert "KeyError: 'on purpose'" in text
            said = text.partition("Traceback (most recent call last)")[0]
        if kind == "thread":
            # It is told that the engine closes, and may or may not get as far as saying so.
            assert "panic" not in text
            assert "fatal" not in text.lower()
            said = text.partition("Exception in thread")[0]
        assert (kind, status, said) == (kind, STATUS[kind], "")
    wait_until(partition.empty)
    assert partition.sessions() == 0, "every process has said goodbye"
