"""Settings of the service registry, read from `SERVICE_REGISTRY_*`. A leaf: it imports no service."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from dotmac.platform.connection.config import Namespace, Partitions, RedisUrl, Seconds, Section

__all__ = ["LoadBalancingStrategy", "ServiceRegistryConfig"]


class LoadBalancingStrategy(StrEnum):
    """How one of several instances is chosen."""

    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    LEAST_CONNECTIONS = "least_connections"
    POWER_OF_TWO = "power_of_two"
    PEAK_EWMA = "peak_ewma"


class ServiceRegistryConfig(Section):
    """Settings of the service registry.

    Args:
        redis_url: Redis or Valkey; None for the platform's (`REDIS_URL`).
        default_ttl: seconds for which a registration outlives its process, where a call names none.
        health_check_interval: seconds between two health checks of one instance.
        health_check_timeout: seconds for one health check.
        health_check_rise: successes in a row that make an instance healthy.
        health_check_fall: failures in a row that make it unhealthy.
        load_balancing_strategy: how `get_service` chooses, where a call doesn't say.
        namespace: first part of every key on the server.
        connect_timeout: seconds to connect.
        request_timeout: seconds for the server's answer to one request.
        partitions: how many a cluster's services are spread over; None for 64, or what the address says.
    """

    redis_url: RedisUrl | None = None
    default_ttl: Seconds = 60.0
    health_check_interval: Seconds = 30.0
    health_check_timeout: Seconds = 5.0
    health_check_rise: int = Field(default=2, ge=1, le=100)
    health_check_fall: int = Field(default=3, ge=1, le=100)
    load_balancing_strategy: LoadBalancingStrategy = LoadBalancingStrategy.ROUND_ROBIN
    namespace: Namespace = "dotmac"
    connect_timeout: Seconds = 5.0
    request_timeout: Seconds = 5.0
    partitions: Partitions | None = None
