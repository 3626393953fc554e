"""Reading exports, record by record: each is the export's columns, or why it can't be read."""

from __future__ import annotations

import codecs
import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from dotmac.platform.audit_trail.exports.columns import NAMES
from dotmac.platform.audit_trail.exports.extras import extra

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_RECORD", "READABLE", "BadRecord", "Exact", "read_records"]

READABLE: Final = ("json", "ndjson", "csv", "parquet")
MAX_RECORD: Final = 16 << 20
_PARQUET_ROWS: Final = 1_000
_CHUNK: Final = 1 << 20
_BETWEEN: Final = re.compile(r"[\s,]*")
# A cell in quotes, or one without; then what ends it.
_CELL: Final = re.compile(rb'(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r\n|\n|\r|\Z)')
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "'", "＝", "＋", "－", "＠")


class BadRecord(ValueError):
    """A record can't be read; the ones behind it can."""


class Exact(float):
    """A number that a float does not hold, with its digits."""

    text: str

    @classmethod
    def of(cls, text: str) -> float:
        """A float where that is the number, else one that keeps the digits."""
        plain = float(text)
        if Decimal(repr(plain)) == Decimal(text):
            return plain
        kept = cls(plain)
        kept.text = text
        return kept


def read_records(file: BinaryIO, format: str) -> Iterator[dict[str, Any] | BadRecord]:  # noqa: A002 (as the argument is called)
    """The records of an export, in constant memory.

    Raises: ValueError: the file as a whole is not of that format. MissingExtra.
    """
    if format == "parquet":
        return _parquet(file)
    if format == "csv":
        return _csv(file)
    return _array(file) if format == "json" else _lines(file)


def _lines(file: BinaryIO) -> Iterator[dict[str, Any] | BadRecord]:
    for number, raw in enumerate(iter(lambda: file.readline(MAX_RECORD), b"")):
        line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw).strip()
        if line:
            yield _object(line)


def _array(file: BinaryIO) -> Iterator[dict[str, Any] | BadRecord]:
    """The members of a JSON array, whatever white space stands between them."""
    decoder = json.JSONDecoder(parse_float=Exact.of)
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    text, place, began, ended = "", 0, False, False
    while True:
        place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # it matches the empty text
        if not began and text[place : place + 1] == "[":
            place, began = place + 1, True
            continue
        if began and text[place : place + 1] == "]":
            return
        if began and place < len(text):
            try:
                said, place = decoder.raw_decode(text, place)
            except ValueError:
                if ended or len(text) - place > MAX_RECORD:
                    raise
            else:
                yield said if isinstance(said, dict) else BadRecord("not a JSON object")
                continue
        elif place < len(text):
            raise ValueError("it is no JSON array")
        elif ended:
            raise ValueError("the JSON array does not end")
        data = file.read(_CHUNK)
        ended = not data
        text, place = text[place:] + utf8.decode(data, final=ended), 0


def _object(line: bytes) -> dict[str, Any] | BadRecord:
    try:
        said = json.loads(line, parse_float=Exact.of)
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not JSON: {error}"[:300])
    if not isinstance(said, dict):
        return BadRecord("not a JSON object")
    return said


def _csv(file: BinaryIO) -> Iterator[dict[str, Any] | BadRecord]:
    records = _csv_records(file)
    head = next(records, None)
    if isinstance(head, BadRecord) or head is None:
        raise ValueError("it has no line of column names")
    names = [cell.lstrip("\ufeff") if cell is not None else "" for cell in head]
    if missing := [name for name in ("id", "occurred_at", "category", "action") if name not in names]:
        raise ValueError(f"it has no column {missing[0]!r}")
    for cells in records:
        if isinstance(cells, BadRecord):
            yield cells
        elif len(cells) != len(names):
            yield BadRecord(f"{len(cells)} cells where there are {len(names)} columns")
        else:
            yield _typed(dict(zip(names, cells, strict=True)))


def _typed(said: dict[str, Any]) -> dict[str, Any] | BadRecord:
    try:
        score = said.get("anomaly_score")
        said["anomaly_score"] = None if score is None else float(score)
        for name in ("metadata", "personal", "anomaly_reasons"):
            if said.get(name) is not None:
                said[name] = json.loads(said[name], parse_float=Exact.of)
    except (ValueError, RecursionError) as error:
        return BadRecord(f"a cell can't be read: {error}"[:300])
    return said


def _csv_records(file: BinaryIO) -> Iterator[list[str | None] | BadRecord]:
    """RFC 4180, where an empty cell without quotes is NULL and one with quotes an empty text."""
    while record := file.readline(MAX_RECORD):
        # A line break within quotes does not end the record.
        while record.count(b'"') % 2 and len(record) < MAX_RECORD:
            more = file.readline(MAX_RECORD)
            if not more:
                break
            record += more
        if record.strip(b"\r\n"):
            yield _cells(record.rstrip(b"\r\n"))


def _cells(record: bytes) -> list[str | None] | BadRecord:
    cells: list[str | None] = []
    place = 0
    while True:
        found = _CELL.match(record, place)
        if found is None:
            return BadRecord(f"a cell in quotes does not end well, at byte {place} of its record")
        quoted, plain, ending = found.groups()
        try:
            text = (plain if quoted is None else quoted.replace(b'""', b'"')).decode()
        except UnicodeDecodeError:
            return BadRecord(f"not UTF-8, at byte {place} of its record")
        if text.startswith("'") and text[1:].startswith(_FORMULA):
            text = text[1:]
        cells.append(None if quoted is None and not text else text)
        place = found.end()
        if ending != b",":
            return cells


def _parquet(file: BinaryIO) -> Iterator[dict[str, Any] | BadRecord]:
    parquet = extra("pyarrow.parquet", "parquet")
    arrow = extra("pyarrow", "parquet")
    try:
        table = parquet.ParquetFile(file)
    except arrow.ArrowInvalid as error:
        raise ValueError(str(error)) from error
    known = [name for name in table.schema_arrow.names if name in NAMES]
    if missing := [name for name in ("id", "occurred_at", "category", "action") if name not in known]:
        raise ValueError(f"it has no column {missing[0]!r}")
    for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=known):
        for said in batch.to_pylist():
            try:
                for name in ("metadata", "personal"):
                    if said.get(name) is not None:
                        said[name] = json.loads(said[name], parse_float=Exact.of)
            except (ValueError, RecursionError) as error:
                yield BadRecord(f"{name}: {error}"[:300])
                continue
            yield said
