"""What several lock tests need: a look at the server's side, and waiting for a condition."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from dotmac.platform.distributed_locks import DistributedLockManager
from dotmac.platform.distributed_locks.config import DistributedLockConfig

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 20.0
TESTS = str(Path(__file__).parent.parent)


def manager_at(url: object, namespace: str, **settings: object) -> DistributedLockManager:
    """A manager whose settings don't come from the environment."""
    return DistributedLockManager(url, config=DistributedLockConfig(), namespace=namespace, **settings)


async def works(locks: DistributedLockManager, name: str = "a") -> int:
    """A lock is held, seen and given back in time; its fencing token."""
    async with asyncio.timeout(30), locks.acquire_lock(name) as lock:
        assert lock.held
        assert name in [info.name for info in await locks.list_locks()]
        token = lock.fencing_token
    assert name not in [info.name for info in await locks.list_locks()]
    return token


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = LIMIT) -> None:
    """Blocks until the condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


async def until(condition: Callable[[], object], seconds: float = LIMIT) -> None:
    """The same without blocking the loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


class Partition:
    """The server's records of one namespace's locks, in a cluster those of one partition."""

    def __init__(self, url: str, namespace: str, partition: int = 0) -> None:
        self.client = redis.Redis.from_url(url, decode_responses=True)
        self.tag = f"{{{namespace}:{partition}}}"

    def used_before(self) -> None:
        """As if locks had been used there: a server that has just started keeps nobody waiting then."""
        self.client.hsetnx(f"{self.tag}:m", "e", "1")

    def held(self) -> int:
        return self.client.hlen(f"{self.tag}:h")

    def queued(self) -> int:
        # Where several hold a lock, they stand in the same set, behind a NUL.
        return sum(not member.startswith("\0") for member in self.client.zrange(f"{self.tag}:q", 0, -1))

    def sessions(self) -> int:
        return sum(not member.startswith("!") for member in self.client.zrange(f"{self.tag}:x", 0, -1))

    def empty(self) -> bool:
        """Nothing is held, nobody waits, and no request is known."""
        return not (self.held() or self.queued() or self.client.hlen(f"{self.tag}:w"))


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that runs a script; what it prints comes line by line."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": TESTS},
    )
    started.append(process)
    return process


started: list[subprocess.Popen[str]] = []


def end_started() -> None:
    """Ends what a failed test left running."""
    while started:
        process = started.pop()
        if process.poll() is None:
            process.kill()
        if process.stdout is not None and not process.stdout.closed:
            process.communicate()


HOLDER = """
import sys, time
from support.locks import manager_at
locks = manager_at(sys.argv[1], sys.argv[2])
with locks.acquire_lock("a", timeout=1.0) as lock:
    print(lock.fencing_token)
    time.sleep(60)
"""


async def killed_holder_is_succeeded(locks: DistributedLockManager, url: str, namespace: str) -> None:
    """Another process is killed with a lock in hand; the next one gets it, under a higher token."""
    holder = python(HOLDER, url, namespace)
    assert holder.stdout is not None
    token = int(await asyncio.to_thread(holder.stdout.readline))
    assert not await locks.acquire_lock("a").acquire(blocking=False)
    holder.kill()
    assert await works(locks) > token
