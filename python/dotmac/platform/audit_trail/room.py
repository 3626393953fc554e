"""A bound on what waits for the database: so many events, so many bytes. Belongs to one event loop."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Room"]


class Room:
    """Lets events in, first come, first served, while there is room.

    Args:
        max_events: events inside at most.
        max_size: bytes inside at most; one event alone may be larger.
    """

    def __init__(self, max_events: int, max_size: int) -> None:
        self._max_events = max_events
        self._max_size = max_size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.events = 0
        self.size = 0

    def enter_now(self, size: int) -> bool:
        """Go in, if nobody waits before and there is room."""
        if self._waiting or not self._fits(size):
            return False
        self._take(size)
        return True

    async def enter(self, size: int) -> None:
        """Go in as soon as there is room; `leave` afterwards."""
        if self.enter_now(size):
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._let_in()  # those behind may be smaller
            else:
                self.leave(size)  # was let in and cancelled at once
            raise

    def leave(self, size: int, events: int = 1) -> None:
        """Make room for others: so many bytes in so many events."""
        self.events -= events
        self.size -= size
        if self._waiting:
            self._let_in()

    def _fits(self, size: int) -> bool:
        return self.events < self._max_events and (self.events == 0 or self.size + size <= self._max_size)

    def _take(self, size: int) -> None:
        self.events += 1
        self.size += size

    def _let_in(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(size):
                    return
                self._take(size)
                turn.set_result(None)
            self._waiting.popleft()
