"""Cold partitions as Parquet files, at any place that fsspec can write to.

A file holds one partition's rows in the order of (occurred_at, id), every column by its name: times as
microseconds in UTC, numbers as numbers, anything else (uuid, inet, jsonb …) as PostgreSQL writes it, so that
it reads back as the same value. PostgreSQL sends CSV and Arrow reads it: neither meets a Python object.
A file counts once it was read back whole: same SHA-256, same number of rows, in order and within its month.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import queue
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dotmac.platform.errors import ArchiveError, DotmacError, InvalidArgument, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime
    from uuid import UUID

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = [
    "Place",
    "Written",
    "archive_place",
    "columns_of",
    "export",
    "import_pyarrow",
    "open_place",
    "reading",
    "verify",
]

# More than a row's CSV can have: 1 MiB of metadata, blanks after each colon, quotes doubled.
_BLOCK = 16 << 20
_CHUNK = 1 << 20
_QUEUED = 16  # chunks of the COPY that wait for the file
_PATIENCE = 0.2  # seconds between looks at whether the other side is still there
_ARROW = {"bigint": "int64", "integer": "int32", "double precision": "float64"}
_COLUMNS = """
    SELECT attname AS name, format_type(atttypid, NULL) AS kind FROM pg_catalog.pg_attribute
    WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where archives go. `options`: what the file system is opened with, such as credentials."""

    url: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written: its rows, its size in bytes, its SHA-256."""

    events: int
    size: int
    sha256: bytes


def archive_place(place: Place, start: datetime, partition: str, archive: UUID) -> Place:
    """The file of one partition, by year; the id keeps a second archive of the same month apart."""
    base = place.url.rstrip("/")
    return Place(f"{base}/{start.year:04}/{partition}-{archive}.parquet", place.options)


def open_place(place: Place) -> tuple[Any, str]:
    """The file system and the path in it.

    Raises: MissingExtra: pyarrow, fsspec or the file system's own package is not installed. InvalidArgument.
    """
    import_pyarrow()
    import fsspec.core

    if "://" not in place.url and not place.url.startswith("/"):
        raise InvalidArgument(
            "archive_url", place.url, "give an absolute path or a URL such as s3://bucket/audit"
        )
    try:
        system, path = fsspec.core.url_to_fs(place.url, **place.options)
    except ImportError as error:
        raise MissingExtra(f"{place.url.partition(':')[0]} needs another package: {error}") from error
    except (ValueError, TypeError) as error:
        raise InvalidArgument("archive_url", place.url, f"give a URL that fsspec knows ({error})") from error
    return system, str(path)


async def columns_of(connection: Connection, table: str) -> list[tuple[str, str]]:
    """Names and types of a table's columns."""
    return [(row["name"], row["kind"]) for row in await connection.fetch(_COLUMNS, table)]


