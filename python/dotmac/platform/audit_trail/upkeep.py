"""The upkeep of the partitions: made ahead, dropped when old, archived before; by hand or on a schedule."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from dotmac.platform import _semconv
from dotmac.platform.audit_trail.archive import Place
from dotmac.platform.audit_trail.maintenance import Maintenance, take_turn
from dotmac.platform.errors import DotmacError, InvalidArgument
from dotmac.platform.observability import metrics
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg

    from dotmac.platform.audit_trail.retention import DroppedPartition

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Upkeep"]

_log = get_logger(__name__)

MAX_AHEAD = 3  # months; audit_ensure_partition makes none that is further off than 100 days
_MAX_DAYS = 36_525
_PATIENCE = 60.0  # seconds in which another run may end
_AHEAD = """
    WITH wanted AS (
        SELECT now() + ahead * interval '1 month' AS moment, ahead FROM generate_series(0, $1::int) AS ahead
    ), missing AS (
        SELECT * FROM wanted
        WHERE to_regclass('audit_events_' || to_char(moment AT TIME ZONE 'UTC', 'YYYY_MM')) IS NULL
    ) SELECT ahead, audit_ensure_partition(moment) AS name FROM missing ORDER BY ahead
"""


class Upkeep(Maintenance):
    """The part of `AuditAggregator` that looks after the partitions; retention needs the tables' owner."""

    async def apply_retention(
        self,
        days: int | None = None,
        *,
        archive_url: str | None = None,
        archive: bool = True,
        dry_run: bool = False,
        progress: Callable[[str, int], None] | None = None,
    ) -> list[DroppedPartition]:
        """Drop the months that are older than the retention, whole: no event that is younger goes along.

        Interrupted at any place, the next run goes on where this one stopped. Writers are not held up. What
        is dropped is told in the trail (`audit.partition.dropped`); roots of segments stay.

        Args:
            days: age from which on events go; default: the configuration's `retention_days`. It is the same
                for all tenants and categories, as they share their months.
            archive_url: where months are archived before they are dropped, at any place that fsspec knows;
                default: the configuration's `archive_url`, if any.
            archive: False drops without archiving, whatever the configuration says.
            dry_run: change nothing, say what would be done.
            progress: called with a partition and its rows archived so far, in another thread.
        Returns: one answer per month that is old enough, the oldest first.
        Raises:
            InvalidArgument: an argument is wrong.
            ArchiveError: what was read back is not what was written; nothing was dropped.
            MissingExtra: archives need the extra `archive`.
            AuditUnavailable: the database went away, or others hold a lock for too long.
            ServerRefused: not the owner, among others.
        """
        section = self._section()
        age = section.retention_days if days is None else days
        if isinstance(age, bool) or not isinstance(age, int) or not 1 <= age <= _MAX_DAYS:
            raise InvalidArgument("days", days, f"give a whole number from 1 to {_MAX_DAYS}")
        if archive_url is not None and not archive:
            raise InvalidArgument("archive_url", archive_url, "leave it out where archive is False")
        url = (archive_url or section.archive_url or "") if archive else ""
        place = Place(url, section.archive_arguments())
        if url:
            from dotmac.platform.audit_trail.archive import open_place

            await asyncio.to_thread(open_place, place)  # a wrong one is told before anything is sealed

        async def work(connection: Connection) -> list[DroppedPartition]:
            return await self._retire_all(connection, timedelta(days=age), place, dry_run, progress)

        return await self._maintain(work)

    async def _retire_all(
        self,
        connection: Connection,
        age: timedelta,
        place: Place,
        dry_run: bool,
        progress: Callable[[str, int], None] | None,
    ) -> list[DroppedPartition]:
        from dotmac.platform.audit_trail import retention

        retirement = retention.Retirement(connection, place, progress)
        if dry_run:
            return [await retirement.look(row) for row in await retention.partitions_before(connection, age)]
        await take_turn(connection, retention.RETENTION_LOCK, _PATIENCE)
        done = []
        for row in await retention.unfinished(connection):
            done.append(await retirement.resume(row))
            await self._tell_dropped(connection)
        await self._tell_dropped(connection)
        for row in await retention.partitions_before(connection, age):
            done.append(await retirement.retire(row))
            await self._tell_dropped(connection)
        return done

    async def _tell_dropped(self, connection: Connection) -> None:
        """Into the trail, once for each partition, also if a run ended before it came to it."""
        from dotmac.platform.audit_trail import retention

        for row in await retention.untold(connection):
            details: dict[str, Any] = {
                "from_time": row["from_time"].isoformat(),
                "to_time": row["to_time"].isoformat(),
                "events": row["events"],
            }
            if row["archived_at"] is not None:
                details["archive"] = {
                    "id": str(row["id"]),
                    "url": row["url"],
                    "bytes": row["bytes"],
                    "sha256": row["sha256"].hex(),
                }
            await self.log_event(
                "ADMINISTRATION",
                "audit.partition.dropped",
                "WARNING",
                outcome="success",
                resource_type="audit_partition",
                resource_id=row["partition"],
                metadata=details,
                occurred_at=row["dropped_at"],
                id=row["event_id"],
            )
            await retention.mark_told(connection, row["id"])
            metrics.counter(_semconv.AUDIT_PARTITIONS_DROPPED).add(1)

    async def list_archives(self) -> list[dict[str, Any]]:
        """What retention has taken, the newest last: `audit_archives` as JSON types."""

        async def work(connection: Connection) -> list[dict[str, Any]]:
            rows = await connection.fetch("SELECT * FROM audit_archives ORDER BY from_time, started_at")
            return [{name: _plain(value) for name, value in row.items()} for row in rows]

        return await self._read(work, tenant="")

    async def ensure_partitions(self, ahead: int = MAX_AHEAD) -> list[str]:
        """Make the partitions of this month and the next ones; a role that may log events may.

        Writers make what they need, so a missing one costs the first event of a month some milliseconds, and
        not more. One that is missing for this month or the next is logged as a warning nevertheless: it says
        that this job has not run for a while.

        Args: ahead: months beyond this one, 1 to 3.
        Returns: names of those that were missing.
        """
        if isinstance(ahead, bool) or not isinstance(ahead, int) or not 1 <= ahead <= MAX_AHEAD:
            raise InvalidArgument("ahead", ahead, f"give a number of months from 1 to {MAX_AHEAD}")

        async def work(connection: Connection) -> list[Any]:
            return list(await connection.fetch(_AHEAD, ahead))

        made = await self._maintain(work)
        for row in made:
            metrics.counter(_semconv.AUDIT_PARTITIONS_MADE).add(1)
            if row["ahead"] <= 1:
                _log.warning(
                    "a partition was missing that should have been made ahead", partition=row["name"]
                )
        return [row["name"] for row in made]

    async def keep_up(self, *, every: float = 3_600.0, retention: bool = False, **settings: Any) -> None:
        """Run `ensure_partitions`, and on request `apply_retention`, again and again until cancelled.

        What fails is logged and tried again at the next turn. Several processes may run it at once.

        Args:
            every: seconds from the end of a turn to the next, 1 to 86,400.
            retention: apply retention as well, which needs the tables' owner.
            **settings: for `apply_retention`.
        """
        if not 1 <= every <= 86_400:  # noqa: PLR2004 (bounds told in the text)
            raise InvalidArgument("every", every, "give seconds from 1 to 86400")
        while True:
            try:
                await self.ensure_partitions()
                if retention:
                    await self.apply_retention(**settings)
            except InvalidArgument:
                raise
            except (DotmacError, OSError) as error:
                _log.warning(
                    "the upkeep of the audit tables failed", error=f"{type(error).__name__}: {error}"
                )
            await asyncio.sleep(every)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, int | str) else str(value)
