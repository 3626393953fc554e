"""Calls `on_anomaly`: what it raises is logged, and nobody waits for it for ever. One event loop's."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from uuid import UUID

    from dotmac.platform.audit_trail.anomaly import Anomaly, OnAnomaly

__all__ = ["Teller"]

_FAILED = "on_anomaly failed for event %s"
_logger = logging.getLogger(__name__)


class Teller:
    """Tells a callback of anomalies.

    Args:
        on_anomaly: the callback, which may be async.
        timeout: seconds after which an async one is cancelled.
    """

    def __init__(self, on_anomaly: OnAnomaly | None, timeout: float) -> None:
        self._on_anomaly = on_anomaly
        self._timeout = timeout
        self._running: set[asyncio.Task[None]] = set()

    async def tell(self, anomaly: Anomaly, deadline: float) -> None:
        """Call it; an async callback that is not done at `deadline` (the loop's time) goes on beside."""
        if self._on_anomaly is None:
            return
        try:
            answer = self._on_anomaly(anomaly)
        except Exception:
            _logger.exception(_FAILED, anomaly.event_id)
            return
        if answer is None:
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._finish(answer, anomaly.event_id), name="dotmac-audit-anomaly")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait({task}, timeout=max(0.0, deadline - loop.time()))

    async def _finish(self, answer: Awaitable[None], event_id: UUID) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await answer
        except Exception:
            _logger.exception(_FAILED, event_id)

    async def aclose(self) -> None:
        """Wait for what is running, each at most for the timeout."""
        if self._running:
            await asyncio.wait(self._running, timeout=self._timeout)
