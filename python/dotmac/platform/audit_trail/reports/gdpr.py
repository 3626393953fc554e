"""General Data Protection Regulation, articles 15, 17, 30, 32 and 33."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from dotmac.platform.audit_trail.reports.spec import (
    ANOMALY,
    PERIOD,
    SUBJECT,
    TIME,
    SectionSpec,
    Spec,
    counted,
    listing,
    named,
)

__all__ = ["SPEC"]

_DATA = "e.category IN ('data_access', 'data_change', 'data_export', 'privacy')"
_SUBJECTS = f"""
    SELECT {SUBJECT} AS subject, e.action, coalesce(e.metadata->>'data_category', '(not said)') AS data_category,
        coalesce(e.metadata->>'purpose', '(not said)') AS purpose,
        coalesce(e.metadata->>'recipient', e.metadata->>'source', '(none)') AS recipient_or_source,
        count(*) AS events, count(DISTINCT e.user_id) AS persons, min({TIME}) AS first, max({TIME}) AS last
    FROM audit_events e WHERE {PERIOD} AND {_DATA} AND {SUBJECT} IS NOT NULL
    GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
"""  # noqa: S608 (constants of ours)
_BREACH = named("breach", "data_breach", "leak")
_BREACHES = f"""
    SELECT {TIME} AS aware_at,
        to_char((e.occurred_at + interval '72 hours') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS notify_by,
        e.metadata->>'notified_at' AS notified_at, e.action AS nature, e.metadata->>'data_category' AS data_category,
        e.metadata->>'consequences' AS consequences, e.metadata->>'measures' AS measures,
        e.metadata->>'justification' AS reason_for_delay, e.correlation_id
    FROM audit_events e WHERE {PERIOD} AND {_BREACH} ORDER BY e.occurred_at, e.id
"""  # noqa: S608 (constants of ours)
_BREACH_SUBJECTS = f"""
    SELECT e.correlation_id, count(DISTINCT {SUBJECT}) AS subjects,
        count(DISTINCT (e.resource_type, e.resource_id)) FILTER (WHERE e.resource_id IS NOT NULL) AS records
    FROM audit_events e WHERE {PERIOD} AND {_BREACH} GROUP BY 1 ORDER BY 1
"""  # noqa: S608 (constants of ours)

SPEC = Spec(
    "gdpr",
    "Regulation (EU) 2016/679 (GDPR)",
    (
        counted(
            "processing_observed",
            "Processing that the log observed, to set beside the record of processing",
            "Art. 30(1)(b)-(d)",
            _DATA,
            {
                "purpose": "coalesce(e.metadata->>'purpose', '(not said)')",
                "data_category": "coalesce(e.metadata->>'data_category', '(not said)')",
                "recipient": "coalesce(e.metadata->>'recipient', '(none)')",
                "category": "e.category",
            },
            "No processing of data was logged in the period.",
        ),
        SectionSpec(
            "access_by_subject",
            "Access to each person's data; other persons are counted, not named",
            "Art. 15(1)",
            (
                "subject",
                "action",
                "data_category",
                "purpose",
                "recipient_or_source",
                "events",
                "persons",
                "first",
                "last",
            ),
            _SUBJECTS,
            "No event of the period names a subject (metadata.subject_id, or a resource of type person, user, "
            "customer or patient).",
        ),
        listing(
            "automated_decisions",
            "Automated decisions",
            "Art. 15(1)(h), Art. 22",
            named("automated_decision", "profiling", "auto_decision"),
            "time tenant action subject_id purpose outcome justification",
            "No automated decision was logged in the period.",
        ),
        listing(
            "erasures",
            "Erasures and refusals of erasure",
            "Art. 17",
            f"e.category = 'privacy' AND {named('erase', 'erased', 'erasure', 'delete', 'deleted', 'forget')}",
            "time user tenant action subject_id scope outcome justification",
            "No erasure was logged in the period.",
        ),
        listing(
            "security_events",
            "Security events and anomalies",
            "Art. 32(1)(b), (d)",
            f"e.category = 'security' OR {ANOMALY}",
            "time user tenant address category action level outcome anomaly_score anomaly_reason",
            "No security event and no anomaly was logged in the period.",
        ),
        SectionSpec(
            "breaches",
            "Personal data breaches and the 72-hour clock",
            "Art. 33(1), (3)",
            (
                "aware_at",
                "notify_by",
                "notified_at",
                "nature",
                "data_category",
                "consequences",
                "measures",
                "reason_for_delay",
                "correlation_id",
            ),
            _BREACHES,
            "No breach was logged in the period.",
        ),
        SectionSpec(
            "breach_extent",
            "Subjects and records concerned, each counted once",
            "Art. 33(3)(a)",
            ("correlation_id", "subjects", "records"),
            _BREACH_SUBJECTS,
            "No breach was logged in the period, so nobody is counted.",
        ),
    ),
    (
        (
            "Art. 30(1)(a), (e), (f), (g): controller, officer, transfers, time limits and measures stand in the record "
            "of processing, not in the log."
        ),
        "Art. 33(3)(b): the contact point is not in the log.",
        (
            "Personal data that the log itself holds are shown as they were logged; this version keeps no keys per "
            "subject."
        ),
    ),
)
