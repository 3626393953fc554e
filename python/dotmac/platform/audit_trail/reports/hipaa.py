"""HIPAA Security Rule: audit controls, 45 CFR 164.312(b) with 164.308(a)(1)(ii)(D)."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.reports.spec import (
    PERIOD,
    TARGET,
    TIME,
    ChartSpec,
    SectionSpec,
    Spec,
    Unanswered,
    computed,
    counted,
    listing,
    named,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dotmac.platform.audit_trail.reports.facts import Facts
    from dotmac.platform.audit_trail.reports.spec import Cell

__all__ = ["OPERATION", "SPEC"]

_RECORDS = "e.category IN ('data_access', 'data_change', 'data_export')"
_PATIENT = "coalesce(e.metadata->>'patient_id', CASE WHEN e.resource_type = 'patient' THEN e.resource_id END, e.subject_id)"
_THIS_PATIENT = f"($subject IS NULL OR {_PATIENT} = $subject)"
# What was done to a record, by the words of the action, else by the category.
OPERATION = f"""CASE
    WHEN {named("print", "printed")} THEN 'printed'
    WHEN e.category = 'data_export' OR {named("export", "exported", "download", "downloaded", "disclose", "disclosed")} THEN 'exported'
    WHEN {named("delete", "deleted", "remove", "removed", "erase", "erased")} THEN 'deleted'
    WHEN {named("create", "created", "add", "added", "insert", "inserted")} THEN 'created'
    WHEN e.category = 'data_change' THEN 'updated'
    ELSE 'read' END"""
_DISABLED = f"""
    SELECT gone.who AS "user", gone.at AS disabled_at, {TIME} AS time, e.action, e.outcome,
        host(e.ip_address) AS address
    FROM (SELECT {TARGET} AS who, e.tenant_id AS realm, min(e.occurred_at) AS since, min({TIME}) AS at
          FROM audit_events e
          WHERE e.occurred_at < $end AND ($tenant IS NULL OR e.tenant_id = $tenant) AND e.outcome = 'success'
            AND {named("disable", "disabled", "deactivate", "deactivated", "terminate", "terminated")}
            AND {TARGET} IS NOT NULL
          GROUP BY 1, 2) gone
    JOIN audit_events e ON e.user_id = gone.who AND e.occurred_at > gone.since
        AND e.tenant_id IS NOT DISTINCT FROM gone.realm
    WHERE {PERIOD} ORDER BY e.occurred_at, e.id
