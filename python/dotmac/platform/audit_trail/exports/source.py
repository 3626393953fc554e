"""Reading all events of a query as they were at one moment, without holding the database to it.

A snapshot that stays open over an export of an hour holds up those who drop old partitions, and is lost with
its connection. Here the snapshot is written down instead: the trail is append-only, and each row bears the
transaction that stored it, so "visible at that moment" is a condition on `recorded_tx` that holds for ever
(PostgreSQL documentation, "pg_current_snapshot": visible is what is less than xmax and not among
those in progress). So an export is a series of short statements, each beginning behind the last row that
arrived; a connection lost in the middle, or a process that died yesterday, changes nothing in what is read.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from dotmac.platform.audit_trail.database import FAILURES, backoff, is_transient, meaning, told
from dotmac.platform.audit_trail.exports.columns import SELECT
from dotmac.platform.audit_trail.ids import from_micros
from dotmac.platform.audit_trail.query import Order
from dotmac.platform.audit_trail.tenancy import check_named, name_tenant
from dotmac.platform.errors import AuditUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from dotmac.platform.audit_trail.database import Database, Pooled
    from dotmac.platform.audit_trail.filters import Filters

__all__ = ["ROWS_PER_STATEMENT", "Place", "Snapshot", "Source", "TakerFailed", "take_snapshot"]

ROWS_PER_STATEMENT = 100_000
Place = tuple[int, bytes]

_SNAPSHOT = """
    SELECT pg_snapshot_xmin(now_seen)::text::bigint AS xmin, pg_snapshot_xmax(now_seen)::text::bigint AS xmax,
        ARRAY(SELECT running::text::bigint FROM pg_snapshot_xip(now_seen) AS running) AS running,
        clock_timestamp() AS moment,
        EXISTS (SELECT FROM audit_events
            WHERE recorded_tx >= pg_snapshot_xmax(now_seen)::text::bigint) AS moved
    FROM pg_current_snapshot() AS now_seen
"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was visible at a moment.

    Args:
        xmin, xmax, running: the server's snapshot.
        moment: when it was taken.
        moved: are there rows with transactions of the future? They were restored from another cluster, whose
            count of transactions was further; those are told from later rows by when they were recorded.
    """

    xmin: int
    xmax: int
    running: tuple[int, ...]
    moment: datetime
    moved: bool

    def condition(self) -> str:
        """The condition in SQL; all in it are numbers and a time of ours."""
        between = f"recorded_tx < {self.xmax}"
        if self.running:
            listed = ", ".join(map(str, self.running))
            between = f"(recorded_tx < {self.xmin} OR ({between} AND recorded_tx NOT IN ({listed})))"
        if self.moved:
            told = self.moment.isoformat()
            between = f"({between} OR (recorded_tx >= {self.xmax} AND recorded_at <= '{told}'))"
        return between

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "xmin": self.xmin,
            "xmax": self.xmax,
            "running": list(self.running),
            "moment": self.moment.isoformat(),
            "moved": self.moved,
        }

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> Snapshot:
        """What `to_dict` made."""
        return cls(
            int(said["xmin"]),
            int(said["xmax"]),
            tuple(int(one) for one in said["running"]),
            datetime.fromisoformat(said["moment"]),
            bool(said["moved"]),
        )


async def take_snapshot(connection: Any) -> Snapshot:
    """What is visible now."""
    found = await connection.fetchrow(_SNAPSHOT)
    return Snapshot(found["xmin"], found["xmax"], tuple(found["running"]), found["moment"], found["moved"])


class TakerFailed(Exception):
    """Who took the rows failed: not the database's failure, though both may be an OSError."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Encoder(Protocol):
    """Turns COPY's pieces into the bytes of a format."""

    @property
    def rows(self) -> int:
        """Rows written so far."""

    @property
    def last(self) -> Place | None:
        """Key of the last one."""

    def restart(self) -> None:
        """Another statement begins."""


