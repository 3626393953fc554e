"""Settings of the audit trail, read from `AUDIT_TRAIL_*`. A leaf: it imports no service."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dotmac.platform.connection.config import PostgresUrl, RedisUrl, Seconds, Section

__all__ = ["AuditTrailConfig"]


class AuditTrailConfig(Section):
    """Settings of the audit trail.

    Args:
        postgres_url: where events are stored; None for the platform's (`DATABASE_URL`).
        redis_url: Redis or Valkey; None for the platform's (`REDIS_URL`).
        retention_days: days for which events are kept.
        anomaly_detection_enabled: score events as they are logged.
        anomaly_threshold: score in (0, 1] from which an event counts as an anomaly.
        batch_size: events that one commit stores at most.
        batch_wait_ms: milliseconds that the first event of a batch waits for others at most.
        max_pending: events that may wait for the database at once, 64 MiB of them at most; further ones
            are held up.
        timeout: seconds within which an event is durable or the call fails, and a query answers.
        connect_timeout: seconds to connect.
        pool_min_size: connections kept open.
        pool_max_size: connections at most.
        statement_cache_size: prepared statements kept per connection; 0 behind pgbouncer in transaction mode.
    """

    postgres_url: PostgresUrl | None = None
    redis_url: RedisUrl | None = None
    retention_days: int = Field(default=365, ge=1, le=36_525)
    anomaly_detection_enabled: bool = True
    anomaly_threshold: float = Field(default=0.5, gt=0, le=1, allow_inf_nan=False)
    batch_size: int = Field(default=5_000, ge=1, le=100_000)
    batch_wait_ms: float = Field(default=5.0, ge=0, le=10_000, allow_inf_nan=False)
    max_pending: int = Field(default=20_000, ge=1)
    timeout: Seconds = 10.0
    connect_timeout: Seconds = 5.0
    pool_min_size: int = Field(default=1, ge=0, le=1_000)
    pool_max_size: int = Field(default=4, ge=1, le=1_000)
    statement_cache_size: int = Field(default=100, ge=0, le=10_000)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.pool_min_size > self.pool_max_size:
            raise ValueError("pool_min_size must not be more than pool_max_size")
        return self
