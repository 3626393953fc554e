"""Audit trail: events that are durable once acknowledged, queries, reports and anomaly scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.aggregator import AuditAggregator
    from dotmac.platform.audit_trail.config import AuditTrailConfig
    from dotmac.platform.audit_trail.importer import ImportSummary, import_events
    from dotmac.platform.audit_trail.models import AuditCategory, AuditEvent, AuditLevel, AuditOutcome
    from dotmac.platform.audit_trail.query import EventPage
    from dotmac.platform.audit_trail.reports.model import ComplianceReport

_HOMES = {
    "AuditAggregator": "aggregator",
    "AuditCategory": "models",
    "AuditEvent": "models",
    "AuditLevel": "models",
    "AuditOutcome": "models",
    "AuditTrailConfig": "config",
    "ComplianceReport": "reports.model",
    "EventPage": "query",
    "ImportSummary": "importer",
    "import_events": "importer",
}

__all__ = [
    "AuditAggregator",
    "AuditCategory",
    "AuditEvent",
    "AuditLevel",
    "AuditOutcome",
    "AuditTrailConfig",
    "ComplianceReport",
    "EventPage",
    "ImportSummary",
    "import_events",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
