"""Sarbanes-Oxley, section 404: IT general controls."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.reports.facts import moment_of
from dotmac.platform.audit_trail.reports.spec import (
    PERIOD,
    TARGET,
    TIME,
    ChartSpec,
    SectionSpec,
    Spec,
    Unanswered,
    computed,
    listing,
    named,
    sample,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dotmac.platform.audit_trail.reports.facts import Facts
    from dotmac.platform.audit_trail.reports.spec import Cell

__all__ = ["ACCESS", "AUDIT_LOG", "CHANGE", "SPEC", "UNAPPROVED"]

CHANGE = (
    f"(e.category = 'configuration' OR {named('deploy', 'deployed', 'release', 'released', 'change', 'migration')}) "
    "AND e.category NOT IN ('authentication', 'authorization')"
)
UNAPPROVED = (
    f"{CHANGE} AND (e.metadata->>'approver' IS NULL OR "
    "e.metadata->>'approver' = coalesce(e.metadata->>'author', e.user_id))"
)
_GRANT = ("create", "created", "grant", "granted", "assign", "assigned", "add", "added", "enable", "enabled")
_REVOKE = (
    "revoke",
    "revoked",
    "remove",
    "removed",
    "delete",
    "deleted",
    "disable",
    "disabled",
    "terminate",
    "terminated",
    "deactivate",
    "deactivated",
)
ACCESS = f"e.category IN ('authorization', 'administration') AND {named(*_GRANT, *_REVOKE, 'change', 'changed', 'update', 'updated')}"
AUDIT_LOG = "(e.action ~* '^audit[._:-]' OR e.resource_type IN ('audit', 'audit_log', 'audit_events'))"
_GRANTED = f"e.category IN ('authorization', 'administration') AND {named(*_GRANT)} AND e.outcome = 'success'"
_REVOKED = (
    f"e.category IN ('authorization', 'administration') AND {named(*_REVOKE)} AND e.outcome = 'success'"
)
_UNAPPROVED_ACCESS = f"{_GRANTED} AND (e.metadata->>'approver' IS NULL OR e.metadata->>'approver' IN (e.user_id, e.metadata->>'requester'))"
_WHO = "time user tenant action resource_type resource_id outcome"
_ACCESS_COLUMNS = "time granted_by tenant action target_user resource_type resource_id role outcome requester approver ticket"
_CHANGE_COLUMNS = (
    "time user tenant action change_id author approver deployer environment resource_type resource_id outcome"
)
_ACCESS_NEEDED = "Log role.grant, user.create, role.revoke and the like; target_user, role, requester, approver and ticket are keys of metadata."
_CHANGE_NEEDED = "Log change.deploy and the like, or the category CONFIGURATION; change_id, author, approver, deployer and environment are keys of metadata."
_PROMPT = 24.0

_SEGREGATION = f"""
    SELECT a.tenant_id AS tenant, a.resource_type, a.resource_id, a.user_id AS "user", a.action AS created_by_action,
        a.at AS created_at, b.action AS approved_by_action, b.at AS approved_at
    FROM (SELECT e.*, {TIME} AS at FROM audit_events e
          WHERE {PERIOD} AND {named("create", "created", "submit", "submitted", "request", "requested")}) a
    JOIN (SELECT e.*, {TIME} AS at FROM audit_events e
          WHERE {PERIOD} AND {named("approve", "approved")} AND e.outcome = 'success') b
      ON a.resource_type = b.resource_type AND a.resource_id = b.resource_id AND a.user_id = b.user_id
     AND a.tenant_id IS NOT DISTINCT FROM b.tenant_id
    ORDER BY a.occurred_at, b.occurred_at, a.id, b.id
