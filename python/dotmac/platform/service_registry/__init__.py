"""Service registry: register instances, find them, choose one. Names are loaded when first used (PEP 562)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
