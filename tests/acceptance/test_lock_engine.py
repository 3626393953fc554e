"""One engine for everything in a process.

Promises: the number of locks that a process holds changes neither its commands to the server nor its
processor time; two event loops and threads without one share a single connection; one lock object works in
five loops, one after another, and in two at once, also under uvloop, and one that was made at import time;
loops that have ended leave no descriptors behind.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
import uvloop

from support.locks import Partition, manager_at, python

if TYPE_CHECKING:
    from dotmac.platform.connection.embedded import EmbeddedValkey

MANY = """
import asyncio, os, resource, sys, time
from support.locks import manager_at

async def main():
    count = int(sys.argv[3])
    async with manager_at(sys.argv[1], sys.argv[2]) as manager:
        locks = [manager.acquire_lock(f"n{n}", timeout=3.0) for n in range(count)]
        for at in range(0, count, 500):
            await asyncio.gather(*(lock.acquire() for lock in locks[at : at + 500]))
        await asyncio.sleep(1)
        print("held")
        while True:
            line = await asyncio.to_thread(sys.stdin.readline)
            if line != "cpu\\n":
                break
            assert all(lock.held for lock in (locks[0], locks[-1]))
            usage = resource.getrusage(resource.RUSAGE_SELF)
            print(usage.ru_utime + usage.ru_stime)
        assert all(lock.held for lock in locks)
        assert manager.stats()["losses"] == 0

asyncio.run(main())
"""
SECONDS = 6.0


@pytest.mark.slow
def test_ten_thousand_locks_cost_what_ten_cost(own_valkey: EmbeddedValkey, unique: str) -> None:
    import time

    def commands(client: redis.Redis) -> int:
        # Scripts' inner commands are counted, too: so is what the server does for one heartbeat.
        stats = client.info("commandstats")
        return sum(entry["calls"] for name, entry in stats.items() if name != "cmdstat_info")

    measured: dict[int, tuple[float, float]] = {}
    with redis.Redis.from_url(own_valkey.url) as client:
        for count in (10, 1_000, 10_000):
            process = python(MANY, own_valkey.url, f"{unique}-{count}", str(count))
            assert process.stdin is not None
            assert process.stdout is not None

            def ask(process=process) -> float:
                process.stdin.write("cpu\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            assert process.stdout.readline() == "held\n"
            cpu, calls = ask(), commands(client)
            time.sleep(SECONDS)
            calls = commands(client) - calls
            cpu = ask() - cpu
            measured[count] = (calls * 60 / SECONDS, cpu * 60 / SECONDS)
            _, err = process.communicate("end\n", timeout=60)
            assert (process.returncode, err) == (0, "")
            print(
                f"{count:>6} locks: {measured[count][0]:.0f} commands/min at the server, "
                f"{measured[count][1]:.2f} s/min of the process's CPU"
            )
    few, many = measured[10], measured[10_000]
    assert 0 < many[0] <= 1.5 * few[0]
    # 10,000 renewals by single commands would cost more than ten seconds a minute.
    assert many[1] <= few[1] + 1.0


async def in_turn(lock, partition: Partition, times: int = 20) -> None:
    for _ in range(times):
        async with lock:
            assert lock.held
            assert partition.held() == 1
            await asyncio.sleep(0)
    assert not lock.held


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_five_loops_in_turn(valkey_url: str, unique: str, partition: Partition, run) -> None:
    manager = manager_at(valkey_url, unique)
    lock = manager.acquire_lock("a", timeout=5)
    run(in_turn(lock, partition))
    gc.collect()
    before = descriptors()
    for _ in range(5):
        run(in_turn(lock, partition))
        with lock:
            assert lock.held
    for _ in range(20):
        run(in_turn(lock, partition, 1))
    gc.collect()
    assert descriptors() <= before + 1, "an ended loop's descriptor stayed open"
    assert partition.empty()
    manager.close()


def test_acquired_in_one_loop_and_released_in_another(
    valkey_url: str, unique: str, partition: Partition
) -> None:
    with manager_at(valkey_url, unique) as manager:
        lock = manager.acquire_lock("a", timeout=1)
        asyncio.run(lock.acquire())
        assert lock.held
        uvloop.run(asyncio.sleep(1.5))
        assert lock.held, "it is renewed also where its loop has ended"
        asyncio.run(lock.release())
        assert partition.empty()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_two_loops_at_once_and_threads_share_one_connection(
    own_valkey: EmbeddedValkey, unique: str, run
) -> None:
    manager = manager_at(own_valkey.url, unique)
    lock = manager.acquire_lock("a", timeout=5)
    inside = counter = 0
    connections: set[int] = set()
    failed: list[BaseException] = []
    together = threading.Barrier(4)
    view = Partition(own_valkey.url, unique)
    alone = len(view.client.client_list())

    def step(change: int) -> None:
        nonlocal inside, counter
        inside += change
        counter += change > 0
        assert inside in (0, 1), "two holders"

    async def loop() -> None:
        async def work() -> None:
            for _ in range(25):
                async with lock:
                    step(+1)
                    await asyncio.sleep(0)
                    step(-1)

        await asyncio.gather(*(work() for _ in range(4)))

    def thread(body) -> None:
        try:
            together.wait(10)
            body()
        except BaseException as error:  # noqa: BLE001 - looked at below
            failed.append(error)

    def blocking() -> None:
        for number in range(50):
            with lock:
                step(+1)
                if number == 25:
                    connections.add(len(view.client.client_list()) - alone)
                step(-1)

    bodies = [lambda: run(loop()), lambda: run(loop()), blocking, blocking]
    threads = [threading.Thread(target=thread, args=(body,)) for body in bodies]
    for started in threads:
        started.start()
    for started in threads:
        started.join(60)
        assert not started.is_alive()
    assert failed == []
    assert counter == 300
    assert connections == {1}
    assert manager.stats()["connections"] == 1
    with manager_at(own_valkey.url, unique) as second, second.acquire_lock("b"):
        assert len(view.client.client_list()) - alone == 1, "services with one target share an engine"
    manager.close()
    view.client.close()


IMPORTED = """
import asyncio, sys, time
import uvloop
started = time.perf_counter()
import dotmac.platform
assert time.perf_counter() - started < 0.5
from dotmac.platform.distributed_locks import DistributedLockManager
locks = DistributedLockManager()
lock = locks.acquire_lock("import-" + sys.argv[1])
import threading
assert not [t for t in threading.enumerate() if "dotmac" in t.name]

@locks.with_lock("import-{name}", timeout=5.0)
async def work(name):
    assert [info.name for info in await locks.list_locks() if info.name == "import-" + name]
    return name

for run in (asyncio.run, uvloop.run, asyncio.run):
    assert run(work(sys.argv[1])) == sys.argv[1]
with lock:
    print("ok", lock.held)
"""


def test_a_manager_made_at_import_time(
    valkey_url: str, unique: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)
    monkeypatch.chdir(tmp_path)
    process = python(IMPORTED, unique)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "ok True\n", "")


def test_closing_ends_the_session_for_good(valkey_url: str, unique: str, partition: Partition) -> None:
    """Also where a heartbeat comes due, every 33 ms here, in the middle of it."""
    for _ in range(150):
        with manager_at(valkey_url, unique) as manager, manager.acquire_lock("a", timeout=0.1):
            pass
        assert partition.sessions() == 0
    assert partition.empty()
