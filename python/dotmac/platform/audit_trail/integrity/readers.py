"""Connections that see one and the same state of the database, to read stretches of it side by side."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.database import FAILURES, told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]
    Opening = Callable[[], Awaitable[Connection]]

__all__ = ["LOCK", "USUAL_READERS", "Readers", "readers_of"]

# Each keeps a server process and a thread of ours busy; the loop, which is between them, not many more.
USUAL_READERS = max(2, min(4, os.cpu_count() or 1))
# What each reader looks at. Taken at once, so that none has to wait for it later.
LOCK = "LOCK TABLE audit_events, audit_segments, audit_log IN ACCESS SHARE MODE"
_OPENING_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
_log = logging.getLogger(__name__)


class Readers:
    """Connections, each of which is lent to one at a time.

    Args: first: one of them; there is always one.
    """

    def __init__(self, first: Connection) -> None:
        self._free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        self._free.put_nowait(first)
        self.count = 1

    def add(self, connection: Connection) -> None:
        """One more."""
        self._free.put_nowait(connection)
        self.count += 1

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Connection]:
        """One that nobody else uses; waits until there is one."""
        connection = await self._free.get()
        try:
            yield connection
        finally:
            self._free.put_nowait(connection)


@asynccontextmanager
async def readers_of(
    connection: Connection,
    opening: Opening | None,
    wanted: int,
    prepare: Callable[[Connection], Awaitable[None]],
) -> AsyncIterator[Readers]:
    """Readers that see what a transaction sees.

    A server that grants fewer connections is read by way of those that there are.

    Args:
        connection: in a transaction of isolation repeatable read that holds the locks of `LOCK`; the first
            reader.
        opening: connects; None where nobody but `connection` can see what it sees.
        wanted: number of readers.
        prepare: called with each further one, in its transaction.
    """
    async with AsyncExitStack() as stack:
        readers = Readers(connection)
        if opening is not None and wanted > 1:
            snapshot = await connection.fetchval("SELECT pg_export_snapshot()")
            while readers.count < wanted:
                try:
                    # A pooler lets clients in and makes them wait for a server, perhaps for one that we hold.
                    async with asyncio.timeout(_OPENING_SECONDS):
                        other = await stack.enter_async_context(_further(opening, snapshot, prepare))
                except FAILURES as error:
                    _log.warning(
                        "%d of %d connections read the audit trail: %s", readers.count, wanted, told(error)
                    )
                    break
                readers.add(other)
        yield readers


@asynccontextmanager
async def _further(
    opening: Opening, snapshot: str, prepare: Callable[[Connection], Awaitable[None]]
) -> AsyncIterator[Connection]:
    connection = await opening()
    try:
        await connection.execute(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; "
            f"SET TRANSACTION SNAPSHOT '{snapshot}'; "  # the server's own word
            # Who waits for the tables to be changed would stand behind this, and this behind the first reader
            # for ever: of that no server knows.
            f"{LOCK} NOWAIT"
        )
        await prepare(connection)
        yield connection
    except BaseException:
        connection.terminate()
        raise
    # It has only read: how it ends is of no interest.
    with suppress(*FAILURES):
        await connection.close(timeout=_CLOSE_SECONDS)
