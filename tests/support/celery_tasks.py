"""Tasks for real workers of the Celery tests; `URL` and `NAMESPACE` in the environment say where."""

from __future__ import annotations

import asyncio
import os
import time

import redis
from celery import Celery

from dotmac.platform.contrib.celery import LockedTask
from dotmac.platform.errors import LockTimeout
from support.locks import manager_at

URL, NAMESPACE = os.environ["URL"], os.environ["NAMESPACE"]

app = Celery("tasks", broker=URL, backend=URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_default_queue=NAMESPACE,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
)
locks = manager_at(URL, NAMESPACE, default_timeout=2.0)
log = redis.Redis.from_url(URL, decode_responses=True)


def note(what: str) -> None:
    log.rpush(f"{NAMESPACE}:log", what)


@app.task(base=LockedTask, bind=True, lock="shared:{key}", lock_manager=locks)
def function(self: LockedTask, key: str) -> list[object]:
    note(f"begin {os.getpid()} {self.held_lock.fencing_token}")
    time.sleep(0.05)
    note("end")
    return [self.held_lock.name, self.request.id]


@app.task(base=LockedTask, bind=True, lock="shared:{key}", lock_manager=locks)
async def coroutine(self: LockedTask, key: str) -> list[object]:
    note(f"begin {os.getpid()} {self.held_lock.fencing_token}")
    await asyncio.sleep(0.05)
    note("end")
    return [self.held_lock.name, self.request.id]


@app.task(base=LockedTask, lock=lambda n: f"skip:{n}", lock_manager=locks, lock_if_held="skip")
def skipping(n: int) -> str:
    return f"ran {n}"


@app.task(base=LockedTask, lock="skip:{n}", lock_manager=locks, lock_if_held="skip")
async def skipping_coroutine(n: int) -> str:
    return f"ran {n}"


@app.task(
    base=LockedTask,
    lock="retry",
    lock_manager=locks,
    lock_if_held="retry",
    lock_retry_in=0.1,
    max_retries=None,
)
def retrying() -> str:
    return "ran"


@app.task(
    base=LockedTask, lock="retry", lock_manager=locks, lock_if_held="retry", lock_retry_in=0.1, max_retries=2
)
async def retrying_coroutine() -> str:
    return "ran"


@app.task(base=LockedTask, lock="wait", lock_manager=locks, lock_blocking_timeout=0.1)
def impatient() -> str:
    return "ran"


@app.task(
    base=LockedTask,
    lock="wait",
    lock_manager=locks,
    lock_blocking_timeout=0.0,
    autoretry_for=(LockTimeout,),
    default_retry_delay=0,
    retry_kwargs={"max_retries": None, "countdown": 0.1},
)
async def retried_by_celery() -> str:
    return "ran"


@app.task(base=LockedTask, bind=True, lock="own", lock_manager=locks, lock_if_held="skip")
async def times_out_inside(self: LockedTask) -> None:
    """Somebody else's LockTimeout is not this task's: it is not skipped."""
    async with locks.acquire_lock("wait", blocking_timeout=0):
        pass


@app.task(base=LockedTask, bind=True, lock="own", lock_manager=locks)
async def retries_itself(self: LockedTask) -> int:
    if self.request.retries < 2:
        raise self.retry(countdown=0.05)
    return int(self.request.retries)


@app.task(base=LockedTask, lock="endless", lock_manager=locks)
def endless() -> None:
    note(f"holding {os.getpid()}")
    time.sleep(600)


@app.task
@locks.with_lock("shared:{key}")
async def decorated(key: str) -> str:
    note(f"begin {os.getpid()} 0")
    await asyncio.sleep(0.05)
    note("end")
    return key
