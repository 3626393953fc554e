"""SOC 2: the trust services criteria (AICPA TSP 100, 2017, points of focus of 2022) that a log has evidence for."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.reports.facts import moment_of
from dotmac.platform.audit_trail.reports.sox import ACCESS, CHANGE, UNAPPROVED
from dotmac.platform.audit_trail.reports.spec import (
    ANOMALY,
    PERIOD,
    TIME,
    ChartSpec,
    Spec,
    Unanswered,
    computed,
    counted,
    listing,
    named,
    sample,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dotmac.platform.audit_trail.reports.facts import Facts
    from dotmac.platform.audit_trail.reports.spec import Cell

__all__ = ["SPEC"]

_LOGICAL = "e.category IN ('authentication', 'authorization', 'data_access', 'data_change', 'data_export')"
_PRIVATE = "'{10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,127.0.0.0/8,169.254.0.0/16,100.64.0.0/10,::1,fc00::/7,fe80::/10}'::inet[]"
_OUTSIDE = f"e.ip_address IS NOT NULL AND NOT (e.ip_address <<= ANY ({_PRIVATE}))"
_BOUNDARY = f"{named('firewall', 'waf', 'blocked', 'block', 'vpn', 'gateway', 'intrusion', 'ids', 'ips', 'rate_limit', 'throttled')}"
_INCIDENT = f"(e.metadata ? 'incident_id' OR {named('incident')})"
_INCIDENTS = f"""
    SELECT coalesce(e.metadata->>'incident_id', e.correlation_id, e.id::text) AS incident, min({TIME}) AS opened,
        min({TIME}) FILTER (WHERE {named("evaluated", "triage", "triaged", "acknowledge", "acknowledged", "classified")}) AS evaluated,
        min({TIME}) FILTER (WHERE {named("contain", "contained", "mitigated", "responded", "response")}) AS contained,
        max({TIME}) FILTER (WHERE {named("close", "closed", "resolve", "resolved", "recovered")}) AS closed,
        max(CASE e.level WHEN 'critical' THEN '5 critical' WHEN 'error' THEN '4 error' WHEN 'warning' THEN '3 warning' WHEN 'info' THEN '2 info' ELSE '1 debug' END) AS gravest,
        count(*) AS events, string_agg(DISTINCT e.metadata->>'owner', '; ') AS owner, string_agg(DISTINCT e.metadata->>'measures', '; ') AS measures
    FROM audit_events e WHERE {PERIOD} AND {_INCIDENT} GROUP BY 1 ORDER BY 2, 1
