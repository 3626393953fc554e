"""Finding stored events again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from dotmac.platform.audit_trail import facets as facets_
from dotmac.platform.audit_trail import query
from dotmac.platform.audit_trail.arguments import filters_of, order_of
from dotmac.platform.audit_trail.histogram import Histogram, Shape, count_sql
from dotmac.platform.audit_trail.ids import time_of
from dotmac.platform.audit_trail.personal import Personal
from dotmac.platform.audit_trail.query import EventPage, Order
from dotmac.platform.audit_trail.tail import Position, Tail
from dotmac.platform.audit_trail.tenancy import tenant_of
from dotmac.platform.audit_trail.time_units import zone_of
from dotmac.platform.audit_trail.timeline import Timeline
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from datetime import datetime
    from zoneinfo import ZoneInfo

    import asyncpg

    from dotmac.platform.audit_trail.archive_reading import Archives
    from dotmac.platform.audit_trail.bell import Bell
    from dotmac.platform.audit_trail.facets import Facet
    from dotmac.platform.audit_trail.filters import Filters
    from dotmac.platform.audit_trail.models import AuditEvent

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["DEFAULT_LIMIT", "MAX_VALUES", "Queries"]

Answer = TypeVar("Answer")

DEFAULT_LIMIT = 1_000
MAX_VALUES = 1_000


class Queries(Personal):
    """The part of `AuditAggregator` that reads events."""

    async def query_events(
        self,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        *,
        limit: int = DEFAULT_LIMIT,
        cursor: str | None = None,
        order: Order | str = Order.NEWEST_FIRST,
        include_archive: bool = False,
        decrypt_personal: bool | None = None,
        **filters: Any,
    ) -> EventPage:
        """One page of events; all filters must hold.

        Args:
            start_time: first moment; naive means local time.
            end_time: moment after the last.
            limit: events per page, 1 to 10,000.
            cursor: `next_cursor` or `previous_cursor` of another page; repeat its filters and order (the
                times may move).
            order: `"desc"`, the newest first, or `"asc"`.
            include_archive: also events of months that retention has archived (extra `archive`).
            decrypt_personal: show personal data; default: the aggregator's `decrypt_personal`. Without,
                `event.personal` is `sealed` where there are some.
            **filters: `categories`, `levels`, `outcome`: one or several members or names. `actions`: one
                or several, `*` stands for anything (`user.*`). `user_id`, `tenant_id`, `resource_type`,
                `resource_id`, `correlation_id`, `trace_id`, `subject_id`: equal to it, or to one of several.
                `ip_address`: an address, a network (`10.0.0.0/8`), or several. `text`: occurs in the action
                or in the metadata written as JSON, in whichever case; of several, each. `metadata`: a mapping
                from paths to values, `{"order.total": 5}`, or to operators with values,
                `{"order.total": {"gte": 5, "lt": 9}}`; the operators are `eq`, `ne`, `gt`, `gte`, `lt`,
                `lte` (numbers with numbers, strings with strings), `in`, `exists`, `like` (`*` stands for
                anything), `contains` (of a list). `min_anomaly_score`: 0 to 1. `missing`: fields that are
                not set. `exclude`: a mapping of these filters; what fits one condition of them is left out.

        Returns: a list of `AuditEvent` that has a `next_cursor` and a `previous_cursor`; its `note` says so
            where row-level security shows nothing because no tenant is named.
        Raises: InvalidArgument, InvalidCursor, AuditUnavailable, SchemaOutdated, ArchiveError.
        """
        _check_count("limit", limit, query.MAX_LIMIT)
        checked, way = filters_of(start_time, end_time, filters), order_of(order)
        place = query.read_cursor(checked, way, cursor)
        sql, values = query.page_sql(checked, way, limit + 1, place)

        async def work(connection: Connection) -> list[AuditEvent]:
            return [query.event_of(record) for record in await connection.fetch(sql, *values)]

        if include_archive:
            archives = await self._archives(checked)
            found = await archives.page(work, query.Statement(sql, values), checked, way, limit + 1, place)
        else:
            found = await self._find(checked, work)
        page = query.page_of(found, checked, way, limit, place)
        page[:] = await self._for_reader(page, decrypt_personal, tenant_of(checked))
        page.note = await self._why_nothing(tenant_of(checked))
        return page

    async def iter_events(
        self,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        *,
        page_size: int = DEFAULT_LIMIT,
        order: Order | str = Order.NEWEST_FIRST,
        include_archive: bool = False,
        decrypt_personal: bool | None = None,
        **filters: Any,
    ) -> AsyncIterator[AuditEvent]:
        """All events, page by page in constant memory; arguments as for `query_events`."""
        cursor: str | None = None
        while True:
            page = await self.query_events(
                start_time,
                end_time,
                limit=page_size,
                cursor=cursor,
                order=order,
                include_archive=include_archive,
                decrypt_personal=decrypt_personal,
                **filters,
            )
            for event in page:
                yield event
            cursor = page.next_cursor
            if cursor is None:
                return

    async def count_events(
        self,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        *,
        include_archive: bool = False,
        **filters: Any,
    ) -> int:
        """How many events there are; arguments as for `query_events`.

        Where the filters are no others than times, tenant, categories, levels and outcome, whole days are
        summed up instead of counted; exact either way.
        """
        checked = filters_of(start_time, end_time, filters)
        if include_archive:
            return await (await self._archives(checked)).count(checked)
        sql, values = count_sql(checked, zone_of("UTC"))

        async def work(connection: Connection) -> int:
            return int(await connection.fetchval(sql, *values))

        return await self._find(checked, work)

    async def histogram(
        self,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        *,
        by: str | Iterable[str] = "day",
        time_zone: str | ZoneInfo = "UTC",
        fill: bool = False,
        **filters: Any,
    ) -> Histogram:
        """Counts of events by unit of time, by field, or by both.

        Args:
            start_time, end_time, **filters: as for `query_events`.
            by: `minute`, `hour`, `day`, `week` (from Monday), `month`, `quarter` or `year`; `category`,
                `level`, `outcome`, `action`, `user_id`, `tenant_id`, `resource_type`, `resource_id`,
                `ip_address` or `correlation_id`; or several: `("day", "category")`.
            time_zone: whose days and hours are meant, an IANA name.
            fill: a bucket of 0, too, where there are no events: from the start to the end time, or from the
                first to the last event.

        Returns: a list of `Bucket`, ordered by key; whole days are summed up where `count_events` does that
            too, and days are those of UTC.
        Raises: InvalidArgument: also where there are more than 100,000 buckets. AuditUnavailable,
            SchemaOutdated.
        """
        named = by if isinstance(by, str) else list(by)
        shape = Shape.of(named, zone_of(time_zone))
        checked = filters_of(start_time, end_time, filters)
        sql, values, source = shape.sql(checked)

        async def work(connection: Connection) -> list[asyncpg.Record]:
            return await connection.fetch(sql, *values)

        return shape.histogram(await self._find(checked, work), checked, source, fill=fill)

    async def facets(
        self,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        *,
        fields: str | Iterable[str] = facets_.DEFAULT_FIELDS,
        limit: int = 20,
        **filters: Any,
    ) -> dict[str, Facet]:
        """For each field its commonest values and how many events have them.

        Each field is counted under all filters but its own, so that a viewer can offer the values that are
        not chosen; `tenant_id` alone is counted under its own as well.

        Args:
            start_time, end_time, **filters: as for `query_events`.
            fields: those that `histogram` counts by.
            limit: values per field, 1 to 1,000.
        Raises: InvalidArgument, AuditUnavailable, SchemaOutdated.
        """
        _check_count("limit", limit, MAX_VALUES)
        names = facets_.check_fields(fields if isinstance(fields, str) else list(fields))
        checked = filters_of(start_time, end_time, filters)
        sql, values = facets_.facet_sql(checked, names, limit)

        async def work(connection: Connection) -> list[asyncpg.Record]:
            return await connection.fetch(sql, *values)

        return facets_.facets_of(await self._find(checked, work), names)

    async def timeline(
        self, correlation_id: str | int | UUID, *, limit: int = DEFAULT_LIMIT, **filters: Any
    ) -> Timeline:
        """The events of one piece of work, oldest first, with the time between them.

        Args:
            correlation_id: what they share.
            limit: events at most, 1 to 10,000.
            **filters: as for `query_events`, `tenant_id` for instance.
        Returns: a list of `Step`; empty where no event bears that id.
        """
        _check_count("limit", limit, query.MAX_LIMIT)
        page = await self.query_events(
            limit=limit, order=Order.OLDEST_FIRST, correlation_id=correlation_id, **filters
        )
        return Timeline(str(correlation_id), page, truncated=page.next_cursor is not None)

    async def get_event(
        self,
        event_id: UUID | str,
        *,
        occurred_at: datetime | None = None,
        tenant_id: object = None,
        include_archive: bool = False,
        decrypt_personal: bool | None = None,
    ) -> AuditEvent | None:
        """The event of that id, or None; the time in an id of ours leads straight to its month.

        Args:
            tenant_id: whose it must be, else it is not found: one or several.
            occurred_at: when it happened, to the microsecond: finds an id of another kind as quickly.
            include_archive: look for it in archives, too.
            decrypt_personal: as for `query_events`.
        """
        try:
            wanted = event_id if isinstance(event_id, UUID) else UUID(event_id)
        except (ValueError, AttributeError, TypeError):
            raise InvalidArgument("event_id", event_id, "give a UUID") from None
        checked = filters_of(None, None, {"tenant_id": tenant_id})
        moment = filters_of(occurred_at, None, {}).start_time or time_of(wanted)
        parts, values = checked.conditions()
        values.append(wanted)
        sql = f"{query.SELECT} FROM audit_events WHERE {' AND '.join([*parts, f'id = ${len(values)}'])}"

        async def work(connection: Connection) -> AuditEvent | None:
            record = None
            if moment is not None:
                at = f"{sql} AND occurred_at = ${len(values) + 1}"
                record = await connection.fetchrow(at, *values, moment)
            if record is None and occurred_at is None:
                # An id of the caller's own may stand beside a time of the caller's own.
                record = await connection.fetchrow(f"{sql} LIMIT 1", *values)
            return query.event_of(record) if record is not None else None

        found = await self._find(checked, work)
        if found is None and include_archive:
            archives = await self._archives(checked)
            found = await archives.find(wanted, moment, checked, elsewhere=occurred_at is None)
        if found is None:
            return None
        return (await self._for_reader([found], decrypt_personal, tenant_of(checked)))[0]

    def tail(
        self,
        *,
        since_start: bool = False,
        after: str | None = None,
        poll: float = 1.0,
        decrypt_personal: bool | None = None,
        **filters: Any,
    ) -> Tail:
        """Follow the trail for ever: every event stored from now on, once, in the order of storing.

        Args:
            since_start: begin with the first stored event instead of with now.
            after: go on where another tail stood: its `position`.
            poll: seconds between looks at most, 0.01 to 60; writers tell of their commits, and then it looks
                at once.
            decrypt_personal: as for `query_events`.
            **filters: as for `query_events`.

        Returns: what `async for` takes. Its `position` changes with every event and outlives the process.
            Where the database does not answer within the timeout, AuditUnavailable comes out of the loop;
            iterate again over the same tail, or over one `after` its `position`, and nothing is missing.
            Where the database is behind the tail's place (a standby that lags, a restored dump) it is
            TransactionsRewound, and the place stays.
        Raises: InvalidArgument, InvalidCursor.
        """
        if not isinstance(poll, int | float) or not 0.01 <= poll <= 60:  # noqa: PLR2004 (bounds told in the text)
            raise InvalidArgument("poll", poll, "give seconds from 0.01 to 60")
        if after is not None and since_start:
            raise InvalidArgument("after", after, "leave it out, or leave out since_start")
        start = Position(0) if since_start else None
        if after is not None:
            start = Position.of(after)
        checked = filters_of(None, None, filters)

        async def read(work: Callable[[Any], Awaitable[Any]]) -> Any:
            return await self._find(checked, work)

        async def opened(events: list[AuditEvent]) -> list[AuditEvent]:
            return await self._for_reader(events, decrypt_personal, tenant_of(checked))

        return Tail(read, self._bell, checked, start, poll, opened)

    async def _bell(self) -> Bell:
        return (await self._state()).bell

    async def _find(self, filters: Filters, work: Callable[[Connection], Awaitable[Answer]]) -> Answer:
        return await self._read(work, tenant=tenant_of(filters))

    async def _archives(self, filters: Filters) -> Archives:
        """What reads archives for a query, after the database was asked what our role may see."""
        from dotmac.platform.audit_trail.archive_reading import Archives

        tenant, sight = tenant_of(filters), await self._sight()
        return Archives(
            partial(self._read, tenant=tenant),
            self._section().archive_arguments(),
            (sight.bound or tenant) if sight.one_tenant else None,
            nothing=sight.is_blind(tenant),
        )


def _check_count(field: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidArgument(field, value, f"give a number from 1 to {most}")