"""  # noqa: S608 (constants of ours)
_SIX_YEARS = 2_190
_PATIENT_NEEDED = (
    "Name the patient: metadata.patient_id, or resource_type 'patient' with the id as resource_id."
)


def _retention(_: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    days = facts.retention_days
    return [
        ("Retention that the settings ask for", f"{days} days", "six years (2,190 days)", "met" if days >= _SIX_YEARS else "not met: raise AUDIT_TRAIL_RETENTION_DAYS"),
        ("Oldest event in the log", facts.completeness["oldest_event"], "six years back, once the log is that old", "see the date"),
    ]  # fmt: skip


SPEC = Spec(
    "hipaa",
    "HIPAA Security Rule, 45 CFR 164",
    (
        listing(
            "logon_attempts",
            "Log-on attempts",
            "164.312(b), 164.308(a)(5)(ii)(C)",
            "e.category = 'authentication'",
            "time user tenant address device application action outcome method anomaly_score anomaly_reason",
            "No log-on was logged in the period.",
            needed="Log log-ons in the category AUTHENTICATION; device (or user_agent), application and method are keys of metadata.",
        ),
        counted(
            "records_by_operation",
            "Records created, read, updated, deleted, printed, exported",
            "164.312(b)",
            f"{_RECORDS} AND {_THIS_PATIENT}",
            {"operation": OPERATION, "outcome": "e.outcome"},
            "No access to records was logged in the period.",
        ),
        counted(
            "records_by_user",
            "Operations on records, per user",
            "164.312(b)",
            f"{_RECORDS} AND {_THIS_PATIENT}",
            {
                "user": "coalesce(e.user_id, '(none)')",
                "operation": OPERATION,
                "action": "e.action",
                "outcome": "e.outcome",
            },
            "No access to records was logged in the period.",
        ),
        counted(
            "records_by_patient",
            "Accounting of access, per patient",
            "164.312(b), 164.528",
            f"{_RECORDS} AND {_PATIENT} IS NOT NULL AND {_THIS_PATIENT}",
            {
                "patient": _PATIENT,
                "user": "coalesce(e.user_id, '(none)')",
                "action": "e.action",
                "outcome": "e.outcome",
            },
            "No event of the period names a patient (metadata.patient_id, or a resource of type patient).",
            needed=_PATIENT_NEEDED,
        ),
        SectionSpec(
            name="accounting_of_disclosures",
            title="Every access and disclosure, for the patient asked about (all patients: exports only)",
            control="164.528(b)(2)",
            columns=(
                "time",
                "patient",
                "user",
                "operation",
                "recipient",
                "purpose",
                "data_category",
                "resource_type",
                "resource_id",
                "outcome",
                "event",
            ),
            sql=f"""
                SELECT {TIME} AS time, {_PATIENT} AS patient, e.user_id AS "user", {OPERATION} AS operation,
                    e.metadata->>'recipient' AS recipient, e.metadata->>'purpose' AS purpose,
                    e.metadata->>'data_category' AS data_category, e.resource_type, e.resource_id, e.outcome,
                    e.id::text AS event
                FROM audit_events e WHERE {PERIOD} AND {_RECORDS} AND {_PATIENT} IS NOT NULL
                    AND ($subject = {_PATIENT} OR ($subject IS NULL AND ({OPERATION}) = 'exported'))
                ORDER BY e.occurred_at, e.id
            """,  # noqa: S608 (constants of ours)
            empty="No disclosure was logged in the period, and no access for a patient asked about.",
            needed=f"{_PATIENT_NEEDED} Give subject_id for one patient's whole accounting; recipient, purpose and data_category are keys of metadata.",
        ),
        listing(
            "break_glass",
            "Break-glass uses with their justification",
            "164.312(a)(2)(ii)",
            f"e.metadata->>'break_glass' = 'true' OR {named('break_glass', 'breakglass', 'emergency_access')}",
            "time user tenant address action resource_type resource_id patient_id justification outcome",
            "No break-glass use was logged in the period.",
            needed="Log emergency access as an action *.break_glass, or with metadata break_glass: true, and its justification.",
        ),
        SectionSpec(
            name="disabled_users",
            title="Activity of users after they were disabled or terminated",
            control="164.308(a)(3)(ii)(C)",
            columns=("user", "disabled_at", "time", "action", "outcome", "address"),
            sql=_DISABLED,
            empty="No user acted after a logged disabling; accounts disabled without an event can't be seen here.",
            needed="Log user.disable or user.terminate with resource_type 'user' and the user as resource_id (or metadata.target_user).",
        ),
        listing(
            "privilege_changes",
            "Changes of privileges",
            "164.308(a)(4)(ii)(C)",
            "e.category IN ('authorization', 'administration') AND "
            + named(
                "role",
                "roles",
                "permission",
                "permissions",
                "privilege",
                "privileges",
                "grant",
                "granted",
                "revoke",
                "revoked",
            ),
            "time user tenant action target_user resource_type resource_id requester approver ticket outcome",
            "No change of privileges was logged in the period.",
            needed="Log role.grant, role.revoke and the like; target_user, requester, approver and ticket are keys of metadata.",
        ),
        listing(
            "review_log",
            "Reviews of the log: who reviewed which period, when, with which findings",
            "164.308(a)(1)(ii)(D)",
            f"{named('review', 'reviewed')} AND (e.action ~* 'audit' OR e.resource_type ~* 'audit')",
            "time user tenant action period findings outcome",
            "No review of the log was logged in the period.",
            needed="Log reviews as action 'audit.review' with period and findings in metadata.",
        ),
        computed(
            "retention",
            "Retention of six years",
            "164.316(b)(2)(i)",
            "what found required verdict",
            _retention,
            "Nothing is known of the retention.",
        ),
    ),
    (
        Unanswered(
            "164.312(b)",
            "Printing, export and viewing outside of the applications that log here",
            "What no application logged is not in the log.",
            "Logs of print servers, workstations and data loss prevention.",
        ),
        Unanswered(
            "164.316(b)(2)(i)",
            "Retention of policies, procedures and older backups",
            "The log knows of its own events only.",
            "The document store, and the register of backups.",
        ),
        Unanswered(
            "164.308(a)(3)",
            "The workforce: who left, and when",
            "Staff records are kept elsewhere; the log has the disabling of accounts that was logged.",
            "A list of leavers from the staff system, to set beside the disabled users.",
        ),
    ),
    (
        ChartSpec("records_by_operation", "Operations on records", "operation"),
        ChartSpec("records_by_patient", "Accesses by patient", "patient"),
    ),
)
