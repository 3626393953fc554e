"""How far a destination is, kept in the database; and who may deliver to it: one process at a time.

Who delivers holds an advisory lock in a transaction that stays open on a connection of its own: the server
lets go of it the moment the connection ends, and a transaction keeps it on one server behind a pooler too.
What was taken over is counted (`epoch`), and a position moves only for the latest count: a process that lost
its lock without knowing moves nothing any more.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform.audit_trail import query
from dotmac.platform.audit_trail.storing_order import Window, horizon
from dotmac.platform.errors import TransactionsRewound

if TYPE_CHECKING:
    from collections.abc import Sequence

    import asyncpg

    from dotmac.platform.audit_trail.database import Database
    from dotmac.platform.audit_trail.filters import Filters
    from dotmac.platform.audit_trail.models import AuditEvent

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Batch", "Holder", "Lost", "Place", "Position", "Stored"]

Place = tuple[int, datetime, UUID]

_LOCK = "SELECT pg_try_advisory_xact_lock(hashtextextended('dotmac audit forward ' || $1, 0))"
_TAKE_OVER = """
    INSERT INTO audit_forward_positions AS old (destination, line, epoch) VALUES ($1, $2, 1)
    ON CONFLICT (destination) DO UPDATE SET epoch = old.epoch + 1, updated_at = now()
    RETURNING line, recorded_tx, occurred_at, id, pending_tx, pending_at, pending_id, attempts, epoch
"""
_MOVE = """
    UPDATE audit_forward_positions SET line = $3, recorded_tx = $4, occurred_at = $5, id = $6,
        pending_tx = $7, pending_at = $8, pending_id = $9, attempts = $10,
        events = events + $11, dead_letters = dead_letters + $12, updated_at = now()
    WHERE destination = $1 AND epoch = $2
"""
_PUT_ASIDE = """
    INSERT INTO audit_forward_dead_letters (destination, occurred_at, id, reason, attempts)
    SELECT $1, moment, identity, $4, $5 FROM unnest($2::timestamptz[], $3::uuid[]) AS given (moment, identity)
    ON CONFLICT DO NOTHING
"""


class Lost(Exception):
    """Another process delivers to the destination now, or may."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a destination is.

    Args:
        line: all events of earlier transactions are confirmed.
        after: the last confirmed event of `line` or later; None: none.
        pending: last event of the batch that is being delivered; None: none is.
        attempts: how often that was tried.
    """

    line: int
    after: Place | None = None
    pending: Place | None = None
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """An event, its place in the order of storing."""

    event: AuditEvent
    place: Place


@dataclass(frozen=True, slots=True)
class Batch:
    """Events in the order of storing; `line`: where the look ended, behind which to go on where it found less
    than it may; `whole`: that is all there is."""

    events: Sequence[Stored]
    line: int
    whole: bool


class Holder:
    """The right to deliver to a destination.

    Args: database: of this event loop. destination: its name.
    """

    def __init__(self, database: Database, destination: str) -> None:
        self._database = database
        self._destination = destination
        self._connection: Connection | None = None
        self._epoch = 0

    async def take(self, start: int | None) -> Position | None:
        """Try to become the one. Returns: where to go on, or None where another is the one.

        Args: start: line of a destination that is new; None: the present.
        """
        connection = await self._database.connect()
        try:
            await connection.execute("BEGIN")
            if not await connection.fetchval(_LOCK, self._destination):
                connection.terminate()
                return None
            async with self._database.reading() as other:
                line = await horizon(other) if start is None else start
                (found,) = await other.fetch(_TAKE_OVER, self._destination, line)
        except BaseException:
            connection.terminate()
            raise
        self._connection, self._epoch = connection, found["epoch"]
        return Position(
            found["line"],
            _place(found["recorded_tx"], found["occurred_at"], found["id"]),
            _place(found["pending_tx"], found["pending_at"], found["pending_id"]),
            found["attempts"],
        )

    async def beat(self, pause: float) -> None:
        """Watch the lock for ever. Raises: Lost: it is gone."""
        while True:
            await asyncio.sleep(pause)
            connection = self._connection
            if connection is None:
                raise Lost
            try:
                async with asyncio.timeout(self._database.settings.timeout):
                    # Not idle for long, which servers and firewalls end.
                    await connection.execute("SELECT 1")
            except Exception as error:
                raise Lost(f"the connection that held the lock is gone: {error}") from error

    async def move(
        self,
        position: Position,
        *,
        events: int = 0,
        dead: Sequence[Stored] = (),
        reason: str = "",
        attempts: int = 0,
    ) -> None:
        """Store the position, and with it the events that were put aside.

        Raises: Lost: another has taken over.
        """
        after, pending = position.after, position.pending
        values = (
            position.line,
            *(after or (None, None, None)),
            *(pending or (None, None, None)),
            position.attempts,
        )

        async def work(connection: Any) -> str:
            async with connection.transaction():
                if dead:
                    moments = [one.place[1] for one in dead]
                    ids = [one.place[2] for one in dead]
                    await connection.execute(_PUT_ASIDE, self._destination, moments, ids, reason, attempts)
                answer: str = await connection.execute(
                    _MOVE, self._destination, self._epoch, *values, events, len(dead)
                )
                return answer

        if await self._database.read(work, self._database.settings.timeout) != "UPDATE 1":
            raise Lost("another process has taken the destination over")

    async def aclose(self) -> None:
        """Give the right back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                await connection.close(timeout=1.0)
            connection.terminate()


