"""Runs a framework's sections over one snapshot of the log."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

import hashlib
import json
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dotmac.platform._native import __version__
from dotmac.platform.audit_trail.reports import access_log, gdpr, hipaa, sox
from dotmac.platform.audit_trail.reports.model import Cell, ComplianceReport, Section
from dotmac.platform.audit_trail.reports.spec import ANOMALY, PERIOD, THRESHOLD, TIME, SectionSpec, Spec
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["MAX_ROWS", "TYPES", "prepare"]

MAX_ROWS = 100_000
TYPES: dict[str, Spec] = {one.SPEC.report_type: one.SPEC for one in (access_log, gdpr, hipaa, sox)}

# Every field of an event, as text in fixed forms: what the fingerprint covers.
_FINGERPRINT = f"""
    SELECT sha256(convert_to(ROW(e.occurred_at, e.id, e.recorded_at, e.category, e.action, e.level, e.outcome,
        e.user_id, e.tenant_id, e.resource_type, e.resource_id, e.ip_address, e.correlation_id, e.trace_id,
        e.span_id, e.metadata, e.anomaly_score, e.anomaly_reasons)::text, 'UTF8')) AS digest
    FROM audit_events e WHERE {PERIOD} ORDER BY e.occurred_at, e.id
"""  # noqa: S608 (constants of ours)
_OVERVIEW = f"""
    SELECT count(*) AS events, min({TIME}) AS first_event, max({TIME}) AS last_event,
        count(*) FILTER (WHERE e.recorded_at - e.occurred_at > interval '1 hour') AS recorded_late,
        count(*) FILTER (WHERE e.occurred_at - e.recorded_at > interval '5 seconds') AS recorded_before_they_happened,
        count(*) FILTER (WHERE e.user_id IS NULL) AS without_user,
        count(*) FILTER (WHERE e.ip_address IS NULL) AS without_address,
        count(*) FILTER (WHERE {ANOMALY}) AS anomalies
    FROM audit_events e WHERE {PERIOD}
"""  # noqa: S608 (constants of ours)
_SILENCE = f"""
    SELECT extract(epoch FROM max(gap))::float8 AS seconds FROM (
        SELECT e.occurred_at - lag(e.occurred_at) OVER (ORDER BY e.occurred_at, e.id) AS gap
        FROM audit_events e WHERE {PERIOD}) AS gaps
