"""From the arguments of `log_event` to a row: everything that could fail in the database fails here.

A row that leaves this module is one that PostgreSQL takes, so that one bad event can't fail the others of
its batch.
"""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from dotmac.platform.audit_trail.ids import EPOCH, IdSource, from_micros, micros, time_of
from dotmac.platform.audit_trail.models import AuditCategory, AuditLevel, AuditOutcome, parse_choice
from dotmac.platform.errors import InvalidEvent
from dotmac.platform.observability.tracing import trace_ids

__all__ = [
    "COLUMNS",
    "MAX_METADATA_BYTES",
    "MAX_TEXT",
    "Row",
    "aware",
    "guess_outcome",
    "make_row",
    "parse_address",
]

MAX_TEXT = 512
MAX_METADATA_BYTES = 1 << 20
MAX_DEPTH = 32
_AHEAD = timedelta(days=1)
_SHOWN = 60
_FAILED_WORDS = frozenset({"failed", "failure", "fail"})
_DENIED_WORDS = frozenset({"denied", "refused", "forbidden", "blocked", "rejected"})
_LONGEST_ADDRESS = 128
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Row(NamedTuple):
    """One row of `audit_events`, in the order of COPY; the database adds when it was recorded."""

    occurred_at: datetime
    id: UUID
    category: str
    action: str
    level: str
    outcome: str
    user_id: str | None
    tenant_id: str | None
    resource_type: str | None
    resource_id: str | None
    ip_address: str | None
    correlation_id: str | None
    trace_id: str | None
    span_id: str | None
    metadata: str
    anomaly_score: float | None = None
    anomaly_reasons: str | None = None


COLUMNS = Row._fields


def make_row(
    source: IdSource,
    *,
    category: object,
    action: object,
    level: object,
    outcome: object,
    user_id: object,
    tenant_id: object,
    resource_type: object,
    resource_id: object,
    ip_address: object,
    correlation_id: object,
    metadata: object,
    occurred_at: object,
    event_id: object,
) -> Row:
    """Check every field and make the row.

    Raises: InvalidEvent: names the field, shows its value and says what would be right.
    """
    stated, encoded = _metadata(metadata)
    if ip_address is None:
        address = parse_address(stated.get("ip_address"))
    else:
        address = parse_address(ip_address)
        if address is None:
            raise _bad("ip_address", ip_address, "give an IPv4 or IPv6 address, or leave it out")
    identity = _identity(event_id)
    moment = _moment(source, occurred_at, identity)
    traced = trace_ids()
    return Row(
        occurred_at=moment,
        id=identity or source.new(micros(moment)),
        category=parse_choice(AuditCategory, "category", category).value,
        action=_required_text("action", action),
        level=parse_choice(AuditLevel, "level", level).value,
        outcome=parse_choice(AuditOutcome, "outcome", outcome).value,
        user_id=_text("user_id", user_id),
        tenant_id=_text("tenant_id", tenant_id),
        resource_type=_text("resource_type", resource_type),
        resource_id=_text("resource_id", resource_id),
        ip_address=address,
        correlation_id=_text("correlation_id", correlation_id),
        trace_id=traced[0] if traced else None,
        span_id=traced[1] if traced else None,
        metadata=encoded,
    )


def guess_outcome(action: object) -> AuditOutcome:
    """How it ended, as the action's words say: `login.failed` is a failure, `access.denied` was denied."""
    if isinstance(action, str) and len(action) <= MAX_TEXT:
        return _outcome_of(str(action))
    return AuditOutcome.SUCCESS


@lru_cache(maxsize=4096)
def _outcome_of(action: str) -> AuditOutcome:
    words = set("".join(letter if letter.isalnum() else " " for letter in action.lower()).split())
    if words & _FAILED_WORDS:
        return AuditOutcome.FAILURE
    if words & _DENIED_WORDS:
        return AuditOutcome.DENIED
    return AuditOutcome.SUCCESS


def parse_address(value: object) -> str | None:
    """The plain form of an IP address, or None where `value` is none.

    A zone (`%eth0`) is left out, which PostgreSQL's inet can't hold; an IPv4 address in IPv6 clothes
    (`::ffff:10.0.0.7`) becomes the IPv4 address, so that one peer has one name.
    """
    if isinstance(value, str):
        return _plain_address(value) if len(value) <= _LONGEST_ADDRESS else None
    if isinstance(value, ipaddress.IPv4Address | ipaddress.IPv6Address):
        return _plain_address(str(value))
    return None


