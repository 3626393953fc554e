"""From the arguments of `log_event` to an event: everything that could fail in the database fails here.

An event that leaves this module is one that PostgreSQL takes, so that one bad event can't fail the others of
its batch. Plain arguments are the business of `_native.AuditEncoder`; this file has the words for the others.
"""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform._native import AuditEncoder
from dotmac.platform.audit_trail.ids import EPOCH, time_of
from dotmac.platform.audit_trail.models import AuditCategory, AuditLevel, AuditOutcome, parse_choice
from dotmac.platform.errors import InvalidEvent
from dotmac.platform.observability.tracing import trace_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform._native import AuditEntry

__all__ = [
    "MAX_METADATA_BYTES",
    "MAX_TEXT",
    "aware",
    "make_encoder",
    "make_entry",
    "parse_address",
    "plain_text",
    "when_and_id",
]

MAX_TEXT = 512
MAX_METADATA_BYTES = 1 << 20
MAX_DEPTH = 32
_AHEAD = timedelta(days=1)
_SHOWN = 60
_LONGEST_ADDRESS = 128
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def make_encoder(
    *, hashed: bool, capacity: int = 0, seed: int = 0, clock: Callable[[], int] | None = None
) -> AuditEncoder:
    """What makes the events of one process.

    Args:
        hashed: events get leaf hashes, for the trail's integrity.
        capacity: users, addresses, tenants and actions that the detector remembers (about 500 bytes each); 0
            for no detector.
        seed: makes what it forgets under pressure repeatable.
        clock: microseconds since 1970; default: the system's.
    """
    return AuditEncoder(
        [member.value for member in AuditCategory],
        [member.value for member in AuditLevel],
        [member.value for member in AuditOutcome],
        hashed=hashed,
        capacity=capacity,
        seed=seed,
        clock=clock,
    )


def make_entry(
    encoder: AuditEncoder,
    *,
    category: object,
    action: object,
    level: object = None,
    outcome: object = None,
    user_id: object = None,
    tenant_id: object = None,
    resource_type: object = None,
    resource_id: object = None,
    ip_address: object = None,
    correlation_id: object = None,
    metadata: object = None,
    personal: object = None,
    subject_id: object = None,
    occurred_at: object = None,
    event_id: object = None,
) -> AuditEntry:
    """Check every field and make the event; None leaves a field out.

    Raises: InvalidEvent: names the field, shows its value where that is a text or a number, and says what
        would be right. What stands in metadata is not shown.
    """
    entry = encoder.entry(
        None, trace_ids(), category, action, level, outcome, user_id, tenant_id, resource_type, resource_id,
        ip_address, correlation_id, metadata, personal, subject_id, occurred_at, event_id,
    )  # fmt: skip
    if entry is not None:
        return entry
    # The same event in plain types, or the words for what is wrong.
    moment, identity = when_and_id(occurred_at, event_id)
    entry = encoder.entry(
        None,
        trace_ids(),
        parse_choice(AuditCategory, "category", category).value,
        _required_text("action", action),
        parse_choice(AuditLevel, "level", AuditLevel.INFO if level is None else level).value,
        None if outcome is None else parse_choice(AuditOutcome, "outcome", outcome).value,
        plain_text("user_id", user_id),
        plain_text("tenant_id", tenant_id),
        plain_text("resource_type", resource_type),
        plain_text("resource_id", resource_id),
        _address(ip_address),
        plain_text("correlation_id", correlation_id),
        _json("metadata", metadata),
        _json("personal", personal),
        plain_text("subject_id", subject_id),
        moment,
        identity,
    )
    if entry is None:
        raise InvalidEvent(
            "the event is refused, but its checks find nothing wrong with it: please report it"
        )
    return entry


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
        raise _bad(field, type(value), "give a datetime")
    try:
        return value.astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        raise _bad(field, value.isoformat(), "give a datetime between the years 1970 and 9998") from None


def _address(value: object) -> str | None:
    if value is None:
        return None
    address = parse_address(value)
    if address is None:
        shown = value if isinstance(value, str) else type(value)
        raise _bad("ip_address", shown, "give an IPv4 or IPv6 address, or leave it out")
    return address


def when_and_id(occurred_at: object, event_id: object) -> tuple[datetime | None, UUID | None]:
    """When an event was and its id, as far as they are given. Raises: InvalidEvent."""
    identity = _identity(event_id)
    if occurred_at is None:
        if identity is None:
            return None, None
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
    return stated, identity


def _identity(value: object) -> UUID | None:
    if value is None or isinstance(value, UUID):
        return value
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass
    raise _bad("id", type(value), "give a UUID (of version 7 where there is no occurred_at)")


def plain_text(field: str, value: object) -> str | None:
    """A name as it is stored. Raises: InvalidEvent."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > 3 * MAX_TEXT:
            raise _bad(field, int, f"an integer of {value.bit_length()} bits is too large; give a string")
        value = str(int(value))
    elif isinstance(value, UUID):
        value = str(value)
    if not isinstance(value, str):
        raise _bad(field, value, "give a string, an integer or a UUID")
    if len(value) > MAX_TEXT:
        raise _bad(field, value, f"at most {MAX_TEXT} characters are allowed, it has {len(value)}")
    _check_characters(field, value)
    return str.__str__(value)  # what was redacted, not what a subclass makes of itself


def _required_text(field: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _bad(
            field, value if isinstance(value, str) else type(value), "give a string such as 'user.login'"
        )
    return plain_text(field, value) or ""


def _check_characters(field: str, value: str, *, shown: bool = True) -> None:
    told = value if shown else str
    if "\x00" in value:
        raise _bad(field, told, "PostgreSQL can't store the NUL character: remove or escape it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _bad(
            field, told, f"character {error.start} is half of a surrogate pair: give valid Unicode"
        ) from None


def _json(field: str, value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _bad(field, type(value), "give a mapping with string keys")
    plain: dict[str, Any] = _plain(field, value, 0)
    size = len(_ENCODER.encode(plain).encode())
    if size > MAX_METADATA_BYTES:
        raise InvalidEvent(
            f"{field}: {size} bytes of JSON are not allowed; at most {MAX_METADATA_BYTES} are. "
            "Store the document elsewhere and log its name and digest"
        )
    return plain


def _plain(path: str, value: object, depth: int) -> Any:
    """The value as plain JSON types, checked to the leaves."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_characters(path, value, shown=False)
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
                raise _bad(f"{path} (key)", type(key), "give a string key")
            _check_characters(f"{path} (key)", key, shown=False)
            plain[str.__str__(key)] = _plain(f"{path}.{key}", item, depth + 1)
        return plain
    if isinstance(value, list | tuple):
        return [_plain(f"{path}[{place}]", item, depth + 1) for place, item in enumerate(value)]
    kind = type(value)
    raise _bad(path, kind, f"{kind.__name__} is not a JSON type: give a string, number, list or dict")


def _bad(field: str, value: object, right: str) -> InvalidEvent:
    """The error. Texts are shown, which were redacted before, and numbers; of anything else the type."""
    kind = type(value)
    if isinstance(value, str):
        shown = repr(str.__str__(value)[:_SHOWN])[: _SHOWN + 20]
    elif value is None or kind is bool or kind is float:
        shown = repr(value)
    else:
        shown = f"a value of type {value.__name__ if isinstance(value, type) else kind.__name__}"
    return InvalidEvent(f"{field[:200]}: {shown} is not allowed; {right}")
