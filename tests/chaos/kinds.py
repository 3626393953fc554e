"""The kinds of lock that workers use, and how each is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager

    Make = Callable[..., DistributedLock]

ALL = 1_000  # what a writer takes of a lock that readers share: more than there are readers


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to ask for a lock.

    Args:
        name: what people call it.
        family: first part of the names of the locks that it is used on.
        cost, capacity: how much of the lock one holder takes, of how much: holders exclude each other when
            there is not enough for all of them.
        mode: what the register checks of its tokens, see `register.py`.
        make: the lock, from a manager, a name and keyword arguments.
        weight: how often it is chosen, beside the others.
        again: its holder may enter it once more.
    """

    name: str
    family: str
    cost: int
    capacity: int
    mode: str
    make: Make
    weight: int = 1
    again: bool = False


def _exclusive(locks: DistributedLockManager, name: str, **arguments: Any) -> DistributedLock:
    return locks.acquire_lock(name, **arguments)


def _reentrant(locks: DistributedLockManager, name: str, **arguments: Any) -> DistributedLock:
    return locks.acquire_lock(name, reentrant=True, **arguments)


def _reader(locks: DistributedLockManager, name: str, **arguments: Any) -> DistributedLock:
    return locks.read_lock(name, **arguments)


def _writer(locks: DistributedLockManager, name: str, **arguments: Any) -> DistributedLock:
    return locks.write_lock(name, **arguments)


def _pair(locks: DistributedLockManager, name: str, **arguments: Any) -> DistributedLock:
    return locks.semaphore(name, 2, **arguments)


def _few(locks: DistributedLockManager, name: str, **arguments: Any) -> DistributedLock:
    return locks.semaphore(name, 3, **arguments)


EXCLUSIVE = Kind("exclusive", "x", 1, 1, "write", _exclusive, weight=6)
KINDS: tuple[Kind, ...] = (
    EXCLUSIVE,
    Kind("reentrant", "x", 1, 1, "write", _reentrant, weight=2, again=True),
    Kind("reader", "r", 1, ALL, "read", _reader, weight=4),
    Kind("writer", "r", ALL, ALL, "write", _writer, weight=2),
    Kind("one of two", "p", 1, 2, "any", _pair, weight=2),
    Kind("one of three", "f", 1, 3, "any", _few, weight=1),
)
