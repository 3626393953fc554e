"""The token by which a lock is handed from one process to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dotmac.platform.distributed_locks.arguments import MOST, check_name
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from dotmac.platform.distributed_locks.terms import Kind, Terms

__all__ = ["Offer", "offer_token", "read_offer"]

_FENCES = 2**63


class Offer(NamedTuple):
    """What a token says.

    Args:
        fence: fencing token of the holding; it stays the same.
        kind, permits: of the lock.
        name: of the lock.
    """

    fence: int
    kind: Kind
    permits: int
    name: str


def offer_token(name: str, fence: int, terms: Terms) -> str:
    """The token for a lock: printable where its name is."""
    return f"{fence}:{terms.kind}:{terms.permits}:{name}"


def read_offer(token: object) -> Offer:
    """What a token says.

    Raises: InvalidArgument: it is none.
    """
    allowed = "it must be what DistributedLock.offer returned"
    parts = token.split(":", 3) if isinstance(token, str) else []
    if len(parts) != 4 or not (parts[0].isdecimal() and parts[2].isdecimal()):  # noqa: PLR2004 - its four parts
        raise InvalidArgument("token", token, allowed)
    fence, permits = int(parts[0][:20]), int(parts[2][:20])
    for kind in ("exclusive", "shared", "semaphore"):
        if parts[1] == kind and fence < _FENCES and (0 < permits <= MOST) == (kind == "semaphore"):
            return Offer(fence, kind, permits, check_name(parts[3], "token"))
    raise InvalidArgument("token", token, allowed)
