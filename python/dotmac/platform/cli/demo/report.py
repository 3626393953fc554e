"""What the demo found: claims that were checked, tables, times; on the screen, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Claim", "Report", "percentile"]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


_MARKS = {True: "✔ ", False: "✘ **broken:** ", None: ""}


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence, and whether it was found to be true; None for what is told without claiming it."""

    text: str
    holds: bool | None


@dataclass(slots=True)
class _Section:
    title: str
    lines: list[Claim] = field(default_factory=list)
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)


class Report:
    """Collects and shows.

    Args: console: where to show what happens while it happens.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._sections: list[_Section] = []
        self._times: dict[str, list[float]] = {}
        self._started = time.monotonic()

    def section(self, title: str) -> None:
        """Begin a part."""
        self._sections.append(_Section(title))
        self.console.print(f"\n[bold]{title}[/bold]  [dim]{time.monotonic() - self._started:.0f} s[/dim]")

    def note(self, text: str) -> None:
        """Tell something that is measured or set, not claimed."""
        self._sections[-1].lines.append(Claim(text, None))
        self.console.print(f"  {text}", markup=False)

    def claim(self, holds: bool, text: str) -> None:
        """Tell something that has just been checked."""
        if not self._sections:
            self.section("Start")
        self._sections[-1].lines.append(Claim(text, holds))
        mark = "[green]✔[/green]" if holds else "[red]✘ BROKEN:[/red]"
        self.console.print(f"  {mark} {escape(text)}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a table."""
        cells = [[str(cell) for cell in row] for row in rows]
        self._sections[-1].tables.append((list(columns), cells))
        shown = Table(*columns)
        for row in cells:
            shown.add_row(*row)
        self.console.print(shown)

    def timed(self, operation: str, seconds: float) -> None:
        """Count one call of an operation."""
        self._times.setdefault(operation, []).append(seconds)

    def times(self) -> None:
        """The table of times of every operation."""
        rows = [
            (name, f"{len(taken):,}", _ms(percentile(taken, 0.5)), _ms(percentile(taken, 0.99)))
            for name, taken in self._times.items()
        ]
        self.table(("operation", "calls", "p50 ms", "p99 ms"), rows)

    @property
    def broken(self) -> list[str]:
        """The claims that do not hold."""
        return [line.text for part in self._sections for line in part.lines if line.holds is False]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types; times in seconds."""
        return {
            "version": version("dotmac-platform"),
            "python": platform.python_version(),
            "machine": platform.platform(),
            "seconds": round(time.monotonic() - self._started, 1),
            "holds": not self.broken,
            "sections": [
                {
                    "title": part.title,
                    "lines": [{"text": line.text, "holds": line.holds} for line in part.lines],
                    "tables": [{"columns": columns, "rows": rows} for columns, rows in part.tables],
                }
                for part in self._sections
            ],
            "operations": {
                name: {"calls": len(taken), "p50": percentile(taken, 0.5), "p99": percentile(taken, 0.99)}
                for name, taken in self._times.items()
            },
        }

    def write(self, directory: Path) -> dict[str, Any]:
        """Leave `report.json` and `report.md` there. Returns what is in them."""
        told = self.to_dict()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "report.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        (directory / "report.md").write_text(_markdown(told))
        return told


def _markdown(told: dict[str, Any]) -> str:
    verdict = "Every claim holds." if told["holds"] else "**Some claims do not hold.**"
    lines = [
        "# Demo report",
        "",
        f"dotmac-platform {told['version']}, Python {told['python']}, {told['machine']}",
        "",
        f"{told['seconds']} s",
        "",
        verdict,
    ]
    for part in told["sections"]:
        lines += ["", f"## {part['title']}", ""]
        lines += [f"- {_MARKS[line['holds']]}{line['text']}" for line in part["lines"]]
        for table in part["tables"]:
            lines += ["", _row(table["columns"]), _row("---" for _ in table["columns"])]
            lines += [_row(row) for row in table["rows"]]
    return "\n".join(lines) + "\n"


def _row(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f}" if seconds >= 1 else f"{seconds * 1000:.3g}"
