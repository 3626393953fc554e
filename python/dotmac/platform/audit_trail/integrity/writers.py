"""The chains: every writer numbers and links the segments of each tenant, and closes with their number."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.integrity.log import NO_LINK, SEGMENT_COLUMNS, Segment, next_link
from dotmac.platform.audit_trail.integrity.report import Finding, FindingKind

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
    before: Segment | None = None
    done = 0
    cursor = await connection.cursor(
        f"SELECT {SEGMENT_COLUMNS} FROM audit_segments WHERE {condition} ORDER BY writer, tenant_id, seq",  # noqa: S608 (ours)
        *values,
    )
    # By blocks: a wait for each row costs more than its link.
    while rows := await cursor.fetch(_PREFETCH):
        for row in rows:
            segment = Segment.of(row)
            if before is None or (before.writer, before.tenant_id) != (segment.writer, segment.tenant_id):
                before = None
            _check_link(scope, before, segment)
            before = segment
        done += len(rows)
        scope.tell("writers", done, None)
    scope.tell("writers", done, done)


def _check_link(scope: Scope, before: Segment | None, segment: Segment) -> None:
    wanted = before.seq + 1 if before is not None else 1
    if segment.seq != wanted:
        numbers = f"{wanted}" if segment.seq == wanted + 1 else f"{wanted} to {segment.seq - 1}"
        scope.report.add(
            Finding(
                kind=FindingKind.SEGMENT_MISSING,
                text=f"segment {numbers} of writer {segment.writer} is gone",
                tenant_id=segment.tenant_id,
                writer=segment.writer,
                segment=segment.id,
                expected=f"number {wanted}",
                found=f"number {segment.seq}",
            )
        )
        return  # what it links to is not there
    link = next_link(before.link if before is not None else NO_LINK, segment)
    if link != segment.link:
        scope.report.add(
            Finding(
                kind=FindingKind.LINK_BROKEN,
                text=f"segment {segment.id} is not what its writer linked to the one before it",
                tenant_id=segment.tenant_id,
                writer=segment.writer,
                segment=segment.id,
                expected=segment.link.hex(),
                found=link.hex(),
            )
        )


async def check_ends(connection: Connection, scope: Scope) -> None:
    """Every writer is known, has closed, or was at work lately; who closed stored so many segments."""
    rows = connection.cursor(
        """
        SELECT coalesce(made.writer, w.id, e.writer) AS writer, w.id IS NOT NULL AS known, w.host, w.pid,
            coalesce(e.segments, x.segments) AS closed_with, coalesce(made.segments, 0) AS segments,
            greatest(w.started_at, made.latest) AS seen
        FROM (
            SELECT writer, count(*) AS segments, max(recorded_at) AS latest FROM audit_segments
            GROUP BY writer
        ) AS made
        FULL JOIN audit_writers w ON w.id = made.writer
        FULL JOIN audit_writer_ends e ON e.writer = coalesce(made.writer, w.id)
        LEFT JOIN audit_explanations x ON x.writer = w.id
        """,
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
