"""Following the trail without missing an event, whatever the order of commits.

A clock or a serial number would not do: a transaction that took its place early may commit late, behind a
reader that went past it. So each row bears the transaction that stored it, and only rows are read whose
transaction is older than every one still running (`pg_snapshot_xmin`): behind that line nothing can appear
any more. A long writing transaction elsewhere in the cluster delays the follower; it never makes it miss.
When to look is told by the bell; a look from time to time makes up for rings that get lost.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from uuid import UUID

from dotmac.platform.audit_trail import query
from dotmac.platform.audit_trail.ids import EPOCH, from_micros, micros
from dotmac.platform.audit_trail.storing_order import Window, horizon
from dotmac.platform.errors import AuditUnavailable, InvalidCursor, TransactionsRewound

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime
    from types import TracebackType

    import asyncpg

    from dotmac.platform.audit_trail.bell import Bell
    from dotmac.platform.audit_trail.filters import Filters
    from dotmac.platform.audit_trail.models import AuditEvent

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Position", "Tail"]

_BLOCK = 1_000
_NOBODY = UUID(int=0)
_REST = 0.05  # seconds between looks, however often the bell rings
_QUICK_LOOKS = 5
_PLAIN = struct.Struct(">Bqq16s")
_CHECK_BYTES = 4
_TOKEN = struct.Struct(f">Bqq16s{_CHECK_BYTES}s")


class Position(NamedTuple):
    """A place in the order of storing: everything up to it was seen, itself included."""

    transaction: int
    occurred_at: datetime = EPOCH
    id: UUID = _NOBODY

    def token(self) -> str:
        """The place as text, for `tail(after=…)`."""
        plain = _PLAIN.pack(1, self.transaction, micros(self.occurred_at), self.id.bytes)
        return base64.urlsafe_b64encode(plain + _check(plain)).decode().rstrip("=")

    @classmethod
    def of(cls, token: object) -> Position:
        """The place that a token names. Raises: InvalidCursor: it is damaged."""
        try:
            if isinstance(token, str):
                raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
                version, transaction, moment, identity, check = _TOKEN.unpack(raw)
                if version == 1 and check == _check(raw[: _PLAIN.size]):
                    return cls(transaction, from_micros(moment), UUID(bytes=identity))
        except (binascii.Error, struct.error, ValueError, OverflowError):
            pass
        shown = token[:40] if isinstance(token, str) else type(token).__name__
        raise InvalidCursor(f"after: {shown!r} is damaged; pass the `position` of a tail unchanged")


class Tail:
    """Events as they are stored, each once, for ever: `async for event in audit.tail()`.

    It reads no further than its user does: who is slow falls behind, and nothing piles up. Cancelling a wait
    for the next event loses none. Ends with its own `aclose()` or the aggregator's, or when nobody refers to
    it any more.
    """

    def __init__(
        self,
        read: Callable[..., Awaitable[Any]],
        bell: Callable[[], Awaitable[Bell]],
        filters: Filters,
        start: Position | None,
        poll: float,
        opened: Callable[[list[AuditEvent]], Awaitable[list[AuditEvent]]],
    ) -> None:
        self._opened = opened
        self._read = read
        self._bell = bell
        self._filters = filters
        self._poll = poll
        self._found: deque[tuple[AuditEvent, Position]] = deque()
        self._seen = self._line = start
        self._window = Window()
        self._more = start is not None
        self._closed = False
        self._next_look = 0.0
        self._quick_looks = 0

    @property
    def position(self) -> str | None:
        """Where to go on after the event given last: for `tail(after=…)`; None before the first look."""
        return None if self._seen is None else self._seen.token()

    @property
    def waiting(self) -> int:
        """Events that were read and not yet taken."""
        return len(self._found)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AuditEvent:
        while not self._found:
            if self._closed:
                raise StopAsyncIteration
            await self._look()
        event, self._seen = self._found.popleft()
        return event

    async def start(self) -> None:
        """Settle from where on events are seen; else the first wait does."""
        if self._line is None:
            self._seen = self._line = Position(await self._read(horizon))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End: whoever iterates is told so when the next event would come."""
        self._closed = True
        self._found.clear()

    async def _look(self) -> None:
        await self.start()
        assert self._line is not None
        bell, loop = await self._bell(), asyncio.get_running_loop()
        rings = bell.rings
        if not self._more:
            await asyncio.sleep(max(0.0, self._next_look - loop.time()))
        self._next_look = loop.time() + _REST
        # Nothing changes before the answer is there: a wait that is cancelled loses nothing.
        try:
            rows, end, whole = await self._read(_step(self._filters, self._line, self._window))
        except AuditUnavailable:
            self._window.narrow()
            raise
        events = await self._opened([query.event_of(row) for row in rows])
        for row, event in zip(rows, events, strict=True):
            place = Position(row["recorded_tx"], row["occurred_at"], row["id"])
            self._found.append((event, place))
        if len(rows) == _BLOCK:
            last = self._found[-1][1]
            self._window.filled(self._line.transaction, last.transaction)
            self._line, self._more = last, True
        else:
            self._line, self._more = Position(end), not whole
            if self._more:
                self._window.widen()
        if rows:
            return
        self._seen = self._line
        if self._more:
            return
        # What rang may still be behind a transaction that is about to end: look again soon, then less often.
        wait, quick = self._poll, self._quick_looks
        if quick:
            wait, self._quick_looks = min(wait, _REST * 2.0 ** (_QUICK_LOOKS - quick)), quick - 1
        await bell.wait(rings, wait)
        self._closed = self._closed or bell.closed
        if bell.rings != rings:
            self._quick_looks = _QUICK_LOOKS


def _step(filters: Filters, line: Position, window: Window) -> Any:
    """Reads on: rows, the transaction before which the look ends, and whether that is the horizon."""

    async def work(connection: Connection) -> tuple[list[asyncpg.Record], int, bool]:
        settled = await horizon(connection)
        if settled < line.transaction:
            # What is stored from here on takes numbers again that were seen: it would be skipped.
            raise TransactionsRewound(
                f"the follower stood at transaction {line.transaction}, and the database is at {settled}: a "
                "standby answers that has not got everything, or it took over, or the database was restored "
                "from a dump. If it does not catch up, follow anew without `after`, and query what was "
                "stored since",
                line.transaction,
                settled,
            )
        if settled == line.transaction:
            return [], settled, True
        until = window.end(line.transaction, settled)
        parts, values = filters.conditions()
        values += [line.transaction, until, line.occurred_at, line.id]
        tx, end, moment, identity = (f"${len(values) - 3 + n}" for n in range(4))
        parts += [
            f"recorded_tx >= {tx}",
            f"recorded_tx < {end}",
            f"(recorded_tx, occurred_at, id) > ({tx}, {moment}, {identity})",
        ]
        rows = await connection.fetch(
            f"{query.SELECT}, recorded_tx FROM audit_events WHERE {' AND '.join(parts)} "
            f"ORDER BY recorded_tx, occurred_at, id LIMIT {_BLOCK}",
            *values,
        )
        return rows, until, until == settled

    return work


def _check(plain: bytes) -> bytes:
    return hashlib.blake2b(plain, digest_size=_CHECK_BYTES).digest()
