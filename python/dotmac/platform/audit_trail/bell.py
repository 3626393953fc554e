"""Telling followers that events were stored, without a word in the way of the commits that store them.

NOTIFY inside a transaction makes all commits of the database wait for one another. So a writer rings after
its commits, in a transaction of its own that waits for no disk, and at most ten times a second. A ring that
gets lost costs a follower the time to its next look, never an event.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.database import FAILURES, backoff
from dotmac.platform.errors import DotmacError

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.database import Database

__all__ = ["CHANNEL", "Bell", "Ringer"]

CHANNEL = "dotmac_audit"
_RING = f"BEGIN; SET LOCAL synchronous_commit = off; NOTIFY {CHANNEL}; COMMIT"
_BETWEEN_RINGS = 0.1
_AFTER_FAILURE = 30.0
_UNUSED = 30.0
_CHECK = 15.0
_FAILURES = (*FAILURES, DotmacError)
_logger = logging.getLogger(__name__)


class Ringer:
    """Rings for the commits of one event loop's writer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        self._ringing: asyncio.Task[None] | None = None
        self._again = False
        self._closed = False

    def committed(self, _events: int) -> None:
        """Events were stored; returns at once."""
        if self._ringing is not None:
            self._again = True
        elif not self._closed:
            self._ringing = self._loop.create_task(self._ring(), name="dotmac-audit-ring")

    async def _ring(self) -> None:
        try:
            while True:
                await asyncio.sleep(max(0.0, self._next - self._loop.time()))
                self._again = False
                self._next = self._loop.time() + await self._notify()
                if not self._again:
                    return
        finally:
            self._ringing = None

    async def _notify(self) -> float:
        """Seconds until the next ring may come."""
        try:
            async with (
                asyncio.timeout(self._database.settings.timeout),
                self._database.reading() as connection,
            ):
                await connection.execute(_RING)
        except _FAILURES as error:
            # Followers look by themselves from time to time; a read-only server, say, takes no NOTIFY at all.
            _logger.debug("followers of the audit trail were not told: %s", error)
            return _AFTER_FAILURE
        return _BETWEEN_RINGS

    async def aclose(self) -> None:
        """Ring for what was stored last, if that is to be done at once."""
        self._closed = True
        ringing = self._ringing
        if ringing is not None:
            await asyncio.wait([ringing], timeout=_BETWEEN_RINGS * 5)
            ringing.cancel()
            await asyncio.wait([ringing])


class Bell:
    """Hears the rings: one connection for all followers of an event loop, kept while there are any."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._rung = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self._waiting = 0
        self._last_used = 0.0
        self.closed = False
        self.rings = 0

    async def wait(self, seen: int, seconds: float) -> None:
        """Until it rings, or has rung since `rings` was `seen`; at most for so many seconds."""
        if self._listening is None and not self.closed:
            self._listening = self._loop.create_task(self._listen(), name="dotmac-audit-listen")
        self._waiting += 1
        try:
            if self.rings == seen:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._rung.wait()
        finally:
            self._waiting -= 1
            self._last_used = self._loop.time()

    def _ring(self, *_: Any) -> None:
        self.rings += 1
        self._rung.set()
        self._rung = asyncio.Event()

    async def _listen(self) -> None:
        attempt = 0
        try:
            while self._in_use():
                try:
                    await self._listen_once()
                    attempt = 0
                except _FAILURES as error:
                    _logger.debug("followers of the audit trail look by themselves: %s", error)
                    attempt += 1
                    await asyncio.sleep(min(_AFTER_FAILURE, backoff(attempt) * 2**attempt))
        finally:
            self._listening = None

    def _in_use(self) -> bool:
        return self._waiting > 0 or self._loop.time() - self._last_used < _UNUSED

    async def _listen_once(self) -> None:
        """Until the connection is lost or nobody follows any more."""
        connection = await self._database.connect()
        lost = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(CHANNEL, self._ring)
            self._ring()  # what was stored until now was told to nobody here
            while self._in_use() and not lost.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CHECK):
                        await lost.wait()
                        return
                # A connection that died without a word would be waited on for ever.
                async with asyncio.timeout(self._database.settings.timeout):
                    await connection.execute("SELECT 1")
        finally:
            connection.terminate()

    async def aclose(self) -> None:
        """Stop listening; whoever waits goes on."""
        self.closed = True
        listening = self._listening
        if listening is not None:
            listening.cancel()
            await asyncio.wait([listening])
        self._ring()
