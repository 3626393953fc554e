"""The formats of an export: each takes COPY's pieces and gives bytes of its own."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, Final, Protocol

from dotmac.platform._native import RowFormatter, RowReader
from dotmac.platform.audit_trail.exports.columns import KINDS, NAMES
from dotmac.platform.audit_trail.exports.extras import extra
from dotmac.platform.audit_trail.ids import from_micros

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dotmac.platform.audit_trail.exports.source import Place

__all__ = ["FORMATS", "RESUMABLE", "SUFFIXES", "Encoder", "make_encoder"]

FORMATS: Final = ("json", "ndjson", "csv", "parquet", "pdf", "ocsf")
# A row can be added to their text; a Parquet file or a PDF is whole or nothing.
RESUMABLE: Final = ("json", "ndjson", "csv", "ocsf")
BINARY: Final = ("parquet", "pdf")
SUFFIXES: Final = {
    ".json": "json",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pdf": "pdf",
}
_BATCH_ROWS, _GROUP_ROWS, _GROUP_BYTES = 512, 65_536, 8 << 20
# Columns whose values come again and again. A dictionary of any other is given up when it is full, and until
# then has only made the file larger.
_REPEATED: Final = (
    "category", "action", "level", "outcome", "user_id", "tenant_id", "resource_type", "ip_address",
    "subject_id",
)  # fmt: skip


class Encoder(Protocol):
    """Turns pieces of COPY's stream into a file.

    Attributes: heavy: does `feed` take long enough to be called in a thread?
    """

    heavy: bool

    @property
    def rows(self) -> int:
        """Rows so far, with those of an earlier run."""

    @property
    def first(self) -> Place | None:
        """Key of this run's first row."""

    @property
    def last(self) -> Place | None:
        """Key of the last row."""

    def restart(self) -> None:
        """Another statement begins."""

    def head(self) -> bytes:
        """What stands before the first row."""

    def feed(self, piece: bytes) -> bytes:
        """The rows that are whole by now, as far as the format lets them go."""

    def tail(self) -> bytes:
        """All that is left, and the end."""


def make_encoder(format: str, rows: int, title: Sequence[tuple[str, str]]) -> Encoder:  # noqa: A002 (as the argument is called)
    """The encoder of a format.

    Args:
        format: one of `FORMATS`.
        rows: that the file has already.
        title: what the export is about, for a document's first page.
    Raises: MissingExtra: a package of the format is not installed.
    """
    if format == "parquet":
        return _Parquet()
    if format == "pdf":
        return _Pdf(title)
    if format == "ocsf":
        return _Ocsf(rows)
    return _Text(format, rows)


class _Text:
    """JSON, JSON lines and CSV, all written in Rust."""

    heavy = False

    def __init__(self, format: str, rows: int) -> None:  # noqa: A002 (as the argument is called)
        self._format = format
        self._rows = RowFormatter(format, KINDS, rows)
        self.feed: Callable[[bytes], bytes] = self._rows.feed
        self.restart = self._rows.restart

    @property
    def rows(self) -> int:
        return self._rows.rows

    @property
    def first(self) -> Place | None:
        return self._rows.first

    @property
    def last(self) -> Place | None:
        return self._rows.last

    def head(self) -> bytes:
        if self._format == "csv":
            return ",".join(NAMES).encode() + b"\r\n"
        return b"[" if self._format == "json" else b""

    def tail(self) -> bytes:
        return b"\n]\n" if self._format == "json" else b""


class _Columns:
    """What those formats share that are made of Python's values."""

    heavy = True

    def __init__(self, rows: int = 0) -> None:
        self._reader = RowReader(KINDS)
        self.restart = self._reader.restart
        self.rows = rows
        self.first: Place | None = None
        self.last: Place | None = None

    def read(self, piece: bytes) -> dict[str, list[Any]]:
        columns = dict(zip(NAMES, self._reader.feed(piece), strict=True))
        times, ids = columns["occurred_at"], columns["id"]
        if times:
            self.first = self.first or (times[0], ids[0])
            self.last = (times[-1], ids[-1])
            self.rows += len(times)
        return columns


class _Ocsf(_Columns):
    """JSON lines of OCSF events."""

    def head(self) -> bytes:
        return b""

    def feed(self, piece: bytes) -> bytes:
        from dotmac.platform.audit_trail.exports.ocsf import ocsf_event

        columns = self.read(piece)
        lines = []
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(NAMES, values, strict=True))
            row["metadata"] = json.loads(row["metadata"])
            row["anomaly_reasons"] = json.loads(row["anomaly_reasons"])
            row["id"] = _uuid(row["id"])
            lines.append(json.dumps(ocsf_event(row), ensure_ascii=False, separators=(",", ":")))
        return "".join(f"{line}\n" for line in lines).encode()

    def tail(self) -> bytes:
        return b""


