"""Retention: whole months leave the table once they are old enough, never single rows.

A partition goes in steps, each of which leaves a state in `audit_archives` from which the next run goes on:

    sealed      a trigger refuses inserts, so that what is counted and archived is all there is
    archived    written, read back, compared (only where there is a place for archives)
    detaching   decided, with no hold in the way; DETACH … CONCURRENTLY, for which no writer has to wait
    dropped     gone; told in the trail

Until it is detached a partition is read as ever; then its archive is, within the same snapshot. Holds are
looked for before it is sealed, when it is decided, and when it is dropped: a hold that comes in between
brings the partition back (`kept`).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg

from dotmac.platform.audit_trail import archive
from dotmac.platform.audit_trail.archive import Place, Written
from dotmac.platform.audit_trail.holds import holds_on
from dotmac.platform.audit_trail.maintenance import patiently
from dotmac.platform.errors import ArchiveError, DotmacError
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from uuid import UUID

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["DroppedPartition", "Retirement", "mark_told", "partitions_before", "unfinished", "untold"]

_log = get_logger(__name__)

RETENTION_LOCK = 4_843_917_210_475_304
_ROLLUP_LOCK = 4_843_917_210_475_302  # of audit_compact_rollup()
_OPEN = "SELECT * FROM audit_archives WHERE state IN ('sealed', 'archived', 'detaching') ORDER BY from_time"
_UNTOLD = "SELECT * FROM audit_archives WHERE state = 'dropped' AND told_at IS NULL ORDER BY dropped_at"
# The bounds are those that audit_ensure_partition made from the name.
_OLD = """
    SELECT relname AS name, from_time AT TIME ZONE 'UTC' AS from_time,
        (from_time + interval '1 month') AT TIME ZONE 'UTC' AS to_time
    FROM pg_catalog.pg_inherits JOIN pg_catalog.pg_class ON pg_class.oid = inhrelid,
        to_timestamp(right(relname, 7) || ' UTC', 'YYYY_MM TZ') AS made,
        date_trunc('month', made AT TIME ZONE 'UTC') AS from_time
    WHERE inhparent = 'audit_events'::regclass AND NOT inhdetachpending
        AND relname ~ '^audit_events_\\d{4}_\\d{2}$'
        AND (from_time + interval '1 month') AT TIME ZONE 'UTC' <= now() - $1::interval
    ORDER BY from_time
"""
_ATTACHED = """
    SELECT inhdetachpending FROM pg_catalog.pg_inherits JOIN pg_catalog.pg_class ON pg_class.oid = inhrelid
    WHERE inhparent = 'audit_events'::regclass AND relname = $1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedPartition:
    """What became of one partition.

    Attributes:
        partition: its name. start_time, end_time: the month it holds.
        outcome: `dropped`; `held` where a legal hold keeps it; `due` in a dry run.
        events: rows in it.
        archive: where they are now, if they were archived.
        holds: the holds that keep it.
        seconds: how long it took.
    """

    partition: str
    start_time: datetime
    end_time: datetime
    outcome: str
    events: int
    archive: str | None = None
    holds: tuple[UUID, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "partition": self.partition,
            "start_time": self.start_time.isoformat(),
            "end_time": self.end_time.isoformat(),
            "outcome": self.outcome,
            "events": self.events,
            "archive": self.archive,
            "holds": [str(one) for one in self.holds],
            "seconds": round(self.seconds, 3),
        }


