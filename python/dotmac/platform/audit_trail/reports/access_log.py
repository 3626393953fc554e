"""Who did what to which resource, from where, and how it ended."""

from __future__ import annotations

from dotmac.platform.audit_trail.reports.spec import PERIOD, TIME, SectionSpec, Spec, counted, listing

__all__ = ["SPEC"]

_ACCESS = (
    "e.category IN ('authentication', 'authorization', 'data_access', 'data_change', 'data_export', "
    "'administration')"
)
_NOTHING = "No access was logged in the period."


def _first_seen(name: str, what: str, column: str, shown: str) -> SectionSpec:
    sql = f"""
        SELECT {shown} AS {name}, min({TIME}) AS first_seen, count(*) AS events FROM audit_events e
        WHERE {PERIOD} AND {column} IS NOT NULL AND NOT EXISTS (
            SELECT FROM audit_events before WHERE before.occurred_at < $1
            AND before.{column.removeprefix("e.")} = {column} AND ($3::text IS NULL OR before.tenant_id = $3))
        GROUP BY {column} ORDER BY 2, 1
    """  # noqa: S608 (constants of ours)
    return SectionSpec(
        f"first_seen_{name}",
        f"{what} seen for the first time",
        "ISO 27001 A.8.15",
        (name, "first_seen", "events"),
        sql,
        f"No {what.lower()} appeared that had not been in the log before the period.",
    )


SPEC = Spec(
    "access_log",
    "Access log",
    (
        listing(
            "events",
            "Every access",
            "ISO 27001 A.8.15",
            _ACCESS,
            "time user tenant address user_agent action resource_type resource_id outcome method session_id "
            "trace_id anomaly_score anomaly_reason",
            _NOTHING,
        ),
        counted(
            "by_user",
            "Accesses by user and outcome",
            "ISO 27001 A.8.15",
            _ACCESS,
            {'"user"': "coalesce(e.user_id, '(none)')", "outcome": "e.outcome"},
            _NOTHING,
        ),
        counted(
            "by_hour",
            "Accesses by hour and outcome",
            "ISO 27001 A.8.15",
            _ACCESS,
            {
                "hour": "to_char(date_trunc('hour', e.occurred_at AT TIME ZONE $4), 'YYYY-MM-DD HH24:00')",
                "outcome": "e.outcome",
            },
            _NOTHING,
        ),
        counted(
            "by_outcome",
            "Accesses by outcome",
            "ISO 27001 A.8.15",
            _ACCESS,
            {"outcome": "e.outcome"},
            _NOTHING,
        ),
        _first_seen("user", "Users", "e.user_id", "e.user_id"),
        _first_seen("address", "Addresses", "e.ip_address", "host(e.ip_address)"),
    ),
    ("Accesses that the application did not log are not in the log, so not in this report.",),
)
