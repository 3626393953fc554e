"""FastAPI: locks as dependencies, errors as answers, the audit trail over HTTP, a lock manager for an app."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.contrib.fastapi.audit import audit_router
    from dotmac.platform.contrib.fastapi.audit_access import AuditAccess, unprotected
    from dotmac.platform.contrib.fastapi.errors import install_error_handlers
    from dotmac.platform.contrib.fastapi.locks import lifespan, lock

_HOMES = {
    "AuditAccess": "audit_access",
    "audit_router": "audit",
    "install_error_handlers": "errors",
    "lifespan": "locks",
    "lock": "locks",
    "unprotected": "audit_access",
}

__all__ = ["AuditAccess", "audit_router", "install_error_handlers", "lifespan", "lock", "unprotected"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
