"""General Data Protection Regulation, articles 15, 17, 30, 32 and 33."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.reports.facts import moment_of, told
from dotmac.platform.audit_trail.reports.spec import (
    ANOMALY,
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

_DATA = "e.category IN ('data_access', 'data_change', 'data_export', 'privacy')"
_THIS = f"($subject IS NULL OR {SUBJECT} = $subject)"
_PURPOSE = "coalesce(e.metadata->>'purpose', '(not said)')"
_DATA_CATEGORY = "coalesce(e.metadata->>'data_category', '(not said)')"
_SAID = "purpose, data_category, recipient, source and retention are keys of metadata."
_OBSERVED = f"""
    SELECT {_PURPOSE} AS purpose, {_DATA_CATEGORY} AS data_category, coalesce(e.metadata->>'recipient', '(none)') AS recipient,
        e.category, count(*) AS events
    FROM audit_events e WHERE {PERIOD} AND {_DATA} GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
"""  # noqa: S608 (constants of ours)
_SUBJECTS = f"""
    SELECT {SUBJECT} AS subject, e.action, {_DATA_CATEGORY} AS data_category, {_PURPOSE} AS purpose,
        coalesce(e.metadata->>'recipient', e.metadata->>'source', '(none)') AS recipient_or_source,
        count(*) AS events, count(DISTINCT e.user_id) AS persons, min({TIME}) AS first, max({TIME}) AS last
    FROM audit_events e WHERE {PERIOD} AND {_DATA} AND {SUBJECT} IS NOT NULL AND {_THIS}
    GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
"""  # noqa: S608 (constants of ours)
_ACCESS_OF_ONE = f"""
    SELECT {TIME} AS time, e.category, e.action, {_DATA_CATEGORY} AS data_category, {_PURPOSE} AS purpose,
        e.user_id AS who, e.metadata->>'recipient' AS recipient, e.metadata->>'source' AS source,
        e.metadata->>'retention' AS retention, {named("automated_decision", "profiling", "auto_decision")} AS automated, e.outcome, e.id::text AS event
    FROM audit_events e WHERE {PERIOD} AND {_DATA} AND $subject IS NOT NULL AND {SUBJECT} = $subject
    ORDER BY e.occurred_at, e.id
"""  # noqa: S608 (constants of ours)
_BREACH = named("breach", "data_breach", "leak")
_BREACH_ID = "coalesce(e.metadata->>'breach_id', e.correlation_id, e.id::text)"
_NOTIFIED = named("notify", "notified", "notification", "reported")
_BREACHES = f"""
    SELECT {_BREACH_ID} AS breach, min({TIME}) AS first_logged,
        min(e.metadata->>'aware_at') AS aware_at, min(e.metadata->>'notified_at') AS notified_at,
        min({TIME}) FILTER (WHERE {_NOTIFIED}) AS notified_logged,
        coalesce(string_agg(DISTINCT e.metadata->>'nature', '; '), string_agg(DISTINCT e.action, '; ')) AS nature,
        string_agg(DISTINCT e.metadata->>'subject_category', '; ') AS subject_categories,
        string_agg(DISTINCT e.metadata->>'data_category', '; ') AS data_categories,
        string_agg(DISTINCT e.metadata->>'contact', '; ') AS contact,
        string_agg(DISTINCT e.metadata->>'consequences', '; ') AS consequences,
        string_agg(DISTINCT e.metadata->>'measures', '; ') AS measures,
        string_agg(DISTINCT coalesce(e.metadata->>'reason_for_delay', e.metadata->>'justification'), '; ') AS reason_for_delay
    FROM audit_events e WHERE {PERIOD} AND {_BREACH} GROUP BY 1 ORDER BY 2, 1
"""  # noqa: S608 (constants of ours)
_EXTENT = f"""
    SELECT {_BREACH_ID} AS breach,
        CASE WHEN grouping(e.metadata->>'data_category') = 1 THEN '(all)' ELSE coalesce(e.metadata->>'data_category', '(not said)') END AS data_category,
        count(DISTINCT named.subject) AS subjects,
        count(DISTINCT (e.resource_type, e.resource_id)) FILTER (WHERE e.resource_id IS NOT NULL) AS records,
        count(DISTINCT e.id) AS events
    FROM audit_events e LEFT JOIN LATERAL (
        SELECT {SUBJECT} AS subject UNION ALL SELECT jsonb_array_elements_text(
            CASE WHEN jsonb_typeof(e.metadata->'subject_ids') = 'array' THEN e.metadata->'subject_ids' ELSE '[]' END)) named ON true
    WHERE {PERIOD} AND {_BREACH}
    GROUP BY GROUPING SETS ((1), (1, e.metadata->>'data_category')) ORDER BY 1, grouping(e.metadata->>'data_category') DESC, 2
