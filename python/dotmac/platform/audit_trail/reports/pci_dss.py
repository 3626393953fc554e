"""Payment Card Industry Data Security Standard 4.0, requirement 10: log and monitor all access."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.reports.sox import AUDIT_LOG
from dotmac.platform.audit_trail.reports.spec import (
    PERIOD,
    SUBJECT,
    TIME,
    ChartSpec,
    SectionSpec,
    Spec,
    Unanswered,
    computed,
    listing,
    named,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dotmac.platform.audit_trail.reports.facts import Facts
    from dotmac.platform.audit_trail.reports.spec import Cell

__all__ = ["SPEC"]

_CARD = (
    "e.category IN ('data_access', 'data_change', 'data_export') AND (e.resource_type ~* '(card|cardholder|^pan$|payment_account|account_data)' "
    "OR e.metadata->>'data_category' ~* '(card|cardholder|^pan$|account_data)')"
)
_INVALID = "e.category IN ('authentication', 'authorization', 'data_access', 'data_change', 'data_export') AND e.outcome IN ('failure', 'denied')"
_CREDENTIALS = (
    "((e.resource_type IN ('user', 'account', 'role', 'credential', 'api_key', 'group') AND "
    f"{named('create', 'created', 'delete', 'deleted', 'disable', 'disabled', 'enable', 'enabled', 'update', 'updated', 'change', 'changed', 'terminate', 'terminated')}) OR "
    f"{named('password', 'credential', 'credentials', 'mfa', 'api_key', 'role', 'privilege', 'privileges', 'permission', 'permissions', 'grant', 'granted', 'revoke', 'revoked', 'sudo', 'elevate')}) "
    "AND e.category IN ('authentication', 'authorization', 'administration')"
)
_LOGGING = "e.action ~* '(^|[._:-])(audit|audit_log|log|logging|logger|auditd|syslog)[._:-](.*[._:-])?(start|started|stop|stopped|pause|paused|resume|resumed|init|initialized|enable|enabled|disable|disabled|rotate|rotated|clear|cleared)$'"
_OBJECTS = (
    "e.category IN ('system', 'system_task', 'configuration', 'administration') AND e.resource_type IS DISTINCT FROM 'user' AND "
    f"{named('create', 'created', 'delete', 'deleted', 'drop', 'dropped', 'install', 'installed', 'uninstall', 'uninstalled', 'provision', 'provisioned', 'destroy', 'destroyed')}"
)
# Requirement, name, what it is, its events.
_KINDS = (
    ("10.2.1.1", "cardholder_data_access", "Access to cardholder data", _CARD),
    ("10.2.1.2", "administrative_actions", "Administrative actions", "e.category = 'administration'"),
    ("10.2.1.3", "audit_log_access", "Access to audit logs", AUDIT_LOG),
    ("10.2.1.4", "invalid_access", "Invalid logical access attempts", _INVALID),
    ("10.2.1.5", "credential_changes", "Changes to identities and credentials", _CREDENTIALS),
    ("10.2.1.6", "log_control", "Starting, stopping and pausing of audit logs", _LOGGING),
    ("10.2.1.7", "system_objects", "Creation and deletion of system-level objects", _OBJECTS),
)
_NEEDED = {
    "10.2.1.1": "Log access with a resource_type such as 'card' or 'cardholder', or metadata.data_category that names card data.",
    "10.2.1.2": "Log all actions of persons with administrative access in the category ADMINISTRATION.",
    "10.2.1.3": "Log reading and exporting of the trail as audit.read, audit.export and the like.",
    "10.2.1.4": "Log refused and failed attempts with outcome DENIED or FAILURE.",
    "10.2.1.5": "Log password.change, mfa.reset, role.grant, user.create and the like in AUTHENTICATION, AUTHORIZATION or ADMINISTRATION.",
    "10.2.1.6": "Log audit.start, audit.stop, audit.pause and the like, from every component that keeps a log.",
    "10.2.1.7": "Log table.create, service.delete and the like in SYSTEM, CONFIGURATION or ADMINISTRATION.",
}
_FIELDS = {
    "user": "e.user_id IS NOT NULL",
    "type_of_event": "e.action <> ''",
    "date_and_time": "true",
    "success_or_failure": "e.outcome <> 'unknown'",
    "origin": "e.ip_address IS NOT NULL OR e.metadata ?| ARRAY['origin', 'source', 'host', 'terminal', 'device']",
    "affected_data": f"e.resource_id IS NOT NULL OR e.metadata ? 'data_category' OR {SUBJECT} IS NOT NULL",
    "component": "e.resource_type IS NOT NULL OR e.metadata ?| ARRAY['component', 'service', 'host', 'application']",
}
_PER_CENT = ", ".join(
    f"round(100.0 * count(*) FILTER (WHERE {one}) / nullif(count(*), 0), 1)::float8 AS {name}"
    for name, one in _FIELDS.items()
)
_COVERAGE = " UNION ALL ".join(
    f"SELECT '{number}' AS requirement, '{title}' AS event_type, count(*) AS events, {_PER_CENT} FROM audit_events e WHERE {PERIOD} AND ({where})"  # noqa: S608 (constants of ours)
    for number, _, title, where in _KINDS
)
_REVIEWS = f"""
    SELECT to_char(e.occurred_at AT TIME ZONE $zone, 'YYYY-MM-DD') AS day, count(*) AS reviews,
        string_agg(DISTINCT e.user_id, ', ') AS reviewers, string_agg(DISTINCT e.metadata->>'findings', '; ') AS findings
    FROM audit_events e
    WHERE {PERIOD} AND {named("review", "reviewed")} AND (e.action ~* '(audit|log)' OR e.resource_type ~* '(audit|log)')
    GROUP BY 1 ORDER BY 1