class Retirement:
    """Takes partitions out of the table, on one connection of the owner.

    Args:
        place: where archives go; its URL is empty where there are to be none.
        progress: called, in another thread, with a partition and its rows archived so far.
    """

    def __init__(
        self,
        connection: Connection,
        place: Place,
        progress: Callable[[str, int], None] | None = None,
    ) -> None:
        self._connection = connection
        self._place = place
        self._progress = progress

    async def look(self, row: Any) -> DroppedPartition:
        """What would become of a partition."""
        name, start, end = row["name"], row["from_time"], row["to_time"]
        held = await holds_on(self._connection, name, start, end)
        events = await self._count(name)
        return DroppedPartition(
            partition=name, start_time=start, end_time=end, outcome="held" if held else "due",
            events=events, holds=tuple(held),
        )  # fmt: skip

    async def retire(self, row: Any) -> DroppedPartition:
        """Take a partition out, from its sealing on."""
        began = time.monotonic()
        name, start, end = row["name"], row["from_time"], row["to_time"]
        held = await holds_on(self._connection, name, start, end)
        if held:
            return replace(await self.look(row), seconds=time.monotonic() - began)
        sealed = await patiently(lambda: self._seal(name, start, end))
        return replace(await self.go_on(sealed), seconds=time.monotonic() - began)

    async def resume(self, row: Any) -> DroppedPartition:
        """Go on with what an interrupted run has left; an archive that did not last is written anew."""
        name = row["partition"]
        exists = await self._connection.fetchval("SELECT to_regclass($1)", name) is not None
        if row["archived_at"] is not None and exists:
            written = Written(row["events"], row["bytes"], row["sha256"])
            place = Place(row["url"], self._place.options)
            try:
                await asyncio.to_thread(archive.verify, place, written, row["from_time"], row["to_time"])
            except ArchiveError as error:
                _log.warning("an archive did not last, it is written anew", partition=name, error=str(error))
                row = await self._write(row, place)
        return await self.go_on(row)

    async def go_on(self, row: Any) -> DroppedPartition:
        """The rest of the way, from the state of that row on."""
        if row["state"] == "sealed":
            row = await self._count_or_archive(row)
        if row["state"] in {"sealed", "archived"}:
            row = await patiently(lambda: self._decide(row))
        if row["state"] == "detaching":
            await self._detach(row["partition"])
            row = await patiently(lambda: self._drop(row))
        held = await self._holds(row) if row["state"] == "kept" else []
        return DroppedPartition(
            partition=row["partition"], start_time=row["from_time"], end_time=row["to_time"],
            outcome="held" if row["state"] == "kept" else "dropped",
            events=row["events"], archive=row["url"], holds=tuple(held),
        )  # fmt: skip

    async def _count_or_archive(self, row: Any) -> Any:
        try:
            events = await self._count(row["partition"])
            if not self._place.url or events == 0:
                return await self._connection.fetchrow(
                    "UPDATE audit_archives SET events = $2 WHERE id = $1 RETURNING *", row["id"], events
                )
            place = archive.archive_place(self._place, row["from_time"], row["partition"], row["id"])
            return await self._write(row, place)
        except Exception:
            # Late events of that month find their place again, and the next run begins anew.
            try:
                await patiently(lambda: self._keep(row))
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, DotmacError) as error:
                _log.warning(
                    "a partition stays closed to late events until the next run of retention",
                    partition=row["partition"], error=str(error),
                )  # fmt: skip
            raise

    # --- steps; each may be repeated

    async def _seal(self, name: str, start: datetime, end: datetime) -> Any:
        async with self._connection.transaction():
            row = await self._connection.fetchrow(
                "INSERT INTO audit_archives (id, partition, from_time, to_time, state, event_id) "
                "VALUES ($1, $2, $3, $4, 'sealed', $5) RETURNING *",
                uuid4(), name, start, end, uuid4(),
            )  # fmt: skip
            await self._connection.execute(
                f'CREATE TRIGGER audit_sealed BEFORE INSERT ON "{name}" '
                "FOR EACH ROW EXECUTE FUNCTION audit_refuse_insert()"
            )
        return row

    async def _write(self, row: Any, place: Place) -> Any:
        """Archive the rows, and read them back."""
        name, progress = row["partition"], self._progress
        told = None if progress is None else (lambda done: progress(name, done))
        written = await archive.export(self._connection, name, place, told)
        events = await self._count(name)
        if written.events != events:
            raise ArchiveError(f"{place.url}: {written.events} rows, but {name} has {events}")
        await asyncio.to_thread(archive.verify, place, written, row["from_time"], row["to_time"])
        return await self._connection.fetchrow(
            "UPDATE audit_archives SET state = CASE state WHEN 'sealed' THEN 'archived' ELSE state END, "
            "url = $2, events = $3, bytes = $4, sha256 = $5, archived_at = now() WHERE id = $1 RETURNING *",
            row["id"], place.url, written.events, written.size, written.sha256,
        )  # fmt: skip

    async def _decide(self, row: Any) -> Any:
        async with self._connection.transaction():
            await self._connection.execute("LOCK TABLE audit_holds IN SHARE MODE")
            if await self._holds(row):
                return await self._keep(row)
            return await self._set(row, "detaching")

    async def _detach(self, name: str) -> None:
        """Not in a transaction. One that was interrupted is finished."""

        async def step() -> None:
            pending = await self._connection.fetchval(_ATTACHED, name)
            if pending is not None:
                how = "FINALIZE" if pending else "CONCURRENTLY"
                await self._connection.execute(f'ALTER TABLE audit_events DETACH PARTITION "{name}" {how}')

        await patiently(step)

    async def _drop(self, row: Any) -> Any:
        name = row["partition"]
        async with self._connection.transaction():
            await self._connection.execute("LOCK TABLE audit_holds IN SHARE MODE")
            if await self._connection.fetchval("SELECT to_regclass($1)", name) is not None:
                if await self._holds(row):
                    return await self._keep(row)
                await self._connection.execute(f'DROP TABLE "{name}"')
            await self._forget_counts(row["from_time"], row["to_time"])
            return await self._connection.fetchrow(
                "UPDATE audit_archives SET state = 'dropped', dropped_at = now() WHERE id = $1 RETURNING *",
                row["id"],
            )

    async def _keep(self, row: Any) -> Any:
        """Undo: attach it again, if need be, and take inserts again."""
        name = row["partition"]
        async with self._connection.transaction():
            if await self._connection.fetchval(_ATTACHED, name) is None:
                await self._connection.execute(
                    f'ALTER TABLE audit_events ATTACH PARTITION "{name}" '
                    f"FOR VALUES FROM ('{row['from_time']}') TO ('{row['to_time']}')"
                )
                await self._connection.execute("SELECT audit_grant_partition($1::text::regclass)", name)
            await self._connection.execute(f'DROP TRIGGER IF EXISTS audit_sealed ON "{name}"')
            return await self._set(row, "kept")

    async def _set(self, row: Any, state: str) -> Any:
        return await self._connection.fetchrow(
            "UPDATE audit_archives SET state = $2 WHERE id = $1 RETURNING *", row["id"], state
        )

    async def _count(self, name: str) -> int:
        return int(await self._connection.fetchval(f'SELECT count(*) FROM "{name}"'))  # noqa: S608 (our name)

    async def _holds(self, row: Any) -> list[UUID]:
        return await holds_on(self._connection, row["partition"], row["from_time"], row["to_time"])

    async def _forget_counts(self, start: datetime, end: datetime) -> None:
        """The rollup counts what the table has."""
        # Not while its rows are summed up: sums that come in meanwhile would not be seen.
        await self._connection.execute("SELECT pg_advisory_xact_lock($1)", _ROLLUP_LOCK)
        await self._connection.execute(
            "DELETE FROM audit_rollup WHERE day >= ($1::timestamptz AT TIME ZONE 'UTC')::date "
            "AND day < ($2::timestamptz AT TIME ZONE 'UTC')::date",
            start,
            end,
        )


async def unfinished(connection: Connection) -> list[Any]:
    """What a run that was interrupted has left."""
    return list(await connection.fetch(_OPEN))


async def untold(connection: Connection) -> list[Any]:
    """What was dropped, and is not in the trail yet."""
    return list(await connection.fetch(_UNTOLD))


async def partitions_before(connection: Connection, age: Any) -> list[Any]:
    """Partitions all of whose events are older, the oldest first."""
    return list(await connection.fetch(_OLD, age))


async def mark_told(connection: Connection, archive_id: UUID) -> None:
    """The drop is in the trail."""
    await connection.execute("UPDATE audit_archives SET told_at = now() WHERE id = $1", archive_id)
