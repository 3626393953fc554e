"""Taking an export in again: the same events, under the same ids."""

from __future__ import annotations

import asyncio
import io
import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dotmac.platform._native import AuditEntry
from dotmac.platform.audit_trail.entry import MAX_TEXT, make_encoder, make_entry
from dotmac.platform.audit_trail.exports.columns import NAMES
from dotmac.platform.audit_trail.exports.compression import (
    COMPRESSIONS,
    compression_of,
    damages,
    decompressed,
    without_suffix,
)
from dotmac.platform.audit_trail.exports.extras import extra
from dotmac.platform.audit_trail.exports.formats import SUFFIXES
from dotmac.platform.audit_trail.exports.outputs import in_thread
from dotmac.platform.audit_trail.exports.pack import packed
from dotmac.platform.audit_trail.exports.readers import READABLE, BadRecord, Exact, read_records
from dotmac.platform.audit_trail.ids import from_micros
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dotmac.platform._native import AuditEncoder

__all__ = ["RestoreProgress", "RestoreSummary", "entry_of", "restore"]

_BLOCK_ROWS = 2_000
_BLOCK_SIZE = 8 << 20
_MOST_KEPT = 100


@dataclass(frozen=True, slots=True)
class RestoreProgress:
    """How far reading an export back is: records read, events stored and bad records so far."""

    records: int
    stored: int
    bad: int


@dataclass(slots=True)
class RestoreSummary:
    """What reading an export back did.

    Attributes:
        records: records read.
        stored: events that were new.
        present: events that were there already, and were left as they are.
        bad: records that could not be read.
        bad_records: the first hundred of them: number (from 1) and why.
        first, last: times of the earliest and the latest event.
    """

    records: int = 0
    stored: int = 0
    present: int = 0
    bad: int = 0
    bad_records: list[tuple[int, str]] = field(default_factory=list)
    first: datetime | None = None
    last: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON types."""
        return {
            "records": self.records,
            "stored": self.stored,
            "present": self.present,
            "bad": self.bad,
            "bad_records": [{"record": number, "why": why} for number, why in self.bad_records],
            "first": self.first.isoformat() if self.first else None,
            "last": self.last.isoformat() if self.last else None,
        }


async def restore(
    audit: Any,
    source: Any,
    format: str | None,  # noqa: A002 (as the argument is called)
    compression: str | None,
    progress: Callable[[RestoreProgress], None] | None,
    *,
    hashed: bool,
) -> RestoreSummary:
    """See `AuditAggregator.import_events`."""
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    path = os.fsdecode(path) if isinstance(path, bytes) else path
    if path is not None:
        format = format or SUFFIXES.get(Path(without_suffix(path)).suffix.lower())  # noqa: A001
        compression = compression or compression_of(path)
    elif not callable(getattr(source, "read", None)):
        raise InvalidArgument("path_or_stream", source, "give a path, a URL or an object with `read`")
    if format not in READABLE:
        raise InvalidArgument("format", format, f"give one of {', '.join(READABLE)}, or a name that tells")
    if compression is not None and compression not in COMPRESSIONS:
        raise InvalidArgument("compression", compression, f"give one of {', '.join(COMPRESSIONS)}, or none")
    file = await in_thread(_open, source, path)
    summary = RestoreSummary()
    encoder = make_encoder(hashed=False)  # what is scored was scored when it was logged
    try:
        records = _told(read_records(decompressed(file, compression), format), compression)
        while entries := await in_thread(_block, records, summary, encoder, hashed):
            new = await audit.store_rows(entries)
            summary.stored += sum(new)
            summary.present += len(new) - sum(new)
            if progress is not None:
                progress(RestoreProgress(summary.records, summary.stored, summary.bad))
    except _Damaged as error:
        text = f"after {summary.records} records: {error}"
        raise InvalidArgument("path_or_stream", path or source, text) from error.__cause__
    finally:
        if path is not None:
            await asyncio.shield(asyncio.to_thread(file.close))
    return summary


def _open(source: Any, path: str | None) -> BinaryIO:
    try:
        if path is None:
            opened: Any = source
            return opened if hasattr(source, "readline") else io.BufferedReader(source)
        if "://" in path:
            fsspec = extra("fsspec", f"the URL {path.partition('://')[0]}://…")
            remote: BinaryIO = fsspec.open(path, "rb").open()
            return remote
        return Path(path).open("rb")
    except OSError as error:
        text = f"give a readable file ({error.strerror or error})"
        raise InvalidArgument("path_or_stream", path, text) from error


def _block(
    records: Iterator[dict[str, Any] | BadRecord],
    summary: RestoreSummary,
    encoder: AuditEncoder,
    hashed: bool,
) -> list[AuditEntry]:
    """The next events, about as many as one commit takes; bad records are counted. Empty at the end."""
    entries: list[AuditEntry] = []
    size = 0
    for record in records:
        summary.records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            entry = entry_of(encoder, record, hashed=hashed)
        except (ValueError, OverflowError, RecursionError) as error:
            summary.bad += 1
            if len(summary.bad_records) < _MOST_KEPT:
                summary.bad_records.append((summary.records, str(error)[:300]))
            continue
        entries.append(entry)
        size += entry.size
        moment = from_micros(entry.occurred_at)
        summary.first = min(summary.first or moment, moment)
        summary.last = max(summary.last or moment, moment)
        if len(entries) >= _BLOCK_ROWS or size >= _BLOCK_SIZE:
            break
    return entries


class _Damaged(Exception):
    """The file as a whole can't be read any further."""


