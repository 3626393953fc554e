"""What several lock tests need: a look at the server's side, and waiting for a condition."""

from __future__ import annotations

import asyncio
import os
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
    """The server's records of one namespace's locks."""

    def __init__(self, url: str, namespace: str) -> None:
        self.client = redis.Redis.from_url(url, decode_responses=True)
        self.tag = f"{{{namespace}:0}}"

    def held(self) -> int:
        return self.client.hlen(f"{self.tag}:h")

    def queued(self) -> int:
        return self.client.zcard(f"{self.tag}:q")

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
