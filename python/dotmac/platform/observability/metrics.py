"""The platform's instruments, by the names in `_semconv`.

Made on first use through the OpenTelemetry API. Without an SDK a call on one costs a fraction of a
microsecond; an SDK that the application sets up later is picked up by the instruments that exist already.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from dotmac.platform import _semconv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation

__all__ = ["counter", "histogram", "observe"]


@cache
def counter(name: str) -> Counter:
    """The counter of that name; raises KeyError for a name that `_semconv` doesn't define."""
    return _meter().create_counter(name, unit=_defined(name, "counter").unit, description=_about(name))


@cache
def histogram(name: str) -> Histogram:
    """The histogram of that name; raises KeyError for a name that `_semconv` doesn't define."""
    return _meter().create_histogram(name, unit=_defined(name, "histogram").unit, description=_about(name))


def observe(name: str, read: Callable[[], int]) -> None:
    """Reports a counter that is kept elsewhere: `read` is called at collection, in any thread."""

    def look(_: CallbackOptions) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation

        return [Observation(read())]

    _meter().create_observable_counter(
        name, callbacks=[look], unit=_defined(name, "counter").unit, description=_about(name)
    )


@cache
def _meter() -> Meter:
    from opentelemetry import metrics

    return metrics.get_meter(_semconv.SCOPE)


def _defined(name: str, kind: str) -> _semconv.Metric:
    metric = _semconv.METRICS[name]
    if metric.kind != kind:
        raise KeyError(f"{name} is a {metric.kind}, not a {kind}")
    return metric


def _about(name: str) -> str:
    return _semconv.METRICS[name].description
