"""Where results come out of the engine: one side per event loop, and one for threads that don't wait."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from dotmac.platform import _native

if TYPE_CHECKING:
    import asyncio

    from dotmac.platform.connection.engine import Link

__all__ = ["Holding", "LoopSide", "Report", "ReportThread"]


class Holding(Protocol):
    """What has to be known of what is held: through which link, and whom to tell that it is lost."""

    link: Link

    def forfeit(self, reason: str) -> None: ...

    def tell(self, reason: str | None) -> None: ...


Report = Callable[[str, int, Any], None]


class LoopSide:
    """One event loop's side of one engine: the bridge, and who is told when a lease is lost."""

    __slots__ = ("_limits", "_ticking", "bridge", "children", "holdings", "loop")

    def __init__(
        self, engine: _native.Engine, loop: asyncio.AbstractEventLoop, reports: dict[int, Report]
    ) -> None:
        self.loop = loop
        # By number of the lease.
        self.holdings: dict[int, Holding] = {}
        # By number of the lease: how long the loop may stand still, seconds.
        self._limits: dict[int, float] = {}
        self._ticking: asyncio.TimerHandle | None = None
        # Requests of tasks that others may await, for the locks to look at.
        self.children: Any = None
        self.bridge = _native.Bridge(engine, loop, self.holdings, reports)
        try:
            loop.add_reader(self.bridge.fileno(), self.bridge.drain)
        except NotImplementedError:
            _ReaderThread(loop, self.bridge).start()

    def guard(self, number: int, limit: float) -> None:
        """While this lease is held the loop has to turn at least every `limit` seconds."""
        self._limits[number] = limit
        self.bridge.guard(min(self._limits.values()))
        # Now, and not when a longer limit would have wanted it.
        if self._ticking is not None:
            self._ticking.cancel()
        self._tick()

    def unguard(self, number: int) -> None:
        """The lease is over."""
        if self._limits.pop(number, None) is not None:
            self.bridge.guard(min(self._limits.values(), default=0.0))

    def _tick(self) -> None:
        self._ticking = None
        if self._limits:
            self.bridge.turned()
            self._ticking = self.loop.call_later(min(self._limits.values()) / 4, self._tick)

    def detach(self) -> None:
        """The engine is closed: what it said last is handed on, then the descriptor is let go of."""
        with suppress(RuntimeError):  # a closed loop watches nothing any more
            self.loop.call_soon_threadsafe(self._detach)

    def _detach(self) -> None:
        self.bridge.drain()
        with suppress(NotImplementedError):
            self.loop.remove_reader(self.bridge.fileno())


class _ReaderThread(threading.Thread):
    """For loops without `add_reader`: waits for the descriptor and wakes the loop once per batch."""

    def __init__(self, loop: asyncio.AbstractEventLoop, bridge: _native.Bridge) -> None:
        super().__init__(name="dotmac-bridge", daemon=True)
        self._loop, self._bridge = loop, bridge
        self._drained = threading.Event()

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._bridge.fileno(), select.POLLIN)
        while not self._loop.is_closed():
            if not poll.poll(1000):
                continue
            self._drained.clear()
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop was closed in between
                return
            # The loop may be closed after it has taken the call.
            while not self._drained.wait(1.0) and not self._loop.is_closed():
                pass

    def _drain(self) -> None:
        try:
            self._bridge.drain()
        finally:
            self._drained.set()


class ReportThread(threading.Thread):
    """Hands on what nobody waits for. Started by the first release from a thread that does not wait."""

    def __init__(self, bridge: _native.Bridge) -> None:
        super().__init__(name="dotmac-reports", daemon=True)
        self.bridge, self.closed = bridge, False

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.bridge.fileno(), select.POLLIN)
        while not self.closed:
            if poll.poll(1000):
                self.bridge.drain()
