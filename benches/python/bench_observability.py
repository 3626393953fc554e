"""What telemetry costs where no SDK is installed."""

from __future__ import annotations

import pytest

from dotmac.platform import _semconv
from dotmac.platform.observability import metrics, tracing


@pytest.mark.benchmark(group="telemetry")
def test_counter(benchmark) -> None:
    benchmark(lambda: metrics.counter(_semconv.LOCK_TIMEOUTS).add(1))


@pytest.mark.benchmark(group="telemetry")
def test_histogram(benchmark) -> None:
    benchmark(lambda: metrics.histogram(_semconv.LOCK_ACQUIRE_DURATION).record(0.1))


@pytest.mark.benchmark(group="telemetry")
def test_span(benchmark) -> None:
    def work() -> None:
        with tracing.span(_semconv.SPAN_LOCK_ACQUIRE):
            pass

    benchmark(work)
