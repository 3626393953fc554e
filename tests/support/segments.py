"""A second, plain writer of segments: what the library's own stores, by the words of its description."""

from __future__ import annotations

import hashlib
import json
import uuid
from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIELDS = [
    *("occurred_at", "id", "category", "action", "level", "outcome", "user_id", "tenant_id"),
    *("resource_type", "resource_id", "ip_address", "correlation_id", "trace_id", "span_id", "subject_id"),
    *("metadata", "personal", "anomaly_score", "anomaly_reasons"),
]


def micros(moment):
    return (moment - EPOCH) // timedelta(microseconds=1)


def canonical(value):
    """RFC 8785, for objects of strings and integers below 2^53."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def leaf(event):
    kept = {name: value for name, value in event.items() if value is not None}
    kept["occurred_at"] = micros(kept["occurred_at"])
    kept["id"] = str(kept["id"])
    return hashlib.sha256(b"\x00" + canonical(kept)).digest()


def root(leaves):
    """RFC 6962, section 2.1, word for word."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + root(leaves[:split]) + root(leaves[split:])).digest()


class PlainWriter:
    """Stores events as one writer does, one segment per call and tenant."""

    def __init__(self, connection, *, keep_leaves=True):
        self.connection = connection
        self.id = uuid.uuid4()
        self.links = {}
        self.segments = 0
        self.keep_leaves = keep_leaves

    async def begin(self):
        await self.connection.execute(
            "INSERT INTO audit_writers (id, host, pid) VALUES ($1, 'host', 7)", self.id
        )
        return self

    async def end(self):
        await self.connection.execute(
            "INSERT INTO audit_writer_ends (writer, segments) VALUES ($1, $2)", self.id, self.segments
        )

    async def store(self, events):
        tenants = {}
        for event in events:
            tenants.setdefault(event.get("tenant_id") or "", []).append(event)
        made = []
        async with self.connection.transaction():
            for tenant, mine in tenants.items():
                made.append(await self._segment(tenant, mine))
        return made

    async def _segment(self, tenant, events):
        segment = uuid7()
        for place, event in enumerate(events):
            values = [event.get(name) for name in FIELDS]
            for number, name in enumerate(FIELDS):
                if name in ("metadata", "personal", "anomaly_reasons") and values[number] is not None:
                    values[number] = json.dumps(values[number])
            numbers = ", ".join(f"${number}" for number in range(1, len(FIELDS) + 3))
            await self.connection.execute(
                f"INSERT INTO audit_events ({', '.join(FIELDS)}, segment, leaf) VALUES ({numbers})",
                *values,
                segment,
                place,
            )
        leaves = [leaf(event) for event in events]
        before, seq = self.links.get(tenant, (bytes(32), 0))
        times = [event["occurred_at"] for event in events]
        record = {
            "id": str(segment),
            "writer": str(self.id),
            "tenant_id": tenant,
            "seq": seq + 1,
            "size": len(events),
            "root": root(leaves).hex(),
            "first_at": micros(min(times)),
            "last_at": micros(max(times)),
        }
        link = hashlib.sha256(before + canonical(record)).digest()
        await self.connection.execute(
            "INSERT INTO audit_segments (id, writer, tenant_id, seq, size, root, link, first_at, last_at, "
            "leaves) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            segment,
            self.id,
            tenant,
            seq + 1,
            len(events),
            root(leaves),
            link,
            min(times),
            max(times),
            b"".join(leaves) if self.keep_leaves else None,
        )
        self.links[tenant] = (link, seq + 1)
        self.segments += 1
        return segment


def uuid7(moment=None):
    from dotmac.platform.audit_trail.ids import uuid7 as made

    return made(micros(moment or datetime.now(UTC)), uuid.uuid4().int)


def event(number, *, tenant=None, at=None, **more):
    at = at or datetime.now(UTC).replace(microsecond=number)
    return {
        "occurred_at": at,
        "id": uuid7(at),
        "category": "data_access",
        "action": f"record.read.{number}",
        "level": "info",
        "outcome": "success",
        "user_id": f"user-{number % 7}",
        "tenant_id": tenant,
        "resource_type": "record",
        "resource_id": str(number),
        "ip_address": "192.0.2.7" if number % 3 else "2001:db8::7",
        "metadata": {"n": number, "ü": "☃"},
        **more,
    }
