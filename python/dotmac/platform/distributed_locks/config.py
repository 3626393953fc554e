"""Settings of the lock manager, read from `DISTRIBUTED_LOCKS_*`. A leaf: it imports no service."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dotmac.platform.connection.config import Namespace, Partitions, RedisUrl, Seconds, Section

__all__ = ["DistributedLockConfig"]


class DistributedLockConfig(Section):
    """Settings of the lock manager.

    Args:
        redis_url: Redis or Valkey; None for the platform's (`REDIS_URL`).
        default_timeout: length of a lease, seconds, where a call names none.
        blocking_timeout: seconds to wait for a lock where a call names none; None without end.
        auto_renewal_enabled: keep leases alive while their process lives.
        deadlock_detection_enabled: refuse to wait where that would close a cycle.
        on_lost: what becomes of the body of a lost lock: it is cancelled (`cancel`) or only told (`flag`).
        release: what leaving a lock waits for: the server's answer (`confirmed`) or nothing (`pipelined`).
        namespace: first part of every key on the server.
        connect_timeout: seconds to connect.
        request_timeout: seconds for the server's answer to one request.
        partitions: how many a cluster's locks are spread over; None for 64, or what the address says.
        deadlock_victim: whose wait ends where one would close a cycle.
        wait_replicas: how many replicas have to know of a grant before it counts.
        max_loop_stall: seconds for which a holder's event loop may stand still before what its process holds
            is given up; None: it is kept.
    """

    redis_url: RedisUrl | None = None
    default_timeout: Seconds = Field(default=10.0, ge=0.1)
    blocking_timeout: Seconds | None = None
    auto_renewal_enabled: bool = True
    deadlock_detection_enabled: bool = True
    on_lost: Literal["cancel", "flag"] = "cancel"
    release: Literal["confirmed", "pipelined"] = "confirmed"
    namespace: Namespace = "dotmac"
    connect_timeout: Seconds = 5.0
    request_timeout: Seconds = 5.0
    partitions: Partitions | None = None
    deadlock_victim: Literal["youngest", "lowest_priority", "fewest_locks", "self"] = "youngest"
    wait_replicas: int = Field(default=0, ge=0)
    max_loop_stall: Seconds | None = None
