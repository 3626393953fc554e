"""Looks at the tables of the audit trail: does everything in them fit together?"""

from __future__ import annotations

import io
import struct
from itertools import groupby

import asyncpg

from dotmac.platform._native import AUDIT_COLUMNS, leaf_hashes, merkle_root, segment_link
from dotmac.platform.audit_trail.ids import micros

_PLACES = "SELECT {} FROM audit_events WHERE segment IS NOT NULL ORDER BY segment, leaf"
# What is summed up already, of all tenants together.
TOTALS_THAT_DIFFER = """
    SELECT day, category, outcome, level, sum(events) FROM (
        SELECT day, category, outcome, level, events FROM audit_rollup WHERE batch IS NULL
        UNION ALL SELECT day, category, outcome, level, -events FROM audit_rollup_totals
    ) AS counted GROUP BY 1, 2, 3, 4 HAVING sum(events) <> 0
"""

PACKED = struct.Struct(">16s16sqiqqq")
EPOCH = 946_684_800_000_000  # microseconds from 1970 to 2000


async def look_through(url):
    """Check segments against events, chains against segments, counts against events, totals against counts.

    Returns: ids of all events that are in a segment.
    """
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            copied = io.BytesIO()
            await connection.copy_from_query(
                _PLACES.format(", ".join(AUDIT_COLUMNS)), output=copied, format="binary"
            )
            hashes = leaf_hashes(copied.getvalue())
            places = await connection.fetch(_PLACES.format("id, tenant_id, segment, leaf, recorded_tx"))
            segments = await connection.fetch("SELECT * FROM audit_segments ORDER BY writer, tenant_id, seq")
            difference = await connection.fetch(
                "SELECT tenant_id, day, sum(events) FROM (SELECT tenant_id, day, events FROM audit_rollup "
                "UNION ALL SELECT coalesce(tenant_id, ''), (occurred_at AT TIME ZONE 'UTC')::date, -1 "
                "FROM audit_events) AS counted GROUP BY 1, 2 HAVING sum(events) <> 0"
            )
            totals = await connection.fetch(TOTALS_THAT_DIFFER)
    finally:
        await connection.close()
    assert difference == []
    assert totals == []
    leaves = {}
    for number, place in enumerate(places):
        found = leaves.setdefault(place["segment"], [])
        assert place["leaf"] == len(found)
        found.append((hashes[32 * number : 32 * number + 32], place["tenant_id"] or "", place["recorded_tx"]))
    for _, chain in groupby(segments, key=lambda one: (one["writer"], one["tenant_id"])):
        link = bytes(32)
        for seq, one in enumerate(chain, 1):
            covered = leaves.pop(one["id"])
            assert one["seq"] == seq
            assert one["size"] == len(covered)
            assert one["root"] == merkle_root(b"".join(leaf for leaf, _, _ in covered))
            assert {(tenant, tx) for _, tenant, tx in covered} == {(one["tenant_id"], one["recorded_tx"])}
            times = (micros(one[name]) - EPOCH for name in ("first_at", "last_at", "recorded_at"))
            packed = PACKED.pack(one["id"].bytes, one["writer"].bytes, seq, one["size"], *times)
            link = segment_link(link, packed, one["tenant_id"], one["root"])
            assert one["link"] == link
    assert leaves == {}
    return [place["id"] for place in places]
