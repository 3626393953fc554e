"""A tenant's log: its segments in an order that never changes again, each as a leaf of a Merkle tree.

A leaf is the RFC 8785 JSON of everything that the segment's row says, hashed as RFC 6962 does. Segments come
into the log when no transaction that began to write before theirs is still running (the line that `tail`
follows, too), so the order is that of storing and nothing is passed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dotmac.platform import _native

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["LEAF_COLUMNS", "leaf_hash", "seal", "trail_name"]

# What a leaf covers: all columns of fixed width in one value, as taking each apart costs more than the hash.
LEAF_COLUMNS = (
    "uuid_send(id) || uuid_send(writer) || int8send(seq) || int4send(size) || timestamptz_send(first_at) || "
    "timestamptz_send(last_at) || timestamptz_send(recorded_at) AS packed, tenant_id, root, link"
)

_BLOCK = 5_000
# Serialises sealing, whichever process does it; the number is arbitrary but ours.
_SEAL_LOCK = 4_843_917_210_475_310
# A row that this snapshot shows although its number lies ahead comes from another server's history (a
# restored dump): nothing is running that could still precede it.
_FRESH = f"""
    SELECT id, {LEAF_COLUMNS}, recorded_tx, pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS settled
    FROM audit_segments s
    WHERE s.recorded_tx >= $1
      AND (s.recorded_tx < pg_snapshot_xmin(pg_current_snapshot())::text::bigint
           OR s.recorded_tx >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint)
      AND NOT EXISTS (SELECT FROM audit_log l WHERE l.segment = s.id)
    ORDER BY s.recorded_tx, s.id LIMIT {_BLOCK}
"""  # noqa: S608 (constants of ours)
_ENDS = """
    SELECT t.tenant_id, (SELECT max(position) FROM audit_log l WHERE l.tenant_id = t.tenant_id) AS position
    FROM unnest($1::text[]) AS t (tenant_id)
"""
_APPEND = """
    INSERT INTO audit_log (tenant_id, position, segment, leaf, recorded_tx)
    SELECT * FROM unnest($1::text[], $2::bigint[], $3::uuid[], $4::bytea[], $5::bigint[])
"""


def leaf_hash(row: asyncpg.Record) -> bytes:
    """The leaf in its tenant's log (RFC 6962, section 2.1) of a segment by its `LEAF_COLUMNS`."""
    return _native.segment_leaf(row["packed"], row["tenant_id"], row["root"], row["link"])


class Sealed(NamedTuple):
    """What one pass did: how many segments, and the transaction to look on from."""

    segments: int
    line: int
    more: bool


async def seal(connection: Connection, line: int, *, durably: bool) -> Sealed | None:
    """Append segments that have settled to their tenants' logs, in one transaction.

    Args:
        connection: of a role that may write the log; not in a transaction.
        line: transaction from which on to look; 0 looks at every segment.
        durably: the database would not wait for the disk unless told to.
    Returns: None where another process is at it.
    """
    async with connection.transaction():
        if durably:
            await connection.execute("SET LOCAL synchronous_commit = on")
        if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _SEAL_LOCK):
            return None
        rows = await connection.fetch(_FRESH, line)
        if not rows:
            return Sealed(0, line, more=False)
        tenants = list({row["tenant_id"] for row in rows})
        ends = {row["tenant_id"]: row["position"] for row in await connection.fetch(_ENDS, tenants)}
        entries = []
        for row in rows:
            tenant = row["tenant_id"]
            position = ends[tenant] = 0 if ends[tenant] is None else ends[tenant] + 1
            entries.append((tenant, position, row["id"], leaf_hash(row), row["recorded_tx"]))
        await connection.execute(_APPEND, *(list(column) for column in zip(*entries, strict=True)))
    # Numbers of another server's history lie ahead: what is stored here next must not be passed over.
    line = min(rows[-1]["recorded_tx"], rows[0]["settled"])
    return Sealed(len(rows), line, more=len(rows) == _BLOCK)


async def trail_name(connection: Connection, wanted: str | None) -> str:
    """The trail's name, given to it now if it has none yet."""
    await connection.execute(
        "INSERT INTO audit_trail (origin) VALUES (coalesce($1, 'dotmac-audit/' || gen_random_uuid())) "
        "ON CONFLICT DO NOTHING",
        wanted,
    )
    return str(await connection.fetchval("SELECT origin FROM audit_trail"))
