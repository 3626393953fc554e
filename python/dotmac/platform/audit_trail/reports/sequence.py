"""The completeness block's proofs: segments and their gaps, the tenants' logs, checkpoints, the verification.

Everything is said of the period: of the segments that hold its events, and of the logs up to the last of
these. What came later changes nothing here, so that a report on a settled period stays the same to the byte.
"""

# ruff: noqa: E501 (statements and sentences read best by the line)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dotmac.platform import _native
from dotmac.platform.audit_trail.integrity.notes import open_note
from dotmac.platform.audit_trail.integrity.report import FindingKind
from dotmac.platform.audit_trail.reports.spec import PERIOD
from dotmac.platform.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    import asyncpg

    from dotmac.platform.audit_trail.integrity.report import IntegrityReport
    from dotmac.platform.audit_trail.reports.statements import Statements

__all__ = ["logs", "segments", "verification"]

_SHOWN = 20
_MOST_LOGS = 50
_UTC = """'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"""
_TOUCHED = f"touched AS MATERIALIZED (SELECT DISTINCT e.segment AS id FROM audit_events e WHERE {PERIOD} AND e.segment IS NOT NULL)"  # noqa: S608 (constants of ours)
_OVERVIEW = f"""
    WITH {_TOUCHED}, mine AS (SELECT s.* FROM audit_segments s JOIN touched t ON t.id = s.id)
    SELECT count(*) AS segments, count(DISTINCT writer) AS writers, coalesce(sum(size), 0)::bigint AS events_that_they_hold,
        (SELECT count(*) FROM audit_events e WHERE e.segment IN (SELECT id FROM mine)
            AND e.occurred_at >= (SELECT min(first_at) FROM mine) AND e.occurred_at <= (SELECT max(last_at) FROM mine)) AS events_found_in_them,
        (SELECT count(*) FROM touched t WHERE NOT EXISTS (SELECT FROM audit_segments s WHERE s.id = t.id)) AS segments_without_a_record,
        (SELECT count(*) FROM audit_events e WHERE {PERIOD} AND e.segment IS NULL) AS events_without_a_segment,
        count(DISTINCT writer) FILTER (WHERE NOT EXISTS (SELECT FROM audit_writer_ends w WHERE w.writer = mine.writer)) AS writers_without_a_closing_record
    FROM mine
"""  # noqa: S608 (constants of ours)
_ENDS = f"""
    WITH {_TOUCHED}, mine AS (SELECT s.* FROM audit_segments s JOIN touched t ON t.id = s.id)
    SELECT e.place, id::text, writer::text, tenant_id AS tenant, seq, size, encode(root, 'hex') AS root, encode(link, 'hex') AS link,
        to_char(recorded_at AT TIME ZONE 'UTC', {_UTC}) AS recorded_at
    FROM ((SELECT 'first' AS place, m.* FROM mine m ORDER BY m.recorded_tx, m.id LIMIT 1)
        UNION ALL (SELECT 'last' AS place, m.* FROM mine m ORDER BY m.recorded_tx DESC, m.id DESC LIMIT 1)) e
"""  # noqa: S608 (constants of ours)
# Numbers that a writer gave to segments of a tenant, up to the last of the period, and that no segment has.
_GAPS = f"""
    WITH {_TOUCHED}, chains AS (
        SELECT s.writer, s.tenant_id, max(s.seq) AS last FROM audit_segments s JOIN touched t ON t.id = s.id GROUP BY 1, 2)
    SELECT c.writer::text AS writer, c.tenant_id AS tenant, n.seq FROM chains c
    CROSS JOIN LATERAL generate_series(1, c.last) AS n (seq)
    WHERE NOT EXISTS (SELECT FROM audit_segments s WHERE s.writer = c.writer AND s.tenant_id = c.tenant_id AND s.seq = n.seq)
    ORDER BY 1, 2, 3
"""  # noqa: S608 (constants of ours)
_LOGS = f"""
    WITH {_TOUCHED}
    SELECT l.tenant_id AS tenant, min(l.position) AS first, max(l.position) AS last, count(*) AS entries FROM audit_log l
    JOIN touched t ON t.id = l.segment GROUP BY 1 ORDER BY l.tenant_id COLLATE "C"
"""  # noqa: S608 (constants of ours)
_UNLOGGED = f"""
    WITH {_TOUCHED}
    SELECT count(*) AS segments FROM touched t WHERE NOT EXISTS (SELECT FROM audit_log l WHERE l.segment = t.id)
"""  # noqa: S608 (constants of ours)
_LEAVES = "SELECT l.position, l.leaf FROM audit_log l WHERE l.tenant_id = $log AND l.position <= $last ORDER BY l.position"
_CHECKPOINTS = """
    (SELECT 'start' AS place, c.* FROM audit_checkpoints c WHERE c.tenant_id = $log AND c.size <= $first
        ORDER BY c.size DESC, c.signed_at, c.key LIMIT 1)
    UNION ALL
    (SELECT 'end' AS place, c.* FROM audit_checkpoints c WHERE c.tenant_id = $log AND c.size > $last
        ORDER BY c.size, c.signed_at, c.key LIMIT 1)
"""


