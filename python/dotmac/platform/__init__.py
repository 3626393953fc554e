"""Distributed locks, service registry, audit trail, configuration and observability.

Importing this package imports none of its parts: each name below is loaded when it is first used (PEP 562).
"""

from __future__ import annotations

from dotmac.platform._lazy import lazily

# As type checkers know it: importing `typing` itself would take most of this package's import time.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from dotmac.platform._native import __version__
    from dotmac.platform.audit_trail import AuditAggregator, AuditCategory, AuditLevel
    from dotmac.platform.core.unified_config import PlatformConfig, get_config
    from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
    from dotmac.platform.observability.unified_logging import get_logger
    from dotmac.platform.service_registry import ServiceInstance, ServiceRegistry

_HOMES = {
    "AuditAggregator": "audit_trail",
    "AuditCategory": "audit_trail",
    "AuditLevel": "audit_trail",
    "DistributedLock": "distributed_locks",
    "DistributedLockManager": "distributed_locks",
    "PlatformConfig": "core.unified_config",
    "ServiceInstance": "service_registry",
    "ServiceRegistry": "service_registry",
    "__version__": "_native",
    "get_config": "core.unified_config",
    "get_logger": "observability.unified_logging",
}

__all__ = [
    "AuditAggregator",
    "AuditCategory",
    "AuditLevel",
    "DistributedLock",
    "DistributedLockManager",
    "PlatformConfig",
    "ServiceInstance",
    "ServiceRegistry",
    "__version__",
    "get_config",
    "get_logger",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
