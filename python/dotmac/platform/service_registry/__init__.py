"""Service registry: register instances, find them, choose one. Names are loaded when first used (PEP 562)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.service_registry.config import LoadBalancingStrategy, ServiceRegistryConfig
    from dotmac.platform.service_registry.models import ServiceInstance
    from dotmac.platform.service_registry.registry import ServiceRegistry

_HOMES = {
    "LoadBalancingStrategy": "config",
    "ServiceInstance": "models",
    "ServiceRegistry": "registry",
    "ServiceRegistryConfig": "config",
}

__all__ = ["LoadBalancingStrategy", "ServiceInstance", "ServiceRegistry", "ServiceRegistryConfig"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
