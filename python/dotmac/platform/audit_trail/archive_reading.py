"""Archived events in queries: the same filters, the same order, the same pages as of those in the table.

PostgreSQL itself decides which archived rows match: the query's own statement runs over them, with a common
table expression in the table's place. Arrow only leaves out beforehand what can't match: whole files and row
groups by time, rows by the plain filters. Which months are archived is read in the same snapshot as the
table, so that an event is seen in one of both places, not in both or neither, while retention is at work.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from dotmac.platform.audit_trail import archive
from dotmac.platform.audit_trail.archive import columns_of, import_pyarrow
from dotmac.platform.audit_trail.query import SELECT, Order, Statement, event_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
    from uuid import UUID

    import asyncpg

    from dotmac.platform.audit_trail.filters import Filters
    from dotmac.platform.audit_trail.models import AuditEvent
    from dotmac.platform.audit_trail.query import Place

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Archives"]

# Rows that go to the database at once: enough to be worth a round trip.
_BLOCK = 2_000
_INSTANT = timedelta(microseconds=1)  # between two times that differ
_ARCHIVED = """
    SELECT id, url, from_time, to_time, events FROM audit_archives AS archive
    WHERE archived_at IS NOT NULL AND (state = 'dropped' OR state = 'detaching' AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_inherits JOIN pg_catalog.pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = 'audit_events'::regclass AND relname = partition AND NOT inhdetachpending))
    AND ($1::timestamptz IS NULL OR to_time > $1) AND ($2::timestamptz IS NULL OR from_time < $2)