class _Parquet(_Columns):
    """Parquet of format version 2.6, in row groups, compressed by zstd."""

    def __init__(self) -> None:
        super().__init__()
        self._arrow = extra("pyarrow", "parquet")
        parquet = extra("pyarrow.parquet", "parquet")
        self._buffer = io.BytesIO()
        self._schema = _arrow_schema(self._arrow)
        self._writer = parquet.ParquetWriter(
            self._buffer, self._schema, compression="zstd", version="2.6", use_dictionary=list(_REPEATED)
        )
        self._held: dict[str, list[Any]] = {name: [] for name in NAMES}
        self._batches: list[Any] = []
        self._rows = self._size = 0

    def head(self) -> bytes:
        return b""

    def feed(self, piece: bytes) -> bytes:
        for name, values in self.read(piece).items():
            self._held[name] += values
        self._size += len(piece)
        # Arrow's form takes a fraction of what Python's values do.
        if len(self._held["id"]) >= _BATCH_ROWS or self._size >= _GROUP_BYTES:
            self._pack()
        if self._rows >= _GROUP_ROWS or self._size >= _GROUP_BYTES:
            self._flush()
        return self._taken()

    def tail(self) -> bytes:
        self._pack()
        self._flush()
        self._writer.close()
        return self._taken()

    def _pack(self) -> None:
        held, self._held = self._held, {name: [] for name in NAMES}
        self._rows += len(held["id"])
        held["id"] = [_uuid(value) for value in held["id"]]
        held["anomaly_reasons"] = [json.loads(value) for value in held["anomaly_reasons"]]
        self._batches.append(self._arrow.record_batch(held, schema=self._schema))

    def _flush(self) -> None:
        batches, self._batches, self._rows, self._size = self._batches, [], 0, 0
        if any(batch.num_rows for batch in batches):
            table = self._arrow.Table.from_batches(batches, self._schema)
            self._writer.write_table(table, row_group_size=_GROUP_ROWS + _BATCH_ROWS)

    def _taken(self) -> bytes:
        # The writer only asks for its position, which must go on: what is taken away is counted by Arrow
        # itself.
        data = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        return data


def _arrow_schema(arrow: Any) -> Any:
    time = arrow.timestamp("us", tz="UTC")
    kinds = {"time": time, "float": arrow.float64()}
    own = {"anomaly_reasons": arrow.list_(arrow.string())}
    needed = ("id", "occurred_at", "recorded_at", "category", "action", "level", "outcome", "metadata")
    return arrow.schema(
        [
            arrow.field(name, own.get(name) or kinds.get(kind, arrow.string()), nullable=name not in needed)
            for name, kind in KINDS
        ],
        metadata={"content": "audit events; metadata is JSON"},
    )


_PDF_COLUMNS = (
    "time (UTC)",
    "category",
    "action",
    "level",
    "outcome",
    "user",
    "tenant",
    "resource",
    "address",
)
_PDF_SAMPLE = 300
_PDF_SIZE, _PDF_LINES = 7.0, 6


class _Pdf(_Columns):
    """A table for people: the most important columns, page by page."""

    def __init__(self, title: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        from dotmac.platform.audit_trail.pdf.document import Document
        from dotmac.platform.audit_trail.pdf.table import RowTable

        self._table_of = RowTable
        self._document = Document("Audit events", head=dict(title).get("period", ""))
        self._title = title
        self._table: Any = None
        self._sample: list[Sequence[object]] = []

    def head(self) -> bytes:
        self._document.new_page()
        self._document.heading("Audit events", 0)
        self._document.pairs(self._title)
        return b""

    def feed(self, piece: bytes) -> bytes:
        columns = self.read(piece)
        for row in _pdf_rows(columns):
            if self._table is None:
                self._sample.append(row)
                if len(self._sample) == _PDF_SAMPLE:
                    self._begin()
            else:
                self._table.row(row)
        return b""

    def _begin(self) -> None:
        self._table = self._table_of(self._document, _PDF_COLUMNS, self._sample, _PDF_SIZE, _PDF_LINES)
        for row in self._sample:
            self._table.row(row)
        self._sample = []

    def tail(self) -> bytes:
        if self._table is None and self._sample:
            self._begin()
        if self._table is not None:
            self._table.end()
        else:
            self._document.note("No event matches.")
        self._document.paragraph(f"{self.rows} events.")
        return self._document.to_bytes()


def _pdf_rows(columns: dict[str, list[Any]]) -> list[tuple[str | None, ...]]:
    names = ("category", "action", "level", "outcome", "user_id", "tenant_id")
    rows = zip(
        columns["occurred_at"],
        *(columns[name] for name in names),
        columns["resource_type"],
        columns["resource_id"],
        columns["ip_address"],
        strict=True,
    )
    return [
        (
            from_micros(time).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3],
            *rest,
            " ".join(part for part in (kind, which) if part) or None,
            address,
        )
        for time, *rest, kind, which, address in rows
    ]


def _uuid(value: bytes) -> str:
    text = value.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