async def segments(run: Statements) -> dict[str, Any]:
    """The segments that hold the period's events, the first and the last of them, and what is missing."""
    found = dict((await run.rows(_OVERVIEW))[0])
    ends = {
        row["place"]: {name: value for name, value in row.items() if name != "place"}
        for row in await run.rows(_ENDS)
    }
    gaps = await run.rows(f"SELECT *, count(*) OVER () AS total FROM ({_GAPS}) AS g LIMIT {_SHOWN}")  # noqa: S608 (constants of ours)
    return {
        **found,
        "events_missing_from_segments": found["events_that_they_hold"] - found["events_found_in_them"],
        "first_segment": ends.get("first", "none"),
        "last_segment": ends.get("last", "none"),
        "gaps_in_sequences": gaps[0]["total"] if gaps else 0,
        "gaps": [{"writer": row["writer"], "tenant": row["tenant"], "sequence": row["seq"]} for row in gaps],
    }


async def logs(run: Statements, trusted: Sequence[bytes]) -> dict[str, Any]:
    """The tenants' logs at the start and the end of the period, with their roots and checkpoints."""
    rows = await run.rows(_LOGS)
    told = [await _log(run, row, trusted) for row in rows[:_MOST_LOGS]]
    return {
        "logs": len(rows),
        "logs_not_shown": max(0, len(rows) - _MOST_LOGS),
        "segments_not_yet_in_a_log": (await run.rows(_UNLOGGED))[0]["segments"],
        "each": told,
    }


async def _log(run: Statements, row: asyncpg.Record, trusted: Sequence[bytes]) -> dict[str, Any]:
    first, last = row["first"], row["last"]
    here = run.with_values(log=row["tenant"], first=first, last=last)
    tree, start, seen = _native.MerkleTree(), b"", 0
    async for entry in here.stream(_LEAVES):
        if entry["position"] >= first and not start and len(tree):
            start = tree.root()
        tree.extend(entry["leaf"])
        seen += 1
    found = {one["place"]: one for one in await here.rows(_CHECKPOINTS)}
    return {
        "tenant": row["tenant"] or "(none)",
        "first_position": first,
        "last_position": last,
        "entries_of_the_period": row["entries"],
        "gaps_in_positions": last + 1 - seen,
        "root_at_start": start.hex() if start else "the log began in the period",
        "root_at_end": tree.root().hex(),
        "checkpoint_before": _checkpoint(found.get("start"), trusted),
        "checkpoint_after": _checkpoint(found.get("end"), trusted),
    }


def _checkpoint(row: asyncpg.Record | None, trusted: Sequence[bytes]) -> dict[str, Any] | str:
    if row is None:
        return "none"
    try:
        open_note(row["note"], trusted or (row["key"],))
        signature = (
            "holds, by a trusted key"
            if trusted
            else "holds, by the key that the database names; no trusted key was given"
        )
    except InvalidCheckpoint as error:
        signature = f"does not hold: {error}"
    except ImportError:
        signature = "not checked: pip install 'dotmac-platform[integrity]'"
    return {
        "size": row["size"],
        "root": row["root"].hex(),
        "signed_at": row["signed_at"].isoformat(),
        "signature": signature,
        "note": row["note"],
    }


def verification(found: IntegrityReport | ImportError | None) -> dict[str, Any]:
    """What the verification of the period found; `result` is ok, failed or not made."""
    if found is None:
        return {"result": "not made", "said": "not verified: the report was asked for without verification"}
    if isinstance(found, ImportError):
        return {"result": "not made", "said": f"not verified: {found}"}
    problems = found.problems
    kinds = {kind.value: count for kind, count in sorted(found.counts.items()) if kind not in _PASSING}
    amiss = sum(count for kind, count in found.counts.items() if not kind.is_notice)
    if not found.ok:
        said = f"FAILED: {amiss} findings"
    elif not found.segments:
        said = "nothing to verify: no event of the period is in a segment"
    else:
        said = f"verified: events {found.events:,}, segments {found.segments:,}, all as they were stored"
    return {
        "result": "ok" if found.ok and found.segments else "failed" if not found.ok else "nothing to verify",
        "said": said,
        "events": found.events,
        "segments": found.segments,
        "legacy_events": found.legacy,
        "events_dropped_by_retention": found.dropped,
        "findings_by_kind": kinds,
        "findings": [one.text for one in problems[:_SHOWN]],
        "findings_not_shown": amiss - min(len(problems), _SHOWN),
    }


# They tell of now, not of the period: the blocks above count what of these touches it.
_PASSING = frozenset({FindingKind.WRITER_OPEN, FindingKind.NOT_SEALED, FindingKind.NO_CHECKPOINT})