"""  # noqa: S608 (constants of ours)
_TIME_SYNC = f"e.category IN ('system', 'system_task', 'configuration', 'administration', 'security') AND {named('ntp', 'chrony', 'time', 'clock', 'timesync', 'time_sync')}"
_LOG_FAILURE = (
    "(e.action ~* '(^|[._:-])(audit|audit_log|log|logging|siem|ids|ips|firewall|antivirus|monitoring)[._:-]' AND "
    f"({named('fail', 'failed', 'failure', 'unavailable', 'full', 'lost', 'refused', 'late', 'outage', 'down')} OR e.outcome = 'failure'))"
)


def _review_days(records: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    if not records:
        return []
    by_day = {one["day"]: one for one in records}
    return [
        (day, by_day[day]["reviews"] if day in by_day else 0, by_day[day]["reviewers"] if day in by_day else None,
         by_day[day]["findings"] if day in by_day else None, "reviewed" if day in by_day else "no review logged")
        for day in facts.days()
    ]  # fmt: skip


def _integrity(_: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    known = facts.completeness
    return [
        ("10.3.1", "Read access limited to those with a need", "see the grants of the database's roles", "not in the log"),
        ("10.3.2", "Protected from modification", "UPDATE, DELETE and TRUNCATE are refused by triggers; tampering shows in the verification", "in force"),
        ("10.3.3", "Backed up to a place that is hard to alter", _checkpoints(known), "see the completeness block"),
        ("10.3.4", "Integrity mechanisms alert on change", known["verification"]["said"], known["verification"]["result"]),
    ]  # fmt: skip


def _checkpoints(known: dict[str, Any]) -> str:
    each = known["log"]["each"]
    signed = sum(1 for one in each if isinstance(one["checkpoint_after"], dict))
    if not each:
        return "no segment of the period is in a log"
    return f"signed checkpoints cover the period in {signed} of {len(each)} logs; anchors keep them outside the database"


def _retention(_: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    days, oldest = facts.retention_days, facts.completeness["oldest_event"]
    return [
        ("Twelve months kept", f"{days} days by the settings", "365 days", "met" if days >= 365 else "not met: raise AUDIT_TRAIL_RETENTION_DAYS"),  # noqa: PLR2004
        ("Oldest event at hand", oldest, "three months back, once the log is that old", "see the date"),
    ]  # fmt: skip


def _clock(_: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    known = facts.completeness
    return [
        ("events in the period", known["events"]),
        ("events that a process dated later than the database recorded them, by more than 5 s", known["recorded_before_they_happened"]),
        ("events recorded more than one hour after they happened", known["recorded_late"]),
        ("largest lead of a process's clock over the database's, seconds", known["largest_clock_lead_seconds"]),
    ] if known["events"] else []  # fmt: skip


SPEC = Spec(
    "pci_dss",
    "PCI DSS 4.0, requirement 10",
    (
        SectionSpec(
            name="field_coverage",
            title="Field coverage per event type, per cent of the events",
            control="10.2.2",
            columns=("requirement", "event_type", "events", *_FIELDS),
            sql=_COVERAGE,
            empty="There are no event types.",
            needed="An event type without events has no percentages: see its own section for how to log it.",
            about="origin: ip_address, or origin, source, host, terminal or device in metadata; affected data: resource_id, a data category or a subject; component: resource_type, or component, service, host or application in metadata.",
        ),
        *(
            listing(name, title, number, where, "time user category action outcome address resource_type resource_id tenant event",
                    f"No event of this kind ({title.lower()}) was logged in the period.", needed=_NEEDED[number])
            for number, name, title, where in _KINDS
        ),
        computed("log_integrity", "Protection of the audit log", "10.3.1 to 10.3.4", "requirement what found verdict", _integrity, "Nothing is known."),
        computed("log_reviews", "Evidence of review, day by day", "10.4.1, 10.4.2", "day reviews reviewers findings verdict", _review_days,
                 "No review of the log was logged on any day of the period.", sql=_REVIEWS,
                 needed="Log reviews as action 'audit.review' with findings in metadata; 10.4.1 asks for one every day."),
        computed("retention", "Retention of twelve months, three at hand", "10.5.1", "what found required verdict", _retention, "Nothing is known."),
        computed("clocks", "What the log shows of clocks", "10.6.1 to 10.6.3", "what value", _clock, "No event was logged in the period, so nothing shows of clocks.",
                 about="Each event has the time of the process that logged it and that of the database."),
        listing("time_changes", "Changes of time settings and synchronisation", "10.6.2, 10.6.3", _TIME_SYNC, "time user action outcome address resource_type resource_id event",
                "No change of time settings and no synchronisation was logged in the period.",
                needed="Log clock.change and time_sync.failed from the hosts (`dotmac audit import` reads logs in)."),
        listing("logging_failures", "Failures of logging and of critical security controls", "10.7.1 to 10.7.3", _LOG_FAILURE,
                "time user action level outcome address resource_type resource_id duration cause measures",
                "No failure of logging or of a security control was logged in the period.",
                needed="Log logging.failed, firewall.down and the like with duration, cause and measures in metadata."),
        SectionSpec(
            name="silences",
            title="The longest silences of the log",
            control="10.7.1",
            columns=("from", "until", "seconds"),
            sql=f"""
                SELECT began AS "from", {TIME.replace("e.", "g.")} AS until, extract(epoch FROM gap)::float8 AS seconds FROM (
                    SELECT e.occurred_at, lag({TIME}) OVER w AS began, e.occurred_at - lag(e.occurred_at) OVER w AS gap
                    FROM audit_events e WHERE {PERIOD} WINDOW w AS (ORDER BY e.occurred_at, e.id)) AS g
                WHERE gap IS NOT NULL ORDER BY gap DESC, occurred_at LIMIT 10
            """,  # noqa: S608 (constants of ours)
            empty="There are fewer than two events in the period, so no silence lies between any.",
            about="A silence is no proof of a failure, nor is its absence a proof of none.",
        ),
    ),
    (
        Unanswered("10.2.1", "Events of system components that do not log here", "The log has what was sent to it.", "An inventory of in-scope components, to set beside those that logged."),
        Unanswered("10.3.1, 10.3.2", "Who may read the log, and file permissions", "Rights are held by the database and the operating system.", "The grants of the database (`\\dp audit_*`) and of its host."),
        Unanswered("10.4.1.1", "Automated reviews", "A tool that reads the log does not necessarily log that it did.", "The tool's own record; or let it log audit.review."),
        Unanswered("10.6.1", "That clocks are synchronised with an industry-accepted source", "The log shows differences, not sources.", "The configuration of NTP or PTP on each component."),
    ),
    (ChartSpec("field_coverage", "Events by requirement", "event_type"),),
)  # fmt: skip
