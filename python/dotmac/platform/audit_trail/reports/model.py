"""A finished report, and the forms in which it is handed over."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from dotmac.platform.audit_trail.reports.spec import Unanswered

__all__ = ["FORMATS", "Chart", "ComplianceReport", "Section"]

FORMATS = (".json", ".zip", ".html", ".pdf")
# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)

Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One question of the framework and the log's answer.

    Attributes:
        name: short, unique in the report; its file's name.
        title: the question.
        control: control or article that asks it.
        columns, rows: the answer.
        total: rows that there are; more than `rows` holds where the bound cut it.
        note: sentences: what is missing, what was cut, or that there is nothing.
        needed: what has to be logged or given for an answer; empty where the answer is whole.
        about: how the rows come about.
    """

    name: str
    title: str
    control: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: int
    note: str = ""
    needed: str = ""
    about: str = ""

    def to_csv(self) -> str:
        """RFC 4180, safe to open in a spreadsheet; a section without rows says why in a row of its own."""
        out = io.StringIO()
        self._write_csv(out)
        return out.getvalue()

    def csv_sha256(self) -> str:
        """SHA-256 of `to_csv`, which is never whole in memory for it."""
        sink = _Digest()
        self._write_csv(sink)
        return sink.digest.hexdigest()

    def _write_csv(self, out: io.StringIO | _Digest) -> None:
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(self.columns)
        writer.writerows([_safe(cell) for cell in row] for row in self.rows)
        if not self.rows:
            writer.writerow([_safe(" ".join(filter(None, (self.note, self.needed))))])

    def to_dict(self) -> dict[str, Any]:
        """The section as JSON types."""
        return {**self.as_is(), "columns": list(self.columns), "rows": [list(row) for row in self.rows]}

    def as_is(self) -> dict[str, Any]:
        """The same with tuples for lists, as they are held."""
        return {
            "name": self.name,
            "title": self.title,
            "control": self.control,
            "about": self.about,
            "note": self.note,
            "needed": self.needed,
            "columns": self.columns,
            "rows": self.rows,
            "rows_shown": len(self.rows),
            "rows_total": self.total,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What a chart shows; HTML and PDF draw it.

    Attributes:
        title: what is shown.
        labels: one per bar.
        series: name to values, as many as labels.
        over_time: do the bars stand side by side in the order of time, or lie under their names?
        unit: what is counted.
    """

    title: str
    labels: tuple[str, ...]
    series: dict[str, tuple[float, ...]]
    over_time: bool = False
    unit: str = "events"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "title": self.title,
            "labels": list(self.labels),
            "series": {name: list(values) for name, values in self.series.items()},
            "over_time": self.over_time,
            "unit": self.unit,
        }


@dataclass(frozen=True, kw_only=True)
class ComplianceReport:
    """A report: header, completeness, sections, and what the log can't answer.

    It bears no time of generation: the same parameters over the same events give the same bytes, in every
    form.
    """

    report_type: str
    header: dict[str, Any]
    completeness: dict[str, Any]
    sections: tuple[Section, ...]
    cannot_answer: tuple[Unanswered, ...]
    charts: tuple[Chart, ...] = ()
    sign_off: dict[str, str] = field(
        default_factory=lambda: dict.fromkeys(
            (
                "prepared_by",
                "prepared_on",
                "reviewer",
                "role",
                "reviewed_on",
                "findings",
                "conclusion",
                "signature",
            ),
            "",
        )
    )

    def section(self, name: str) -> Section:
        """The section of that name.

        Raises: KeyError: there is none.
        """
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)

    def _names(self) -> Iterator[tuple[str, Section]]:
        for number, section in enumerate(self.sections, 1):
            yield f"{number:02}_{section.name}.csv", section

    def _files(self) -> Iterator[tuple[str, str]]:
        """The CSV files one by one: all of them at once may be large."""
        for name, section in self._names():
            yield name, section.to_csv()

    @cached_property
    def attachments(self) -> dict[str, str]:
        """SHA-256 of each section's CSV file, by file name."""
        return {name: section.csv_sha256() for name, section in self._names()}

    @cached_property
    def body_sha256(self) -> str:
        """SHA-256 of all that `to_dict` holds besides, as compact JSON with sorted keys."""
        digest = hashlib.sha256()
        for piece in _compact(self._body()):
            digest.update(piece.encode())
        return digest.hexdigest()

    def _body(self) -> dict[str, Any]:
        return {
            "report_type": self.report_type,
            **self.header,
            "completeness": self.completeness,
            "charts": [chart.to_dict() for chart in self.charts],
            "sections": [section.as_is() for section in self.sections],
            "cannot_answer": [one.to_dict() for one in self.cannot_answer],
            "attachments": [{"file": name, "sha256": digest} for name, digest in self.attachments.items()],
            "sign_off": self.sign_off,
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; `body_sha256` covers all else in it."""
        sections = [section.to_dict() for section in self.sections]
        return {**self._body(), "sections": sections, "body_sha256": self.body_sha256}

    def to_json(self) -> str:
        """`to_dict` as text, keys in a fixed order."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2, sort_keys=True) + "\n"

    def to_csv(self) -> dict[str, str]:
        """One CSV text per section, by file name."""
        return dict(self._files())

    def to_zip(self) -> bytes:
        """The report as JSON, a CSV per section, and their digests in the form of `sha256sum`."""
        out, sums = io.BytesIO(), ""
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:

            def add(name: str, text: str) -> None:
                entry = zipfile.ZipInfo(name, _ZIP_TIME)
                # Else the system that runs this would stand in the file.
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                archive.writestr(entry, text, zipfile.ZIP_DEFLATED)

            for name, text in chain([("report.json", self.to_json())], self._files()):
                add(name, text)
                sums += f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"
            add("SHA256SUMS", sums)
        return out.getvalue()

    def to_html(self) -> str:
        """One file without scripts and links to elsewhere, for reading and printing."""
        from dotmac.platform.audit_trail.reports.html import render

        return render(self)

    def to_pdf(self, *, page_size: str = "A4", fonts: Sequence[str | os.PathLike[str]] = ()) -> bytes:
        """Pages to hand over. It computes for as long as about 0.1 ms per row: in a loop, use a thread.

        Args:
            page_size: `A4` or `letter`.
            fonts: paths of TrueType fonts to embed for characters that DejaVu lacks (Chinese, Japanese,
                Korean …); without, the viewer's own fonts show those.

        Raises: MissingExtra: reportlab is not installed. InvalidArgument.
        """
        from dotmac.platform.audit_trail.reports.pages import render

        return render(self, page_size=page_size, fonts=fonts)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the report in the form of the suffix: .json, .zip (with a CSV per section), .html, .pdf.

        Returns: the path.
        Raises: InvalidArgument: another suffix. OSError: it can't be written. MissingExtra.
        """
        target = Path(path)
        if target.suffix not in FORMATS:
            raise InvalidArgument("path", str(target), f"give a file that ends in {', '.join(FORMATS)}")
        target.write_bytes(self.to_bytes(target.suffix))
        return target

    def to_bytes(self, suffix: str) -> bytes:
        """The file's bytes in one of the forms of `write`."""
        match suffix:
            case ".json":
                return self.to_json().encode()
            case ".zip":
                return self.to_zip()
            case ".html":
                return self.to_html().encode()
            case ".pdf":
                return self.to_pdf()
        raise InvalidArgument("suffix", suffix, f"give one of {', '.join(FORMATS)}")


class _Digest:
    """A file that keeps only the digest of what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, text: str) -> int:
        self.digest.update(text.encode())
        return len(text)


def _safe(cell: Cell) -> Cell:
    if isinstance(cell, str) and cell.lstrip(" ").startswith(_FORMULA):
        return "'" + cell
    return cell


def _compact(value: Any) -> Iterator[str]:
    """Compact JSON with sorted keys in pieces: the whole of a large report is never one string."""
    if isinstance(value, dict):
        yield "{"
        for number, name in enumerate(sorted(value)):
            yield ("," if number else "") + json.dumps(name, ensure_ascii=False) + ":"
            yield from _compact(value[name])
        yield "}"
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict | list | tuple):
        yield "["
        for number, one in enumerate(value):
            if number:
                yield ","
            yield from _compact(one)
        yield "]"
    else:
        yield json.dumps(value, ensure_ascii=False, separators=(",", ":"))
