"""How commands show their results: tables for people, JSON for programs, errors on standard error."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["show_error", "show_json", "show_table", "visible"]

# Control characters, which could forge lines or command the terminal, and those that turn or break a line.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text in one line, its control characters as `\\xNN`."""
    return _INVISIBLE.sub(lambda found: _escaped(ord(found.group())), text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 (two hexadecimal digits)


def show_json(value: Any) -> None:
    """Write a value as JSON to standard output; what JSON doesn't know as its text."""
    sys.stdout.write(json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Write a table to standard output; rich honours NO_COLOR and pipes."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*("" if cell is None else visible(str(cell)) for cell in row))
    # A pipe has no width: let no column be cut there.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000).print(table)


def show_error(error: BaseException) -> None:
    """Write an error to standard error in one paragraph."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(
        "error: " + "\n".join(map(visible, str(error).splitlines()))
    )
