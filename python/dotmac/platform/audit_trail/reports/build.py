"""Runs a framework's sections over one snapshot of the log."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dotmac.platform._native import __version__
from dotmac.platform.audit_trail.reports import (
    access_log,
    completeness,
    drawing,
    gdpr,
    hipaa,
    pci_dss,
    soc2,
    sox,
)
from dotmac.platform.audit_trail.reports.facts import Facts
from dotmac.platform.audit_trail.reports.model import Cell, ComplianceReport, Section
from dotmac.platform.audit_trail.reports.registry import ProcessingRecord, load_records, records_digest
from dotmac.platform.audit_trail.reports.statements import Statements
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    import asyncpg

    from dotmac.platform.audit_trail.integrity.report import IntegrityReport
    from dotmac.platform.audit_trail.reports.spec import SectionSpec, Spec

    Connection = asyncpg.Connection[asyncpg.Record]
    Progress = Callable[[int, int, str], None]
    Verify = Callable[[Connection], Awaitable[IntegrityReport]]

__all__ = ["MAX_ROWS", "TYPES", "Question", "ask", "prepare"]

MAX_ROWS, MAX_SAMPLE = 100_000, 1_000
TYPES: dict[str, Spec] = {
    one.SPEC.report_type: one.SPEC for one in (access_log, gdpr, hipaa, pci_dss, soc2, sox)
}
_REMEMBERED, _REMEMBERED_LENGTH = 10_000, 100
_OF_ONE_PERSON = ("gdpr", "hipaa")
# Columns that are rightly empty: nothing was anomalous, late, held or amiss.
_MAY_BE_EMPTY = {
    "anomaly_score", "anomaly_reason", "reason_for_delay", "legal_hold", "observed_but_not_recorded",
    "rights_taken", "closed", "hours",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a report is asked, checked; see `AuditAggregator.generate_compliance_report`."""

    spec: Spec
    start: datetime
    end: datetime
    tenant_id: str | None
    zone: ZoneInfo
    max_rows: int
    sample_size: int
    subject_id: str | None
    records: tuple[ProcessingRecord, ...] | None
    threshold: float
    retention_days: int
    seed: str
    parameters: dict[str, Any]

    @property
    def parameters_sha256(self) -> str:
        """SHA-256 of the parameters, as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.parameters, sort_keys=True).encode()).hexdigest()


def ask(
    start_date: date | datetime,
    end_date: date | datetime,
    report_type: str,
    *,
    tenant_id: str | None,
    time_zone: str,
    max_rows: int,
    sample_size: int,
    seed: str | None,
    subject_id: str | None,
    processing_records: str | os.PathLike[str] | Iterable[ProcessingRecord | Mapping[str, Any]] | None,
    threshold: float,
    retention_days: int,
    verify: bool,
) -> Question:
    """Check the arguments.

    Raises: InvalidArgument: names the argument and what would be right.
    """
    spec = TYPES.get(report_type) if isinstance(report_type, str) else None
    if spec is None:
        raise InvalidArgument("report_type", report_type, f"give one of {', '.join(TYPES)}")
    _check_count("max_rows", max_rows, MAX_ROWS)
    _check_count("sample_size", sample_size, MAX_SAMPLE)
    for field, value in (("tenant_id", tenant_id), ("subject_id", subject_id), ("seed", seed)):
        if value is not None and (not isinstance(value, str) or "\x00" in value or _has_surrogate(value)):
            raise InvalidArgument(field, value, "give a text without NUL and lone surrogates, or None")
    if subject_id is not None and report_type not in _OF_ONE_PERSON:
        raise InvalidArgument(
            "subject_id", subject_id, f"only {' and '.join(_OF_ONE_PERSON)} are about one person"
        )
    if processing_records is not None and report_type != "gdpr":
        raise InvalidArgument("processing_records", report_type, "only the report gdpr shows them")
    try:
        zone = ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError, TypeError):
        raise InvalidArgument("time_zone", time_zone, "give an IANA name such as Europe/Berlin") from None
    start = _moment("start_date", start_date, zone, 0)
    end = _moment("end_date", end_date, zone, 1)
    if start >= end:
        raise InvalidArgument("end_date", end_date, f"give a day not before start_date ({start_date})")
    records = load_records(processing_records)
    parameters = {
        "report_type": report_type,
        "start": start.isoformat(),
        "end": end.isoformat(),
        "tenant_id": tenant_id,
        "time_zone": time_zone,
        "max_rows": max_rows,
        "sample_size": sample_size,
        "seed": seed,
        "subject_id": subject_id,
        "processing_records_sha256": records_digest(records),
        "anomaly_threshold": float(threshold),
        "retention_days": retention_days,
        "verify": verify,
        "generator_version": __version__,
    }
    return Question(
        spec=spec,
        start=start,
        end=end,
        tenant_id=tenant_id,
        zone=zone,
        max_rows=max_rows,
        sample_size=sample_size,
        subject_id=subject_id,
        records=records,
        threshold=float(threshold),
        retention_days=retention_days,
        seed=seed or hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest(),
        parameters=parameters,
    )


def prepare(
    question: Question, verify: Verify | None, trusted: Sequence[bytes], progress: Progress | None = None
) -> Callable[[Connection], Awaitable[ComplianceReport]]:
    """The work to be done on a connection.

    Args:
        verify: verifies the period by way of the connection; None leaves that out.
        trusted: public keys whose checkpoints are trusted.
    """

    async def work(connection: Connection) -> ComplianceReport:
        # Not `async with`, which would wait for a silent server's ROLLBACK: who reads drops the connection.
        transaction = connection.transaction(isolation="repeatable_read", readonly=True)
        await transaction.start()
        # The text forms of times and numbers must not depend on who asks.
        await connection.execute(
            "SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO'; SET LOCAL extra_float_digits = 1"
        )
        report = await _Run(connection, question, verify, trusted, progress).report()
        await transaction.rollback()
        return report

    return work


class _Run:
    def __init__(
        self,
        connection: Connection,
        question: Question,
        verify: Verify | None,
        trusted: Sequence[bytes],
        progress: Progress | None,
    ) -> None:
        self._connection, self._question, self._progress = connection, question, progress
        self._verify, self._trusted = verify, trusted
        self._statements = Statements(
            connection,
            {
                "start": question.start,
                "end": question.end,
                "tenant": question.tenant_id,
                "zone": question.zone.key,
                "seed": question.seed,
                "size": question.sample_size,
                "subject": question.subject_id,
                "threshold": question.threshold,
            },
        )

    async def report(self) -> ComplianceReport:
        question, spec = self._question, self._question.spec
        steps = len(spec.sections) + 2
        self._tell(0, steps, "completeness")
        found = await completeness.gather(self._statements, await self._verified(), self._trusted)
        facts = Facts(
            start=question.start,
            end=question.end,
            zone=question.zone,
            subject=question.subject_id,
            retention_days=question.retention_days,
            completeness=found,
            records=question.records,
        )
        for number, one in enumerate(spec.sections, 1):
            self._tell(number, steps, one.title)
            facts.sections[one.name] = await self._section(one, facts)
        self._tell(steps - 1, steps, "charts")
        sections = tuple(facts.sections.values())
        charts = await drawing.charts(self._statements, facts, spec)
        self._tell(steps, steps, "done")
        return ComplianceReport(
            report_type=spec.report_type,
            header=self._header(),
            completeness=found,
            sections=sections,
            cannot_answer=spec.cannot_answer,
            charts=charts,
        )

    async def _verified(self) -> IntegrityReport | ImportError | None:
        if self._verify is None:
            return None
        try:
            return await self._verify(self._connection)
        except ImportError as error:  # cryptography, for the signatures
            return error

    def _header(self) -> dict[str, Any]:
        question = self._question
        masked = " Persons other than the subject are masked." if question.spec.report_type == "gdpr" else ""
        return {
            "framework": question.spec.framework,
            "period": {"start": question.start.isoformat(), "end_excluded": question.end.isoformat()},
            "tenant": question.tenant_id or "(all)",
            "subject": question.subject_id,
            "filters": "the period and the tenant; a section's own condition is told by its title",
            "exclusions": "no event of the period and tenant is left out",
            "redactions": "what was redacted or encrypted when it was stored stays so; nothing is decrypted."
            + masked,
            "time_zone": question.zone.key,
            "clock": "an event's time is its process's; recorded_at is the database's",
            "generator": f"dotmac-platform {__version__}",
            "parameters": question.parameters,
            "parameters_sha256": question.parameters_sha256,
            "sample_seed": question.seed,
        }

    def _tell(self, done: int, total: int, title: str) -> None:
        if self._progress is not None:
            self._progress(done, total, title)

    async def _section(self, spec: SectionSpec, facts: Facts) -> Section:
        most = self._question.max_rows
        records: list[dict[str, Any]] = []
        rows: list[tuple[Cell, ...]] = []
        known: dict[str, str] = {}
        if spec.sql:
            sql = f"SELECT * FROM ({spec.sql}) AS s LIMIT {most + 1}"  # noqa: S608 (constants of ours)
            async for record in self._statements.stream(sql):
                if spec.compute is None:
                    rows.append(tuple(_cell(value, known) for value in record.values()))
                else:
                    records.append(dict(record))
        total = len(rows) + len(records)
        if total > most:
            del rows[most:], records[most:]
            counting = f"SELECT count(*) AS total FROM ({spec.sql}) AS s"  # noqa: S608 (constants of ours)
            total = (await self._statements.rows(counting))[0]["total"]
        if spec.compute is not None:
            rows = spec.compute(records, facts)
            total = max(total, len(rows)) if len(records) == most and spec.sql else len(rows)
        note, needed = _said(spec, rows, total)
        return Section(
            name=spec.name,
            title=spec.title,
            control=spec.control,
            columns=spec.columns,
            rows=tuple(rows),
            total=total,
            note=note,
            needed=needed,
            about=spec.about,
        )


def _said(spec: SectionSpec, rows: Sequence[tuple[Cell, ...]], total: int) -> tuple[str, str]:
    """What has to be said about a section, and what would have been needed."""
    if not rows:
        return spec.empty, spec.needed
    said = []
    if total > len(rows):
        said.append(
            f"Only the first {len(rows)} of {total} rows are shown; "
            "a larger max_rows, or export_events, gives the others."
        )
    bare = [
        name
        for place, name in enumerate(spec.columns)
        if name not in _MAY_BE_EMPTY and all(row[place] is None for row in rows)
    ]
    if bare:
        said.append(f"None of these rows has {', '.join(bare)}.")
    return " ".join(said), spec.needed if bare else ""


def _cell(value: Any, known: dict[str, str]) -> Cell:
    """A value as the report holds it; users, actions and the like are held once, however often they come."""
    if value is None or isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else str(value)
    if len(text) > _REMEMBERED_LENGTH or len(known) > _REMEMBERED:
        return text
    return known.setdefault(text, text)


def _check_count(field: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidArgument(field, value, f"give a number from 1 to {most}")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


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
