"""Locked Celery tasks in real workers, of every pool.

Promises: sync and `async def` tasks of several workers run one at a time under a lock, in the pools prefork,
threads and solo, and know their lock and their request; a task whose lock is held waits, is skipped, or tries
again, as it says, and a LockTimeout out of its own body is none of these; Celery's own retries see what the
lock raises; a killed worker's lock is free when its lease has ended; options that can't work are refused when
the task is made; without a worker, tasks can be called.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import redis
from celery import Celery

from dotmac.platform.contrib.celery import LockedTask
from dotmac.platform.errors import InvalidArgument, LockNotOwned, LockTimeout
from support.locks import TESTS, manager_at, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from celery.result import AsyncResult

    from dotmac.platform.distributed_locks import DistributedLockManager

LIMIT = 60
POOLS = ["prefork", "threads", "solo"]


class Workers:
    """Workers of one pool, and how to give them work."""

    def __init__(self, url: str, namespace: str, pool: str, count: int, folder: Path) -> None:
        self.env = {**os.environ, "URL": url, "NAMESPACE": namespace, "C_FORCE_ROOT": "1"}
        self.namespace, self.folder = namespace, folder
        self.client = redis.Redis.from_url(url, decode_responses=True)
        self.app = Celery("tasks", broker=url, backend=url)
        self.app.conf.update(task_default_queue=namespace, broker_connection_retry_on_startup=True)
        self.processes = [self._start(pool, number) for number in range(count)]

    def _start(self, pool: str, number: int) -> subprocess.Popen[bytes]:
        with (self.folder / f"worker{number}.log").open("wb") as output:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "-A", "support.celery_tasks", "worker"),
                    *(
                        "--pool",
                        pool,
                        "--concurrency",
                        "2",
                        "--loglevel",
                        "INFO",
                        "-n",
                        f"w{number}@{self.namespace}",
                    ),
                    *("--without-mingle", "--without-gossip", "--without-heartbeat"),
                ],
                cwd=TESTS,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ask(self, task: str, *arguments: Any) -> AsyncResult:
        return self.app.send_task(f"support.celery_tasks.{task}", arguments)

    def log(self) -> list[str]:
        found: Any = self.client.lrange(f"{self.namespace}:log", 0, -1)
        return list(found)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.app.close()
        self.client.close()
        for file in sorted(self.folder.glob("worker*.log")):
            print(file.read_text())


@pytest.fixture(scope="module", params=POOLS)
def workers(request: pytest.FixtureRequest, valkey_url: str, tmp_path_factory: Any) -> Iterator[Workers]:
    """Two workers."""
    started = Workers(
        valkey_url, f"c{os.urandom(6).hex()}", request.param, 2, tmp_path_factory.mktemp("celery")
    )
    yield started
    started.stop()


@pytest.fixture
def locks(workers: Workers) -> Iterator[DistributedLockManager]:
    """A manager that meets that of the tasks."""
    manager = manager_at(workers.env["URL"], workers.namespace)
    yield manager
    manager.close()


def test_one_at_a_time(workers: Workers) -> None:
    kinds = ["function", "coroutine", "decorated"]
    processes: set[str] = set()
    rounds = 0
    # A worker that is ready later than the others takes none of the first.
    while len(processes) < 2:
        assert rounds < 20, "several processes take part"
        rounds += 1
        results = [workers.ask(kinds[number % 3], "k") for number in range(12)]
        found = [result.get(timeout=LIMIT) for result in results]
        for result, value in zip(results[::3] + results[1::3], found[::3] + found[1::3], strict=True):
            assert value == ["shared:k", result.id]
        log = workers.log()
        workers.client.delete(f"{workers.namespace}:log")
        assert [line.split()[0] for line in log] == ["begin", "end"] * 12
        processes |= {line.split()[1] for line in log[::2]}
        fences = [int(line.split()[2]) for line in log[::2] if not line.endswith(" 0")]
        assert fences == sorted(set(fences))


def test_skipped_if_held(workers: Workers, locks: DistributedLockManager) -> None:
    for task in ("skipping", "skipping_coroutine"):
        with locks.acquire_lock("skip:1"):
            held = workers.ask(task, 1)
            other = workers.ask(task, 2)
            assert held.get(timeout=LIMIT) is None
            assert other.get(timeout=LIMIT) == "ran 2"
        assert workers.ask(task, 1).get(timeout=LIMIT) == "ran 1"


def test_tried_again_later_if_held(workers: Workers, locks: DistributedLockManager) -> None:
    with locks.acquire_lock("retry"):
        result = workers.ask("retrying")
        wait_until(lambda: result.state == "RETRY", LIMIT)
        finite = workers.ask("retrying_coroutine")
        with pytest.raises(LockTimeout, match="'retry' is held by another"):
            finite.get(timeout=LIMIT)
    assert result.get(timeout=LIMIT) == "ran"
    assert workers.ask("retrying_coroutine").get(timeout=LIMIT) == "ran"


def test_waiting_no_longer_than_it_should(workers: Workers, locks: DistributedLockManager) -> None:
    with locks.acquire_lock("wait"):
        retried = workers.ask("retried_by_celery")
        wait_until(lambda: retried.state == "RETRY", LIMIT)
        with pytest.raises(LockTimeout, match=r"not granted within 0\.1"):
            workers.ask("impatient").get(timeout=LIMIT)
        with pytest.raises(LockTimeout, match="'wait' is held by another"):
            workers.ask("times_out_inside").get(timeout=LIMIT)
    assert workers.ask("impatient").get(timeout=LIMIT) == "ran"
    assert retried.get(timeout=LIMIT) == "ran"
    assert workers.ask("times_out_inside").get(timeout=LIMIT) is None


def test_a_coroutine_can_try_itself_again(workers: Workers) -> None:
    assert workers.ask("retries_itself").get(timeout=LIMIT) == 2


@pytest.mark.parametrize("pool", POOLS)
def test_the_lock_of_a_killed_worker(pool: str, valkey_url: str, unique: str, tmp_path: Path) -> None:
    workers = Workers(valkey_url, unique, pool, 1, tmp_path)
    try:
        workers.ask("endless")
        wait_until(workers.log, LIMIT)
        holder = int(workers.log()[0].split()[1])
        assert (holder == workers.processes[0].pid) == (pool != "prefork")
        with manager_at(valkey_url, unique) as locks:
            with pytest.raises(LockTimeout), locks.acquire_lock("endless", blocking_timeout=0):
                pass
            psutil.Process(holder).kill()
            killed = time.monotonic()
            with locks.acquire_lock("endless", blocking_timeout=LIMIT):
                assert time.monotonic() - killed < LIMIT / 2, "two seconds of lease, and slow machines"
    finally:
        workers.stop()


# ---- without a worker


def test_options_that_cannot_work(valkey_url: str, unique: str) -> None:
    app = Celery("t", set_as_current=False)
    manager = manager_at(valkey_url, unique)

    def make(**options: Any) -> Any:
        def task(report_id: int) -> None: ...

        name = os.urandom(4).hex()
        return app.task(base=LockedTask, lazy=False, shared=False, name=name, **options)(task)

    for wrong, field in (
        ({}, "lock"),
        ({"lock": ""}, "template"),
        ({"lock": "{id}"}, "template"),
        ({"lock": lambda other: other}, "template"),
        ({"lock": "a", "lock_if_held": "explode"}, "lock_if_held"),
        ({"lock": "a", "lock_timeout": 0}, "lock_timeout"),
        ({"lock": "a", "lock_blocking_timeout": -1}, "lock_blocking_timeout"),
        ({"lock": "a", "lock_retry_in": None}, "lock_retry_in"),
        ({"lock": "a", "lock_retry_in": "1"}, "lock_retry_in"),
        ({"lock": "a", "lock_manager": "redis://localhost"}, "lock_manager"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            make(**wrong)
        assert caught.value.field == field
    task = make(lock="report:{report_id}", lock_manager=manager)
    with pytest.raises(LockNotOwned, match="does not run here"):
        _ = task.held_lock
    with pytest.raises(TypeError):
        task.apply_async(())
    manager.close()


async def test_called_directly(valkey_url: str, unique: str) -> None:
    app = Celery("t", set_as_current=False)
    locks = manager_at(valkey_url, unique)

    @app.task(base=LockedTask, bind=True, lock="{self.kind}:{n}", kind="k", lock_manager=locks)
    async def coroutine(self: Any, n: int) -> str:
        return str(self.held_lock.name)

    @app.task(base=LockedTask, lock="{n}", lock_manager=locks, lock_if_held="skip")
    def function(n: int) -> list[str]:
        return [info.name for info in locks.list_locks_sync()]

    class Task(LockedTask):
        lock = "{n}"
        lock_manager = locks
        lock_if_held = "retry"

        def run(self, n: int) -> str:
            return f"{self.held_lock.name} {n}"

    assert await coroutine(7) == "k:7"
    assert await asyncio.to_thread(function, n=3) == ["3"]
    method = app.register_task(Task())
    assert await asyncio.to_thread(method, 4) == "4 4"
    async with locks.acquire_lock("3"), locks.acquire_lock("4"):
        assert await asyncio.to_thread(function, 3) is None
        with pytest.raises(LockTimeout):
            await asyncio.to_thread(method, 4)
    await locks.aclose()
