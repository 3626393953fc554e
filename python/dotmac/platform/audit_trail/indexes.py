"""Indexes built on a table in use, a partition at a time, without holding writers up.

A revision makes the parent's part of an index at once, where the table is large, and leaves it invalid. Here
the partitions' parts follow by CREATE INDEX CONCURRENTLY; the last one makes the index valid. Queries use the
parts that are there from the beginning.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.maintenance import LOCK_TIMEOUT, Maintenance, patiently, take_turn

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Indexes"]

_LOCK = 4_843_917_210_475_305
_PATIENCE = 3_600.0  # seconds; a large table takes a while
_METADATA = """
    CREATE INDEX IF NOT EXISTS audit_events_metadata ON ONLY audit_events USING gin (metadata jsonb_path_ops)
"""
# What a partition lacks: the index's definition without its name and table.
_MISSING = """
    SELECT pg_index.indexrelid::regclass::text AS parent, leaf.relname AS leaf,
        substring(pg_get_indexdef(pg_index.indexrelid) FROM ' ON ONLY [^ ]+ (.*)$') AS terms
    FROM pg_catalog.pg_index
    JOIN pg_catalog.pg_inherits AS tables ON tables.inhparent = indrelid AND NOT tables.inhdetachpending
    JOIN pg_catalog.pg_class AS leaf ON leaf.oid = tables.inhrelid
    WHERE indrelid = 'audit_events'::regclass AND NOT indisvalid AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_inherits AS parts
        JOIN pg_catalog.pg_index AS part ON part.indexrelid = parts.inhrelid
        WHERE parts.inhparent = pg_index.indexrelid AND part.indrelid = leaf.oid)
    ORDER BY 1, 2 DESC
"""
# Has another index taken the place of one, on each partition that is there?
_REPLACED = """
    SELECT to_regclass('audit_events_tx') IS NOT NULL AND to_regclass('audit_events_stored') IS NOT NULL
        AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_inherits AS tables
            WHERE tables.inhparent = 'audit_events'::regclass AND NOT tables.inhdetachpending AND NOT EXISTS (
                SELECT FROM pg_catalog.pg_inherits AS parts
                JOIN pg_catalog.pg_index AS part ON part.indexrelid = parts.inhrelid
                WHERE parts.inhparent = to_regclass('audit_events_stored')
                    AND part.indrelid = tables.inhrelid AND part.indisvalid))
"""


class Indexes(Maintenance):
    """The part of `AuditAggregator` that builds indexes; it needs the tables' owner."""

    async def build_indexes(
        self, *, metadata: bool = False, progress: Callable[[str], None] | None = None
    ) -> list[str]:
        """Build what partitions lack of the table's indexes, the newest month first. Writers go on meanwhile.

        Interrupted, the next run goes on. `migrate()` does it as well.

        Args:
            metadata: also a GIN index on the metadata, for queries by its paths. It takes about a quarter of
                the table's size, and writers pay for it with each event.
            progress: called with each partition before its part is built.
        Returns: names of the partitions' indexes that were built.
        Raises: AuditUnavailable, ServerRefused.
        """

        async def work(connection: Connection) -> list[str]:
            if metadata:
                await patiently(lambda: connection.execute(_METADATA))
            made: list[str] = []
            if await connection.fetch(_MISSING):
                # CREATE INDEX CONCURRENTLY waits for old transactions, and nobody for it: let it wait.
                await connection.execute("SET lock_timeout = 0")
                await take_turn(connection, _LOCK, _PATIENCE)
                for row in await connection.fetch(_MISSING):
                    if progress is not None:
                        progress(row["leaf"])
                    made.append(await _build(connection, row["parent"], row["leaf"], row["terms"]))
                await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
            await _drop_replaced(connection)
            return made

        return await self._maintain(work)


async def _build(connection: Connection, parent: str, leaf: str, terms: str) -> str:
    name = f"{leaf}_{hashlib.sha256(parent.encode()).hexdigest()[:8]}_idx"
    await connection.execute(f'DROP INDEX CONCURRENTLY IF EXISTS "{name}"')  # of a run that was interrupted
    await connection.execute(f'CREATE INDEX CONCURRENTLY "{name}" ON "{leaf}" {terms}')
    await connection.execute(f'ALTER INDEX {parent} ATTACH PARTITION "{name}"')
    return name


async def _drop_replaced(connection: Connection) -> None:
    if await connection.fetchval(_REPLACED):
        await patiently(lambda: connection.execute("DROP INDEX IF EXISTS audit_events_tx"))
