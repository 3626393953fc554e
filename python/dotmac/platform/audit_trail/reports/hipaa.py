"""HIPAA Security Rule: audit controls, 45 CFR 164.312(b) with 164.308(a)(1)(ii)(D)."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from dotmac.platform.audit_trail.reports.spec import PERIOD, TIME, SectionSpec, Spec, counted, listing, named

__all__ = ["SPEC"]

_RECORDS = "e.category IN ('data_access', 'data_change', 'data_export')"
_PATIENT = "coalesce(e.metadata->>'patient_id', CASE WHEN e.resource_type = 'patient' THEN e.resource_id END)"
_DISABLED = f"""
    SELECT gone.who AS "user", gone.at AS disabled_at, {TIME} AS time, e.action, e.outcome,
        host(e.ip_address) AS address
    FROM (SELECT coalesce(e.metadata->>'target_user', e.resource_id) AS who, min(e.occurred_at) AS since,
            min({TIME}) AS at
          FROM audit_events e
          WHERE e.occurred_at < $2 AND ($3::text IS NULL OR e.tenant_id = $3) AND e.outcome = 'success'
            AND {named("disable", "disabled", "deactivate", "deactivated", "terminate", "terminated")}
            AND (e.resource_type = 'user' OR e.metadata ? 'target_user')
          GROUP BY 1) gone
    JOIN audit_events e ON e.user_id = gone.who AND e.occurred_at > gone.since
    WHERE {PERIOD} ORDER BY e.occurred_at, e.id
"""  # noqa: S608 (constants of ours)

SPEC = Spec(
    "hipaa",
    "HIPAA Security Rule, 45 CFR 164",
    (
        listing(
            "logon_attempts",
            "Log-on attempts",
            "164.312(b), 164.308(a)(5)(ii)(C)",
            "e.category = 'authentication'",
            "time user tenant address user_agent application action outcome method anomaly_score anomaly_reason",
            "No log-on was logged in the period.",
        ),
        counted(
            "records_by_user",
            "Records created, read, updated, deleted, printed, exported, per user",
            "164.312(b)",
            _RECORDS,
            {
                '"user"': "coalesce(e.user_id, '(none)')",
                "category": "e.category",
                "action": "e.action",
                "outcome": "e.outcome",
            },
            "No access to records was logged in the period.",
        ),
        counted(
            "records_by_patient",
            "Accounting of access, per patient",
            "164.312(b), 164.528",
            f"{_RECORDS} AND {_PATIENT} IS NOT NULL",
            {
                "patient": _PATIENT,
                '"user"': "coalesce(e.user_id, '(none)')",
                "action": "e.action",
                "outcome": "e.outcome",
            },
            "No event of the period names a patient (metadata.patient_id, or a resource of type patient).",
        ),
        listing(
            "break_glass",
            "Break-glass uses with their justification",
            "164.312(a)(2)(ii)",
            f"e.metadata->>'break_glass' = 'true' OR {named('break_glass', 'breakglass', 'emergency_access')}",
            "time user tenant address action resource_type resource_id patient_id justification outcome",
            "No break-glass use was logged in the period.",
        ),
        SectionSpec(
            "disabled_users",
            "Activity of users after they were disabled or terminated",
            "164.308(a)(3)(ii)(C)",
            ("user", "disabled_at", "time", "action", "outcome", "address"),
            _DISABLED,
            "No user acted after a logged disabling; accounts disabled without an event can't be seen here.",
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
                "grant",
                "granted",
                "revoke",
                "revoked",
            ),
            "time user tenant action resource_type resource_id requester approver ticket outcome",
            "No change of privileges was logged in the period.",
        ),
        listing(
            "review_log",
            "Reviews of the log: who reviewed which period, when, with which findings",
            "164.308(a)(1)(ii)(D)",
            f"{named('review', 'reviewed')} AND (e.action ~* 'audit' OR e.resource_type ~* 'audit')",
            "time user tenant action period findings outcome",
            "No review of the log was logged in the period: log it as action 'audit.review' with period and "
            "findings.",
        ),
    ),
    (
        (
            "Retention of six years, 164.316(b)(2)(i): see the oldest event in the completeness block and the "
            "configured retention; older backups are not visible to the log."
        ),
        "Printing and export outside of the application are not in the log.",
    ),
)
