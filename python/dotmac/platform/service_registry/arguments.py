"""What the registry's arguments must look like; each wrong one is named with what would be right."""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from dotmac.platform.errors import InvalidArgument

__all__ = [
    "check_filter",
    "check_health_url",
    "check_host",
    "check_metadata",
    "check_name",
    "check_number",
    "check_port",
    "check_record_size",
    "check_tags",
    "check_text",
    "check_weight",
    "health_host",
]

LONGEST_NAME = 255
LONGEST_TTL = 7 * 24 * 3600.0
SHORTEST_TTL = 0.5
MOST_TAGS = 64
HEAVIEST = 10_000
LAST_PORT = 65_535
LARGEST_RECORD = 64 * 1024
# Labels of 1 to 63 characters, 253 in all; a dot may end it.
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(\.[A-Za-z0-9_-]{1,63})*(?<!-)\.?")


def check_text(value: object, field: str, longest: int = 128) -> str:
    """A text of 1 to `longest` bytes without control characters or blanks at its ends."""
    allowed = (
        f"it must be 1 to {longest} bytes of text without control characters and without blanks at its ends"
    )
    if not isinstance(value, str) or not value or value != value.strip() or not value.isprintable():
        raise InvalidArgument(field, value, allowed)
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(field, value, f"{allowed}; it is not UTF-8") from error
    if size > longest:
        raise InvalidArgument(field, value, allowed)
    return value


def check_name(value: object, field: str = "name") -> str:
    """The name of a service or an instance."""
    return check_text(value, field, LONGEST_NAME)


def check_host(value: object) -> str:
    """A host name or an address, without port, scheme or brackets."""
    allowed = "it must be a host name or an IP address, without scheme, port or brackets"
    if not isinstance(value, str):
        raise InvalidArgument("host", value, allowed)
    if _HOST.fullmatch(value):
        return value
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise InvalidArgument("host", value, allowed) from None
    return value


def check_port(value: object) -> int:
    """A port number."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LAST_PORT:
        raise InvalidArgument("port", value, "it must be a whole number from 1 to 65535")
    return value


def check_weight(value: object) -> int:
    """A share of the traffic."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= HEAVIEST:
        raise InvalidArgument("weight", value, f"it must be a whole number from 1 to {HEAVIEST}")
    return value


def check_number(value: object, field: str, least: float, most: float, unit: str = "seconds") -> float:
    """A number in a range."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not least <= value <= most
    ):
        raise InvalidArgument(field, value, f"it must be a number of {unit} from {least:g} to {most:g}")
    return float(value)


def check_tags(value: object, field: str = "tags") -> tuple[str, ...]:
    """Tags, each once."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidArgument(field, value, 'it must be a list of texts, such as ["user", "auth"]')
    tags = tuple(dict.fromkeys(check_text(tag, field) for tag in value))
    if len(tags) > MOST_TAGS:
        raise InvalidArgument(field, tags, f"at most {MOST_TAGS} tags")
    return tags


def check_metadata(value: object, field: str = "metadata") -> dict[str, Any]:
    """What JSON can say, under text keys; a copy."""
    if value is None:
        return {}
    allowed = "it must be a mapping of texts to what JSON can say (no NaN, no sets, no dates)"
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidArgument(field, value, allowed)
    try:
        copy = json.loads(json.dumps(dict(value), allow_nan=False))
        json.dumps(copy, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(field, value, f"{allowed}: {error}") from error
    assert isinstance(copy, dict)
    return copy


def check_record_size(record: str) -> str:
    """A whole record as it is stored."""
    size = len(record.encode())
    if size > LARGEST_RECORD:
        raise InvalidArgument(
            "metadata", f"{size} bytes", f"a registration may have {LARGEST_RECORD} bytes in all"
        )
    return record


def health_host(url: str) -> str | None:
    """The host that a health check URL names, or None where the URL can't be used."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None or port == 0:
        return None
    return parts.hostname


def check_health_url(value: object, host: str, also: frozenset[str]) -> str | None:
    """Where the health of an instance on `host` is asked for: at that host, or at one of `also`."""
    if value is None:
        return None
    url = check_text(value, "health_check_url", 2048)
    named = health_host(url)
    if named is None or " " in url:
        raise InvalidArgument(
            "health_check_url",
            value,
            "it must be an http:// or https:// URL with a host and without user or password",
        )
    if named != host.lower() and named not in also:
        raise InvalidArgument(
            "health_check_url",
            value,
            f"its host must be the registered one, {host!r}; name others in allowed_health_hosts",
        )
    return url


def check_filter(tags: object, any_tags: object, no_tags: object, metadata: object, zone: object) -> str:
    """The conditions of a lookup, as the extension reads them (JSON)."""
    return json.dumps(
        {
            "all": check_tags(tags),
            "any": check_tags(any_tags, "any_tags"),
            "none": check_tags(no_tags, "no_tags"),
            "metadata": check_metadata(metadata),
            "zone": None if zone is None else check_text(zone, "zone"),
        }
    )
