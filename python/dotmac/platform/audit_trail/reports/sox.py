"""Sarbanes-Oxley, section 404: IT general controls."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from dotmac.platform.audit_trail.reports.spec import PERIOD, TIME, SectionSpec, Spec, listing, named

__all__ = ["SPEC"]

_CHANGE = (
    f"(e.category = 'configuration' OR {named('deploy', 'deployed', 'release', 'change', 'migration')}) "
    "AND e.category <> 'authentication'"
)
_WHO = "time user tenant action resource_type resource_id outcome"

_SEGREGATION = f"""
    SELECT a.resource_type, a.resource_id, a.user_id AS "user", a.action AS created_by_action, a.at AS created_at,
        b.action AS approved_by_action, b.at AS approved_at
    FROM (SELECT e.*, {TIME} AS at FROM audit_events e
          WHERE {PERIOD} AND {named("create", "created", "submit", "submitted", "request", "requested")}) a
    JOIN (SELECT e.*, {TIME} AS at FROM audit_events e
          WHERE {PERIOD} AND {named("approve", "approved")} AND e.outcome = 'success') b
      ON a.resource_type = b.resource_type AND a.resource_id = b.resource_id AND a.user_id = b.user_id
     AND a.tenant_id IS NOT DISTINCT FROM b.tenant_id
    ORDER BY a.occurred_at, b.occurred_at, a.id, b.id
"""  # noqa: S608 (constants of ours)
_SAMPLE = f"""
    SELECT {TIME} AS time, e.user_id AS "user", e.action, e.metadata->>'change_id' AS change_id, e.id::text AS event
    FROM audit_events e WHERE {PERIOD} AND {_CHANGE}
    ORDER BY sha256(convert_to($5 || e.id::text, 'UTF8')), e.id LIMIT 25
"""  # noqa: S608 (constants of ours)

SPEC = Spec(
    "sox",
    "Sarbanes-Oxley Act, section 404, IT general controls",
    (
        listing(
            "access_management",
            "Access provided, changed and removed",
            "ITGC access management",
            f"e.category IN ('authorization', 'administration') AND "
            f"{named('create', 'grant', 'granted', 'assign', 'change', 'update', 'revoke', 'revoked', 'remove', 'delete', 'disable')}",
            f"{_WHO} requester approver ticket",
            "No provision, change or removal of access was logged in the period.",
        ),
        listing(
            "privileged_access",
            "Use of privileged access",
            "ITGC access management",
            "e.category = 'administration'",
            f"{_WHO} address ticket justification",
            "No event of the category ADMINISTRATION was logged in the period.",
        ),
        listing(
            "access_reviews",
            "Access reviews and their attestation",
            "ITGC access management",
            named("review", "recertification", "attest", "attestation"),
            f"{_WHO} period findings",
            "No access review was logged in the period; evidence of reviews must come from elsewhere.",
        ),
        SectionSpec(
            "segregation_of_duties",
            "The same person created and approved",
            "ITGC segregation of duties",
            (
                "resource_type",
                "resource_id",
                "user",
                "created_by_action",
                "created_at",
                "approved_by_action",
                "approved_at",
            ),
            _SEGREGATION,
            "No object was created (or requested) and approved by the same person, as far as both were logged with "
            "resource_type and resource_id.",
        ),
        listing(
            "changes",
            "Changes to systems and configuration: population",
            "ITGC change management",
            _CHANGE,
            f"{_WHO} change_id author approver deployer environment",
            "No change was logged in the period.",
        ),
        listing(
            "changes_unapproved",
            "Exceptions: changes without an approver, or approved by their author",
            "ITGC change management",
            f"{_CHANGE} AND (e.metadata->>'approver' IS NULL OR "
            "e.metadata->>'approver' = coalesce(e.metadata->>'author', e.user_id))",
            f"{_WHO} change_id author approver deployer environment",
            "Every logged change names an approver other than its author.",
        ),
        SectionSpec(
            "changes_sample",
            "Seeded sample of 25 changes",
            "ITGC change management",
            ("time", "user", "action", "change_id", "event"),
            _SAMPLE,
            "The population of changes is empty, so there is no sample.",
        ),
        listing(
            "operations",
            "Failed jobs, and backups",
            "ITGC operations",
            f"(e.category IN ('system_task', 'system') AND e.outcome <> 'success') OR {named('backup', 'restore')}",
            f"{_WHO} level",
            "No failed job and no backup was logged in the period.",
        ),
        listing(
            "logon_failures",
            "Failed and refused log-ons",
            "ITGC access management",
            "e.category = 'authentication' AND e.outcome IN ('failure', 'denied')",
            "time user tenant address action outcome anomaly_score anomaly_reason",
            "No failed log-on was logged in the period.",
        ),
        listing(
            "audit_log_access",
            "Access to the audit log",
            "ITGC access management",
            "e.action ~* '^audit[._:-]' OR e.resource_type IN ('audit', 'audit_log', 'audit_events')",
            f"{_WHO} address",
            "No access to the audit log was logged in the period. Access by SQL shows in PostgreSQL's own log only.",
        ),
    ),
    (
        "Time from a person's leaving to the removal of access: the day of leaving is in the staff system.",
        "The complete population of accounts and rights: the log has changes, not the state.",
    ),
)
