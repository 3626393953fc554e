"""Spans through the OpenTelemetry API; without an SDK about a microsecond, and nothing is recorded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import get_current
from opentelemetry.trace import INVALID_SPAN, ProxyTracerProvider, SpanKind, Status, StatusCode

from dotmac.platform._semconv import ERROR_TYPE, SCOPE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

__all__ = ["span", "trace_ids"]

_BELIEVED = 0.25  # seconds


def span(
    name: str, attributes: Mapping[str, AttributeValue] | None = None, *, kind: SpanKind = SpanKind.CLIENT
) -> AbstractContextManager[Span]:
    """A span around a block; an error that leaves the block is noted by its type and passes on.

    Use it inside one function and never across a `yield`: the current span belongs to the context.
    """
    if not _sdk.present():
        return _NOTHING
    return _Recorded(name, attributes, kind)


def trace_ids() -> tuple[str, str] | None:
    """Trace and span id of the current span as hexadecimal text; None outside of any span."""
    if not get_current():
        return None  # nothing at all is set, which is quicker to see
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


class _Sdk:
    """Whether an SDK was set up. Asking costs microseconds, so a "no" is believed for a while."""

    __slots__ = ("_ask_again", "_present")

    def __init__(self) -> None:
        self._present, self._ask_again = False, 0.0

    def present(self) -> bool:
        if not self._present and (now := time.monotonic()) >= self._ask_again:
            self._ask_again = now + _BELIEVED
            self._present = not isinstance(trace.get_tracer_provider(), ProxyTracerProvider)
        return self._present


_sdk = _Sdk()


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> Span:
        return INVALID_SPAN

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


class _Recorded:
    __slots__ = ("_manager", "_span")

    def __init__(self, name: str, attributes: Mapping[str, AttributeValue] | None, kind: SpanKind) -> None:
        tracer = trace.get_tracer(SCOPE)
        self._span = tracer.start_span(name, kind=kind, attributes=dict(attributes or {}))
        self._manager = trace.use_span(
            self._span, end_on_exit=True, record_exception=False, set_status_on_exception=False
        )

    def __enter__(self) -> Span:
        return self._manager.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        if kind is not None:
            self._span.set_attribute(ERROR_TYPE, kind.__qualname__)
            self._span.set_status(Status(StatusCode.ERROR))
        self._manager.__exit__(kind, error, trace_back)
