"""Logs, metrics and traces.

Promises: importing and calling `get_logger` configures nothing; messages are readable, fields kept; secrets
never reach a record; trace ids do; `DEBUG=true` shows the platform's debug records on standard error, once;
without an SDK spans and instruments do nothing, with one they carry the names and units of `_semconv`; every
defined metric name follows the naming rules.
"""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest
from pydantic import SecretStr

from dotmac.platform import _semconv
from dotmac.platform.observability import metrics, tracing
from dotmac.platform.observability.unified_logging import configure_logging, get_logger


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=env,
        timeout=60,
    )


def test_records_are_readable_and_keep_their_fields(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("somebody.elses")
    with caplog.at_level(logging.INFO, "somebody.elses"):
        logger.bind(tenant="t1").info("stored %s", "it", seconds=0.5)
        logger.debug("unseen")
        try:
            int("broken")
        except ValueError:
            logger.exception("failed 100%", why="x")
    first, second = caplog.records
    assert first.getMessage() == "stored it tenant='t1' seconds=0.5"
    assert (first.fields, first.event, first.name) == (
        {"tenant": "t1", "seconds": 0.5},
        "stored it",
        "somebody.elses",
    )
    assert second.getMessage() == "failed 100% why='x'"
    assert second.exc_info[0] is ValueError


def test_secrets_never_reach_a_record(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        get_logger("x").info(
            "connecting to redis://u:hunter2@h/0",
            password="hunter2",
            db_password="hunter2",
            access_token="hunter2",
            key=SecretStr("hunter2"),
            nested={"headers": [{"Authorization": "hunter2"}]},
            url="postgresql://u:hunter2@h/d",
            odd=["redis://u:pass@hunter2@h/0", "redis://u@corp:hunter2@h/0", "redis://:/@hunter2@h"],
            fencing_token=7,
        )
    record = caplog.records[0]
    assert "hunter2" not in record.getMessage() + repr(record.__dict__)
    assert record.fields["fencing_token"] == 7


def test_json_lines_and_repeated_configuration() -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = io.StringIO()
    try:
        configure_logging("DEBUG", stream=io.StringIO())
        configure_logging("DEBUG", stream=stream)
        get_logger("app").warning("odd", what="thing", thing=object)
    finally:
        for handler in [one for one in root.handlers if one not in before]:
            root.removeHandler(handler)
        root.setLevel(level)
    (line,) = stream.getvalue().splitlines()
    assert (
        json.loads(line).items()
        >= {"level": "warning", "event": "odd", "what": "thing", "logger": "app"}.items()
    )


SILENT = """
import logging
from dotmac.platform.observability.unified_logging import get_logger
get_logger("dotmac.platform.x").debug("look", n=1)
assert not logging.getLogger().handlers
"""


def test_debug_shows_the_platforms_records_once_and_nothing_is_configured_otherwise() -> None:
    assert run(SILENT).stderr == ""
    shown = run(SILENT, DEBUG="true").stderr.splitlines()
    assert len(shown) == 1
    assert shown[0].endswith("DEBUG   dotmac.platform.x: look n=1")
    configured = run(
        f"import logging; logging.basicConfig(level=0)\n{SILENT.replace('assert', '0 and ')}", DEBUG="1"
    )
    assert len(configured.stderr.splitlines()) == 1


def test_without_an_sdk_nothing_is_recorded() -> None:
    with tracing.span("x", {"a": 1}) as span:
        assert not span.is_recording()
        assert tracing.trace_ids() is None
    metrics.counter(_semconv.LOCK_TIMEOUTS).add(1)
    with pytest.raises(KeyError):
        metrics.counter("dotmac.unheard.of")
    with pytest.raises(KeyError, match="not a histogram"):
        metrics.histogram(_semconv.LOCK_TIMEOUTS)


WITH_SDK = """
import json, logging
from opentelemetry import trace, metrics as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from dotmac.platform import _semconv
from dotmac.platform.observability import metrics, tracing
from dotmac.platform.observability.unified_logging import get_logger

for name, metric in _semconv.METRICS.items():  # made before the SDK is there
    getattr(metrics, metric.kind)(name)
exporter, reader, provider = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
api.set_meter_provider(MeterProvider([reader]))
for name, metric in _semconv.METRICS.items():
    instrument = getattr(metrics, metric.kind)(name)
    (instrument.add if metric.kind == "counter" else instrument.record)(1)
seen = []
class Keep(logging.Handler):
    def emit(self, record): seen.append(record.fields)
logging.getLogger("app").addHandler(Keep())
try:
    with tracing.span("outer", {"a": 1}):
        ids = tracing.trace_ids()
        get_logger("app").warning("inside")
        raise TimeoutError("secret text")
except TimeoutError:
    pass
assert seen == [{"trace_id": ids[0], "span_id": ids[1]}], seen
(span,) = exporter.get_finished_spans()
assert dict(span.attributes) == {"a": 1, "error.type": "TimeoutError"} and not span.events
assert span.status.status_code.name == "ERROR"
(resource,) = reader.get_metrics_data().resource_metrics
found = {m.name: m.unit for s in resource.scope_metrics for m in s.metrics}
assert found == {name: metric.unit for name, metric in _semconv.METRICS.items()}, found
"""


def test_with_an_sdk_everything_is_recorded_under_its_name() -> None:
    run(WITH_SDK)


def test_metric_names_follow_the_rules() -> None:
    for name, metric in _semconv.METRICS.items():
        assert name.startswith("dotmac.")
        assert name == name.lower()
        assert "total" not in name
        assert metric.description.endswith(".")
        assert metric.unit == "s" if name.endswith("duration") else metric.unit.startswith("{")