"""  # noqa: S608 (constants of ours)

# The state of rights at the end of the period: of each right of each person, what the last event did.
_RIGHT = "coalesce(e.metadata->>'role', e.metadata->>'permission', CASE WHEN e.resource_type NOT IN ('user', 'account') THEN concat_ws(':', e.resource_type, e.resource_id) END, '(account)')"
_POPULATION = f"""
    WITH changes AS (
        SELECT e.tenant_id, {TARGET} AS who, {_RIGHT} AS name, ({_GRANTED}) AS given, {TIME} AS at,
            row_number() OVER (PARTITION BY e.tenant_id, {TARGET}, {_RIGHT} ORDER BY e.occurred_at DESC, e.id DESC) AS age
        FROM audit_events e
        WHERE e.occurred_at < $end AND ($tenant IS NULL OR e.tenant_id = $tenant)
            AND (({_GRANTED}) OR ({_REVOKED})) AND {TARGET} IS NOT NULL
    ), rights AS (
        SELECT tenant_id, who, string_agg(name, ', ' ORDER BY name COLLATE "C") FILTER (WHERE given) AS held,
            string_agg(name, ', ' ORDER BY name COLLATE "C") FILTER (WHERE NOT given) AS taken, max(at) AS changed
        FROM changes WHERE age = 1 GROUP BY 1, 2
    ), active AS (
        SELECT e.tenant_id, e.user_id AS who, count(*) AS events, max({TIME}) AS last
        FROM audit_events e WHERE {PERIOD} AND e.user_id IS NOT NULL GROUP BY 1, 2
    ), reviews AS (
        SELECT DISTINCT ON (e.tenant_id, {TARGET}) e.tenant_id, {TARGET} AS who, {TIME} AS at, e.user_id AS reviewer,
            coalesce(e.metadata->>'decision', e.metadata->>'findings', e.outcome) AS decision
        FROM audit_events e
        WHERE {PERIOD} AND {named("review", "reviewed", "recertification", "attest", "attested", "attestation")} AND {TARGET} IS NOT NULL
        ORDER BY 1, 2, e.occurred_at DESC, e.id DESC
    ), persons AS (SELECT tenant_id, who FROM rights UNION SELECT tenant_id, who FROM active)
    SELECT p.tenant_id AS tenant, p.who AS "user", r.held AS rights_held, r.taken AS rights_taken,
        r.changed AS rights_changed, a.last AS last_activity, coalesce(a.events, 0) AS events,
        v.at AS attested_at, v.reviewer AS attested_by, v.decision
    FROM persons p
    LEFT JOIN rights r ON r.who = p.who AND r.tenant_id IS NOT DISTINCT FROM p.tenant_id
    LEFT JOIN active a ON a.who = p.who AND a.tenant_id IS NOT DISTINCT FROM p.tenant_id
    LEFT JOIN reviews v ON v.who = p.who AND v.tenant_id IS NOT DISTINCT FROM p.tenant_id
    ORDER BY p.tenant_id COLLATE "C" NULLS FIRST, p.who COLLATE "C"
"""  # noqa: S608 (constants of ours)
_LEAVERS = f"""
    SELECT {TIME} AS revoked_at, e.user_id AS "user", {TARGET} AS target_user, e.action,
        coalesce(e.metadata->>'left_at', e.metadata->>'termination_date') AS left_at, e.metadata->>'ticket' AS ticket
    FROM audit_events e WHERE {PERIOD} AND {_REVOKED}
        AND coalesce(e.metadata->>'left_at', e.metadata->>'termination_date') IS NOT NULL
    ORDER BY e.occurred_at, e.id