async def next_batch(
    connection: Any, filters: Filters, position: Position, limit: int, window: Window
) -> Batch:
    """The next events behind a position: those of the pending batch again, else at most `limit`.

    Raises: TransactionsRewound: the cluster has not come to that position.
    """
    settled = await horizon(connection)
    if settled < position.line:
        raise TransactionsRewound(
            f"all before transaction {position.line} was delivered, and this cluster is at {settled}: it was "
            "restored from a dump, and what it stores now would be skipped. Stop it, and before it takes "
            f"more events run `pg_resetwal --epoch={(position.line >> 32) + 1}` on it; or forward under "
            "another name",
            position.line,
            settled,
        )
    if position.pending is None:
        end = window.end(position.line, settled)
    else:
        end = min(settled, position.pending[0] + 1)
    parts, values = filters.conditions()
    values += [position.line, end]
    parts += [f"recorded_tx >= ${len(values) - 1}", f"recorded_tx < ${len(values)}"]
    for sign, place in ((">", position.after), ("<=", position.pending)):
        if place is not None:
            values += place
            count = len(values)
            parts.append(f"(recorded_tx, occurred_at, id) {sign} (${count - 2}, ${count - 1}, ${count})")
    bound = "" if position.pending is not None else f" LIMIT {limit}"
    rows = await connection.fetch(
        f"{query.SELECT}, recorded_tx FROM audit_events WHERE {' AND '.join(parts)} "
        f"ORDER BY recorded_tx, occurred_at, id{bound}",
        *values,
    )
    events = [
        Stored(query.event_of(row), (row["recorded_tx"], row["occurred_at"], row["id"])) for row in rows
    ]
    if position.pending is not None:
        return Batch(events, position.line, whole=False)
    if len(events) == limit:
        window.filled(position.line, events[-1].place[0])
        return Batch(events, end, whole=False)
    if end < settled:
        window.widen()
    return Batch(events, end, whole=end == settled)


def advanced(position: Position, place: Place) -> Position:
    """The position once everything up to `place` is confirmed."""
    return replace(position, line=place[0], after=place, pending=None, attempts=0)


def _place(transaction: int | None, moment: datetime | None, identity: UUID | None) -> Place | None:
    if transaction is None or moment is None or identity is None:
        return None
    return transaction, moment, UUID(int=identity.int)
