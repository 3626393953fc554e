"""Filters, keyset pages and cursors over the stored events."""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import ipaddress
import json
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform.audit_trail.ids import from_micros, micros
from dotmac.platform.audit_trail.models import (
    AuditCategory,
    AuditEvent,
    AuditLevel,
    AuditOutcome,
    Choice,
    parse_choice,
    stored_choice,
)
from dotmac.platform.errors import InvalidArgument, InvalidCursor, InvalidEvent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import asyncpg

__all__ = ["MAX_LIMIT", "SELECT", "EventPage", "Filters", "Order", "event_of", "page_sql"]

MAX_LIMIT = 10_000

SELECT = (
    "SELECT id, occurred_at, recorded_at, category, action, level, outcome, user_id, tenant_id, "
    "resource_type, resource_id, host(ip_address) AS ip_address, correlation_id, trace_id, span_id, "
    "metadata::text AS metadata, anomaly_score, anomaly_reasons::text AS anomaly_reasons"
)
_EQUAL = ("user_id", "tenant_id", "resource_type", "resource_id", "correlation_id")
_CURSOR = struct.Struct(">Bq16s8s")
_PLAIN = struct.Struct(">Bq16s")


class Order(enum.StrEnum):
    """Direction of a query by time."""

    NEWEST_FIRST = "desc"
    OLDEST_FIRST = "asc"


