"""Distributed locks: fair, fenced, renewed by the engine, and their holder is told when one is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

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

__getattr__, __dir__ = lazily(__name__, _HOMES)
