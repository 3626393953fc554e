"""`AuditAggregator`: the audit trail's one public service."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import UUID

from dotmac.platform import _semconv
from dotmac.platform.audit_trail import query, schema
from dotmac.platform.audit_trail.arguments import (
    check_count,
    check_seconds,
    check_threshold,
    filters_of,
    order_of,
)
from dotmac.platform.audit_trail.database import Database, Settings, meaning
from dotmac.platform.audit_trail.entry import Row, guess_outcome, make_row
from dotmac.platform.audit_trail.ids import time_of
from dotmac.platform.audit_trail.models import AuditCategory, AuditEvent, AuditLevel, AuditOutcome
from dotmac.platform.audit_trail.query import EventPage, Order
from dotmac.platform.audit_trail.state import LoopState, Process
from dotmac.platform.errors import InvalidArgument
from dotmac.platform.observability import metrics
from dotmac.platform.observability.tracing import span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from datetime import date, datetime
    from ipaddress import IPv4Address, IPv6Address
    from types import TracebackType

    import asyncpg

    from dotmac.platform.audit_trail.anomaly import OnAnomaly, Scorer
    from dotmac.platform.audit_trail.config import AuditTrailConfig
    from dotmac.platform.audit_trail.reports.model import ComplianceReport

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["AuditAggregator"]

Answer = TypeVar("Answer")

DEFAULT_LIMIT = 1_000
# What a forked child inherits of its parent: kept, so that nothing of it is closed or finalised there.
_LEFT_TO_THE_PARENT: list[object] = []


class AuditAggregator:
    """Stores audit events, finds them again, reports on them.

    Made at import time, it does nothing until it is used; then it works in any event loop, several one
    after another or at once in several threads, and in a forked child, which starts anew. After
    `aclose()`, or after its loop has ended, the next use starts anew too.

    Args:
        postgres_url: `postgresql://…`, `postgresql+asyncpg://…` or `embedded://`; default: `config`, then
            the environment (`AUDIT_TRAIL_POSTGRES_URL`, `DATABASE_URL`).
        redis_url: Redis or Valkey; default as above. Nothing is kept there by this version.
        config: settings; arguments win over it, it wins over the environment.
        timeout: seconds within which an event is durable or `log_event` raises, and a query answers;
            defaults of this and the next four: the configuration's.
        max_pending: events that may wait for the database at once, 64 MiB of them at most; further callers
            wait.
        statement_cache_size: prepared statements kept per connection; 0 behind pgbouncer in transaction
            mode.
        anomaly_detection: score events as they are logged.
        anomaly_threshold: score in (0, 1] from which an event is an anomaly.
        on_anomaly: called with an `Anomaly` after an anomalous event is stored; may be async. What it
            raises is logged, since the event is stored all the same. `log_event` waits for an async one
            for as long as is left of its `timeout`; then it goes on beside, for another `timeout` at most,
            and `aclose()` waits for it.

    Raises: InvalidArgument: an argument is wrong. ConfigurationError: nothing says where the database is.
    """

    def __init__(
        self,
        postgres_url: str | None = None,
        redis_url: str | None = None,
        *,
        config: AuditTrailConfig | None = None,
        timeout: float | None = None,
        max_pending: int | None = None,
        statement_cache_size: int | None = None,
        anomaly_detection: bool | None = None,
        anomaly_threshold: float | None = None,
        on_anomaly: OnAnomaly | None = None,
    ) -> None:
        from dotmac.platform.connection.urls import parse_redis_url, postgres_dsn

        check_seconds("timeout", timeout)
        check_count("max_pending", max_pending, 1)
        check_count("statement_cache_size", statement_cache_size, 0)
        check_threshold("anomaly_threshold", anomaly_threshold)
        if postgres_url is not None and not _is_embedded(postgres_url):
            postgres_dsn(postgres_url)
        if redis_url is not None and not _is_embedded(redis_url):
            parse_redis_url(redis_url)
        self._postgres_url = postgres_url
        self.redis_url = redis_url
        self._config = config
        self._timeout = timeout
        self._max_pending = max_pending
        self._statement_cache_size = statement_cache_size
        self._anomaly_detection = anomaly_detection
        self._anomaly_threshold = anomaly_threshold
        self._on_anomaly = on_anomaly
        self._process: Process | None = None

    # --- events

    async def log_event(
        self,
        category: AuditCategory | str,
        action: str,
        level: AuditLevel | str = AuditLevel.INFO,
        *,
        outcome: AuditOutcome | str | None = None,
        user_id: str | int | UUID | None = None,
        tenant_id: str | int | UUID | None = None,
        resource_type: str | None = None,
        resource_id: str | int | UUID | None = None,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        correlation_id: str | int | UUID | None = None,
        metadata: dict[str, Any] | None = None,
        occurred_at: datetime | None = None,
        id: UUID | str | None = None,  # noqa: A002 (the column's name, and the one a retry needs)
    ) -> UUID:
        """Store one event; it is durable when this returns.

        Args:
            category: what kind of thing happened: a member, or its name in any case.
            action: what happened, such as `user.login`; at most 512 characters.
            level: how grave it is.
            outcome: how it ended; default: read from the action's words (`login.failed` is a failure,
                `access.denied` was denied), else success.
            user_id: who did it; at most 512 characters, like the other names.
            tenant_id: in whose realm.
            resource_type: what kind of thing it was done to.
            resource_id: to which one.
            ip_address: where from; default: `metadata["ip_address"]` where that is an address.
            correlation_id: what ties the events of one piece of work together.
            metadata: anything else, as JSON types; at most 1 MiB, 32 levels deep. NUL characters, lone
                surrogates, NaN and infinity are refused, because PostgreSQL's jsonb can't hold them.
            occurred_at: when; naive means local time; default: now (or the time in `id`, if version 7).
            id: an id of your own; logging it again stores nothing new. Without `occurred_at` it must be of
                version 7, which holds the time.

        Returns: the event's id; one that is not your own is a UUID of version 7.
        Raises:
            InvalidEvent: a field is wrong; nothing was stored.
            AuditUnavailable: not confirmed within the timeout; says whether it may have been stored. Its
                `event_id`, given as `id`, makes another try safe.
            SchemaOutdated: run `dotmac db upgrade`.
            ServerRefused: the database refused (login, rights).
        """
        process, began = self._here(), asyncio.get_running_loop().time()
        row = make_row(
            process.ids,
            category=category,
            action=action,
            level=level,
            outcome=guess_outcome(action) if outcome is None else outcome,
            user_id=user_id,
            tenant_id=tenant_id,
            resource_type=resource_type,
            resource_id=resource_id,
            ip_address=ip_address,
            correlation_id=correlation_id,
            metadata=metadata,
            occurred_at=occurred_at,
            event_id=id,
        )
        anomaly = None
        if process.scorer is not None:
            row, anomaly = process.scorer.score(row)
        with span(_semconv.SPAN_AUDIT_LOG, {_semconv.AUDIT_CATEGORY: row.category}):
            state = await self._state()
            new = await state.writer.put(row, may_exist=id is not None)
        if new and anomaly is not None:
            metrics.counter(_semconv.AUDIT_ANOMALIES).add(1, {_semconv.AUDIT_DETECTOR: "rate"})
            await state.teller.tell(anomaly, began + self._seconds())
        return row.id

    async def store_rows(self, rows: Iterable[Row]) -> list[bool]:
        """Store checked rows whose ids may be there already (imports). Returns which were new."""
        state = await self._state()
        return await state.writer.put_many(rows, may_exist=True)

    async def load_import(self, source: str) -> tuple[int, int, dict[str, Any]] | None:
        """Where the last import of that source stopped: byte, line, the parser's state."""

        async def work(connection: Connection) -> tuple[int, int, dict[str, Any]] | None:
            sql = "SELECT position, line, state::text AS state FROM audit_imports WHERE source = $1"
            found = await connection.fetchrow(sql, source)
            return (found["position"], found["line"], json.loads(found["state"])) if found else None

        return await self._read(work)

    async def save_import(
        self, source: str, position: int, line: int, state: dict[str, Any], *, start_over: bool = False
    ) -> None:
        """Note where an import stands; idempotent, so that it may be repeated after a lost connection.

        Args: start_over: also where the note so far, about another file, is further on.
        """

        async def work(connection: Connection) -> None:
            await connection.execute(
                "INSERT INTO audit_imports AS old (source, position, line, state) VALUES ($1, $2, $3, $4) "
                "ON CONFLICT (source) DO UPDATE SET position = $2, line = $3, state = $4, updated_at = now() "
                "WHERE $5 OR old.position < $2",
                source,
                position,
                line,
                json.dumps(state),
                start_over,
            )

        await self._read(work)

    # --- queries

    async def query_events(
        self,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        *,
        limit: int = DEFAULT_LIMIT,
        cursor: str | None = None,
        order: Order | str = Order.NEWEST_FIRST,
        **filters: Any,
    ) -> EventPage:
        """One page of events; all filters must hold.

        Args:
            start_time: first moment; naive means local time.
            end_time: moment after the last.
            limit: events per page, 1 to 10,000.
            cursor: `next_cursor` of the page before; repeat its other filters (the times may move).
            order: `"desc"`, the newest first, or `"asc"`.
            **filters: `categories`, `levels`, `outcome`: one or several members or names. `actions`: one
                or several, `*` stands for anything (`user.*`). `user_id`, `tenant_id`, `resource_type`,
                `resource_id`, `correlation_id`: equal. `ip_address`: an address or a network
                (`10.0.0.0/8`). `min_anomaly_score`: 0 to 1.

        Returns: a list of `AuditEvent` that has a `next_cursor`.
        Raises: InvalidArgument, InvalidCursor, AuditUnavailable, SchemaOutdated.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= query.MAX_LIMIT:
            raise InvalidArgument("limit", limit, f"give a number from 1 to {query.MAX_LIMIT}")
        checked, way = filters_of(start_time, end_time, filters), order_of(order)
        sql, values = query.page_sql(checked, way, limit + 1, cursor)

        async def work(connection: Connection) -> list[AuditEvent]:
            return [query.event_of(record) for record in await connection.fetch(sql, *values)]

        found = await self._read(work)
        more = len(found) > limit
        page = found[:limit]
        return EventPage(page, query.make_cursor(checked, way, page[-1]) if more else None)

    async def iter_events(
        self,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        *,
        page_size: int = DEFAULT_LIMIT,
        order: Order | str = Order.NEWEST_FIRST,
        **filters: Any,
    ) -> AsyncIterator[AuditEvent]:
        """All events, page by page in constant memory; arguments as for `query_events`."""
        cursor: str | None = None
        while True:
            page = await self.query_events(
                start_time, end_time, limit=page_size, cursor=cursor, order=order, **filters
            )
            for event in page:
                yield event
            cursor = page.next_cursor
            if cursor is None:
                return

    async def count_events(
        self, start_time: datetime | None = None, end_time: datetime | None = None, **filters: Any
    ) -> int:
        """How many events there are; arguments as for `query_events`."""
        parts, values = filters_of(start_time, end_time, filters).conditions()
        where = f" WHERE {' AND '.join(parts)}" if parts else ""

        async def work(connection: Connection) -> int:
            sql = f"SELECT count(*) FROM audit_events{where}"  # noqa: S608 (constants and conditions of ours)
            return int(await connection.fetchval(sql, *values))

        return await self._read(work)

    async def get_event(self, event_id: UUID | str) -> AuditEvent | None:
        """The event of that id, or None; the time in an id of ours leads straight to its month."""
        try:
            wanted = event_id if isinstance(event_id, UUID) else UUID(event_id)
        except (ValueError, AttributeError, TypeError):
            raise InvalidArgument("event_id", event_id, "give a UUID") from None
        moment = time_of(wanted)

        async def work(connection: Connection) -> AuditEvent | None:
            sql = f"{query.SELECT} FROM audit_events WHERE id = $1"
            record = None
            if moment is not None:
                record = await connection.fetchrow(f"{sql} AND occurred_at = $2", wanted, moment)
            # An id of the caller's own may stand beside a time of the caller's own.
            record = record or await connection.fetchrow(f"{sql} LIMIT 1", wanted)
            return query.event_of(record) if record is not None else None

        return await self._read(work)

    async def tail(
        self, *, since_start: bool = False, poll: float = 0.5, **filters: Any
    ) -> AsyncIterator[AuditEvent]:
        """Follow the trail for ever: every event stored from now on, once, in the order of storing.

        Args:
            since_start: begin with the first stored event instead of with now.
            poll: seconds between looks, 0.01 to 60.
            **filters: as for `query_events`.
        """
        from dotmac.platform.audit_trail.tail import follow

        if not 0.01 <= poll <= 60:  # noqa: PLR2004 (bounds told in the text)
            raise InvalidArgument("poll", poll, "give seconds from 0.01 to 60")
        async for event in follow(self._read, filters_of(None, None, filters), since_start, poll):
            yield event

    async def generate_compliance_report(
        self,
        start_date: date | datetime,
        end_date: date | datetime,
        report_type: str = "access_log",
        tenant_id: str | None = None,
        *,
        time_zone: str = "UTC",
        max_rows: int = 10_000,
    ) -> ComplianceReport:
        """What the trail can say about a period, for an auditor.

        Args:
            start_date: first day, or a datetime for an exact moment; a naive one is in `time_zone`.
            end_date: last day, included; or a datetime for the moment after the last.
            report_type: `access_log`, `sox`, `gdpr` or `hipaa`.
            tenant_id: only this tenant's events.
            time_zone: IANA name of the zone in which days begin and end.
            max_rows: rows per section, 1 to 100,000; a section with more says so and how many.

        Returns: sections with their controls; `to_dict()`, `to_json()`, `to_csv()`, `write(path)`. The same
            arguments over the same events give the same bytes.
        Raises: InvalidArgument: among others for an unknown type, with the list. AuditUnavailable.
        """
        from dotmac.platform.audit_trail.reports import build

        timeout = 10 * self._seconds()
        return await self._read(
            build.prepare(
                start_date,
                end_date,
                report_type,
                tenant_id=tenant_id,
                time_zone=time_zone,
                max_rows=max_rows,
                threshold=self._threshold(),
            ),
            timeout,
        )

    # --- tables

    async def migrate(self) -> schema.SchemaStatus:
        """Bring the tables up to date; several processes at once wait for one another.

        Returns: the version found before (`current`) and the one there is now (`wanted`).
        Raises: AuditUnavailable, ServerRefused.
        """
        database = Database(await self._settings())
        return await self._once(schema.upgrade(database.open))

    async def schema_status(self) -> schema.SchemaStatus:
        """The version of the tables and the one that this library wants."""
        database = Database(await self._settings())

        async def look() -> schema.SchemaStatus:
            connection = await database.open()
            try:
                found = await schema.status(connection)
                await connection.close()
            except BaseException:
                connection.terminate()  # close() would wait for a silent server
                raise
            return found

        return await self._once(look())

    async def ping(self) -> None:
        """Raise unless the database answers and its tables fit."""

        async def work(connection: Connection) -> None:
            await schema.check(connection)

        await self._read(work)

    # --- life

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Store what is on its way, then close all connections of this process."""
        process = self._here()
        with process.lock:
            states = dict(process.loops)
            process.loops.clear()
        here = asyncio.get_running_loop()
        for loop, made in states.items():
            if loop is here:
                await (await made).aclose()
            elif loop.is_running() and made.done():
                closing = asyncio.run_coroutine_threadsafe(made.result().aclose(), loop)
                await asyncio.wrap_future(closing)

    def _here(self) -> Process:
        process = self._process
        if process is None or process.pid != os.getpid():
            if process is not None:
                _LEFT_TO_THE_PARENT.append(process)
            process = self._process = Process(self.make_scorer())
        return process

    def make_scorer(self) -> Scorer | None:
        """A detector with this aggregator's settings and no history, or None where detection is off."""
        wanted = self._anomaly_detection
        if wanted is None:
            wanted = self._section().anomaly_detection_enabled
        if not wanted:
            return None
        from dotmac.platform.audit_trail.anomaly import Scorer

        return Scorer(self._threshold(), seed=int.from_bytes(os.urandom(8)))

    async def _state(self) -> LoopState:
        process, loop = self._here(), asyncio.get_running_loop()
        with process.lock:
            made = process.loops.get(loop)
            if made is None or (made.done() and (made.cancelled() or made.exception() is not None)):
                process.forget_closed_loops()
                made = process.loops[loop] = loop.create_task(self._start_state(), name="dotmac-audit-start")
        if made.done():
            return made.result()
        # Shielded: a caller that is cancelled must not take the start away from the others.
        return await asyncio.shield(made)

    async def _start_state(self) -> LoopState:
        state = LoopState(await self._settings(), self._on_anomaly)
        await state.start()
        return state

    async def _read(
        self,
        work: Callable[[Connection], Awaitable[Answer]],
        timeout: float | None = None,
    ) -> Answer:
        state = await self._state()
        with span(_semconv.SPAN_AUDIT_QUERY, {_semconv.DB_SYSTEM: "postgresql"}):
            return await state.database.read(work, timeout or self._seconds())

    async def _once(self, work: Awaitable[Answer]) -> Answer:
        import asyncpg
        from sqlalchemy.exc import DBAPIError

        from dotmac.platform.audit_trail.database import is_transient
        from dotmac.platform.errors import AuditUnavailable

        try:
            async with asyncio.timeout(10 * self._seconds()):
                return await work
        except DBAPIError as error:
            cause = error.orig.__cause__ if error.orig is not None else None
            raise meaning(cause or error) from error
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            if is_transient(error):
                raise AuditUnavailable(f"the audit database does not answer: {error}") from error
            raise meaning(error) from error

    # --- settings

    def _section(self) -> AuditTrailConfig:
        if self._config is not None:
            return self._config
        from dotmac.platform.core.unified_config import get_config

        return get_config().audit_trail

    def _seconds(self) -> float:
        return self._section().timeout if self._timeout is None else self._timeout

    def _threshold(self) -> float:
        return self._anomaly_threshold or self._section().anomaly_threshold

    async def _settings(self) -> Settings:
        from dotmac.platform.connection.embedded import aresolve_database
        from dotmac.platform.connection.urls import postgres_dsn

        section = self._section()
        url = self._postgres_url or _plain(section.postgres_url)
        if url is None:
            from dotmac.platform.core.unified_config import get_config

            known = get_config()
            url = _plain(known.audit_trail.postgres_url) or known.get_database_url()
        cache, pending = self._statement_cache_size, self._max_pending
        return Settings(
            dsn=postgres_dsn(await aresolve_database(url)),
            timeout=self._seconds(),
            connect_timeout=section.connect_timeout,
            statement_cache_size=section.statement_cache_size if cache is None else cache,
            batch_size=section.batch_size,
            batch_wait=section.batch_wait_ms / 1000,
            max_pending=section.max_pending if pending is None else pending,
            pool_min_size=section.pool_min_size,
            pool_max_size=section.pool_max_size,
            migrate_on_first_use=_is_embedded(url),
        )


def _is_embedded(url: object) -> bool:
    return isinstance(url, str) and url.startswith("embedded://")


def _plain(url: Any) -> str | None:
    """The text of a setting that may be a secret."""
    if url is None:
        return None
    reveal = getattr(url, "get_secret_value", None)
    return str(reveal() if reveal is not None else url)