class EventPage(list[AuditEvent]):
    """One page of events: a list, with the cursor of the page after it.

    Attributes: next_cursor: pass it as `cursor=` for the next page; None on the last one.
    """

    def __init__(self, events: Iterable[AuditEvent] = (), next_cursor: str | None = None) -> None:
        super().__init__(events)
        self.next_cursor = next_cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Checked filters; all of them must hold. Make one with `Filters.of`."""

    start_time: datetime | None = None
    end_time: datetime | None = None
    categories: tuple[AuditCategory, ...] | None = None
    levels: tuple[AuditLevel, ...] | None = None
    outcomes: tuple[AuditOutcome, ...] | None = None
    actions: tuple[str, ...] | None = None
    user_id: str | None = None
    tenant_id: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    correlation_id: str | None = None
    network: str | None = None
    min_anomaly_score: float | None = None

    @classmethod
    def of(
        cls,
        *,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        categories: Iterable[AuditCategory | str] | AuditCategory | str | None = None,
        levels: Iterable[AuditLevel | str] | AuditLevel | str | None = None,
        outcome: Iterable[AuditOutcome | str] | AuditOutcome | str | None = None,
        actions: Iterable[str] | str | None = None,
        user_id: object = None,
        tenant_id: object = None,
        resource_type: object = None,
        resource_id: object = None,
        correlation_id: object = None,
        ip_address: object = None,
        min_anomaly_score: float | None = None,
    ) -> Filters:
        """Check what a caller gave; the meaning of each is told at `AuditAggregator.query_events`."""
        if min_anomaly_score is not None and not 0 <= min_anomaly_score <= 1:
            raise InvalidArgument("min_anomaly_score", min_anomaly_score, "give a number from 0 to 1")
        return cls(
            start_time=_moment("start_time", start_time),
            end_time=_moment("end_time", end_time),
            categories=_choices(AuditCategory, "categories", categories),
            levels=_choices(AuditLevel, "levels", levels),
            outcomes=_choices(AuditOutcome, "outcome", outcome),
            actions=None
            if actions is None
            else tuple(
                _text("actions", item) for item in ([actions] if isinstance(actions, str) else actions)
            ),
            user_id=_identifier("user_id", user_id),
            tenant_id=_identifier("tenant_id", tenant_id),
            resource_type=_identifier("resource_type", resource_type),
            resource_id=_identifier("resource_id", resource_id),
            correlation_id=_identifier("correlation_id", correlation_id),
            network=_network(ip_address),
            min_anomaly_score=min_anomaly_score,
        )

    def conditions(self) -> tuple[list[str], list[Any]]:
        """SQL conditions with numbered parameters, and the parameters."""
        parts: list[str] = []
        values: list[Any] = []

        def add(template: str, value: Any) -> None:
            values.append(value)
            parts.append(template.format(f"${len(values)}"))

        if self.start_time is not None:
            add("occurred_at >= {}", self.start_time)
        if self.end_time is not None:
            add("occurred_at < {}", self.end_time)
        for column, members in (
            ("category", self.categories), ("level", self.levels), ("outcome", self.outcomes),
        ):  # fmt: skip
            if members is not None:
                add(column + " = ANY({}::text[])", [member.value for member in members])
        if self.actions is not None:
            add("action LIKE ANY({}::text[])", [_like(action) for action in self.actions])
        for column in _EQUAL:
            value = getattr(self, column)
            if value is not None:
                add(column + " = {}", value)
        if self.network is not None:
            add("ip_address <<= {}::text::inet", self.network)
        if self.min_anomaly_score is not None:
            add("anomaly_score >= {}", self.min_anomaly_score)
        return parts, values

    def digest(self, order: Order, position: bytes) -> bytes:
        """Ties a cursor to its query; not to its times, for `now - 7 days` moves between pages."""
        told = [order.value]
        told += [repr(getattr(self, name)) for name in self.__slots__ if not name.endswith("_time")]
        return hashlib.blake2b("\x1f".join(told).encode() + position, digest_size=8).digest()


def page_sql(
    filters: Filters, order: Order, limit: int, cursor: str | None, *, select: str = SELECT
) -> tuple[str, list[Any]]:
    """The statement of one page: keyset on the primary key, so that deep pages cost what the first does."""
    parts, values = filters.conditions()
    if cursor is not None:
        moment, identity = _read_cursor(filters, order, cursor)
        values += [moment, identity]
        sign = "<" if order is Order.NEWEST_FIRST else ">"
        parts.append(f"(occurred_at, id) {sign} (${len(values) - 1}::timestamptz, ${len(values)}::uuid)")
    where = f" WHERE {' AND '.join(parts)}" if parts else ""
    values.append(limit)
    way = order.value.upper()
    return (
        f"{select} FROM audit_events{where} ORDER BY occurred_at {way}, id {way} LIMIT ${len(values)}",
        values,
    )


def make_cursor(filters: Filters, order: Order, last: AuditEvent) -> str:
    """The opaque place behind `last`."""
    position = _PLAIN.pack(1, micros(last.occurred_at), last.id.bytes)
    return base64.urlsafe_b64encode(position + filters.digest(order, position)).decode().rstrip("=")


def _read_cursor(filters: Filters, order: Order, cursor: object) -> tuple[datetime, UUID]:
    if not isinstance(cursor, str):
        raise InvalidCursor(f"cursor: {type(cursor).__name__} is not allowed; pass a page's next_cursor")
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        version, moment, identity, digest = _CURSOR.unpack(raw)
    except (binascii.Error, struct.error, ValueError):
        raise InvalidCursor(f"cursor: {cursor[:40]!r} is damaged; pass a page's next_cursor") from None
    position = raw[: _PLAIN.size]
    if version != 1 or digest != filters.digest(order, position):
        raise InvalidCursor(
            "cursor: it belongs to a query with other filters or another order, or was altered; "
            "repeat the first page's filters (the times may move)"
        )
    return from_micros(moment), UUID(bytes=identity)


def event_of(record: asyncpg.Record) -> AuditEvent:
    """An event from a row of `SELECT`."""
    reasons = record["anomaly_reasons"]
    return AuditEvent(
        id=UUID(int=record["id"].int),
        occurred_at=record["occurred_at"].astimezone(UTC),
        recorded_at=record["recorded_at"].astimezone(UTC),
        category=stored_choice(AuditCategory, record["category"]),
        action=record["action"],
        level=stored_choice(AuditLevel, record["level"]),
        outcome=stored_choice(AuditOutcome, record["outcome"]),
        user_id=record["user_id"],
        tenant_id=record["tenant_id"],
        resource_type=record["resource_type"],
        resource_id=record["resource_id"],
        ip_address=record["ip_address"],
        correlation_id=record["correlation_id"],
        trace_id=record["trace_id"],
        span_id=record["span_id"],
        metadata=json.loads(record["metadata"]),
        anomaly_score=record["anomaly_score"],
        anomaly_reasons=tuple(json.loads(reasons)) if reasons else (),
    )


def _moment(field: str, value: object) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise InvalidArgument(field, value, "give a datetime (a naive one is local time)")
    try:
        return value.astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        raise InvalidArgument(field, value, "give a datetime between the years 2 and 9998") from None


def _choices(kind: type[Choice], field: str, value: object) -> tuple[Choice, ...] | None:
    if value is None:
        return None
    items: Sequence[object] = [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]  # checked by the caller's types
    try:
        return tuple(parse_choice(kind, field, item) for item in items)
    except InvalidEvent as error:
        names = ", ".join(member.name for member in kind)
        raise InvalidArgument(field, value, f"{error.args[0]}" if error.args else names) from None


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(field, value, "give a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(field, value, "give valid Unicode") from None
    if "\x00" in value:
        raise InvalidArgument(field, value, "it can't contain the NUL character")
    return value


def _identifier(field: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        value = str(value)
    return _text(field, value)


def _network(value: object) -> str | None:
    if value is None:
        return None
    try:
        return str(ipaddress.ip_network(value, strict=False))  # type: ignore[arg-type]  # ValueError for others
    except ValueError:
        raise InvalidArgument(
            "ip_address", value, "give an address or a network such as 10.0.0.0/8"
        ) from None


def _like(action: str) -> str:
    escaped = action.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%")
