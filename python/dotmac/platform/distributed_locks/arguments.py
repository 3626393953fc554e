"""What a lock's arguments may be; anything else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from dotmac.platform.distributed_locks.terms import Victim

__all__ = [
    "LONGEST_NAME",
    "check_name",
    "check_on_lost",
    "check_patience",
    "check_release",
    "check_timeout",
    "patience_of",
]

LONGEST_NAME = 1024
HIGHEST_PRIORITY = 4_999
MOST = 1_000_000
SHORTEST_TIMEOUT = 0.1
LONGEST_TIMEOUT = 30 * 86_400.0


def check_name(name: Any, field: str = "name") -> str:
    """A lock's name: 1 to 1,024 bytes of UTF-8, no NUL."""
    if type(name) is str and name.isascii() and 0 < len(name) <= LONGEST_NAME and "\0" not in name:
        return name
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


def check_owner(owner: Any) -> str:
    """A token that names an owner: as a lock's name, and without control characters, which part owners."""
    check_name(owner, "owner")
    if not owner.isprintable():
        raise InvalidArgument("owner", owner, "it must be a string of printable characters")
    return str(owner)


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


def patience_of(blocking: bool, blocking_timeout: float | None, usual: float | None) -> float | None:
    """How long this one call waits, in seconds: 0 unless `blocking`, else what it says, else the `usual`."""
    if blocking:
        return usual if blocking_timeout is None else check_patience(blocking_timeout)
    if blocking_timeout is not None:
        raise InvalidArgument("blocking_timeout", blocking_timeout, "leave it out when blocking is False")
    return 0.0


def check_priority(priority: Any) -> int:
    """Who is served first."""
    if isinstance(priority, int) and not isinstance(priority, bool) and abs(priority) <= HIGHEST_PRIORITY:
        return priority
    raise InvalidArgument(
        "priority", priority, f"it must be a whole number from -{HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}"
    )


def check_count(count: Any, field: str, least: int = 1) -> int:
    """How many."""
    if isinstance(count, int) and not isinstance(count, bool) and least <= count <= MOST:
        return count
    raise InvalidArgument(field, count, f"it must be a whole number from {least} to {MOST:,}")


def check_victim(victim: Any) -> Victim:
    """Who gives up where a wait closes a cycle."""
    for known in ("youngest", "lowest_priority", "fewest_locks", "self"):
        if victim == known:
            return known
    raise InvalidArgument(
        "deadlock_victim", victim, "it must be 'youngest', 'lowest_priority', 'fewest_locks' or 'self'"
    )


def check_names(names: Any) -> list[str]:
    """Names of several locks, in the order in which everybody acquires them."""
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise InvalidArgument("names", names, "it must be a list of names")
    found = sorted({check_name(name, "names") for name in names})
    if not found:
        raise InvalidArgument("names", names, "it must name at least one lock")
    return found


def check_on_lost(on_lost: Any) -> Literal["cancel", "flag"]:
    """What happens to the body when the lease is lost."""
    if on_lost == "cancel":
        return "cancel"
    if on_lost == "flag":
        return "flag"
    raise InvalidArgument("on_lost", on_lost, 'it must be "cancel" or "flag"')


def check_release(release: Any) -> bool:
    """How a lock is given back on leaving; True for pipelined."""
    if release in ("confirmed", "pipelined"):
        return bool(release == "pipelined")
    raise InvalidArgument("release", release, 'it must be "confirmed" or "pipelined"')


def _seconds(value: Any) -> float:
    """The number, or NaN, which is in no range."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
