"""Waiting until replicas know of a grant.

In turns: while the server waits for its replicas, nothing else of this process gets through to it, its
heartbeats included. So it waits for moments, one at a time however many grants are waited for, and there are
pauses between them.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dotmac.platform import _native
    from dotmac.platform.distributed_locks.terms import Terms

__all__ = ["confirmed", "confirmed_sync"]

_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.1


async def confirmed(bridge: _native.Bridge, lease: _native.Lease, terms: Terms) -> Any:
    """How many replicas know of it, as soon as those are enough, or after half of the request's timeout; or
    what happened instead."""
    pauses = _pauses(terms)
    result = await bridge.replicas(lease, terms.replicas, again=False)
    while _too_few(result, terms) and (pause := next(pauses, 0.0)):
        await asyncio.sleep(pause)
        result = await bridge.replicas(lease, terms.replicas, again=True)
    return result


def confirmed_sync(engine: _native.Engine, lease: _native.Lease, terms: Terms) -> Any:
    """The same without an event loop."""
    pauses = _pauses(terms)
    result = engine.replicas(lease, terms.replicas, again=False)
    while _too_few(result, terms) and (pause := next(pauses, 0.0)):
        time.sleep(pause)
        result = engine.replicas(lease, terms.replicas, again=True)
    return result


def _too_few(result: Any, terms: Terms) -> bool:
    return isinstance(result, int) and result < terms.replicas


def _pauses(terms: Terms) -> Iterator[float]:
    """Seconds between one question and the next."""
    end = time.monotonic() + terms.link.request_timeout / 2
    pause = _FIRST_PAUSE
    while time.monotonic() < end:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)
