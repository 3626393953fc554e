"""Structured logs over the standard library.

    logger = get_logger(__name__)
    logger.info("order stored", order=17, seconds=0.2)

A record's message is readable by itself (`order stored order=17 seconds=0.2`); the fields are also in
`record.fields`, and the id of the current trace is added. Values under names like `password` and passwords in
URLs are masked. Nothing is configured by importing or calling this: records go where the application sends
the standard library's. `configure_logging()` is for applications that have no set-up of their own, and
`DEBUG=true` in the environment makes the platform's own loggers write everything to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Final, TextIO

import structlog

from dotmac.platform.observability.tracing import trace_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

__all__ = ["configure_logging", "enable_debug", "get_logger"]

PLATFORM: Final = "dotmac.platform"
MASK: Final = "***"

_TRUE = ("1", "true", "yes", "on")
_DEEPEST = 6
_SECRET_NAME = re.compile(
    r"(?i)(^|[_-])(password|passwd|pwd|passphrase|secret|authorization|cookie|credentials?|"
    r"(api|private|secret|signing|encryption)[_-]?key|(access|refresh|id|auth|session|csrf|bearer)[_-]?token)$|^token$"
)
# Up to the last @, as a password may hold one: hides too much rather than too little.
_LOGIN = re.compile(r"(://[^\s:/]*):\S*@")
_OURS = "_dotmac"


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A structured logger over `logging.getLogger(name)`.

    Args:
        name: usually `__name__`; levels and handlers are those of the standard library's logger of that name.
    """
    if os.environ.get("DEBUG", "").strip().lower() in _TRUE:
        enable_debug()
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _add_trace,
            _redact,
            _to_record,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return logger


def configure_logging(
    level: int | str = logging.INFO, *, as_json: bool | None = None, stream: TextIO | None = None
) -> None:
    """Send all records of the process to one stream, as lines for people or as JSON objects.

    For applications without a logging set-up of their own; calling it again replaces what it did before and
    touches no other handler.

    Args:
        level: the least level that is written.
        as_json: one JSON object per line; None for JSON unless the stream is a terminal.
        stream: where to write; standard error by default.
    """
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(_Json() if (not target.isatty() if as_json is None else as_json) else _Readable())
    setattr(handler, _OURS, True)
    root = logging.getLogger()
    for old in [one for one in root.handlers if getattr(one, _OURS, False)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)


def enable_debug() -> None:
    """Make the platform's own loggers write everything to standard error, unless the application has set up
    handlers, which then get it. Called for `DEBUG=true`."""
    logger = logging.getLogger(PLATFORM)
    logger.setLevel(logging.DEBUG)
    if not any(isinstance(handler, _UntilConfigured) for handler in logger.handlers):
        handler = _UntilConfigured()
        handler.setFormatter(_Readable())
        logger.addHandler(handler)


class _UntilConfigured(logging.StreamHandler[TextIO]):
    """Writes while the root logger has no handlers: afterwards each record would be written twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr  # the one of now: it may have been replaced since the handler was made
            super().emit(record)


class _Readable(logging.Formatter):
    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", None) or record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _add_trace(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if (ids := trace_ids()) is not None:
        event.setdefault("trace_id", ids[0])
        event.setdefault("span_id", ids[1])
    return event


def _redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    return {name: _masked(name, value, 0) for name, value in event.items()}


def _masked(name: object, value: Any, depth: int) -> Any:
    if isinstance(name, str) and _SECRET_NAME.search(name) and value is not None:
        return MASK
    if hasattr(value, "get_secret_value"):
        return MASK
    if isinstance(value, str):
        return _LOGIN.sub(rf"\1:{MASK}@", value)
    if depth < _DEEPEST:
        if isinstance(value, dict):
            return {key: _masked(key, inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [_masked(None, inner, depth + 1) for inner in value]
    return value


def _to_record(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[str, str], dict[str, Any]]:
    """Arguments for the standard library's logger."""
    passed = {key: event.pop(key) for key in ("exc_info", "stack_info", "stacklevel") if key in event}
    text = str(event.pop("event", ""))
    line = " ".join([text, *(f"{key}={value!r}" for key, value in event.items())])
    return ("%s", line), {"extra": {"event": text, "fields": dict(event)}, **passed}
