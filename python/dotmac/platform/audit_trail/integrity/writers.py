"""The chains: every writer numbers and links the segments of each tenant, and closes with their number."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform import _native
from dotmac.platform.audit_trail.integrity.copying import copy_rows
from dotmac.platform.audit_trail.integrity.report import Finding, FindingKind, in_reach

if TYPE_CHECKING:
    import asyncpg

    from dotmac.platform.audit_trail.integrity.verify import Scope

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["check_chains", "check_ends"]

_PREFETCH = 2_000
# A writer that stored something so recently is taken to be at work still.
_RECENT = timedelta(hours=1)


async def check_chains(connection: Connection, scope: Scope) -> None:
    """Each chain from its first segment on: no number is left out, each link follows from the one before."""
    condition, values = ("tenant_id = $1", [scope.tenant]) if scope.tenant is not None else ("true", [])
    report = scope.report
    check = _native.ChainCheck(report.max_findings)
    done = await copy_rows(
        connection,
        f"SELECT {', '.join(_native.AUDIT_CHAIN_COLUMNS)} FROM audit_segments WHERE {condition} "  # noqa: S608 (ours)
        "ORDER BY writer, tenant_id, seq",
        check.feed,
        *values,
        told=lambda count: scope.tell("writers", count, None),
    )
    found, gaps, links = check.finish()
    for one in found:
        report.add(_broken(*one))
    for kind, count in ((FindingKind.SEGMENT_MISSING, gaps), (FindingKind.LINK_BROKEN, links)):
        if count > report.max_findings:
            report.counts[kind] += count - report.max_findings
    scope.tell("writers", done, done)


def _broken(
    segment: bytes,
    writer: bytes,
    tenant_id: str,
    seq: int,
    wanted: int | None,
    links: tuple[str, str] | None,
) -> Finding:
    """What is wrong with a chain at a segment: its number, or its link."""
    place: dict[str, Any] = {
        "tenant_id": tenant_id,
        "writer": UUID(bytes=writer),
        "segment": UUID(bytes=segment),
    }
    if links is not None:
        return Finding(
            kind=FindingKind.LINK_BROKEN,
            text=f"segment {place['segment']} is not what its writer linked to the one before it",
            expected=links[0],
            found=links[1],
            **place,
        )
    numbers = f"{wanted}" if wanted is None or seq == wanted + 1 else f"{wanted} to {seq - 1}"
    return Finding(
        kind=FindingKind.SEGMENT_MISSING,
        text=f"segment {numbers} of writer {place['writer']} is gone",
        expected=f"number {wanted}",
        found=f"number {seq}",
        **place,
    )


async def check_ends(connection: Connection, scope: Scope) -> None:
    """Every writer is known, has closed, or was at work lately; who closed stored so many segments."""
    rows = connection.cursor(
        f"""
        SELECT coalesce(made.writer, w.id, e.writer) AS writer, w.id IS NOT NULL AS known, w.host, w.pid,
            CASE WHEN e.writer IS NULL THEN x.segments ELSE coalesce(e.segments, -1) END AS closed_with,
            coalesce(made.segments, 0) AS segments,
            {in_reach("greatest(w.started_at, made.latest)", "seen", always=True)}
        FROM (
            SELECT writer, count(*) AS segments, max(recorded_at) AS latest FROM audit_segments
            GROUP BY writer
        ) AS made
        FULL JOIN audit_writers w ON w.id = made.writer
        FULL JOIN audit_writer_ends e ON e.writer = coalesce(made.writer, w.id)
        LEFT JOIN audit_explanations x ON x.writer = w.id
        """,  # noqa: S608 (ours)
        prefetch=_PREFETCH,
    )
    async for row in rows:
        writer, closed = row["writer"], row["closed_with"]
        if not row["known"]:
            scope.report.add(
                Finding(
                    kind=FindingKind.WRITER_UNKNOWN,
                    text=f"writer {writer} stored {row['segments']} segments, and never began",
                    writer=writer,
                    expected="a row of audit_writers",
                    found="none",
                )
            )
        if closed is not None and closed != row["segments"]:
            scope.report.add(
                Finding(
                    kind=FindingKind.CHAIN_TRUNCATED,
                    text=f"writer {writer} closed after {closed} segments; there are {row['segments']}",
                    writer=writer,
                    expected=f"{closed} segments",
                    found=f"{row['segments']} segments",
                )
            )
        elif closed is None and row["known"] and row["seen"] < scope.report.started_at - _RECENT:
            where = f"process {row['pid']} on {row['host']}" if row["host"] else "its process"
            scope.report.add(
                Finding(
                    kind=FindingKind.WRITER_OPEN,
                    text=f"writer {writer} ({where}) did not close and was last seen at "
                    f"{row['seen'].isoformat()}: it is idle, or it crashed. Where it crashed, say so "
                    "(`dotmac audit explain`)",
                    writer=writer,
                    expected="a row of audit_writer_ends",
                    found="none",
                )
            )
