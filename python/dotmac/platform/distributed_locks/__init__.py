"""Distributed locks: fair, fenced, renewed by the engine, and their holder is told when one is lost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dotmac.platform.distributed_locks.config import DistributedLockConfig
    from dotmac.platform.distributed_locks.holding import LostSignal
    from dotmac.platform.distributed_locks.lock import DistributedLock
    from dotmac.platform.distributed_locks.manager import DistributedLockManager, LockInfo

_HOMES = {
    "DistributedLock": "lock",
    "DistributedLockConfig": "config",
    "DistributedLockManager": "manager",
    "LockInfo": "manager",
    "LostSignal": "holding",
}

__all__ = ["DistributedLock", "DistributedLockConfig", "DistributedLockManager", "LockInfo", "LostSignal"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
