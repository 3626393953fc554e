"""An event loop in a thread of its own, for coroutines that are called where no loop runs."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

__all__ = ["run", "submit"]

T = TypeVar("T")


class _Background:
    """The loop of this process and the thread that runs it, both started on first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None

    def running_loop(self) -> asyncio.AbstractEventLoop:
        with self.lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                threading.Thread(target=self.loop.run_forever, name="dotmac-background", daemon=True).start()
            return self.loop

    def in_child(self) -> None:
        """The parent's thread does not exist here."""
        self.lock, self.loop = threading.Lock(), None


_background = _Background()
os.register_at_fork(after_in_child=_background.in_child)


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Runs a coroutine on the background loop, without waiting for it."""
    return asyncio.run_coroutine_threadsafe(coroutine, _background.running_loop())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end on the background loop and returns its result.

    The loop lives as long as the process, so that pools and bridges that the coroutine made are still there
    for the next one. An interrupt of the waiting thread cancels the coroutine.
    """
    future = submit(coroutine)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
