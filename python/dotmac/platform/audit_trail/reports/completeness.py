"""The completeness block: what the report covers, and what can be said of its being whole."""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.reports import sequence
from dotmac.platform.audit_trail.reports.spec import ANOMALY, PERIOD, TIME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dotmac.platform.audit_trail.integrity.report import IntegrityReport
    from dotmac.platform.audit_trail.reports.statements import Statements

__all__ = ["LATE", "gather"]

LATE = "1 hour"
# Every field of an event, as text in fixed forms: what the fingerprint covers.
_FINGERPRINT = f"""
    SELECT sha256(convert_to(ROW(e.occurred_at, e.id, e.recorded_at, e.category, e.action, e.level, e.outcome,
        e.user_id, e.tenant_id, e.resource_type, e.resource_id, e.ip_address, e.correlation_id, e.trace_id,
        e.span_id, e.subject_id, e.metadata, e.personal, e.anomaly_score, e.anomaly_reasons)::text, 'UTF8')) AS digest
    FROM audit_events e WHERE {PERIOD} ORDER BY e.occurred_at, e.id
"""  # noqa: S608 (constants of ours)
_OVERVIEW = f"""
    SELECT count(*) AS events, min({TIME}) AS first_event, max({TIME}) AS last_event,
        count(*) FILTER (WHERE e.recorded_at - e.occurred_at > interval '{LATE}') AS recorded_late,
        count(*) FILTER (WHERE e.occurred_at - e.recorded_at > interval '5 seconds') AS recorded_before_they_happened,
        greatest(0, extract(epoch FROM max(e.occurred_at - e.recorded_at)))::float8 AS largest_clock_lead_seconds,
        count(*) FILTER (WHERE e.user_id IS NULL) AS without_user,
        count(*) FILTER (WHERE e.ip_address IS NULL) AS without_address,
        count(*) FILTER (WHERE {ANOMALY}) AS anomalies
    FROM audit_events e WHERE {PERIOD}
"""  # noqa: S608 (constants of ours)
_ENDS = f"""
    (SELECT {TIME} AS time, e.id::text AS id FROM audit_events e WHERE {PERIOD} ORDER BY e.occurred_at, e.id LIMIT 1)
    UNION ALL
    (SELECT {TIME} AS time, e.id::text AS id FROM audit_events e WHERE {PERIOD} ORDER BY e.occurred_at DESC, e.id DESC LIMIT 1)
"""  # noqa: S608 (constants of ours)
_SILENCE = f"""
    SELECT extract(epoch FROM max(gap))::float8 AS seconds FROM (
        SELECT e.occurred_at - lag(e.occurred_at) OVER (ORDER BY e.occurred_at, e.id) AS gap
        FROM audit_events e WHERE {PERIOD}) AS gaps
"""  # noqa: S608 (constants of ours)
_CATEGORIES = (
    f"SELECT e.category, count(*) AS events FROM audit_events e WHERE {PERIOD} GROUP BY 1 ORDER BY 1"  # noqa: S608 (constants of ours)
)
_OLDEST = f"SELECT {TIME} AS oldest FROM audit_events e WHERE ($tenant IS NULL OR e.tenant_id = $tenant) ORDER BY e.occurred_at LIMIT 1"  # noqa: S608 (constants of ours)
_HIDDEN = f"""
    SELECT count(*) FILTER (WHERE e.personal IS NOT NULL) AS events_with_encrypted_fields,
        count(*) FILTER (WHERE e.metadata ? '_redacted') AS events_redacted_before_storing
    FROM audit_events e WHERE {PERIOD}
"""  # noqa: S608 (constants of ours)
_FIELDS = f"""
    SELECT f.name, count(*) AS events FROM audit_events e
    CROSS JOIN LATERAL jsonb_object_keys(CASE jsonb_typeof(e.personal->'fields') WHEN 'object' THEN e.personal->'fields' ELSE '{{}}' END) AS f (name)
    WHERE {PERIOD} AND e.personal IS NOT NULL GROUP BY 1 ORDER BY f.name COLLATE "C" LIMIT 100
"""  # noqa: S608 (constants of ours)
_RULES = f"""
    SELECT f.value AS rule, count(DISTINCT e.id) AS events FROM audit_events e
    CROSS JOIN LATERAL jsonb_each_text(CASE jsonb_typeof(e.metadata->'_redacted') WHEN 'object' THEN e.metadata->'_redacted' ELSE '{{}}' END) AS f
    WHERE {PERIOD} AND e.metadata ? '_redacted' GROUP BY 1 ORDER BY f.value COLLATE "C" LIMIT 100
"""  # noqa: S608 (constants of ours)


async def gather(
    run: Statements, verified: IntegrityReport | ImportError | None, trusted: Sequence[bytes]
) -> dict[str, Any]:
    """The block; every value depends on the parameters and on what is stored, not on when it is asked.

    Args:
        verified: what the verification found, why it could not be made, or None where none was asked for.
        trusted: public keys whose checkpoints are trusted.
    """
    overview = dict((await run.rows(_OVERVIEW))[0])
    ends = await run.rows(_ENDS)
    digest = hashlib.sha256()
    async for record in run.stream(_FINGERPRINT):
        digest.update(record["digest"])
    oldest = await run.rows(_OLDEST)
    return {
        **overview,
        "first_event_id": ends[0]["id"] if ends else None,
        "last_event_id": ends[-1]["id"] if ends else None,
        "oldest_event": oldest[0]["oldest"] if oldest else None,
        "events_by_category": {row["category"]: row["events"] for row in await run.rows(_CATEGORIES)},
        "longest_silence_seconds": (await run.rows(_SILENCE))[0]["seconds"],
        "verification": sequence.verification(verified),
        "segments": await sequence.segments(run),
        "log": await sequence.logs(run, trusted),
        "personal_and_redacted": await _hidden(run),
        "spooled_events": "an event in a process's spool is not in the log yet; once stored it counts as recorded late",
        "refused_events": "an event that could not be stored was refused to its caller by an error, and is not in the log",
        "late_is": f"recorded more than {LATE} after the event happened: spooled, imported, or from a slow clock",
        "events_sha256": digest.hexdigest(),
        "events_sha256_covers": "SHA-256 over the SHA-256 of each event's fields, by time and id",
    }


async def _hidden(run: Statements) -> dict[str, Any]:
    """What of the period's events is encrypted or was redacted before it was stored."""
    (counted,) = await run.rows(_HIDDEN)
    fields = await run.rows(_FIELDS)
    rules = await run.rows(_RULES)
    return {
        **dict(counted),
        "encrypted_fields": {row["name"]: row["events"] for row in fields},
        "redactions": {row["rule"]: row["events"] for row in rules},
    }