@lru_cache(maxsize=4096)  # the same peers come again and again, and parsing costs more than all else here
def _plain_address(value: str) -> str | None:
    try:
        found = ipaddress.ip_address(value.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def aware(field: str, value: object) -> datetime:
    """A datetime in UTC; a naive one is local time.

    Raises: InvalidEvent: not a datetime, or one that has no counterpart in UTC.
    """
    if not isinstance(value, datetime):
        raise _bad(field, value, "give a datetime")
    try:
        return value.astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        raise _bad(field, value, "give a datetime between the years 1970 and 9998") from None


def _moment(source: IdSource, occurred_at: object, identity: UUID | None) -> datetime:
    if occurred_at is None:
        if identity is None:
            return from_micros(source.now())
        stated = time_of(identity)
        if stated is None:
            # Events are stored once per time and id: another time at each try would store it again.
            raise _bad(
                "id", str(identity), "give a UUID of version 7, which holds the time, or occurred_at too"
            )
    else:
        stated = aware("occurred_at", occurred_at)
    if not EPOCH <= stated <= datetime.now(UTC) + _AHEAD:
        field = "id" if occurred_at is None else "occurred_at"
        raise _bad(field, stated.isoformat(), "its time must lie between 1970 and one day from now")
    return stated


def _identity(value: object) -> UUID | None:
    if value is None or isinstance(value, UUID):
        return value
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass
    raise _bad("id", value, "give a UUID (of version 7 where there is no occurred_at)")


def _text(field: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _bad(field, value, "give a string, an integer or a UUID")
    if len(value) > MAX_TEXT:
        raise _bad(field, value, f"at most {MAX_TEXT} characters are allowed, it has {len(value)}")
    _check_characters(field, value)
    return str(value)


def _required_text(field: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _bad(field, value, "give a string such as 'user.login'")
    return _text(field, value) or ""


def _check_characters(field: str, value: str) -> None:
    if "\x00" in value:
        raise _bad(field, value, "PostgreSQL can't store the NUL character: remove or escape it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _bad(
            field, value, f"character {error.start} is half of a surrogate pair: give valid Unicode"
        ) from None


def _metadata(value: object) -> tuple[Mapping[str, Any], str]:
    if value is None:
        return {}, "{}"
    if not isinstance(value, Mapping):
        raise _bad("metadata", value, "give a mapping with string keys")
    plain = _plain("metadata", value, 0)
    encoded = _ENCODER.encode(plain)
    size = len(encoded.encode())
    if size > MAX_METADATA_BYTES:
        raise InvalidEvent(
            f"metadata: {size} bytes of JSON are not allowed; at most {MAX_METADATA_BYTES} are. "
            "Store the document elsewhere and log its name and digest"
        )
    return plain, encoded


def _plain(path: str, value: object, depth: int) -> Any:
    """The value as plain JSON types, checked to the leaves."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_characters(path, value)
        return str.__str__(value)
    if isinstance(value, int):
        if value.bit_length() > 10_000:  # noqa: PLR2004 (bounds told in the text)
            raise InvalidEvent(f"{path}: an integer of {value.bit_length()} bits is too large; give a string")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _bad(path, value, "JSON has no NaN and no infinity: give None or a string")
        return float(value)
    if depth >= MAX_DEPTH:
        raise InvalidEvent(f"{path[:200]}: nested more than {MAX_DEPTH} deep; flatten it")
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise _bad(f"{path} (key)", key, "give a string key")
            _check_characters(f"{path} (key)", key)
            plain[str.__str__(key)] = _plain(f"{path}.{key}", item, depth + 1)
        return plain
    if isinstance(value, list | tuple):
        return [_plain(f"{path}[{place}]", item, depth + 1) for place, item in enumerate(value)]
    raise _bad(path, value, f"{type(value).__name__} is not a JSON type: give a string, number, list or dict")


def _bad(field: str, value: object, right: str) -> InvalidEvent:
    try:
        shown = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)[: _SHOWN + 20]
    except Exception:  # noqa: BLE001 (told to whom it concerns)
        shown = f"<{type(value).__name__}>"
    return InvalidEvent(f"{field[:200]}: {shown} is not allowed; {right}")
