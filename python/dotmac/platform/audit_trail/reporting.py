"""Compliance reports over stored events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.arguments import check_seconds
from dotmac.platform.audit_trail.integrity.service import Integrity
from dotmac.platform.audit_trail.tenancy import check_named, tenant_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping
    from datetime import date, datetime

    import asyncpg

    from dotmac.platform.audit_trail.integrity.report import IntegrityReport
    from dotmac.platform.audit_trail.reports.model import ComplianceReport
    from dotmac.platform.audit_trail.reports.registry import ProcessingRecord

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Reporting"]

# A report reads the whole period several times over.
_TIMEOUT_FACTOR = 30


class Reporting(Integrity):
    """The part of `AuditAggregator` that reports."""

    async def generate_compliance_report(
        self,
        start_date: date | datetime,
        end_date: date | datetime,
        report_type: str = "access_log",
        tenant_id: str | None = None,
        *,
        time_zone: str = "UTC",
        max_rows: int = 10_000,
        sample_size: int = 25,
        seed: str | None = None,
        subject_id: str | None = None,
        processing_records: str
        | os.PathLike[str]
        | Iterable[ProcessingRecord | Mapping[str, Any]]
        | None = None,
        verify: bool = True,
        timeout: float | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> ComplianceReport:
        """What the trail can say about a period, for an auditor.

        Args:
            start_date: first day, or a datetime for an exact moment; a naive one is in `time_zone`.
            end_date: last day, included; or a datetime for the moment after the last.
            report_type: `access_log`, `gdpr`, `hipaa`, `pci_dss`, `soc2` or `sox`.
            tenant_id: only this tenant's events. Where row-level security shows one tenant at a time, it is
                by default the one of `audit_context`, or the one to which the role is bound.
            time_zone: IANA name of the zone in which days begin and end.
            max_rows: rows per section, 1 to 100,000; a section with more says so and how many. The report
                is held in memory: about 1 kB per row, and as much again while a PDF is drawn.
            sample_size: events of each seeded sample, 1 to 1,000.
            seed: of the samples; default: the SHA-256 of the parameters. The report states it.
            subject_id: the one person (`gdpr`, Art. 15) or patient (`hipaa`, 164.528) it is about.
            processing_records: the record of processing activities (`gdpr`, Art. 30): `ProcessingRecord`
                objects or mappings, or the path of a .json, .toml or .csv file.
            verify: verify the integrity of the period's events, segments and logs, and say what came of it.
            timeout: seconds for the whole; default: 30 times the service's.
            progress: called with sections done, sections in all, and what comes next.

        Returns: sections with their controls; `to_dict()`, `to_json()`, `to_csv()`, `to_html()`, `to_pdf()`,
            `write(path)`. The same arguments over the same events give the same bytes.
        Raises: InvalidArgument: among others for an unknown type, with the list, and where row-level
            security shows one tenant at a time and none is named. AuditUnavailable.
        """
        from dotmac.platform.audit_trail.reports import build

        check_seconds("timeout", timeout)

        def ask(tenant: str | None, records: Any) -> build.Question:
            return build.ask(
                start_date,
                end_date,
                report_type,
                tenant_id=tenant,
                time_zone=time_zone,
                max_rows=max_rows,
                sample_size=sample_size,
                seed=seed,
                subject_id=subject_id,
                processing_records=records,
                threshold=self.threshold(),
                retention_days=self._section().retention_days,
                verify=verify,
            )

        question = ask(tenant_id, processing_records)
        sight = await self._sight()
        if sight.one_tenant and not tenant_id:
            tenant_id = tenant_of(None)
            check_named(sight, tenant_id)
            # The report says whose events it is about, as if it had been asked for them.
            tenant_id = sight.setting(tenant_id)
            question = ask(tenant_id, question.records)

        async def verified(connection: Connection) -> IntegrityReport:
            return await self.verify_integrity(
                question.start,
                question.end,
                tenant_id=tenant_id,
                connection=connection,
                max_findings=100,
                anchors=(),  # places elsewhere: what they answer may differ from one run to the next
            )

        work = build.prepare(question, verified if verify else None, self.trusted_keys(), progress)
        return await self._read(work, timeout or _TIMEOUT_FACTOR * self._seconds(), tenant=tenant_id)
