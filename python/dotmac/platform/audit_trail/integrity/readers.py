"""Connections that see one and the same state of the database, to read stretches of it side by side."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.database import FAILURES, told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]
    Opening = Callable[[], AbstractAsyncContextManager[Connection]]

__all__ = ["USUAL_READERS", "Readers", "readers_of"]

# Each keeps a server process and a thread of ours busy; the loop, which is between them, not many more.
USUAL_READERS = max(2, min(4, os.cpu_count() or 1))
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
        connection: in a transaction of isolation repeatable read, the first reader.
        opening: connects for one block; None where nobody but `connection` can see what it sees.
        wanted: number of readers.
        prepare: called with each further one, in its transaction.
    """
    async with AsyncExitStack() as stack:
        readers = Readers(connection)
        if opening is not None and wanted > 1:
            snapshot = await connection.fetchval("SELECT pg_export_snapshot()")
            while readers.count < wanted:
                try:
                    other = await stack.enter_async_context(opening())
                    await other.execute(
                        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; "
                        f"SET TRANSACTION SNAPSHOT '{snapshot}'"  # the server's own word
                    )
                    await prepare(other)
                except FAILURES as error:
                    _log.warning(
                        "%d of %d connections read the audit trail: %s", readers.count, wanted, told(error)
                    )
                    break
                readers.add(other)
        yield readers
