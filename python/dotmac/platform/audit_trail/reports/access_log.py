"""Who did what to which resource, from where, and how it ended."""

from __future__ import annotations

from dotmac.platform.audit_trail.reports.spec import (
    PERIOD,
    TIME,
    ChartSpec,
    SectionSpec,
    Spec,
    Unanswered,
    counted,
    listing,
)

__all__ = ["SPEC"]

_CONTROL = "ISO/IEC 27001:2022 A.8.15"
_ACCESS = (
    "e.category IN ('authentication', 'authorization', 'data_access', 'data_change', 'data_export', "
    "'administration')"
)
_NOTHING = "No access was logged in the period."
_NEEDED = (
    "Log accesses with user_id, ip_address, resource_type and resource_id; method, session_id and user_agent "
    "are keys of metadata."
)


def _first_seen(name: str, what: str, shown: dict[str, str], keys: tuple[str, ...]) -> SectionSpec:
    told = ", ".join(f'{one} AS "{column}"' for column, one in shown.items())
    same = " AND ".join(f"before.{key} = e.{key}" for key in keys)
    there = " AND ".join(f"e.{key} IS NOT NULL" for key in keys)
    groups = ", ".join(f"e.{key}" for key in keys)
    places = ", ".join(str(place) for place in range(1, len(shown) + 1))
    sql = f"""
        SELECT {told}, min({TIME}) AS first_seen, count(*) AS events FROM audit_events e
        WHERE {PERIOD} AND {there} AND NOT EXISTS (
            SELECT FROM audit_events before WHERE before.occurred_at < $start
            AND {same} AND ($tenant IS NULL OR before.tenant_id = $tenant))
        GROUP BY {groups} ORDER BY first_seen, {places}
    """  # noqa: S608 (constants of ours)
    return SectionSpec(
        name=f"first_seen_{name}",
        title=f"{what} seen for the first time",
        control=_CONTROL,
        columns=(*shown, "first_seen", "events"),
        sql=sql,
        empty=f"No {what.lower()} appeared that had not been in the log before the period.",
        about="First seen by this log: what older events said that retention has removed is not known.",
    )


_USER, _ADDRESS = {"user": "e.user_id"}, {"address": "host(e.ip_address)"}

SPEC = Spec(
    "access_log",
    "Access log",
    (
        listing(
            "events",
            "Every access",
            _CONTROL,
            _ACCESS,
            "time user tenant address user_agent action resource_type resource_id outcome method session_id "
            "trace_id anomaly_score anomaly_reason",
            _NOTHING,
            needed=_NEEDED,
        ),
        counted(
            "by_user",
            "Accesses by user and outcome",
            _CONTROL,
            _ACCESS,
            {"user": "coalesce(e.user_id, '(none)')", "outcome": "e.outcome"},
            _NOTHING,
        ),
        counted(
            "by_hour",
            "Accesses by hour and outcome",
            _CONTROL,
            _ACCESS,
            {
                "hour": "to_char(date_trunc('hour', e.occurred_at AT TIME ZONE $zone), 'YYYY-MM-DD HH24:00')",
                "outcome": "e.outcome",
            },
            _NOTHING,
        ),
        counted("by_outcome", "Accesses by outcome", _CONTROL, _ACCESS, {"outcome": "e.outcome"}, _NOTHING),
        _first_seen("user", "Users", _USER, ("user_id",)),
        _first_seen("address", "Addresses", _ADDRESS, ("ip_address",)),
        _first_seen(
            "user_at_address", "Users at addresses", {**_USER, **_ADDRESS}, ("user_id", "ip_address")
        ),
    ),
    (
        Unanswered(
            _CONTROL,
            "Accesses outside of the applications that log here",
            "An access that no application logged is not in the log.",
            "Logs of operating systems, databases and networks; `dotmac audit import` reads some of them in.",
        ),
    ),
    (ChartSpec("by_user", "Accesses by user", "user"),),
)