"""  # noqa: S608 (constants of ours)


def _time_to_revoke(records: Sequence[dict[str, Any]], _: Facts) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for one in records:
        left, revoked = moment_of(one["left_at"]), moment_of(one["revoked_at"])
        hours = None if left is None or revoked is None else round((revoked - left).total_seconds() / 3600, 2)
        verdict = (
            "unknown: left_at is no ISO 8601 time"
            if hours is None
            else "late"
            if hours > _PROMPT
            else "in time"
        )
        rows.append(
            (
                one["target_user"],
                one["left_at"],
                one["revoked_at"],
                hours,
                verdict,
                one["user"],
                one["action"],
                one["ticket"],
            )
        )
    return rows


def _populations(_: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    """Population, sample and exceptions of each control, from the sections before."""
    made = facts.sections

    def total(name: str) -> int:
        return made[name].total

    late = sum(1 for row in made["time_to_revoke"].rows if row[4] == "late")
    failed = sum(1 for row in made["operations"].rows if row[6] in ("failure", "denied"))
    unattested = sum(1 for row in made["access_review_population"].rows if row[7] is None)
    return [
        ("Access management", "access_management", total("access_management"), total("access_sample"), total("access_unapproved"), "granted without an approver, or approved by who asked or granted"),
        ("Access review", "access_review_population", total("access_review_population"), None, unattested, "users without an attestation logged in the period (of the rows shown)"),
        ("Removal after leaving", "time_to_revoke", total("time_to_revoke"), None, late, "revoked more than 24 hours after leaving (of the rows shown)"),
        ("Segregation of duties", "segregation_of_duties", None, None, total("segregation_of_duties"), "created and approved by the same person"),
        ("Change management", "changes", total("changes"), total("changes_sample"), total("changes_unapproved"), "without an approver, or approved by the author"),
        ("Privileged access", "privileged_access", total("privileged_access"), total("privileged_sample"), None, "to be judged by the reviewer"),
        ("Operations", "operations", total("operations"), None, failed, "failed jobs and backups (of the rows shown)"),
    ]  # fmt: skip


SPEC = Spec(
    "sox",
    "Sarbanes-Oxley Act, section 404, IT general controls",
    (
        listing("access_management", "Access provided, changed and removed: population", "ITGC access management", ACCESS, _ACCESS_COLUMNS,
                "No provision, change or removal of access was logged in the period.", needed=_ACCESS_NEEDED),
        listing("access_unapproved", "Exceptions: access given without an approver, or approved by who asked for or granted it", "ITGC access management",
                _UNAPPROVED_ACCESS, _ACCESS_COLUMNS, "Every logged grant names an approver other than who asked for and granted it.", needed=_ACCESS_NEEDED),
        sample("access_sample", "access provided, changed and removed", "ITGC access management", ACCESS, f"{_ACCESS_COLUMNS} event"),
        computed("time_to_revoke", "Time from leaving to the removal of access", "ITGC access management",
                 "target_user left_at revoked_at hours verdict revoked_by action ticket", _time_to_revoke,
                 "No removal of access says when the person left.", sql=_LEAVERS,
                 needed="Give left_at (ISO 8601) in the metadata of user.disable, role.revoke and the like.",
                 about="Late is more than 24 hours."),
        SectionSpec(
            name="access_review_population",
            title="Access review: every user with rights or activity, and the attestation",
            control="ITGC access management",
            columns=("tenant", "user", "rights_held", "rights_taken", "rights_changed", "last_activity", "events", "attested_at", "attested_by", "decision"),
            sql=_POPULATION,
            empty="No user had rights or activity in the log until the end of the period.",
            needed="Log grants and revocations with target_user and role; log attestations as access.review with target_user and decision.",
            about="Rights as the logged grants and revocations until the end of the period leave them; events are those of the period.",
        ),
        listing("access_reviews", "Access reviews", "ITGC access management", f"{named('review', 'reviewed', 'recertification', 'attest', 'attestation')} AND {AUDIT_LOG} IS NOT TRUE",
                f"{_WHO} period findings", "No access review was logged in the period; evidence of reviews must come from elsewhere.",
                needed="Log reviews as action 'access.review' with period and findings in metadata."),
        listing("privileged_access", "Use of privileged access: population", "ITGC access management", "e.category = 'administration'",
                f"{_WHO} address ticket justification", "No event of the category ADMINISTRATION was logged in the period.",
                needed="Log privileged work in the category ADMINISTRATION; ticket and justification are keys of metadata."),
        sample("privileged_sample", "uses of privileged access", "ITGC access management", "e.category = 'administration'", f"{_WHO} ticket justification event"),
        SectionSpec(
            name="segregation_of_duties",
            title="Exceptions: the same person created and approved",
            control="ITGC segregation of duties",
            columns=("tenant", "resource_type", "resource_id", "user", "created_by_action", "created_at", "approved_by_action", "approved_at"),
            sql=_SEGREGATION,
            empty="No object was created (or requested) and approved by the same person, as far as both were logged with resource_type and resource_id.",
            needed="Log creation (or request) and approval with the same resource_type and resource_id.",
        ),
        listing("changes", "Changes to systems and configuration: population", "ITGC change management", CHANGE, _CHANGE_COLUMNS,
                "No change was logged in the period.", needed=_CHANGE_NEEDED),
        listing("changes_unapproved", "Exceptions: changes without an approver, or approved by their author", "ITGC change management", UNAPPROVED,
                _CHANGE_COLUMNS, "Every logged change names an approver other than its author.", needed=_CHANGE_NEEDED),
        sample("changes_sample", "changes", "ITGC change management", CHANGE, f"{_CHANGE_COLUMNS} event"),
        listing("operations", "Failed jobs, and backups", "ITGC operations",
                f"(e.category IN ('system_task', 'system') AND e.outcome <> 'success') OR {named('backup', 'restore')}",
                f"{_WHO} level", "No failed job and no backup was logged in the period.",
                needed="Log jobs in the category SYSTEM_TASK with their outcome, and backups as backup.run or the like."),
        listing("logon_failures", "Failed and refused log-ons", "ITGC access management",
                "e.category = 'authentication' AND e.outcome IN ('failure', 'denied')",
                "time user tenant address action outcome anomaly_score anomaly_reason", "No failed log-on was logged in the period."),
        listing("audit_log_access", "Access to the audit log", "ITGC access management", AUDIT_LOG, f"{_WHO} address",
                "No access to the audit log was logged in the period. Access by SQL shows in PostgreSQL's own log only.",
                needed="Log reading and exporting of the trail as audit.read, audit.export and the like."),
        computed("populations", "Populations, samples and exceptions", "ITGC", "area section population sampled exceptions exception_is", _populations,
                 "Nothing was counted."),
    ),
    (
        Unanswered("ITGC access management", "Whether each leaver's access was removed", "The day of leaving is in the staff system; the log has removals.",
                   "A list of leavers, to set beside the removals; left_at in the metadata of removals answers it for those logged."),
        Unanswered("ITGC access management", "The complete population of accounts and rights", "The log has changes of rights, not the state before the first of them.",
                   "A listing of accounts and rights from each system, at a day, to set beside the access review population."),
        Unanswered("ITGC change management", "Changes that went around the deployment", "A change that no tool logged is not in the log.",
                   "A comparison of what runs with what was deployed; PostgreSQL's own log for changes by SQL."),
        Unanswered("ITGC operations", "Jobs that did not run at all", "A job that did not start logs nothing.", "The scheduler's list of jobs and due times."),
    ),
    (ChartSpec("populations", "Exceptions by control", "area", "exceptions"), ChartSpec("populations", "Populations by control", "area", "population")),
)  # fmt: skip
