"""Tables of unbounded length, drawn row by row as the rows come."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.pdf.document import INK, RULE, SHADE, TINT, Document
from dotmac.platform.audit_trail.pdf.fonts import BOLD, REGULAR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dotmac.platform.audit_trail.pdf.text import Lines

__all__ = ["Drawn", "RowTable", "draw_table"]

_SAMPLE = 300
_PAD, _LEADING = 3.0, 1.22
_NARROW = 22.0
_MANY, _FEW = 11, 7
_TELL_EVERY = 1_000


@dataclass(frozen=True, slots=True)
class Drawn:
    """What became of a table.

    Attributes:
        rows: rows drawn.
        shortened: cells of which only the beginning is shown; they say how long they are.
    """

    rows: int
    shortened: int


def draw_table(
    document: Document,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    size: float | None = None,
    max_lines: int = 24,
    progress: Callable[[int], None] | None = None,
) -> Drawn:
    """Draw a table from where the document stands, over as many pages as it takes.

    Args:
        document: where to.
        columns: names; shown at the head of every page.
        rows: cells as text, numbers, or None, which is shown as a dash; an iterator is consumed as the pages
            are drawn, so that no more than some 300 rows are held.
        size: of the text, points; default: by the number of columns.
        max_lines: lines of a cell at most; a longer one ends with how long it is.
        progress: called with the number of rows drawn, now and then and at the end.

    The widths come from the first 300 rows.
    """
    source = iter(rows)
    sample = list(islice(source, _SAMPLE))
    size = size or (7.5 if len(columns) <= _FEW else 7.0 if len(columns) <= _MANY else 6.2)
    table = RowTable(document, columns, sample, size, max_lines)
    drawn = 0
    for row in chain(sample, source):
        table.row(row)
        drawn += 1
        if progress is not None and drawn % _TELL_EVERY == 0:
            progress(drawn)
    table.end()
    if progress is not None:
        progress(drawn)
    return Drawn(drawn, table.shortened)


class RowTable:
    def __init__(
        self,
        document: Document,
        columns: Sequence[str],
        sample: list[Sequence[object]],
        size: float,
        max_lines: int,
    ) -> None:
        self._document, self._size, self._most = document, size, max_lines
        self._text, self._bold = document.setter(REGULAR, size), document.setter(BOLD, size)
        self._step = size * _LEADING
        self._numbers = [
            all(isinstance(row[place], int | float | None) for row in sample)
            and any(row[place] is not None for row in sample)
            for place in range(len(columns))
        ]
        self._names = [name.replace("_", " ") for name in columns]
        self._widths = self._fit(sample)
        self._lefts = [document.left + sum(self._widths[:place]) + _PAD for place in range(len(columns))]
        self._inner = [width - 2 * _PAD for width in self._widths]
        self._places = [f"1 0 0 1 {left:.1f}" for left in self._lefts]
        self._head = [
            self._bold.lines(name, width) for name, width in zip(self._names, self._inner, strict=True)
        ]
        self._texts: list[str] = []
        self._shades: list[str] = []
        self._rules: list[str] = []
        self._odd = False
        self.shortened = 0
        document.room(self._head_height() + 2 * self._step + 2 * _PAD)
        self._begin()

    def _fit(self, sample: list[Sequence[object]]) -> list[float]:
        """Narrow columns get what they need, the wide ones share what is left evenly."""
        least, wanted = [], []
        for place, name in enumerate(self._names):
            widest = max((self._text.width(shown(row[place])[:200]) for row in sample), default=0.0)
            words = max((self._bold.width(word) for word in name.split()), default=0.0)
            least.append(max(_NARROW, words + 2 * _PAD + 0.5))
            wanted.append(max(least[-1], widest + 2 * _PAD + 0.5))
        left, widths = self._document.inner, [0.0] * len(wanted)
        if sum(wanted) <= left:
            spare = (left - sum(wanted)) / len(wanted)
            return [width + spare for width in wanted]
        squeeze = min(1.0, left / sum(least))
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        for done, place in enumerate(order):
            reserved = sum(least[other] for other in order[done + 1 :]) * squeeze
            share = left / (len(order) - done)
            widths[place] = max(least[place] * squeeze, min(wanted[place], share, left - reserved))
            left -= widths[place]
        return widths

    def _head_height(self) -> float:
        return max(len(lines.shown) for lines in self._head) * self._step + 2 * _PAD

    def _begin(self) -> None:
        document, high = self._document, self._head_height()
        document.operators(
            f"{TINT} rg {document.left:.2f} {document.y - high:.2f} {document.inner:.2f} {high:.2f} re f"
        )
        for place, lines in enumerate(self._head):
            y = document.y - _PAD - self._size * 0.92
            for line, width in zip(lines.shown, lines.widths, strict=True):
                x = self._lefts[place] + (self._inner[place] - width if self._numbers[place] else 0)
                document.operators(f"BT {self._bold.select} 1 1 1 rg 1 0 0 1 {x:.2f} {y:.2f} Tm {line} ET")
                y -= self._step
        document.y -= high
        self._odd = False

    def row(self, row: Sequence[object]) -> None:
        document, text, most = self._document, self._text, self._most
        cells: list[Lines] = []
        tallest = 1
        for value, width in zip(row, self._inner, strict=True):
            lines = text.lines(value if type(value) is str else shown(value), width, most)
            count = len(lines.shown)
            tallest = max(tallest, count)
            if lines.cut:
                self.shortened += 1
            cells.append(lines)
        high = tallest * self._step + 2 * _PAD - 1
        if document.y - high < document.bottom:
            self._flush()
            document.new_page()
            self._begin()
        top = document.y
        y = top - _PAD - self._size * 0.86
        add = self._texts.append
        first = f" {y:.1f} Tm "
        for place, lines in enumerate(cells):
            if self._numbers[place]:
                x = f"1 0 0 1 {self._lefts[place] + self._inner[place] - lines.widths[0]:.1f}"
            else:
                x = self._places[place]
            add(x + first + lines.shown[0])
            for count in range(1, len(lines.shown)):
                add(f"{x} {y - count * self._step:.1f} Tm {lines.shown[count]}")
        if self._odd:
            self._shades.append(f"{document.left:.1f} {top - high:.1f} {document.inner:.1f} {high:.1f} re")
        self._odd = not self._odd
        document.y = top - high
        self._rules.append(
            f"{document.left:.1f} {document.y:.1f} m {document.left + document.inner:.1f} {document.y:.1f} l"
        )

    def _flush(self) -> None:
        """Shades under rules under text, each kind in one go."""
        document = self._document
        if self._shades:
            document.operators(f"{SHADE} rg\n" + "\n".join(self._shades) + "\nf")
        if self._rules:
            document.operators(f"{RULE} RG 0.3 w\n" + "\n".join(self._rules) + "\nS")
        if self._texts:
            document.operators(f"BT {self._text.select} {INK} rg\n" + "\n".join(self._texts) + "\nET")
        for kept in (self._shades, self._rules, self._texts):
            kept.clear()

    def end(self) -> None:
        self._flush()
        self._document.y -= 8


def shown(value: object) -> str:
    """A cell as text."""
    if value is None:
        return "–"  # noqa: RUF001 (a dash, on purpose)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
