"""How commands show their results: tables for people, JSON for programs, errors on standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["show_error", "show_json", "show_table"]


def show_json(value: Any) -> None:
    """Write a value as JSON to standard output; what JSON doesn't know as its text."""
    sys.stdout.write(json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Write a table to standard output; rich honours NO_COLOR and pipes."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    # A pipe has no width: let no column be cut there.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000).print(table)


def show_error(error: BaseException) -> None:
    """Write an error to standard error in one paragraph."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}")
