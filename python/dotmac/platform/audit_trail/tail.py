"""Following the trail without missing an event, whatever the order of commits.

A clock or a serial number would not do: a transaction that took its place early may commit late, behind a
reader that went past it. So each row bears the transaction that stored it, and only rows are read whose
transaction is older than every one still running (`pg_snapshot_xmin`): behind that line nothing can appear
any more. A long writing transaction elsewhere in the cluster delays the follower; it never makes it miss.
Polling, not LISTEN/NOTIFY: NOTIFY serialises all commits, and LISTEN does not pass a transaction pooler.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail import query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime
    from uuid import UUID

    import asyncpg

    from dotmac.platform.audit_trail.models import AuditEvent

    Connection = asyncpg.Connection[asyncpg.Record]
    Place = tuple[int, datetime, UUID]

__all__ = ["follow"]

_BLOCK = 1_000
_HORIZON = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"


async def follow(
    read: Any, filters: query.Filters, since_start: bool, poll: float
) -> AsyncIterator[AuditEvent]:
    """Every matching event from now (or from the start) on; see `AuditAggregator.tail`."""
    line = 0 if since_start else await read(_horizon)
    after: Place | None = None
    while True:
        events, line, after = await read(_step(filters, line, after))
        for event in events:
            yield event
        if after is None:
            await asyncio.sleep(poll)


async def _horizon(connection: Connection) -> int:
    return int(await connection.fetchval(_HORIZON))


def _step(filters: query.Filters, line: int, after: Place | None) -> Any:
    async def work(connection: Connection) -> tuple[list[AuditEvent], int, Place | None]:
        horizon = await _horizon(connection)
        parts, values = filters.conditions()
        values += [line, horizon, *(after or ())]
        number = len(values) - (3 if after else 0)
        parts += [f"recorded_tx >= ${number - 1}", f"recorded_tx < ${number}"]
        if after is not None:
            parts.append(f"(recorded_tx, occurred_at, id) > (${number + 1}, ${number + 2}, ${number + 3})")
        rows = await connection.fetch(
            f"{query.SELECT}, recorded_tx FROM audit_events WHERE {' AND '.join(parts)} "
            f"ORDER BY recorded_tx, occurred_at, id LIMIT {_BLOCK}",
            *values,
        )
        events = [query.event_of(row) for row in rows]
        if len(rows) < _BLOCK:
            return events, horizon, None
        last = rows[-1]
        return events, last["recorded_tx"], (last["recorded_tx"], last["occurred_at"], last["id"])

    return work