"""  # noqa: S608 (constants of ours)
_CHANGE_COLUMNS = (
    "time user tenant action change_id author approver deployer environment resource_type resource_id outcome"
)
_CHANGE_NEEDED = "Log change.deploy and the like, or the category CONFIGURATION; change_id, author, approver, deployer and environment are keys of metadata."


def _incidents(records: Sequence[dict[str, Any]], _: Facts) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for one in records:
        opened, closed = moment_of(one["opened"]), moment_of(one["closed"])
        hours = (
            None if opened is None or closed is None else round((closed - opened).total_seconds() / 3600, 2)
        )
        rows.append(
            (one["incident"], one["opened"], one["evaluated"], one["contained"], one["closed"], hours,
             "closed" if closed else "open in the log", one["gravest"][2:], one["events"], one["owner"], one["measures"])
        )  # fmt: skip
    return rows


def _criteria(_: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    made = facts.sections
    rows: list[tuple[Cell, ...]] = [
        (one.control, one.title, one.total, "evidence in the log" if one.total else "no evidence in the log")
        for one in made.values()
    ]
    return rows


SPEC = Spec(
    "soc2",
    "SOC 2, trust services criteria",
    (
        counted("logical_access", "Logical access by category and outcome", "CC6.1", _LOGICAL, {"category": "e.category", "outcome": "e.outcome"},
                "No logical access was logged in the period.", needed="Log log-ons, decisions and data access in their categories."),
        listing("denied_access", "Failed and refused access", "CC6.1", f"{_LOGICAL} AND e.outcome IN ('failure', 'denied')",
                "time user tenant address category action resource_type resource_id outcome anomaly_score", "No failed or refused access was logged in the period.",
                needed="Log refusals with outcome DENIED or FAILURE."),
        listing("registration", "Registration and authorisation of users", "CC6.2",
                f"e.category IN ('authorization', 'administration', 'authentication') AND {named('register', 'registered', 'create', 'created', 'invite', 'invited', 'enroll', 'enrolled', 'activate', 'activated', 'disable', 'disabled', 'terminate', 'terminated', 'deactivate', 'deactivated')}",
                "time granted_by tenant action target_user outcome requester approver ticket", "No registration or removal of a user was logged in the period.",
                needed="Log user.create, user.disable and the like; requester, approver and ticket are keys of metadata."),
        listing("access_changes", "Roles and rights given, changed and removed", "CC6.3", ACCESS,
                "time granted_by tenant action target_user role resource_type resource_id outcome requester approver ticket",
                "No change of access was logged in the period.", needed="Log role.grant, role.revoke and the like; target_user, role, requester, approver and ticket are keys of metadata."),
        counted("outside_access", "Access from public addresses, by network", "CC6.6", _OUTSIDE,
                {"network": "(CASE family(e.ip_address) WHEN 4 THEN set_masklen(e.ip_address, 24) ELSE set_masklen(e.ip_address, 48) END)::cidr::text",
                 "category": "e.category", "outcome": "e.outcome"},
                "No event came from a public address in the period.", needed="Log the address of the client (ip_address), not of a proxy."),
        listing("boundary", "Events of boundary protection", "CC6.6", _BOUNDARY, "time address action level outcome resource_type resource_id rule",
                "No event of boundary protection was logged in the period.", needed="Log firewall.blocked, vpn.connect and the like, or import the logs of these systems."),
        listing("anomalies", "Anomalies found by monitoring", "CC7.2", ANOMALY, "time user tenant address category action outcome anomaly_score anomaly_reason",
                "No event of the period has an anomaly score at or over the threshold.", needed="Keep anomaly_detection on; the threshold is among the parameters."),
        listing("security_events", "Security events", "CC7.2", "e.category = 'security'", "time user tenant address action level outcome resource_type resource_id",
                "No security event was logged in the period.", needed="Log them in the category SECURITY."),
        computed("incidents", "Incidents: evaluated, contained, closed", "CC7.3, CC7.4", "incident opened evaluated contained closed hours state gravest_level events owner measures",
                 _incidents, "No incident was logged in the period.", sql=_INCIDENTS,
                 needed="Log incident.opened, incident.evaluated, incident.contained and incident.closed with one incident_id; owner and measures are keys of metadata."),
        listing("incident_events", "Events of incidents", "CC7.3, CC7.4", _INCIDENT, "time user action level outcome incident_id resource_type resource_id measures",
                "No event names an incident (metadata.incident_id)."),
        listing("changes", "Changes: population", "CC8.1", CHANGE, _CHANGE_COLUMNS, "No change was logged in the period.", needed=_CHANGE_NEEDED),
        listing("changes_unapproved", "Exceptions: changes without an approver, or approved by their author", "CC8.1", UNAPPROVED, _CHANGE_COLUMNS,
                "Every logged change names an approver other than its author.", needed=_CHANGE_NEEDED),
        sample("changes_sample", "changes", "CC8.1", CHANGE, f"{_CHANGE_COLUMNS} event"),
        listing("availability", "Backups, restores, outages and failed jobs", "A1.2",
                f"{named('backup', 'restore', 'failover', 'outage', 'recovery', 'down', 'unavailable')} OR (e.category IN ('system', 'system_task') AND e.outcome = 'failure')",
                "time user action level outcome resource_type resource_id duration", "No backup, restore, outage or failed job was logged in the period.",
                needed="Log backup.run, restore.test, service.down and the like with duration in metadata."),
        computed("criteria", "Evidence by criterion", "CC6, CC7, CC8, A1", "criterion section rows evidence", _criteria, "There are no sections."),
    ),
    (
        Unanswered("CC6.4", "Physical access", "Doors do not log here.", "The access control system's log."),
        Unanswered("CC6.7, CC6.8", "Encryption in transit and protection against malware", "They are settings and products, not events of applications.", "Configuration of the endpoints and their protection."),
        Unanswered("CC7.1", "Detection of vulnerabilities", "Scans do not log here.", "Reports of the scanner."),
        Unanswered("A1.1, A1.3", "Capacity, and tests of recovery plans", "The log has what happened, not what is planned.", "Capacity reports, and the minutes of recovery tests; log restore.test to have it here."),
    ),
    (ChartSpec("criteria", "Rows of evidence by section", "section", "rows"), ChartSpec("outside_access", "Events by public network", "network")),
)  # fmt: skip
