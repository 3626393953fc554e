"""Logs, metrics and traces: structlog over the standard library, and the OpenTelemetry API."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dotmac.platform.observability.unified_logging import configure_logging, get_logger

__all__ = ["configure_logging", "get_logger"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.unified_logging"), name)
