"""Whether telemetry reaches anybody: asked for every lock, so that all the rest costs nothing there."""

from __future__ import annotations

from typing import Any

from opentelemetry import trace

from dotmac.platform import _semconv
from dotmac.platform.observability import metrics

__all__ = ["wanted"]

_instrument: Any = None


def wanted() -> bool:
    """True from the moment on at which an SDK for spans or for metrics is set up."""
    # The API has no cheap question for either, but keeps what is not set up yet as None. With a version that
    # does so no more, this is an AttributeError, and every lock has its telemetry.
    try:
        return _instrument._real_instrument is not None or trace._TRACER_PROVIDER is not None  # noqa: SLF001
    except AttributeError:
        return _ask()


def _ask() -> bool:
    global _instrument  # noqa: PLW0603 - made on first use, so that importing this sets nothing up
    if _instrument is not None:
        return True
    # Both look at the environment, which may name a provider.
    trace.get_tracer_provider()
    _instrument = metrics.histogram(_semconv.LOCK_ACQUIRE_DURATION)
    return wanted()
