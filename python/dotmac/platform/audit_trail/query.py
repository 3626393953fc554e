"""Keyset pages and cursors over the stored events."""

from __future__ import annotations

import base64
import binascii
import enum
import json
import struct
from datetime import UTC
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from dotmac.platform.audit_trail.ids import from_micros, micros, uuid_of
from dotmac.platform.audit_trail.models import (
    AuditCategory,
    AuditEvent,
    AuditLevel,
    AuditOutcome,
    PersonalState,
    stored_choice,
    stored_event,
)
from dotmac.platform.errors import InvalidCursor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    import asyncpg

    from dotmac.platform.audit_trail.filters import Filters

__all__ = [
    "MAX_LIMIT",
    "SELECT",
    "EventPage",
    "Order",
    "Place",
    "Statement",
    "event_of",
    "page_of",
    "page_sql",
    "read_cursor",
]

MAX_LIMIT = 10_000

SELECT = (
    "SELECT id, occurred_at, recorded_at, category, action, level, outcome, user_id, tenant_id, "
    "resource_type, resource_id, host(ip_address) AS ip_address, correlation_id, trace_id, span_id, "
    "metadata::text AS metadata, anomaly_score, anomaly_reasons::text AS anomaly_reasons, "
    "subject_id, personal::text AS personal"
)
_CURSOR = struct.Struct(">Bq16s8s")
_PLAIN = struct.Struct(">Bq16s")
# jsonb as text has no blanks around it, which `json.loads` would look for at some cost.
_json = json.JSONDecoder().raw_decode


class Order(enum.StrEnum):
    """Direction of a query by time."""

    NEWEST_FIRST = "desc"
    OLDEST_FIRST = "asc"


class EventPage(list[AuditEvent]):
    """One page of events: a list, with the cursors of the pages around it.

    Attributes:
        next_cursor: pass it as `cursor=` for the next page; None on the last one.
        previous_cursor: the same for the page before; None on the first one.
        note: why there is nothing, where that is not because no event matches.
    """

    def __init__(
        self,
        events: Iterable[AuditEvent] = (),
        next_cursor: str | None = None,
        previous_cursor: str | None = None,
    ) -> None:
        super().__init__(events)
        self.next_cursor = next_cursor
        self.previous_cursor = previous_cursor
        self.note: str | None = None


class Side(enum.IntEnum):
    """Where a page lies, seen from the event that its cursor names; the numbers are in cursors given out."""

    AFTER = 1
    BEFORE = 2
    AFTER_OR_AT = 3
    BEFORE_OR_AT = 4

    @property
    def backward(self) -> bool:
        """Is the page read towards the query's beginning?"""
        return self in {Side.BEFORE, Side.BEFORE_OR_AT}


class Statement(NamedTuple):
    """A query over `audit_events` with its parameters."""

    sql: str
    values: list[Any]


class Place(NamedTuple):
    """What a cursor says: a page on one side of an event."""

    side: Side
    occurred_at: datetime
    id: UUID


def page_sql(
    filters: Filters, order: Order, limit: int, place: Place | None, *, select: str = SELECT
) -> tuple[str, list[Any]]:
    """The statement of one page: keyset on the primary key, so that deep pages cost what the first does.

    A page before a place comes in reverse: nearest to the place first.
    """
    parts, values = filters.conditions()
    descending = order is Order.NEWEST_FIRST
    if place is not None:
        descending ^= place.side.backward
        sign = "<" if descending else ">"
        values += [place.occurred_at, place.id]
        moment, equal = f"${len(values) - 1}", "=" if place.side >= Side.AFTER_OR_AT else ""
        # The first part follows from the second; it lets whole months be left out.
        parts.append(f"occurred_at {sign}= {moment}")
        parts.append(f"(occurred_at, id) {sign}{equal} ({moment}::timestamptz, ${len(values)}::uuid)")
    where = f" WHERE {' AND '.join(parts)}" if parts else ""
    values.append(limit)
    way = "DESC" if descending else "ASC"
    return (
        f"{select} FROM audit_events{where} ORDER BY occurred_at {way}, id {way} LIMIT ${len(values)}",
        values,
    )


def page_of(
    found: Sequence[AuditEvent], filters: Filters, order: Order, limit: int, place: Place | None
) -> EventPage:
    """The page of what `page_sql` found with a limit of one more than `limit`."""
    more, events = len(found) > limit, list(found[:limit])
    backward = place is not None and place.side.backward
    if not events:
        if place is None:
            return EventPage()
        # What the cursor named is on the other side, itself included.
        side = Side.AFTER_OR_AT if backward else Side.BEFORE_OR_AT
        there = _write_cursor(filters, order, Place(side, place.occurred_at, place.id))
        return EventPage([], there if backward else None, None if backward else there)
    if backward:
        events.reverse()
    first, last = (
        _write_cursor(filters, order, Place(side, event.occurred_at, event.id))
        for side, event in ((Side.BEFORE, events[0]), (Side.AFTER, events[-1]))
    )
    return EventPage(
        events,
        last if more or backward else None,
        first if (more if backward else place is not None) else None,
    )


def _write_cursor(filters: Filters, order: Order, place: Place) -> str:
    position = _PLAIN.pack(place.side, micros(place.occurred_at), place.id.bytes)
    return base64.urlsafe_b64encode(position + filters.digest(order, position)).decode().rstrip("=")


def read_cursor(filters: Filters, order: Order, cursor: object) -> Place | None:
    """What a cursor says. Raises: InvalidCursor: it is damaged, or belongs to another query."""
    if cursor is None:
        return None
    if not isinstance(cursor, str):
        raise InvalidCursor(f"cursor: {type(cursor).__name__} is not allowed; pass a page's next_cursor")
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        side, moment, identity, digest = _CURSOR.unpack(raw)
        place = Place(Side(side), from_micros(moment), UUID(bytes=identity))
    except (binascii.Error, struct.error, ValueError, OverflowError):
        raise InvalidCursor(f"cursor: {cursor[:40]!r} is damaged; pass a page's next_cursor") from None
    position = raw[: _PLAIN.size]
    if digest != filters.digest(order, position):
        raise InvalidCursor(
            "cursor: it belongs to a query with other filters or another order, or was altered; "
            "repeat the first page's filters (the times may move)"
        )
    return place


def event_of(record: asyncpg.Record) -> AuditEvent:
    """An event from a row of `SELECT`; columns behind those are the caller's own."""
    (
        identity, occurred_at, recorded_at, category, action, level, outcome, user_id, tenant_id,
        resource_type, resource_id, ip_address, correlation_id, trace_id, span_id,
        metadata, anomaly_score, reasons, subject_id, sealed, *_,
    ) = record  # fmt: skip
    return stored_event(
        uuid_of(identity.int),
        occurred_at.astimezone(UTC),
        recorded_at.astimezone(UTC),
        stored_choice(AuditCategory, category),
        action,
        stored_choice(AuditLevel, level),
        stored_choice(AuditOutcome, outcome),
        user_id,
        tenant_id,
        resource_type,
        resource_id,
        ip_address,
        correlation_id,
        trace_id,
        span_id,
        _json(metadata)[0],
        anomaly_score,
        tuple(_json(reasons)[0]) if reasons else (),
        subject_id,
        None if sealed is None else PersonalState.SEALED,
        None if sealed is None else _json(sealed)[0],
    )
