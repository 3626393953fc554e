"""Distributed locks: fair, fenced, renewed by the engine, and their holder is told when one is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.distributed_locks.config import DistributedLockConfig
    from dotmac.platform.distributed_locks.holding import LostSignal
    from dotmac.platform.distributed_locks.info import (
        HolderInfo,
        LockInfo,
        OwnerInfo,
        WaitEdge,
        WaiterInfo,
        WaitGraph,
    )
    from dotmac.platform.distributed_locks.lock import DistributedLock
    from dotmac.platform.distributed_locks.manager import DistributedLockManager
    from dotmac.platform.distributed_locks.quorum import QuorumLock, QuorumLockManager
    from dotmac.platform.distributed_locks.quorum_token import QuorumToken
    from dotmac.platform.distributed_locks.several import SeveralLocks

_HOMES = {
    "DistributedLock": "lock",
    "DistributedLockConfig": "config",
    "DistributedLockManager": "manager",
    "HolderInfo": "info",
    "LockInfo": "info",
    "LostSignal": "holding",
    "OwnerInfo": "info",
    "QuorumLock": "quorum",
    "QuorumLockManager": "quorum",
    "QuorumToken": "quorum_token",
    "SeveralLocks": "several",
    "WaitEdge": "info",
    "WaitGraph": "info",
    "WaiterInfo": "info",
}

__all__ = [
    "DistributedLock",
    "DistributedLockConfig",
    "DistributedLockManager",
    "HolderInfo",
    "LockInfo",
    "LostSignal",
    "OwnerInfo",
    "QuorumLock",
    "QuorumLockManager",
    "QuorumToken",
    "SeveralLocks",
    "WaitEdge",
    "WaitGraph",
    "WaiterInfo",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
