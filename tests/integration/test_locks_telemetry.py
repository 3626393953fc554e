"""Spans and durations of locks.

Promises: from the moment on at which an SDK is set up, for metrics or for traces, each acquisition has its
span, and acquisition and hold their durations, in loops and in threads; before that nothing is recorded and
nothing fails; a lock that was acquired before and is given back after is left out.
"""

from __future__ import annotations

import asyncio

import pytest

from support.locks import python

RECORDED = """
import asyncio, sys
from opentelemetry import trace, metrics as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from dotmac.platform import _semconv
from dotmac.platform.errors import LockTimeout
from support.locks import manager_at

exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()

def set_up_traces():
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)

def set_up_metrics():
    api.set_meter_provider(MeterProvider([reader]))

def counted():
    found = {}
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    found[metric.name] = getattr(point, "count", None) or getattr(point, "value", 0)
    return found

async def main(url, namespace, traces, meters):
    async with manager_at(url, namespace) as locks:
        async with locks.acquire_lock("before"):
            pass
        across = locks.acquire_lock("across")
        async with across:
            if traces:
                set_up_traces()
            if meters:
                set_up_metrics()
        async with locks.acquire_lock("a") as lock:
            try:
                async with locks.acquire_lock("a", owner="other", blocking_timeout=0):
                    pass
            except LockTimeout:
                pass
        by_hand = locks.acquire_lock("b")
        await by_hand.acquire()
        await by_hand.release()

        def blocking():
            with locks.acquire_lock("c"):
                pass

        await asyncio.to_thread(blocking)
        found = counted()
        spans = [span.name for span in exporter.get_finished_spans()]
    acquired, held = found.get(_semconv.LOCK_ACQUIRE_DURATION), found.get(_semconv.LOCK_HOLD_DURATION)
    if meters:
        assert (acquired, held) == (3, 3), found
        assert found[_semconv.LOCK_TIMEOUTS] == 1, found
    if traces:
        assert spans == [_semconv.SPAN_LOCK_ACQUIRE] * 4, spans
    assert trace.get_current_span() is trace.INVALID_SPAN

asyncio.run(main(sys.argv[1], sys.argv[2], "traces" in sys.argv, "metrics" in sys.argv))
"""


@pytest.mark.parametrize("what", ["traces", "metrics", "both", "none"])
async def test_what_is_recorded(valkey_url: str, unique: str, what: str) -> None:
    both = ["traces", "metrics"]
    process = python(RECORDED, valkey_url, unique, *(both if what == "both" else [what]))
    _, err = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, err
