"""`dotmac locks watch`: looks again and again, and says what has changed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dotmac.platform.cli.output import show_error, visible
from dotmac.platform.errors import ServerUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dotmac.platform.distributed_locks import HolderInfo, LockInfo, WaiterInfo

__all__ = ["Changes", "follow"]

# Two looks differ by that much in what they make of the same end of a lease, seconds.
_BLUR = 0.1


def follow(interval: float, count: int | None, *, as_json: bool) -> None:
    """Prints changes of the configured server's locks.

    A server that is away after the first look is told once, and waited for.

    Args:
        interval: seconds between two looks.
        count: how many looks; None for no end.
        as_json: one JSON object per line.
    Raises: ServerUnavailable, ServerRefused: the first look failed, or the server refuses to be looked at.
    """
    from dotmac.platform.distributed_locks import DistributedLockManager

    changes = Changes()
    looks, away = 0, False
    with DistributedLockManager() as manager:
        while True:
            begun = time.monotonic()
            looks += 1
            try:
                locks = manager.list_locks_sync(queues=True)
            except ServerUnavailable as error:
                if looks == 1:
                    raise
                if not away:
                    show_error(error)
                away = True
            else:
                away = False
                for change in changes.since_last(locks, time.monotonic()):
                    sys.stdout.write((_as_json(change) if as_json else _as_text(change)) + "\n")
                sys.stdout.flush()
            if looks == count:
                return
            time.sleep(max(begun + interval - time.monotonic(), 0))


@dataclass(slots=True)
class _Seen:
    """A holder at the last look: when its lease ends, and whether the look before said the same."""

    holder: HolderInfo
    ends: float
    unrenewed: bool = False


@dataclass(slots=True)
class Changes:
    """What is different from the look before."""

    _held: dict[tuple[str, int], _Seen] = field(default_factory=dict)
    _waiting: dict[tuple[str, str], WaiterInfo] = field(default_factory=dict)
    _first: bool = True

    def since_last(self, locks: Iterable[LockInfo], now: float) -> Iterator[dict[str, Any]]:
        """Compares with the last look, and remembers this one.

        Args:
            locks: all of them, with their queues.
            now: monotonic seconds at which they were read.
        Returns: the changes, as JSON may have them: those that ended, then those that began.
        """
        held: dict[tuple[str, int], _Seen] = {}
        waiting: dict[tuple[str, str], WaiterInfo] = {}
        for lock in sorted(locks, key=lambda lock: lock.name):
            for holder in lock.holders:
                key = lock.name, holder.fencing_token
                ends, before = now + holder.remaining, self._held.get(key)
                held[key] = _Seen(holder, ends, before is not None and abs(ends - before.ends) < _BLUR)
            waiting.update({(lock.name, waiter.request): waiter for waiter in lock.queue})
        owners = {(name, seen.holder.owner) for (name, _), seen in held.items()}
        for (name, token), seen in self._held.items():
            if (name, token) not in held:
                lost = seen.unrenewed and seen.ends - _BLUR <= now
                yield _change("lost" if lost else "released", name, seen.holder)
        for (name, request), waiter in self._waiting.items():
            if (name, request) not in waiting and (name, waiter.owner) not in owners:
                yield _change("left", name, waiter)
        for (name, token), seen in held.items():
            if (name, token) not in self._held:
                yield _change("held" if self._first else "acquired", name, seen.holder)
        for (name, request), waiter in waiting.items():
            if (name, request) not in self._waiting:
                yield _change("waiting", name, waiter)
        self._held, self._waiting, self._first = held, waiting, False


def _change(event: str, lock: str, who: HolderInfo | WaiterInfo) -> dict[str, Any]:
    change = {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "lock": lock,
        "owner": who.owner,
        "session": who.session,
        "host": who.host,
        "pid": who.pid,
        "service": who.service,
    }
    token = getattr(who, "fencing_token", None)
    if token is not None:
        return {**change, "fencing_token": token, "place": getattr(who, "acquired_at", "")}
    return {**change, "position": getattr(who, "position", 0), "place": getattr(who, "waiting_at", "")}


def _as_json(change: dict[str, Any]) -> str:
    return json.dumps(change, ensure_ascii=False)


def _as_text(change: dict[str, Any]) -> str:
    number = (
        f"token {change['fencing_token']}" if "fencing_token" in change else f"place {change['position']}"
    )
    place = f" at {change['place']}" if change["place"] else ""
    return visible(
        f"{change['at']}  {change['event']:<8}  {change['lock']}  {number}  "
        f"{change['service']} {change['host']}:{change['pid']}{place}  {change['owner']}"
    )