"""
# filter → the column that has to be one of its values; what else is asked for, PostgreSQL decides
_ONE_OF = {
    "categories": "category",
    "levels": "level",
    "outcomes": "outcome",
    "user_id": "user_id",
    "tenant_id": "tenant_id",
    "resource_type": "resource_type",
    "resource_id": "resource_id",
    "correlation_id": "correlation_id",
    "trace_id": "trace_id",
}
_PLAIN = frozenset({*_ONE_OF, "start_time", "end_time", "min_anomaly_score"})


class _File(NamedTuple):
    """One archive; its events lie between the times."""

    url: str
    start: datetime
    end: datetime
    events: int


@dataclass(frozen=True, slots=True)
class Archives:
    """Reads archives beside the table.

    Args:
        read: runs work on a connection for the query's tenant, as `Service._read` does.
        options: what fsspec opens the places with.
        tenant: the only tenant whose events may be seen; None for all.
        nothing: row-level security shows nothing, as no tenant is named.
    """

    read: Callable[..., Awaitable[Any]]
    options: Mapping[str, Any]
    tenant: str | None = None
    nothing: bool = False

    async def page(
        self,
        work: Callable[[Connection], Awaitable[list[AuditEvent]]],
        statement: Statement,
        filters: Filters,
        order: Order,
        limit: int,
        place: Place | None,
    ) -> list[AuditEvent]:
        """The first events behind a place, of table and archives together; those before one in reverse.

        Args:
            work: reads the table's part.
            statement: the same as a statement, for archived rows.
            filters: the query's.
            limit: events at most.
            place: what the page's cursor says; None for the beginning.
        """
        found: list[AuditEvent]
        found, files = await self._both(work, filters)
        newest = (order is Order.NEWEST_FIRST) ^ (place is not None and place.side.backward)
        for file in sorted(files, key=lambda one: one.start, reverse=newest):
            if len(found) >= limit:
                last = found[limit - 1].occurred_at
                if last >= file.end if newest else last < file.start:
                    break  # a page's worth comes before anything in this file, or in those behind it
            archived = await self._from_file(file, statement, filters, newest, limit, place)
            merged = heapq.merge(
                found, archived, key=lambda event: (event.occurred_at, event.id), reverse=newest
            )
            found = list(itertools.islice(merged, limit))
        return found

    async def count(self, filters: Filters) -> int:
        """How many events there are in table and archives together.

        Counted, not summed up: the daily sums forget a month when it is dropped, not when its archive begins
        to count.
        """
        parts, values = filters.conditions()
        sql = f"SELECT count(*) FROM audit_events WHERE {' AND '.join(parts) or 'true'}"  # noqa: S608 (conditions of ours)

        async def work(connection: Connection) -> int:
            return int(await connection.fetchval(sql, *values))

        count: int
        count, files = await self._both(work, filters)
        for file in files:
            if filters.given() <= _PLAIN:
                count += await asyncio.to_thread(self._count_rows, file, filters)
                continue
            async with aclosing(self._blocks(file, filters, newest=False)) as blocks:
                async for block in blocks:
                    count += await self._ask(Statement(sql, values), block, _first_value)
        return count

    async def find(
        self, event_id: UUID, moment: datetime | None, filters: Filters, *, elsewhere: bool
    ) -> AuditEvent | None:
        """The archived event of an id.

        Args: moment: when it happened, if that is known. elsewhere: look for it at other times as well.
        """
        statement = Statement(f"{SELECT} FROM audit_events WHERE id = $1 LIMIT 1", [event_id])
        tries = [filters] if elsewhere or moment is None else []
        if moment is not None:
            tries.insert(0, replace(filters, start_time=moment, end_time=moment + _INSTANT))
        for wanted in tries:
            _, files = await self._both(_nothing, wanted)
            for file in files:
                blocks = self._blocks(file, wanted, newest=False, event_id=str(event_id))
                async with aclosing(blocks):
                    async for block in blocks:
                        events: list[AuditEvent] = await self._ask(statement, block, _events)
                        return events[0]
        return None

    async def _both(
        self, work: Callable[[Connection], Awaitable[Any]], filters: Filters
    ) -> tuple[Any, list[_File]]:
        async def together(connection: Connection) -> tuple[Any, list[_File]]:
            rows = await connection.fetch(_ARCHIVED, filters.start_time, filters.end_time)
            files = [_File(row["url"], row["from_time"], row["to_time"], row["events"]) for row in rows]
            return await work(connection), files

        answer, files = await self.read(together, snapshot=True)
        return answer, [] if self.nothing else files

    async def _from_file(
        self,
        file: _File,
        statement: Statement,
        filters: Filters,
        newest: bool,
        limit: int,
        place: Place | None,
    ) -> list[AuditEvent]:
        found: list[AuditEvent] = []
        async with aclosing(self._blocks(file, _bound(filters, newest, place), newest)) as blocks:
            async for block in blocks:
                found += await self._ask(statement, block, _events)
                if len(found) >= limit:
                    break
        return found[:limit]

    # --- in threads

    async def _blocks(
        self, file: _File, filters: Filters, newest: bool, event_id: str | None = None
    ) -> AsyncGenerator[Any]:
        """Rows that may match, in order, a block at a time."""
        blocks = self._scan(file, filters, newest, event_id)
        try:
            while (block := await asyncio.to_thread(next, blocks, None)) is not None:
                yield block
        finally:
            blocks.close()

    def _scan(self, file: _File, filters: Filters, newest: bool, event_id: str | None) -> Generator[Any]:
        _, parquet = import_pyarrow()
        with archive.reading(archive.Place(file.url, self.options)) as handle:
            found = parquet.ParquetFile(handle, page_checksum_verification=True)
            groups = range(found.metadata.num_row_groups)
            for group in reversed(groups) if newest else groups:
                if not _may_match(found.metadata.row_group(group), filters):
                    continue
                table = self._matching(found, group, filters, event_id)
                if table is None:
                    continue
                if newest:
                    table = table.take(list(range(table.num_rows - 1, -1, -1)))
                for start in range(0, table.num_rows, _BLOCK):
                    yield table.slice(start, _BLOCK)

    def _matching(self, found: Any, group: int, filters: Filters, event_id: str | None) -> Any:
        """The rows of a group that may match, or None: first looked for in the columns that say so."""
        condition, needed = self._condition(filters, event_id)
        if condition is not None:
            looked_at = found.read_row_group(group, columns=sorted(needed))
            if looked_at.filter(condition).num_rows == 0:
                return None
        table = found.read_row_group(group)
        return table if condition is None else table.filter(condition)

    def _count_rows(self, file: _File, filters: Filters) -> int:
        _, parquet = import_pyarrow()
        condition, needed = self._condition(filters, None)
        if condition is None:
            return file.events
        count = 0
        with archive.reading(archive.Place(file.url, self.options)) as handle:
            found = parquet.ParquetFile(handle, page_checksum_verification=True)
            for group in range(found.metadata.num_row_groups):
                if _may_match(found.metadata.row_group(group), filters):
                    rows = found.read_row_group(group, columns=sorted(needed))
                    count += rows.filter(condition).num_rows
        return count

    def _condition(self, filters: Filters, event_id: str | None) -> tuple[Any, set[str]]:
        """What rows must satisfy, as Arrow says it, and the columns that it names."""
        import_pyarrow()
        from pyarrow import compute

        parts = []
        needed = set()

        def field(name: str) -> Any:
            needed.add(name)
            return compute.field(name)

        if filters.start_time is not None:
            parts.append(field("occurred_at") >= filters.start_time)
        if filters.end_time is not None:
            parts.append(field("occurred_at") < filters.end_time)
        for name, column in _ONE_OF.items():
            wanted = getattr(filters, name, None)
            if wanted is not None:
                values = [wanted] if isinstance(wanted, str) else list(wanted)
                parts.append(field(column).isin([str(value) for value in values]))
        if filters.min_anomaly_score is not None:
            parts.append(field("anomaly_score") >= float(filters.min_anomaly_score))
        if self.tenant is not None:
            parts.append(field("tenant_id") == self.tenant)
        if event_id is not None:
            parts.append(field("id") == event_id)
        condition = None
        for part in parts:
            condition = part if condition is None else condition & part
        return condition, needed

    # --- the database's word

    async def _ask(self, statement: Statement, block: Any, answer: Callable[[list[Any]], Any]) -> Any:
        """Run a statement over archived rows."""

        async def work(connection: Connection) -> Any:
            columns = await columns_of(connection, "audit_events")
            known = [(name, kind) for name, kind in columns if name in block.column_names]
            first = len(statement.values) + 1
            chosen = ", ".join(
                f'"{name}"::{kind} AS "{name}"' if (name, kind) in known else f'NULL::{kind} AS "{name}"'
                for name, kind in columns
            )
            arrays = ", ".join(f"${place}::text[]" for place in range(first, first + len(known)))
            names = ", ".join(f'"{name}"' for name, _ in known)
            sql = (
                f"WITH audit_events AS (SELECT {chosen} FROM unnest({arrays}) AS archived ({names})) "  # noqa: S608
                + statement.sql
            )
            texts = [_texts(block[name]) for name, _ in known]
            return answer(await connection.fetch(sql, *statement.values, *texts))

        return await self.read(work)


def _bound(filters: Filters, newest: bool, place: Place | None) -> Filters:
    """The filters, with the time from which a page begins: events of that very time may follow."""
    if place is None:
        return filters
    moment, start, end = place.occurred_at, filters.start_time, filters.end_time
    if newest:
        behind = moment + _INSTANT
        return replace(filters, end_time=behind if end is None else min(end, behind))
    return replace(filters, start_time=moment if start is None else max(start, moment))


def _may_match(group: Any, filters: Filters) -> bool:
    """Can a row group hold events of the time asked for, by its statistics?"""
    place = group.column(0)
    if place.path_in_schema != "occurred_at" or place.statistics is None or not place.statistics.has_min_max:
        return True
    first, last = place.statistics.min, place.statistics.max
    return not (
        (filters.start_time is not None and last < filters.start_time)
        or (filters.end_time is not None and first >= filters.end_time)
    )


def _texts(column: Any) -> list[str | None]:
    """A column as PostgreSQL reads it."""
    values = column.to_pylist()
    if column.type == "string":
        return list(values)
    return [_text(value) for value in values]


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return value.isoformat() if isinstance(value, datetime) else repr(value)


def _events(rows: list[Any]) -> list[AuditEvent]:
    return [event_of(row) for row in rows]


def _first_value(rows: list[Any]) -> int:
    return int(rows[0][0])


async def _nothing(_: Connection) -> None:
    return None
