"""The order of storing: up to which transaction it is settled, and how much of it is read at once."""

from __future__ import annotations

from typing import Any

__all__ = ["Window", "horizon"]

_HORIZON = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
_LARGEST = 1 << 62


async def horizon(connection: Any) -> int:
    """The oldest transaction that still runs: behind it nothing can appear any more."""
    return int(await connection.fetchval(_HORIZON))


class Window:
    """How many transactions a reader looks through at once.

    Without a bound, one that lags would have the server sort all that it has to catch up with for each block
    that it reads; unless the planner knows better, which it does not of what was stored since its statistics
    were made. So a look goes through about as many transactions as fill a block.
    """

    def __init__(self) -> None:
        self._size = 8
        self._most = _LARGEST

    def end(self, begin: int, settled: int) -> int:
        """The transaction before which the next look ends. Args: begin: where. settled: the horizon."""
        return min(settled, begin + self._size)

    def filled(self, begin: int, last: int) -> None:
        """A look found as much as it may. Args: begin, last: transactions of its begin and its last event."""
        self._size = min(self._most, 2 * (last - begin + 1))

    def widen(self) -> None:
        """A look found less than it may, and did not come to the horizon."""
        self._size = min(self._most, self._size * 2)
        if self._size == self._most:
            self._most = min(_LARGEST, self._most + self._most // 4 + 1)

    def narrow(self) -> None:
        """A look failed, perhaps for its width: the next ones are of half of it, and widen slowly."""
        self._size = self._most = max(1, self._size // 2)
