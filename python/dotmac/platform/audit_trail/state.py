"""What an aggregator keeps for each event loop and for each process."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.bell import Bell, Ringer
from dotmac.platform.audit_trail.database import Database
from dotmac.platform.audit_trail.spool import Spool
from dotmac.platform.audit_trail.telling import Teller
from dotmac.platform.audit_trail.writer import Writer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from concurrent.futures import Future

    from dotmac.platform._native import AuditEncoder
    from dotmac.platform.audit_trail.anomaly import OnAnomaly
    from dotmac.platform.audit_trail.database import Settings
    from dotmac.platform.audit_trail.integrity.sealer import Sealer

__all__ = ["LoopState", "Process"]


class LoopState:
    """What belongs to one event loop: connections, the writer, callbacks still running, the bell."""

    def __init__(self, settings: Settings, on_anomaly: OnAnomaly | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.database = Database(settings)
        self.writer = Writer(self.database)
        self.teller = Teller(on_anomaly, settings.timeout)
        self.sealer: Sealer | None = None
        self.bell = Bell(self.database)
        self.ringer = Ringer(self.database)
        self.writer.on_committed = self.ringer.committed
        self.spool = Spool(settings, self.writer)
        self._closing: asyncio.Task[None] | None = None
        self._guard = self._until_the_loop_ends()

    async def start(self) -> None:
        """Be closed at the latest when the loop ends."""
        await anext(self._guard)

    async def _until_the_loop_ends(self) -> AsyncGenerator[None]:
        # asyncio.run() and its like end a loop's async generators before they close it: the one hook that
        # lets connections be closed by a loop whose user never called aclose().
        try:
            yield
        finally:
            # Each is closed, whatever becomes of those before it; the last one called here is the first.
            async with AsyncExitStack() as closing:
                closing.push_async_callback(self.database.aclose)
                closing.push_async_callback(self.bell.aclose)
                closing.push_async_callback(self.ringer.aclose)
                if self.sealer is not None:
                    closing.push_async_callback(self.sealer.aclose)
                closing.push_async_callback(self.teller.aclose)
                closing.push_async_callback(self.writer.aclose)
                closing.push_async_callback(self.spool.aclose)

    async def aclose(self) -> None:
        """Store what is on its way, wait for callbacks, close all connections.

        A caller that is cancelled does not end it; another one waits for the same end.
        """
        if self._closing is None:
            self._closing = self.loop.create_task(self._guard.aclose(), name="dotmac-audit-close")
        await asyncio.shield(self._closing)


class Process:
    """What belongs to one process: the states of its loops, and what makes its events."""

    def __init__(self, encoder: AuditEncoder, threshold: float, forks: int) -> None:
        self.forks = forks
        self.lock = threading.Lock()
        self.loops: dict[asyncio.AbstractEventLoop, asyncio.Future[LoopState]] = {}
        self.logging: dict[asyncio.AbstractEventLoop, LoopState] = {}  # of `loops`, those that log events
        self.closing: dict[Future[None], asyncio.AbstractEventLoop] = {}  # what aclose() has begun, and where
        self.encoder = encoder
        self.threshold = threshold

    def forget_closed_loops(self) -> None:
        """Let go of what belongs to loops that have ended; hold `lock` for it."""
        for loop in [loop for loop in self.loops if loop.is_closed()]:
            made = self.loops.pop(loop)
            self.logging.pop(loop, None)
            if made.done() and not made.cancelled() and made.exception() is None:
                made.result().spool.let_go_if_ended()