"""  # noqa: S608 (constants of ours)
_CLOCK = timedelta(hours=72)


def _records(_: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    observed = facts.sections["processing_observed"]
    rows: list[tuple[Cell, ...]] = []
    for one in facts.records or ():
        seen = [row for row in observed.rows if one.matches(str(row[0]))]
        recipients = sorted({str(row[2]) for row in seen} - {"(none)"})
        categories = sorted({str(row[1]) for row in seen} - {"(not said)"})
        known = {text.casefold() for text in (*one.recipients, *one.data_categories)}
        strangers = [text for text in (*categories, *recipients) if text.casefold() not in known]
        rows.append(
            (one.name, one.controller, one.officer or None, "; ".join(one.purposes), "; ".join(one.subject_categories) or None,
             "; ".join(one.data_categories) or None, "; ".join(one.recipients) or None, "; ".join(one.transfers) or None,
             "; ".join(one.safeguards) or None, one.time_limits or None, "; ".join(one.security_measures) or None,
             sum(int(row[4] or 0) for row in seen), "; ".join(strangers) or None)
        )  # fmt: skip
    return rows


def _unregistered(_: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    if facts.records is None:
        return []
    rows = facts.sections["processing_observed"].rows
    return [row for row in rows if not any(one.matches(str(row[0])) for one in facts.records)]


def _access_of_one(records: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    """Other persons by number, in the order in which they first appear."""
    others: dict[str, int] = {}
    rows: list[tuple[Cell, ...]] = []
    for one in records:
        who = one["who"]
        if who is None:
            masked = "(no person)"
        elif who == facts.subject:
            masked = "the person concerned"
        else:
            masked = f"person {others.setdefault(who, len(others) + 1)}"
        limits = next(
            (known.time_limits for known in facts.records or () if known.matches(one["purpose"])), ""
        )
        rows.append(
            (one["time"], one["category"], one["action"], one["data_category"], one["purpose"], masked, one["recipient"],
             one["source"], one["retention"] or limits or None, "yes" if one["automated"] else "no", one["outcome"], one["event"])
        )  # fmt: skip
    return rows


def _breaches(records: Sequence[dict[str, Any]], facts: Facts) -> list[tuple[Cell, ...]]:
    contacts = sorted({one.contact or one.officer for one in facts.records or ()} - {""})
    rows: list[tuple[Cell, ...]] = []
    for one in records:
        aware = moment_of(one["aware_at"]) or moment_of(one["first_logged"])
        notified = moment_of(one["notified_at"]) or moment_of(one["notified_logged"])
        hours = (
            None if aware is None or notified is None else round((notified - aware).total_seconds() / 3600, 2)
        )
        if hours is None:
            clock = "no notification logged"
        elif hours * 3600 <= _CLOCK.total_seconds():
            clock = "within 72 hours"
        else:
            clock = "late" if one["reason_for_delay"] else "late, without a reason"
        rows.append(
            (one["breach"], told(aware), told(aware + _CLOCK) if aware else None, told(notified), hours, clock, one["nature"],
             one["subject_categories"], one["data_categories"], one["contact"] or "; ".join(contacts) or None, one["consequences"],
             one["measures"], one["reason_for_delay"])
        )  # fmt: skip
    return rows


SPEC = Spec(
    "gdpr",
    "Regulation (EU) 2016/679 (GDPR)",
    (
        SectionSpec(
            name="processing_observed",
            title="Processing that the log observed",
            control="Art. 30(1)(b)-(d)",
            columns=("purpose", "data_category", "recipient", "category", "events"),
            sql=_OBSERVED,
            empty="No processing of data was logged in the period.",
            needed=f"Log access to personal data in the categories DATA_ACCESS, DATA_CHANGE, DATA_EXPORT; {_SAID}",
        ),
        computed("records_of_processing", "Record of processing activities, with what the log observed beside it", "Art. 30(1)(a)-(g)",
                 "activity controller officer purposes subject_categories data_categories recipients transfers safeguards time_limits security_measures observed_events observed_but_not_recorded",
                 _records, "No record of processing activities was given, so (a), (e), (f) and (g) can't be shown.",
                 needed="Give processing_records: ProcessingRecord objects, or a .json, .toml or .csv file.",
                 about="From the record that was given; an activity's events are those whose purpose it names. The last column has data categories and recipients that the log saw and the record lacks."),
        computed("processing_not_recorded", "Exceptions: processing observed for a purpose that no record names", "Art. 30(1)(b)",
                 "purpose data_category recipient category events", _unregistered,
                 "No observed processing stands outside the record of processing activities, or no record was given to compare with.",
                 needed="Give processing_records to compare with."),
        SectionSpec(
            name="access_by_subject",
            title="Access to each person's data; other persons are counted, not named",
            control="Art. 15(1)",
            columns=("subject", "action", "data_category", "purpose", "recipient_or_source", "events", "persons", "first", "last"),
            sql=_SUBJECTS,
            empty="No event of the period names a subject (metadata.subject_id, or a resource of type person, user, customer or patient).",
            needed=f"Name the subject: subject_id, or the resource; {_SAID}",
        ),
        computed("subject_access", "Who accessed or received the data of the person asked about", "Art. 15(1)(a)-(d), (g), (h)",
                 "time category action data_category purpose by_whom recipient source retention automated outcome event", _access_of_one,
                 "No person was asked about, or the log has no event about that person in the period.", sql=_ACCESS_OF_ONE,
                 needed=f"Give subject_id for the answer to one person; {_SAID}",
                 about="Other persons are masked: they have numbers in the order in which they appear. Retention is the event's, else the record's time limit for its purpose."),
        listing("automated_decisions", "Automated decisions", "Art. 15(1)(h), Art. 22",
                f"{named('automated_decision', 'profiling', 'auto_decision')} AND {_THIS}",
                "time tenant action subject purpose logic outcome justification", "No automated decision was logged in the period.",
                needed="Log them as *.automated_decision with subject_id, purpose and logic in metadata."),
        listing("erasures", "Erasures and refusals of erasure", "Art. 17",
                f"e.category = 'privacy' AND {named('erase', 'erased', 'erasure', 'delete', 'deleted', 'forget', 'shred')} AND {_THIS}",
                "time user tenant action subject scope key_id key_destroyed_at outcome legal_hold justification event",
                "No erasure was logged in the period.",
                needed="`erase_subject` logs them. For erasures elsewhere: category PRIVACY, action *.erasure, with subject_id, scope, key_destroyed_at, and legal_hold where one forbade it."),
        listing("security_events", "Security events and anomalies", "Art. 32(1)(b), (d)", f"e.category = 'security' OR {ANOMALY}",
                "time user tenant address category action level outcome anomaly_score anomaly_reason",
                "No security event and no anomaly was logged in the period.", needed="Log them in the category SECURITY."),
        computed("breaches", "Personal data breaches and the 72-hour clock", "Art. 33(1), (3)",
                 "breach aware_at notify_by notified_at hours clock nature subject_categories data_categories contact consequences measures reason_for_delay",
                 _breaches, "No breach was logged in the period.", sql=_BREACHES,
                 needed="Log breach.detected and breach.notified with one breach_id (or correlation_id); aware_at, notified_at, nature, subject_category, data_category, contact, consequences, measures and reason_for_delay are keys of metadata.",
                 about="The clock starts at aware_at, where no event says it at the first event of the breach."),
        SectionSpec(
            name="breach_extent",
            title="Subjects and records concerned, each counted once, exactly",
            control="Art. 33(3)(a)",
            columns=("breach", "data_category", "subjects", "records", "events"),
            sql=_EXTENT,
            empty="No breach was logged in the period, so nobody is counted.",
            needed="Name each subject: subject_id, or subject_ids (a list); records are counted by resource_type and resource_id.",
            about="A subject in several data categories is one in the row (all).",
        ),
    ),
    (
        Unanswered("Art. 30(1)(a), (e), (f), (g)", "Controller, officer, transfers, time limits and security measures", "They are decisions, not events.",
                   "The record of processing activities, given as processing_records."),
        Unanswered("Art. 15(3)", "The copy of the personal data themselves", "The log says who had them, not what they are.",
                   "An export from the systems that hold them; for what the log itself holds, the trail's subject access export."),
        Unanswered("Art. 33(3)(a)", "Subjects whose data were exposed without an event that names them", "Only subjects that events of the breach name are counted.",
                   "An analysis of what was within reach of the attacker."),
        Unanswered("Art. 34", "Communication to the persons concerned", "It goes by mail and letter, which do not log here.",
                   "The mailing's own record; log breach.communicated to have it beside the breach."),
    ),
    (ChartSpec("processing_observed", "Processing by purpose", "purpose"), ChartSpec("processing_observed", "Processing by data category", "data_category")),
)  # fmt: skip
