"""One export, from the query to the complete file."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotmac.platform import _semconv
from dotmac.platform.audit_trail.exports.columns import NAMES
from dotmac.platform.audit_trail.exports.compression import COMPRESSIONS, compression_of, without_suffix
from dotmac.platform.audit_trail.exports.formats import BINARY, FORMATS, RESUMABLE, SUFFIXES, make_encoder
from dotmac.platform.audit_trail.exports.outputs import (
    FileOutput,
    Output,
    StreamOutput,
    UrlOutput,
    in_thread,
)
from dotmac.platform.audit_trail.exports.source import Snapshot, Source, TakerFailed
from dotmac.platform.audit_trail.ids import from_micros
from dotmac.platform.audit_trail.tenancy import tenant_of
from dotmac.platform.errors import InvalidArgument, ServerRefused
from dotmac.platform.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.audit_trail.database import Database
    from dotmac.platform.audit_trail.exports.formats import Encoder
    from dotmac.platform.audit_trail.exports.source import Place
    from dotmac.platform.audit_trail.filters import Filters
    from dotmac.platform.audit_trail.query import Order

__all__ = ["ExportProgress", "ExportSummary", "Target", "export", "target_of"]


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """How far an export is.

    Attributes: rows: events written. size: bytes written. at: time of the last event.
    """

    rows: int
    size: int
    at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        format, compression: of the file.
        rows: events in it.
        size: bytes of it, as it lies there.
        sha256: digest of those bytes.
        first, last: times of its first and last event, in its own order.
        as_of: moment whose events it holds: what was committed later is not in it.
        resumed_rows: events that an earlier, interrupted run had written.
        started_over: why an interrupted run's file was not gone on with; None where there was none.
    """

    format: str
    compression: str | None
    rows: int
    size: int
    sha256: str
    first: datetime | None
    last: datetime | None
    as_of: datetime
    resumed_rows: int = 0
    started_over: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON types."""
        told = {name: getattr(self, name) for name in self.__slots__}
        return {name: one.isoformat() if isinstance(one, datetime) else one for name, one in told.items()}


@dataclass(frozen=True, slots=True)
class Target:
    """Where an export goes and in which form."""

    output: Output
    format: str
    compression: str | None


def target_of(target: Any, format: str | None, compression: str | None, resume: bool) -> Target:  # noqa: A002 (as the argument is called)
    """What the arguments of `export_events` mean.

    Raises: InvalidArgument: names the one that is wrong. MissingExtra.
    """
    path = os.fspath(target) if isinstance(target, str | os.PathLike) else None
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if path is None and not callable(getattr(target, "write", None)):
        raise InvalidArgument("path_or_stream", target, "give a path, a URL or an object with `write`")
    if format is None and path is not None:
        format = SUFFIXES.get(Path(without_suffix(path)).suffix.lower())  # noqa: A001
    if format not in FORMATS:
        hint = "give one of " + ", ".join(FORMATS)
        raise InvalidArgument("format", format, hint if path is None else f"{hint}, or a name that tells")
    if compression is None and path is not None:
        compression = compression_of(path)
    if compression is not None and compression not in COMPRESSIONS:
        raise InvalidArgument("compression", compression, f"give one of {', '.join(COMPRESSIONS)}, or none")
    if compression is not None and format in BINARY:
        raise InvalidArgument("compression", compression, f"{format} is compressed in itself")
    return Target(_output(target, path, format, compression, resume), format, compression)


def _output(target: Any, path: str | None, format: str, compression: str | None, resume: bool) -> Output:  # noqa: A002 (as the argument is called)
    if path is None:
        stream = StreamOutput(target, compression)
        if stream.of_text and format in BINARY:
            raise InvalidArgument("path_or_stream", target, f"{format} needs a stream of bytes")
        return stream
    if "://" in path:
        return UrlOutput(path, compression)
    place = Path(path)
    if place.is_dir() or not place.name:
        raise InvalidArgument("path_or_stream", path, "it is a directory: give the name of a file")
    if not place.parent.is_dir():
        raise InvalidArgument("path_or_stream", path, "there is no such directory")
    return FileOutput(place, compression, keeps=resume and format in RESUMABLE)


async def export(
    database: Database,
    target: Target,
    filters: Filters,
    order: Order,
    take_snapshot: Callable[[], Any],
    *,
    tenant: str | None,
    timeout: float,
    progress: Callable[[ExportProgress], None] | None,
) -> ExportSummary:
    """Write all events of a query; see `AuditAggregator.export_events`.

    Args: tenant: whose events the database shows; None where that does not depend on a name.
    """
    began = time.monotonic()
    one = _Export(target, filters, order, tenant, progress)
    try:
        summary = await one.run(database, take_snapshot, timeout)
    except BaseException as error:
        kind = {_semconv.ERROR_TYPE: type(error).__qualname__}
        metrics.counter(_semconv.AUDIT_EXPORT_FAILURES).add(1, kind)
        await _undisturbed(one.abandon())
        raise
    kind = {_semconv.AUDIT_FORMAT: target.format}
    metrics.counter(_semconv.AUDIT_EXPORTED).add(summary.rows - summary.resumed_rows, kind)
    metrics.histogram(_semconv.AUDIT_EXPORT_DURATION).record(time.monotonic() - began, kind)
    return summary


class _Export:
    def __init__(
        self,
        target: Target,
        filters: Filters,
        order: Order,
        tenant: str | None,
        progress: Callable[[ExportProgress], None] | None,
    ) -> None:
        self._target = target
        self._output = target.output
        self._filters = filters
        self._order = order
        self._progress = progress
        self._snapshot: Snapshot | None = None
        self._first: Place | None = None
        self._wanted = {
            "format": target.format,
            "compression": target.compression,
            "columns": hashlib.sha256(",".join(NAMES).encode()).hexdigest()[:16],
            "order": order.value,
            "query": _identity(filters),
            "tenant": tenant,
        }

    async def run(
        self, database: Database, take_snapshot: Callable[[], Any], timeout: float
    ) -> ExportSummary:
        note, started_over = await self._output.resume(self._wanted)
        self._snapshot = Snapshot.from_dict(note["snapshot"]) if note else await take_snapshot()
        assert self._snapshot is not None
        resumed = int(note["rows"]) if note else 0
        after = _place(note["last"]) if note else None
        self._first = _place(note["first"]) if note else None
        encoder = make_encoder(self._target.format, resumed, self._title())
        if note is None:
            await self._output.write(encoder.head())

        # In a thread where it takes long; always in the same, since each keeps memory of what it allocated.
        pool = ThreadPoolExecutor(1, "dotmac-audit-export") if encoder.heavy else None

        async def run(work: Callable[..., bytes], *args: bytes) -> bytes:
            return work(*args) if pool is None else await in_thread(work, *args, pool=pool)

        async def take(piece: bytes) -> None:
            try:
                data = await run(encoder.feed, piece)
            except ValueError as error:
                text = f"the audit database's answer can't be read: {error}"
                raise ServerRefused(text) from error
            if data:
                await self._output.write(data)
            self._tell(encoder)

        async def pause() -> None:
            await self._output.checkpoint(self._note(encoder))

        named = tenant_of(self._filters)
        source = Source(database, self._filters, self._order, self._snapshot, timeout, named)
        try:
            await source.pour(encoder, after, take, pause)
            await self._output.write(await run(encoder.tail))
        except TakerFailed as failed:
            raise failed.error from None
        finally:
            if pool is not None:
                pool.shutdown()  # at once: nothing runs there any more
        digest = await self._output.finish()
        self._tell(encoder)
        first, last = self._first or encoder.first, encoder.last or after
        return ExportSummary(
            format=self._target.format,
            compression=self._target.compression,
            rows=encoder.rows,
            size=self._output.size,
            sha256=digest,
            first=from_micros(first[0]) if first else None,
            last=from_micros(last[0]) if last else None,
            as_of=self._snapshot.moment,
            resumed_rows=resumed,
            started_over=started_over,
        )

    async def abandon(self) -> None:
        await self._output.abandon()

    def _tell(self, encoder: Encoder) -> None:
        if self._progress is not None:
            last = encoder.last
            at = from_micros(last[0]) if last else None
            self._progress(ExportProgress(encoder.rows, self._output.size, at))

    def _note(self, encoder: Encoder) -> dict[str, Any]:
        assert self._snapshot is not None
        first, last = self._first or encoder.first, encoder.last
        return {
            "export": self._wanted,
            "snapshot": self._snapshot.to_dict(),
            "rows": encoder.rows,
            "first": [first[0], first[1].hex()] if first else None,
            "last": [last[0], last[1].hex()] if last else None,
        }

    def _title(self) -> list[tuple[str, str]]:
        assert self._snapshot is not None
        since, until = self._filters.start_time, self._filters.end_time
        told = [
            ("period", f"{since.isoformat() if since else '…'} to {until.isoformat() if until else '…'}"),
            ("as of", self._snapshot.moment.isoformat(timespec="seconds")),
        ]
        for name in self._filters.__slots__:
            value = getattr(self._filters, name)
            if value is not None and not name.endswith("_time"):
                shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                told.append((name.replace("_", " "), shown))
        return told


def _identity(filters: Filters) -> str:
    told = [f"{name}={getattr(filters, name)!r}" for name in filters.__slots__]
    return hashlib.sha256("\x1f".join(told).encode()).hexdigest()


def _place(said: Any) -> Place | None:
    return (int(said[0]), bytes.fromhex(said[1])) if said else None


async def _undisturbed(work: Any) -> None:
    """Finish a clean-up also where its caller is cancelled again meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                break
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
