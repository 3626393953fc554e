"""What an aggregator keeps for each event loop and for each process."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.database import Database
from dotmac.platform.audit_trail.ids import IdSource
from dotmac.platform.audit_trail.telling import Teller
from dotmac.platform.audit_trail.writer import Writer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from dotmac.platform.audit_trail.anomaly import OnAnomaly, Scorer
    from dotmac.platform.audit_trail.database import Settings

__all__ = ["LoopState", "Process"]


class LoopState:
    """What belongs to one event loop: connections, the writer, callbacks that are still running."""

    def __init__(self, settings: Settings, on_anomaly: OnAnomaly | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.database = Database(settings)
        self.writer = Writer(self.database)
        self.teller = Teller(on_anomaly, settings.timeout)
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
            await self.writer.aclose()
            await self.teller.aclose()
            await self.database.aclose()

    async def aclose(self) -> None:
        """Store what is on its way, wait for callbacks, close all connections."""
        await self._guard.aclose()


class Process:
    """What belongs to one process: the states of its loops, its detector, its ids."""

    def __init__(self, scorer: Scorer | None) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.loops: dict[asyncio.AbstractEventLoop, asyncio.Future[LoopState]] = {}
        self.ids = IdSource()
        self.scorer = scorer

    def forget_closed_loops(self) -> None:
        """Let go of what belongs to loops that have ended; hold `lock` for it."""
        for loop in [loop for loop in self.loops if loop.is_closed()]:
            del self.loops[loop]