class Source:
    """The rows of a query, statement by statement.

    Args:
        database: of this event loop.
        filters, order: the query.
        snapshot: what may be seen.
        timeout: seconds within which the server sends something, or is given up.
        tenant: whose events may be seen where row-level security applies.
    """

    def __init__(
        self,
        database: Database,
        filters: Filters,
        order: Order,
        snapshot: Snapshot,
        timeout: float,
        tenant: str | None,
    ) -> None:
        self._database = database
        self._filters = filters
        self._order = order
        self._snapshot = snapshot
        self._timeout = timeout
        self._tenant = tenant

    async def pour(
        self,
        encoder: Encoder,
        after: Place | None,
        take: Callable[[bytes], Coroutine[Any, Any, None]],
        pause: Callable[[], Awaitable[None]],
    ) -> None:
        """Read all rows behind `after`.

        Args:
            encoder: knows how many rows it got and which was the last.
            after: key of the last row that was had before.
            take: gets every piece as it arrives, and gives it to the encoder.
            pause: called between two statements, when all rows before are with the encoder.
        Raises:
            AuditUnavailable: nothing came within the timeout.
            TakerFailed: `take` raised; holds what.
            InvalidArgument: row-level security has come to apply, and no tenant is named.
            ServerRefused, SchemaOutdated.
        """
        loop = asyncio.get_running_loop()
        attempt, deadline = 0, loop.time() + self._timeout
        first = encoder.rows
        begun = first
        while True:
            had = encoder.rows
            place = encoder.last if encoder.rows > first else after
            try:
                await self._statement(encoder, place, begun + ROWS_PER_STATEMENT - had, take)
            except FAILURES as error:
                if not is_transient(error):
                    raise meaning(error) from error
                if encoder.rows > had:
                    attempt, deadline = 0, loop.time() + self._timeout
                rest = backoff(attempt)
                attempt += 1
                if loop.time() + rest >= deadline:
                    raise AuditUnavailable(
                        f"no answer from the audit database within {self._timeout:g} s, after "
                        f"{encoder.rows} rows: {told(error)}"
                    ) from error
                await asyncio.sleep(rest)
                continue
            attempt, deadline = 0, loop.time() + self._timeout
            if encoder.rows < begun + ROWS_PER_STATEMENT:
                return
            begun = encoder.rows
            await pause()
            deadline = loop.time() + self._timeout

    async def _statement(
        self,
        encoder: Encoder,
        after: Place | None,
        limit: int,
        take: Callable[[bytes], Coroutine[Any, Any, None]],
    ) -> None:
        sql, values = self._sql(after, limit)
        failed: list[Exception] = []
        loop = asyncio.get_running_loop()
        encoder.restart()
        try:
            async with asyncio.timeout(self._timeout) as patience, self._database.reading() as connection:

                async def sink(piece: bytes | bytearray) -> None:
                    # Who takes long to write does not make the database late.
                    patience.reschedule(None)
                    try:
                        await take(bytes(piece))
                    except Exception as error:
                        failed.append(error)
                        raise
                    patience.reschedule(loop.time() + self._timeout)

                sight = await self._database.look(connection)
                check_named(sight, self._tenant)
                await _copy(connection, sql, values, sink, sight.setting(self._tenant))
        except Exception:
            if failed:
                raise TakerFailed(failed[0]) from failed[0]
            raise

    def _sql(self, after: Place | None, limit: int) -> tuple[str, list[Any]]:
        parts, values = self._filters.conditions()
        parts.append(self._snapshot.condition())
        newest_first = self._order is Order.NEWEST_FIRST
        if after is not None:
            values += [from_micros(after[0]), UUID(bytes=after[1])]
            time, identity = f"${len(values) - 1}::timestamptz", f"${len(values)}::uuid"
            sign = "<" if newest_first else ">"
            # The first part says nothing new, but lets whole months be left out.
            parts += [f"occurred_at {sign}= {time}", f"(occurred_at, id) {sign} ({time}, {identity})"]
        way = self._order.value.upper()
        sql = (
            f"{SELECT} FROM audit_events WHERE {' AND '.join(parts)} "
            f"ORDER BY occurred_at {way}, id {way} LIMIT {limit}"
        )
        return sql, values


async def _copy(
    connection: Pooled,
    sql: str,
    values: list[Any],
    sink: Callable[[bytes], Coroutine[Any, Any, None]],
    tenant: str | None,
) -> None:
    # In a transaction, because asyncpg asks the server to write the values as literals first, and behind a
    # pooler two statements of one session may meet two servers.
    transaction = connection.transaction(readonly=True)
    await transaction.start()
    await name_tenant(connection, tenant)
    await connection.copy_from_query(sql, *values, output=sink, format="binary")
    await transaction.commit()
