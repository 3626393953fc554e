"""Logs, metrics and traces: structlog over the standard library, and the OpenTelemetry API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.observability.unified_logging import configure_logging, get_logger

__all__ = ["configure_logging", "get_logger"]

_HOMES = dict.fromkeys(__all__, "unified_logging")

__getattr__, __dir__ = lazily(__name__, _HOMES)