"""  # noqa: S608 (constants of ours)
_CATEGORIES = f"SELECT category, count(*) AS events FROM audit_events e WHERE {PERIOD} GROUP BY 1 ORDER BY 1"  # noqa: S608 (constants of ours)
_NOT_PROVABLE = (
    "The log is append-only by trigger and bears no hash chain in this version: a superuser who took events out "
    "would leave no gap in a sequence. The fingerprint below shows whether two reports saw the same events."
)


def prepare(
    start_date: date | datetime,
    end_date: date | datetime,
    report_type: str,
    *,
    tenant_id: str | None,
    time_zone: str,
    max_rows: int,
    threshold: float,
) -> Callable[[Connection], Awaitable[ComplianceReport]]:
    """Check the arguments; returns the work to be done on a connection.

    Raises: InvalidArgument: names the argument and what would be right.
    """
    spec = TYPES.get(report_type) if isinstance(report_type, str) else None
    if spec is None:
        raise InvalidArgument("report_type", report_type, f"give one of {', '.join(TYPES)}")
    if isinstance(max_rows, bool) or not isinstance(max_rows, int) or not 1 <= max_rows <= MAX_ROWS:
        raise InvalidArgument("max_rows", max_rows, f"give a number from 1 to {MAX_ROWS}")
    if tenant_id is not None and (not isinstance(tenant_id, str) or "\x00" in tenant_id):
        raise InvalidArgument("tenant_id", tenant_id, "give a string without NUL, or None for all")
    try:
        zone = ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError, TypeError):
        raise InvalidArgument("time_zone", time_zone, "give an IANA name such as Europe/Berlin") from None
    start = _moment("start_date", start_date, zone, 0)
    end = _moment("end_date", end_date, zone, 1)
    if start >= end:
        raise InvalidArgument("end_date", end_date, f"give a day not before start_date ({start_date})")
    parameters = {
        "report_type": report_type,
        "start": start.isoformat(),
        "end": end.isoformat(),
        "tenant_id": tenant_id,
        "time_zone": time_zone,
        "max_rows": max_rows,
        "anomaly_threshold": threshold,
    }
    seed = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()

    async def work(connection: Connection) -> ComplianceReport:
        # Not `async with`, which would wait for a silent server's ROLLBACK: who reads drops the connection.
        transaction = connection.transaction(isolation="repeatable_read", readonly=True)
        await transaction.start()
        # The text forms of times must not depend on who asks.
        await connection.execute("SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO'")
        run = _Run(connection, (start, end, tenant_id, time_zone, seed), max_rows, threshold)
        completeness = await run.completeness()
        sections = [await run.section(one) for one in spec.sections]
        await transaction.rollback()
        return ComplianceReport(
            report_type=report_type,
            header={
                "framework": spec.framework,
                "period": {"start": start.isoformat(), "end_excluded": end.isoformat()},
                "tenant": tenant_id or "(all)",
                "filters": "the period and the tenant only; no event is left out, nothing is redacted",
                "time_zone": time_zone,
                "clock": "times of events are those of the processes that logged them; recorded_at is the database's",
                "generator": f"dotmac-platform {__version__}",
                "parameters": parameters,
                "parameters_sha256": seed,
                "sample_seed": seed,
            },
            completeness=completeness,
            sections=tuple(sections),
            cannot_answer=spec.cannot_answer,
        )

    return work


class _Run:
    def __init__(
        self, connection: Connection, values: tuple[Any, ...], max_rows: int, threshold: float
    ) -> None:
        self._connection = connection
        self._threshold = f"{float(threshold)!r}::float8"
        self._values = values
        self._max_rows = max_rows

    async def completeness(self) -> dict[str, Any]:
        overview = dict(await self._row(_OVERVIEW))
        digest = hashlib.sha256()
        sql, used = self._bound(_FINGERPRINT)
        async for record in self._connection.cursor(sql, *used, prefetch=5_000):
            digest.update(record["digest"])
        return {
            **overview,
            "events_by_category": {row["category"]: row["events"] for row in await self._rows(_CATEGORIES)},
            "longest_silence_seconds": (await self._row(_SILENCE))["seconds"],
            "sequence_gaps": _NOT_PROVABLE,
            "spooled": "none: this version acknowledges an event only after its commit, and keeps no spool",
            "refused": "events that could not be stored were refused to their caller and are not in the log",
            "events_sha256": digest.hexdigest(),
            "events_sha256_covers": "SHA-256 over the SHA-256 of each event's fields, by time and id",
        }

    async def section(self, spec: SectionSpec) -> Section:
        rows = await self._rows(f"SELECT * FROM ({spec.sql}) AS s LIMIT {self._max_rows + 1}", spec.sql)  # noqa: S608 (constants of ours)
        total, note = len(rows), "" if rows else spec.empty
        if total > self._max_rows:
            rows = rows[: self._max_rows]
            total = (await self._row(f"SELECT count(*) AS total FROM ({spec.sql}) AS s", spec.sql))["total"]  # noqa: S608 (constants of ours)
            note = f"Only the first {len(rows)} of {total} rows are shown; query_events gives the others."
        return Section(
            name=spec.name,
            title=spec.title,
            control=spec.control,
            columns=tuple(column.strip('"') for column in spec.columns),
            rows=tuple(tuple(_cell(value) for value in row.values()) for row in rows),
            total=total,
            note=note,
        )

    async def _rows(self, sql: str, told: str | None = None) -> list[asyncpg.Record]:
        sql, used = self._bound(sql, told)
        return list(await self._connection.fetch(sql, *used))

    async def _row(self, sql: str, told: str | None = None) -> asyncpg.Record:
        return (await self._rows(sql, told))[0]

    def _bound(self, sql: str, told: str | None = None) -> tuple[str, tuple[Any, ...]]:
        """PostgreSQL wants exactly the parameters that a statement mentions; the zone and the seed may be none."""
        told = told or sql
        sql = sql.replace(THRESHOLD, self._threshold)
        if "$4" in told and "$5" not in told:
            return sql, self._values[:4]
        if "$5" in told and "$4" not in told:
            return sql.replace("$5", "$4"), (*self._values[:3], self._values[4])
        return sql, self._values[:3]


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _moment(field: str, value: object, zone: ZoneInfo, days: int) -> datetime:
    try:
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=zone)).astimezone(UTC)
        if isinstance(value, date):
            day = value + timedelta(days=days)
            return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)
    except (OverflowError, ValueError):
        raise InvalidArgument(field, value, "give a day between the years 2 and 9998") from None
    raise InvalidArgument(field, value, "give a date (a whole day) or a datetime (an exact moment)")