async def export(
    connection: Connection,
    partition: str,
    place: Place,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Write a partition's rows into a file; what stood there is replaced.

    Args: progress: called in another thread with the rows written so far.
    """
    columns = await columns_of(connection, partition)
    chosen = ", ".join(
        f'(extract(epoch FROM "{name}") * 1000000)::bigint'
        if kind == "timestamp with time zone"
        else f'"{name}"'
        for name, kind in columns
    )
    sql = f'SELECT {chosen} FROM "{partition}" ORDER BY occurred_at, id'  # noqa: S608 (names of our tables)
    pipe = _Pipe()
    writing = asyncio.create_task(asyncio.to_thread(_write, pipe, columns, place, progress))
    try:
        told = await connection.copy_from_query(sql, output=pipe.feed, format="csv")
        await pipe.end()
    except BaseException:
        pipe.break_off()
        with suppress(Exception):  # the first error says more than what it led to …
            await writing
        cause = writing.exception() if writing.done() and not writing.cancelled() else None
        if cause is not None and not isinstance(cause, _BrokenOff):
            raise cause from None  # … but here it was this side that stopped because of the other
        raise
    written = await writing
    if told != f"COPY {written.events}":
        raise ArchiveError(
            f"{place.url}: the database sent {told.split()[-1]} rows, {written.events} arrived"
        )
    return written


def _write(
    pipe: _Pipe, columns: list[tuple[str, str]], place: Place, progress: Callable[[int], None] | None
) -> Written:
    """Read the CSV, write the Parquet, hash it on the way. Runs in a thread."""
    try:
        return _write_file(pipe, columns, place, progress)
    except (_BrokenOff, DotmacError):
        raise
    except Exception as error:  # every file system has errors of its own
        raise ArchiveError(f"{place.url} can't be written: {type(error).__name__}: {error}") from error
    finally:
        pipe.break_off()


def _write_file(
    pipe: _Pipe, columns: list[tuple[str, str]], place: Place, progress: Callable[[int], None] | None
) -> Written:
    pa, parquet = import_pyarrow()
    from pyarrow import csv

    system, path = open_place(place)
    system.makedirs(system._parent(path), exist_ok=True)  # noqa: SLF001 (fsspec's own idiom)
    moments = {name for name, kind in columns if kind == "timestamp with time zone"}
    kinds = {
        name: pa.int64() if name in moments else pa.type_for_alias(_ARROW.get(kind, "string"))
        for name, kind in columns
    }
    schema = pa.schema(
        [
            pa.field(name, pa.timestamp("us", "UTC") if name in moments else kind)
            for name, kind in kinds.items()
        ]
    )
    events = 0
    with system.open(path, "wb") as file:
        sink = _Hashing(file)
        with parquet.ParquetWriter(
            sink, schema, compression="zstd", write_page_index=True, write_page_checksum=True
        ) as writer:
            for batch in _batches(csv, pipe, kinds):
                table = pa.Table.from_batches([batch]).cast(schema)
                writer.write_table(table)
                events += table.num_rows
                if progress is not None:
                    progress(events)
    _make_durable(system, path)
    return Written(events, sink.size, sink.digest())


def _batches(csv: Any, pipe: _Pipe, kinds: dict[str, Any]) -> Any:
    buffered = io.BufferedReader(pipe, _CHUNK)
    if not buffered.peek(1):
        return  # Arrow takes an empty file for a broken one
    yield from csv.open_csv(
        buffered,
        csv.ReadOptions(use_threads=False, block_size=_BLOCK, column_names=list(kinds)),
        csv.ParseOptions(newlines_in_values=True),
        # COPY writes NULL as nothing and an empty text as two quotes.
        csv.ConvertOptions(
            column_types=kinds, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )


def _make_durable(system: Any, path: str) -> None:
    """The partition is dropped next: on a local disk the file must be there after a power failure, too."""
    if "file" not in ([system.protocol] if isinstance(system.protocol, str) else system.protocol):
        return
    folder = os.path.dirname(path)  # noqa: PTH120 (a path of fsspec's)
    for name in (path, folder, os.path.dirname(folder)):  # noqa: PTH120
        handle = os.open(name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def reading(place: Place) -> Iterator[Any]:
    """A file for reading. Raises: ArchiveError: it is missing or can't be read."""
    system, path = open_place(place)
    try:
        with system.open(path, "rb") as file:
            yield file
    except DotmacError:
        raise
    except FileNotFoundError:
        raise ArchiveError(f"{place.url}: the archive is gone") from None
    except Exception as error:  # every file system has errors of its own, and Arrow has more
        raise ArchiveError(f"{place.url} can't be read: {type(error).__name__}: {error}") from error


def verify(place: Place, expected: Written, start: datetime, end: datetime) -> None:
    """Read a file back whole. Blocks: call it in a thread.

    Raises: ArchiveError: what is there is not what was written; says what differs.
    """
    with reading(place) as file:
        digest, size = hashlib.sha256(), 0
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    if digest.digest() != expected.sha256:
        raise ArchiveError(
            f"{place.url}: SHA-256 {digest.hexdigest()} and {size} bytes were read back, "
            f"{expected.sha256.hex()} and {expected.size} were written"
        )
    _, parquet = import_pyarrow()
    with reading(place) as file:
        found = parquet.ParquetFile(file, page_checksum_verification=True)
        if found.metadata.num_rows != expected.events:
            raise ArchiveError(f"{place.url}: {found.metadata.num_rows} rows instead of {expected.events}")
        last: tuple[datetime, str] | None = None
        for batch in found.iter_batches(columns=["occurred_at", "id"]):
            if not batch.num_rows:
                continue
            edges = [(batch[0][at].as_py(), batch[1][at].as_py()) for at in (0, -1)]
            if not start <= edges[0][0] <= edges[1][0] < end or (last is not None and edges[0] <= last):
                raise ArchiveError(f"{place.url}: rows out of order or outside of {start} to {end}")
            last = edges[1]
        for group in range(found.metadata.num_row_groups):
            found.read_row_group(group)  # every column can be decoded


class _BrokenOff(Exception):
    """The other side of the pipe is gone."""


class _Pipe(io.RawIOBase):
    """Bytes from the event loop to a thread that reads them as a file, a bounded number at a time."""

    def __init__(self) -> None:
        self._chunks: queue.Queue[bytes] = queue.Queue(_QUEUED)
        self._left = memoryview(b"")
        self._ended = False
        self._broken = False

    async def feed(self, data: bytes) -> None:
        """Hand bytes over; waits while the reader is behind."""
        while not self._broken:
            try:
                self._chunks.put_nowait(bytes(data))
            except queue.Full:
                await asyncio.sleep(0.002)
            else:
                return
        raise _BrokenOff("the archive can't be written")

    async def end(self) -> None:
        """Nothing more comes."""
        await self.feed(b"")

    def break_off(self) -> None:
        """Neither side waits for the other any more."""
        self._broken = True

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._left and not self._ended:
            try:
                chunk = self._chunks.get(timeout=_PATIENCE)
            except queue.Empty:
                if self._broken:
                    raise _BrokenOff("the database sends no more") from None
                continue
            self._ended = not chunk
            self._left = memoryview(chunk)
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


class _Hashing(io.RawIOBase):
    """A file that is hashed as it is written."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)
        self.size += len(view)
        return len(view)

    def digest(self) -> bytes:
        return self._digest.digest()


def import_pyarrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`. Raises: MissingExtra."""
    try:
        import fsspec  # noqa: F401 (looked for with the other)
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra(
            f"archives need pyarrow and fsspec ({error}): pip install 'dotmac-platform[archive]'"
        ) from error
    return pa, parquet
