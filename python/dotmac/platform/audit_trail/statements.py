"""The SQL that stores a batch: events, their segments and their counts, all or nothing."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from dotmac.platform._native import AUDIT_COLUMNS

if TYPE_CHECKING:
    from dotmac.platform._native import AuditBatch

__all__ = ["FEW", "PREPARE", "copy_statement", "present", "store_few"]

# So many events go as one prepared statement; for more, COPY is quicker, which can't be prepared.
FEW = 16

_TYPES = {"id": "uuid", "occurred_at": "bigint", "ip_address": "inet", "anomaly_score": "float8"} | {
    "segment": "uuid",
    "leaf": "integer",
    **dict.fromkeys(("metadata", "personal", "anomaly_reasons"), "jsonb"),
}
_COLUMNS = ", ".join(AUDIT_COLUMNS)
_MOMENT = "timestamptz 'epoch' + {} * interval '1 microsecond'"
_VALUES = ", ".join(
    _MOMENT.format(name) if name == "occurred_at" else name  # exact: no event is beyond 2^53 microseconds
    for name in AUDIT_COLUMNS
)
_RECORD = ", ".join(f"{name} {_TYPES.get(name, 'text')}" for name in AUDIT_COLUMNS)

# {} is the table, and then, as below, a JSON array of objects.
_EVENTS = (
    f"INSERT INTO {{}} ({_COLUMNS}) SELECT {_VALUES} "  # noqa: S608 (constants and conditions of ours)
    f"FROM jsonb_to_recordset({{}}::jsonb) AS event({_RECORD})"
)
_SEGMENTS = (
    "INSERT INTO audit_segments (id, writer, tenant_id, seq, size, root, link, first_at, last_at, leaves) "  # noqa: S608
    "SELECT id, writer, tenant_id, seq, size, decode(root, 'hex'), decode(link, 'hex'), "
    f"{_MOMENT.format('first_at')}, {_MOMENT.format('last_at')}, "
    "substring({} FROM leaves_at + 1 FOR 32 * size) FROM jsonb_to_recordset({}::jsonb) "
    "AS segment(id uuid, writer uuid, tenant_id text, seq bigint, size integer, "
    "root text, link text, first_at bigint, last_at bigint, leaves_at integer)"
)
_ROLLUP = (
    "INSERT INTO audit_rollup (tenant_id, day, category, outcome, level, events, batch) "
    "SELECT tenant_id, date '1970-01-01' + day, category, outcome, level, events, batch "
    "FROM jsonb_to_recordset({}::jsonb) AS counted(tenant_id text, day integer, category text, "
    "outcome text, level text, events bigint, batch uuid)"
)


@lru_cache(maxsize=1_024)
def store_few(relation: str) -> str:
    """Few events, their segments and counts, as JSON arrays; the leaf hashes as bytes."""
    events = _EVENTS.format(relation, "$1")
    segments = _SEGMENTS.format("$4::bytea", "$2")
    return f"WITH events AS ({events}), segments AS ({segments}) {_ROLLUP.format('$3')}"


def present(relation: str) -> str:
    """Which of the events with these times and ids are there: their places, from 1."""
    return f"""
        SELECT wanted.place::integer
        FROM unnest($1::timestamptz[], $2::uuid[]) WITH ORDINALITY AS wanted(occurred_at, id, place)
        CROSS JOIN LATERAL (
            SELECT FROM {relation} AS event
            WHERE event.occurred_at = wanted.occurred_at AND event.id = wanted.id LIMIT 1
        ) AS found
    """  # noqa: S608 (names of our tables)


# Beside COPY: parsing and planning these takes longer than running them.
PREPARE = (
    f"PREPARE dotmac_segments (bytea, jsonb) AS {_SEGMENTS.format('$1', '$2')};"
    f"PREPARE dotmac_rollup (jsonb) AS {_ROLLUP.format('$1')}"
)


def copy_statement(packed: AuditBatch, relation: str, *, prepared: bool) -> str:
    """One query of several statements, which PostgreSQL runs as one transaction, and in one round trip.

    Segments come first: a batch that is sent again meets its first try there, and waits for it.

    Args: prepared: `PREPARE` was run on the connection.
    """
    segments, rollup = _SEGMENTS, _ROLLUP
    if prepared:
        segments, rollup = "EXECUTE dotmac_segments ({}, {})", "EXECUTE dotmac_rollup ({})"
    copy = f"COPY {relation} ({_COLUMNS}) FROM STDIN (FORMAT binary)"
    statements = [rollup.format(_quoted(packed.rollup) + "::jsonb"), copy]
    if packed.first_segment is not None:
        leaves = _quoted(rf"\x{packed.leaves.hex()}") + "::bytea"
        statements.insert(0, segments.format(leaves, _quoted(packed.segments) + "::jsonb"))
    return ";".join(statements)


def _quoted(text: str) -> str:
    """A literal that means the same whatever standard_conforming_strings says.

    Read by the server in half the time that `decode(…)` around digits takes.
    """
    tag = "$text"
    while tag in text:
        tag += "_"
    return f"{tag}${text}{tag}$"
