"""Audit trail: events that are durable once acknowledged, queries, reports and anomaly scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.aggregator import AuditAggregator
    from dotmac.platform.audit_trail.config import AuditTrailConfig
    from dotmac.platform.audit_trail.context import AuditContext, audit_context, current_audit_context
    from dotmac.platform.audit_trail.erasure import Erasure
    from dotmac.platform.audit_trail.exports.restore import RestoreProgress, RestoreSummary
    from dotmac.platform.audit_trail.exports.run import ExportProgress, ExportSummary
    from dotmac.platform.audit_trail.facets import Facet
    from dotmac.platform.audit_trail.forward.destination import Destination
    from dotmac.platform.audit_trail.forward.run import ForwardSummary
    from dotmac.platform.audit_trail.forward.syslog import SyslogDestination
    from dotmac.platform.audit_trail.forward.webhook import WebhookDestination, verify_webhook
    from dotmac.platform.audit_trail.histogram import Bucket, Histogram
    from dotmac.platform.audit_trail.holds import LegalHold
    from dotmac.platform.audit_trail.importer import ImportSummary, import_events
    from dotmac.platform.audit_trail.models import (
        AuditCategory,
        AuditEvent,
        AuditLevel,
        AuditOutcome,
        PersonalState,
    )
    from dotmac.platform.audit_trail.personal_key import KeyService
    from dotmac.platform.audit_trail.query import EventPage
    from dotmac.platform.audit_trail.redaction import RedactionRule
    from dotmac.platform.audit_trail.reports.model import ComplianceReport
    from dotmac.platform.audit_trail.retention import DroppedPartition
    from dotmac.platform.audit_trail.roles import RoleGrant
    from dotmac.platform.audit_trail.tail import Tail
    from dotmac.platform.audit_trail.tenancy import TenantMissing
    from dotmac.platform.audit_trail.timeline import Timeline

_HOMES = {
    "AuditAggregator": "aggregator",
    "AuditCategory": "models",
    "AuditContext": "context",
    "AuditEvent": "models",
    "AuditLevel": "models",
    "AuditOutcome": "models",
    "AuditTrailConfig": "config",
    "Bucket": "histogram",
    "ComplianceReport": "reports.model",
    "Destination": "forward.destination",
    "DroppedPartition": "retention",
    "Erasure": "erasure",
    "EventPage": "query",
    "ExportProgress": "exports.run",
    "ExportSummary": "exports.run",
    "Facet": "facets",
    "ForwardSummary": "forward.run",
    "Histogram": "histogram",
    "ImportSummary": "importer",
    "KeyService": "personal_key",
    "LegalHold": "holds",
    "PersonalState": "models",
    "RedactionRule": "redaction",
    "RestoreProgress": "exports.restore",
    "RestoreSummary": "exports.restore",
    "RoleGrant": "roles",
    "SyslogDestination": "forward.syslog",
    "Tail": "tail",
    "TenantMissing": "tenancy",
    "Timeline": "timeline",
    "WebhookDestination": "forward.webhook",
    "audit_context": "context",
    "current_audit_context": "context",
    "import_events": "importer",
    "verify_webhook": "forward.webhook",
}

__all__ = [
    "AuditAggregator",
    "AuditCategory",
    "AuditContext",
    "AuditEvent",
    "AuditLevel",
    "AuditOutcome",
    "AuditTrailConfig",
    "Bucket",
    "ComplianceReport",
    "Destination",
    "DroppedPartition",
    "Erasure",
    "EventPage",
    "ExportProgress",
    "ExportSummary",
    "Facet",
    "ForwardSummary",
    "Histogram",
    "ImportSummary",
    "KeyService",
    "LegalHold",
    "PersonalState",
    "RedactionRule",
    "RestoreProgress",
    "RestoreSummary",
    "RoleGrant",
    "SyslogDestination",
    "Tail",
    "TenantMissing",
    "Timeline",
    "WebhookDestination",
    "audit_context",
    "current_audit_context",
    "import_events",
    "verify_webhook",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
