"""Owners of locks that do what a test tells them: tasks, threads and processes, all in one way."""

from __future__ import annotations

import asyncio
import base64
import contextvars
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dotmac.platform.errors import DotmacError
from support.locks import LIMIT, manager_at, python

if TYPE_CHECKING:
    from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager

Told = asyncio.Future[Any]


class TaskOwner:
    """One task. What is asked for begins at once, and its result is to be awaited."""

    def __init__(self, locks: DistributedLockManager) -> None:
        self.locks, self.held = locks, {}
        self._orders: asyncio.Queue[tuple[Told, str, str, tuple[Any, ...], dict[str, Any]]] = asyncio.Queue()
        # A context of its own: nobody is its parent.
        self.task = asyncio.create_task(self._work(), context=contextvars.Context())

    def acquire(self, make: str, name: str, *args: object, **how: object) -> Told:
        """Asks for `locks.make(name, *args, **how)`; whether it was granted."""
        return self._order(make, name, args, how)

    def release(self, name: str) -> Told:
        return self._order("", name, (), {})

    def give_up(self) -> None:
        """Cancels what is asked for now."""
        self.task.cancel()

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        for lock in self.held.values():
            with suppress(DotmacError):
                await lock.release()

    def _order(self, make: str, name: str, args: tuple[Any, ...], how: dict[str, Any]) -> Told:
        told = asyncio.get_running_loop().create_future()
        self._orders.put_nowait((told, make, name, args, how))
        return told

    async def _work(self) -> None:
        while True:
            told, make, name, args, how = await self._orders.get()
            try:
                result = await self._do(make, name, args, how)
            except asyncio.CancelledError:
                told.cancel()
                task = asyncio.current_task()
                assert task is not None
                task.uncancel()
            except Exception as error:  # noqa: BLE001 - the test's business
                told.set_exception(error)
            else:
                told.set_result(result)

    async def _do(self, make: str, name: str, args: tuple[Any, ...], how: dict[str, Any]) -> object:
        if not make:
            return await self.held.pop(name).release()
        lock = getattr(self.locks, make)(name, *args, **(_patience(make) | how))
        granted = await lock.acquire()
        if granted:
            self.held[name] = lock
        return granted


class ThreadOwner:
    """One thread, in the same way."""

    def __init__(self, locks: DistributedLockManager) -> None:
        self._locks, self._held = locks, {}
        self._thread = ThreadPoolExecutor(1)

    def acquire(self, make: str, name: str, *args: object, **how: object) -> Told:
        return self._run(obey, self._locks, self._held, make, name, args, how)

    def release(self, name: str) -> Told:
        return self._run(obey, self._locks, self._held, "", name, (), {})

    async def close(self) -> None:
        for name in list(self._held):
            with suppress(DotmacError):
                await self.release(name)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: Any, *args: object) -> Told:
        return asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


class ProcessOwner(ThreadOwner):
    """One process, in the same way."""

    def __init__(self, url: str, namespace: str, settings: dict[str, Any]) -> None:
        super().__init__(None)  # type: ignore[arg-type] - they are in the process
        self.process = python(
            "import sys; from support.owners import serve; serve(*sys.argv[1:])",
            url,
            namespace,
            _text(settings),
        )

    def acquire(self, make: str, name: str, *args: object, **how: object) -> Told:
        return self._run(self._ask, make, name, args, how)

    def release(self, name: str) -> Told:
        return self._run(self._ask, "", name, (), {})

    async def close(self) -> None:
        if self.process.poll() is None:
            await asyncio.to_thread(self.process.communicate, "")
        await super().close()

    def _ask(self, *order: object) -> object:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{_text(order)}\n")
        stdin.flush()
        result = _read(stdout.readline())
        if isinstance(result, Exception):
            raise result
        return result


Owner = TaskOwner | ThreadOwner | ProcessOwner


def obey(
    locks: DistributedLockManager,
    held: dict[str, DistributedLock],
    make: str,
    name: str,
    args: tuple[Any, ...],
    how: dict[str, Any],
) -> object:
    """What a thread does."""
    if not make:
        return held.pop(name).release_sync()
    lock = getattr(locks, make)(name, *args, **(_patience(make) | how))
    if not lock.acquire_sync():
        return False
    held[name] = lock
    return True


def _patience(make: str) -> dict[str, Any]:
    """So that a failed test ends."""
    return {} if make == "try_lock" else {"blocking_timeout": LIMIT}


def serve(url: str, namespace: str, settings: str) -> None:
    """What a process does: an order is a line, and so is what came of it."""
    held: dict[str, DistributedLock] = {}
    with manager_at(url, namespace, **_read(settings)) as locks:
        for line in sys.stdin:
            try:
                result = obey(locks, held, *_read(line))
            except Exception as error:  # noqa: BLE001 - the test's business
                result = error
            print(_text(result), flush=True)


def _text(what: object) -> str:
    return base64.b64encode(pickle.dumps(what)).decode()


def _read(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))
