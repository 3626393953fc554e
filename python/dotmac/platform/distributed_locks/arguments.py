"""What a lock's arguments may be; anything else is refused by name."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal

from dotmac.platform.errors import InvalidArgument

__all__ = ["LONGEST_NAME", "check_name", "check_on_lost", "check_patience", "check_timeout"]

LONGEST_NAME = 1024
SHORTEST_TIMEOUT = 0.1
LONGEST_TIMEOUT = 30 * 86_400.0


def check_name(name: Any, field: str = "name") -> str:
    """A lock's name: 1 to 1,024 bytes of UTF-8, no NUL."""
    allowed = f"it must be a string of 1 to {LONGEST_NAME} bytes in UTF-8 without NUL"
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or "\0" in name:
        raise InvalidArgument(field, name, allowed)
    if not name.isascii():
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            raise InvalidArgument(field, name, allowed) from None
        if size > LONGEST_NAME:
            raise InvalidArgument(field, name, allowed)
    return name


def check_timeout(timeout: Any, field: str = "timeout") -> float:
    """A lease's length in seconds."""
    seconds = _seconds(timeout)
    if SHORTEST_TIMEOUT <= seconds <= LONGEST_TIMEOUT:
        return seconds
    raise InvalidArgument(
        field,
        timeout,
        f"it must be a number of seconds from {SHORTEST_TIMEOUT:g} to {LONGEST_TIMEOUT:g} (30 days)",
    )


def check_patience(blocking_timeout: Any, field: str = "blocking_timeout") -> float | None:
    """How long to wait, in seconds; None for ever, 0 not at all."""
    if blocking_timeout is None:
        return None
    seconds = _seconds(blocking_timeout)
    if 0 <= seconds < math.inf:
        return min(seconds, LONGEST_TIMEOUT)
    raise InvalidArgument(
        field,
        blocking_timeout,
        "it must be a finite number of seconds, 0 or more, or None to wait without limit",
    )


def check_on_lost(on_lost: Any) -> Literal["cancel", "flag"]:
    """What happens to the body when the lease is lost."""
    if on_lost == "cancel":
        return "cancel"
    if on_lost == "flag":
        return "flag"
    raise InvalidArgument("on_lost", on_lost, 'it must be "cancel" or "flag"')


def _seconds(value: Any) -> float:
    """The number, or NaN, which is in no range."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
