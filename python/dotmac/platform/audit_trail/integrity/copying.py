"""Rows copied in binary to what reads them, in a thread, while more is on its way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["copy_rows"]

Fed = TypeVar("Fed")
_PIECE = 1 << 18
# Seconds: as long as the rows are many, whatever a caller's connection grants to a command.
_PATIENCE = 30 * 86_400.0


async def copy_rows(
    connection: Connection,
    query: str,
    feed: Callable[[bytes], Fed],
    *values: Any,
    told: Callable[[Fed], None] | None = None,
) -> Fed:
    """Copy what the query gives to `feed`, which runs in a thread while more is on its way.

    Pieces are put together up to 256 KiB: waking the thread costs as much as hashing a hundred events, and of
    larger pieces the first and the last, which nothing overlaps, take longer. So two are kept at most: one is
    fed, one gathers.

    Args:
        feed: takes a piece; called by one thread at a time.
        values: of the query's parameters.
        told: called in the loop with what `feed` returned.
    Returns: what `feed` returned for the last piece, which may be empty.
    """
    loop = asyncio.get_running_loop()
    pieces: list[bytes] = []
    size = 0
    working: asyncio.Future[Fed] | None = None

    async def fed(work: asyncio.Future[Fed]) -> Fed:
        # Shielded: who gives up must not lose sight of the thread.
        answer = await asyncio.shield(work)
        if told is not None:
            told(answer)
        return answer

    async def send() -> asyncio.Future[Fed]:
        nonlocal size, working
        if working is not None:
            await fed(working)
        working = loop.run_in_executor(None, feed, b"".join(pieces))
        pieces.clear()
        size = 0
        return working

    async def take(piece: bytes) -> None:
        nonlocal size
        pieces.append(piece)
        size += len(piece)
        if size >= _PIECE:
            await send()

    try:
        await connection.copy_from_query(query, *values, output=take, format="binary", timeout=_PATIENCE)
        return await fed(await send())
    finally:
        if working is not None:
            # Whoever gave up, or was refused: no thread is left at work on what is not wanted any more.
            await asyncio.wait([working])
            if not working.cancelled():
                working.exception()  # looked at: another error may be the one that is raised