def _told(
    records: Iterator[dict[str, Any] | BadRecord], kind: str | None
) -> Iterator[dict[str, Any] | BadRecord]:
    try:
        yield from records
    except damages(kind) as error:
        raise _Damaged(str(error) or type(error).__name__) from error


def entry_of(encoder: AuditEncoder, said: dict[str, Any], *, hashed: bool) -> AuditEntry:
    """The event of an exported record, checked as `log_event` checks its arguments.

    Args: hashed: give it a leaf hash, for the trail's integrity.
    Raises: ValueError: names what is wrong.
    """
    if unknown := sorted(set(said) - set(NAMES)):
        raise ValueError(f"unknown name {unknown[0]!r}; known: {', '.join(NAMES)}")
    for name in ("id", "occurred_at", "category", "action"):
        if said.get(name) is None:
            raise ValueError(f"{name!r} is missing")
    when = said["occurred_at"]
    moment = datetime.fromisoformat(when) if isinstance(when, str) else when
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValueError(f"occurred_at: {when!r} is no time with a zone")
    made = make_entry(
        encoder,
        category=said["category"],
        action=said["action"],
        level=said.get("level"),
        outcome=said.get("outcome") or "unknown",
        user_id=said.get("user_id"),
        tenant_id=said.get("tenant_id"),
        resource_type=said.get("resource_type"),
        resource_id=said.get("resource_id"),
        ip_address=said.get("ip_address"),
        correlation_id=said.get("correlation_id"),
        metadata=said.get("metadata"),
        personal=said.get("personal"),
        subject_id=said.get("subject_id"),
        occurred_at=moment,
        event_id=said["id"],
    )
    fields = made.fields() | {
        "trace_id": _text("trace_id", said.get("trace_id")),
        "span_id": _text("span_id", said.get("span_id")),
        "anomaly_score": _score(said.get("anomaly_score")),
        "anomaly_reasons": _reasons(said.get("anomaly_reasons")),
    }
    if said.get("ip_address") is None:
        fields["ip_address"] = None  # it may have been read out of the metadata
    for name in ("metadata", "personal"):
        if said.get(name) is not None:
            fields[name] = _exactly(said[name], fields[name])
    return AuditEntry.from_row(packed(fields), hashed=hashed)


def _text(name: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_TEXT or "\x00" in value:
        raise ValueError(f"{name}: {value!r:.80} is not allowed")
    value.encode()
    return value


def _score(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"anomaly_score: {value!r:.80} is not a number from 0 to 1")
    return float(value)


def _reasons(value: object) -> str | None:
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"anomaly_reasons: {value!r:.80} is not a list of texts")
    told = json.dumps(list(value), ensure_ascii=False)
    told.encode()
    if "\\u0000" in told:
        raise ValueError("anomaly_reasons: the NUL character is not allowed")
    return told


def _exactly(stated: Any, encoded: str) -> str:
    """The metadata as text, with the digits of those numbers that no float holds."""
    return "".join(_written(stated)) if any(isinstance(one, Exact) for one in _leaves(stated)) else encoded


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _written(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        for place, (key, item) in enumerate(value.items()):
            yield ("{" if place == 0 else ",") + json.dumps(key, ensure_ascii=False) + ":"
            yield from _written(item)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield "[" if place == 0 else ","
            yield from _written(item)
        yield "]" if value else "[]"
    elif isinstance(value, Exact):
        yield value.text
    else:
        yield json.dumps(value, ensure_ascii=False)
