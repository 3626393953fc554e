"""A finished report, and the forms in which it is handed over."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    import os

__all__ = ["ComplianceReport", "Section"]

# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 (full-width forms count as well)
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
        note: a sentence: what is missing, what was cut, or that there is nothing.
    """

    name: str
    title: str
    control: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: int
    note: str = ""

    def to_csv(self) -> str:
        """RFC 4180, safe to open in a spreadsheet."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(self.columns)
        writer.writerows([_safe(cell) for cell in row] for row in self.rows)
        return out.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The section as JSON types."""
        return {
            "name": self.name,
            "title": self.title,
            "control": self.control,
            "note": self.note,
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
            "rows_shown": len(self.rows),
            "rows_total": self.total,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ComplianceReport:
    """A report: header, completeness, sections, and what the log can't answer.

    It bears no time of generation: the same parameters over the same events give the same bytes.
    """

    report_type: str
    header: dict[str, Any]
    completeness: dict[str, Any]
    sections: tuple[Section, ...]
    cannot_answer: tuple[str, ...]
    sign_off: dict[str, str] = field(
        default_factory=lambda: {"reviewer": "", "role": "", "date": "", "findings": "", "signature": ""}
    )

    def section(self, name: str) -> Section:
        """The section of that name.

        Raises: KeyError: there is none.
        """
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; `body_sha256` covers all else in it."""
        body = {
            "report_type": self.report_type,
            **self.header,
            "completeness": self.completeness,
            "sections": [section.to_dict() for section in self.sections],
            "cannot_answer": list(self.cannot_answer),
            "attachments": [
                {"file": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
                for name, text in self.to_csv().items()
            ],
            "sign_off": self.sign_off,
        }
        return {**body, "body_sha256": hashlib.sha256(_bytes(body)).hexdigest()}

    def to_json(self) -> str:
        """`to_dict` as text, keys in a fixed order."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2, sort_keys=True) + "\n"

    def to_csv(self) -> dict[str, str]:
        """One CSV text per section, by file name."""
        return {
            f"{number:02}_{section.name}.csv": section.to_csv()
            for number, section in enumerate(self.sections, 1)
        }

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the report: `.json` the whole, `.zip` the whole and a CSV per section.

        Returns: the path. Raises: InvalidArgument: another suffix. OSError: it can't be written.
        """
        target = Path(path)
        if target.suffix == ".json":
            target.write_text(self.to_json(), encoding="utf-8")
        elif target.suffix == ".zip":
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, text in {"report.json": self.to_json(), **self.to_csv()}.items():
                    archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), text, zipfile.ZIP_DEFLATED)
        else:
            raise InvalidArgument("path", str(target), "give a file that ends in .json or .zip")
        return target


def _safe(cell: Cell) -> Cell:
    if isinstance(cell, str) and cell.lstrip(" ").startswith(_FORMULA):
        return "'" + cell
    return cell


def _bytes(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
