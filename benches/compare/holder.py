"""A process that holds and wants locks as it is told, for the parts that look at several processes.

It reads lines of JSON: `{"do": "hold", "names": […], "lease": s, "waits": false}` and so on; see `_Holder`.
Answers are `{"done": …}` with times of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import ctypes
import resource
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from peers import BY_NAME
from stand import hear, say, why

if TYPE_CHECKING:
    from collections.abc import Callable

    from peers import AsyncPeer, SyncPeer

AT_ONCE = 500


def _block(how: str, seconds: float) -> None:
    if how == "time.sleep":
        time.sleep(seconds)
    elif how == "Python loop":
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
    else:
        # PyDLL keeps the interpreter's lock during the call.
        ctypes.PyDLL(None).usleep(ctypes.c_uint(int(seconds * 1e6)))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Holder:
    """What is common to both kinds; a subclass takes and gives back."""

    def __init__(self) -> None:
        self.entered: dict[str, Any] = {}

    def answer(self, asked: dict[str, Any]) -> bool:
        """Does what needs no lock; False for the rest."""
        if asked["do"] == "block":
            _block(asked["how"], asked["seconds"])
        elif asked["do"] != "cpu":
            return False
        say({"done": time.monotonic(), "cpu": _cpu()})
        return True


class _AsyncHolder(_Holder):
    def __init__(self, peer: AsyncPeer) -> None:
        super().__init__()
        self.peer = peer
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self, port: int) -> None:
        await self.peer.start(port)
        async with self.peer.lock("warm", 10.0):
            say("ready")
        # Not in a thread while something is blocked or measured, but the loop must turn while it waits.
        while (asked := await asyncio.to_thread(hear)) is not None:
            if not self.answer(asked):
                await getattr(self, asked.pop("do"))(**asked)

    async def hold(self, names: list[str], lease: float) -> None:
        """Takes free locks, and keeps them renewed."""

        async def one(name: str) -> None:
            lock = self.peer.renewed(name, lease)
            await lock.__aenter__()
            self.entered[name] = lock

        for at in range(0, len(names), AT_ONCE):
            await asyncio.gather(*(one(name) for name in names[at : at + AT_ONCE]))
        say({"done": time.monotonic()})

    async def crowd(self, name: str, lease: float, count: int) -> None:
        """As many tasks wait for one lock; nobody is told when they get it."""
        for _ in range(count):
            self.tasks.add(asyncio.create_task(self.peer.renewed(name, lease).__aenter__()))
        say({"done": time.monotonic()})

    async def want(self, names: list[str], lease: float) -> None:
        """Waits for locks; one answer for each, when it is held."""

        async def one(name: str) -> None:
            lock = self.peer.renewed(name, lease)
            await lock.__aenter__()
            say({"name": name, "held": time.monotonic()})
            self.entered[name] = lock

        for name in names:
            task = asyncio.create_task(one(name))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def leave(self) -> None:
        """Gives everything back."""
        while self.entered:
            _, lock = self.entered.popitem()
            try:
                await lock.__aexit__(None, None, None)
            except Exception:  # noqa: BLE001 - lost meanwhile, which is what is looked at elsewhere
                continue
        say({"done": time.monotonic()})


class _SyncHolder(_Holder):
    def __init__(self, peer: SyncPeer) -> None:
        super().__init__()
        self.peer = peer

    def run(self, port: int) -> None:
        self.peer.start(port)
        with self.peer.lock("warm", 10.0):
            say("ready")
        while (asked := hear()) is not None:
            if not self.answer(asked):
                getattr(self, asked.pop("do"))(**asked)

    def _start(self, what: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=what, args=arguments, daemon=True).start()

    def hold(self, names: list[str], lease: float) -> None:
        """As above."""
        for name in names:
            lock = self.peer.renewed(name, lease)
            lock.__enter__()
            self.entered[name] = lock
        say({"done": time.monotonic()})

    def crowd(self, name: str, lease: float, count: int) -> None:
        """As above, in threads."""
        for _ in range(count):
            self._start(self.peer.renewed(name, lease).__enter__)
        say({"done": time.monotonic()})

    def want(self, names: list[str], lease: float) -> None:
        """As above, in threads."""

        def one(name: str) -> None:
            lock = self.peer.renewed(name, lease)
            lock.__enter__()
            say({"name": name, "held": time.monotonic()})
            self.entered[name] = lock

        for name in names:
            self._start(one, name)

    def leave(self) -> None:
        """As above."""
        while self.entered:
            _, lock = self.entered.popitem()
            try:
                lock.__exit__(None, None, None)
            except Exception:  # noqa: BLE001 - as above
                continue
        say({"done": time.monotonic()})


def work(name: str, port: int) -> None:
    """The whole life of such a process."""
    peer = BY_NAME[name]()
    try:
        if peer.sync:
            _SyncHolder(peer).run(port)  # type: ignore[arg-type]
        else:
            asyncio.run(_AsyncHolder(peer).run(port))  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - the parent reports it
        say({"failed": why(error)})


if __name__ == "__main__":
    work(sys.argv[2], int(sys.argv[3]))
