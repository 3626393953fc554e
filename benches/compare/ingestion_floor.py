"""The floor: what group commit costs in plain asyncio, and nothing else.

Rows that were encoded before, but for time and id, go into the same table by COPY, in one transaction for all
that wait, over two connections that take turns. Nothing is checked, hashed, scored, counted, bounded or sent
again, and a failure leaves its callers waiting: a measure of what table, indexes, driver and disk take.
"""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import struct
import time
from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    from collections.abc import Mapping

COLUMNS = ("occurred_at", "id", "category", "action", "level", "outcome", "user_id", "tenant_id", "metadata")
HEADER = b"PGCOPY\n\xff\r\n" + bytes(9)
TRAILER = b"\xff\xff"
START = struct.Struct(">hiqi")  # columns, length of the time, the time, length of the id
LANES = 2
WORTH_A_COMMIT = 16  # events, where another lane is at work
SINCE_1970 = 946_684_800_000_000  # microseconds, of PostgreSQL's epoch


class GroupCommit:
    """Stores one event again and again.

    Args: texts: the six columns after time and id. metadata: the last one.
    """

    def __init__(self, url: str, texts: tuple[str, ...], metadata: Mapping[str, Any]) -> None:
        self._url = url
        values = [*(text.encode() for text in texts), b"\x01" + json.dumps(metadata).encode()]
        self._rest = b"".join(struct.pack(">i", len(value)) + value for value in values)
        self._waiting: list[asyncio.Future[None]] = []
        self._lanes: list[asyncpg.Connection[asyncpg.Record]] = []
        self._looks = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect."""
        self._lanes = [await asyncpg.connect(self._url) for _ in range(LANES)]

    async def put(self) -> None:
        """Store the event once; returns after its commit."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._look_soon()
        await done

    async def aclose(self) -> None:
        """Close the connections."""
        for lane in self._lanes:
            await lane.close()

    def _look_soon(self) -> None:
        if not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._looks = False
        least = 1 if len(self._lanes) == LANES else WORTH_A_COMMIT
        if self._lanes and len(self._waiting) >= least:
            batch, self._waiting = self._waiting, []
            task = asyncio.create_task(self._commit(self._lanes.pop(), batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _commit(
        self, lane: asyncpg.Connection[asyncpg.Record], batch: list[asyncio.Future[None]]
    ) -> None:
        now = time.time_ns() // 1_000 - SINCE_1970
        rows = bytearray(HEADER)
        for place in range(len(batch)):
            rows += START.pack(len(COLUMNS), 8, now + place, 16)
            rows += secrets.token_bytes(16)
            rows += self._rest
        rows += TRAILER
        await lane.copy_to_table("audit_events", source=io.BytesIO(rows), columns=COLUMNS, format="binary")
        for done in batch:
            done.set_result(None)
        self._lanes.append(lane)
        if self._waiting:
            self._look_soon()
