"""Charts as vector graphics, by reportlab.graphics: bars over time, and bars by name."""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.pdf.fonts import BOLD, REGULAR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dotmac.platform.audit_trail.pdf.document import Document

__all__ = ["COLORS", "bars", "named_bars", "ticks"]

# Okabe and Ito, "Color Universal Design": told apart by people with any colour vision, and in grey.
COLORS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#999999")
_GRID, _TEXT = "#C7CED6", "#3B424C"
_LABELS = 16
_HIGH, _LEAST = 170.0, 1e-9
# More of a name is never shown.
_LONGEST = 300


def bars(
    document: Document,
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    unit: str = "events",
) -> None:
    """Bars that stand side by side in the order of `labels`, a part per series on top of one another.

    Args:
        title: what is shown.
        labels: one per bar; where there are many, every so-manieth is written.
        series: name to values, as many as labels; drawn in the order given.
        unit: what the axis counts.
    """
    width, high = document.inner, _HIGH
    drawing = _shapes().Drawing(width, high)
    left, right, bottom, top = 46.0, width - 8, 34.0, high - 34
    totals = [sum(values[place] for values in series.values()) for place in range(len(labels))]
    marks = ticks(max(totals, default=0.0))
    scale = (top - bottom) / marks[-1]
    names = list(series) if len(series) > 1 else []
    _text(document, drawing, 0, high - 10, title, bold=True, size=9, width=width * 0.6)
    _legend(document, drawing, width, high - 10, names)
    _text(document, drawing, 0, high - 24, unit, size=7)
    for mark in marks:
        y = bottom + mark * scale
        drawing.add(_shapes().Line(left, y, right, y, strokeColor=_color(_GRID), strokeWidth=0.4))
        _text(document, drawing, left - 5, y - 2.5, _number(mark), size=7, anchor="end")
    step = (right - left) / max(1, len(labels))
    thick = min(step * 0.78, 42.0)
    every = math.ceil(len(labels) / _LABELS)
    for place, label in enumerate(labels):
        x, y = left + place * step + (step - thick) / 2, bottom
        for number, values in enumerate(series.values()):
            part = values[place] * scale
            if part > 0:
                color = _color(COLORS[number % len(COLORS)])
                drawing.add(
                    _shapes().Rect(x, y, thick, part, fillColor=color, strokeColor=None, strokeWidth=0)
                )
                y += part
        if place % every == 0:
            _text(
                document,
                drawing,
                min(x + thick / 2, right - document.setter(REGULAR, 7.0).width(label) / 2),
                bottom - 11,
                label,
                size=7,
                anchor="middle",
                width=step * every - 3,
            )
    drawing.add(_shapes().Line(left, bottom, right, bottom, strokeColor=_color(_TEXT), strokeWidth=0.7))
    _place(document, drawing)


def named_bars(
    document: Document, title: str, values: Sequence[tuple[str, float]], unit: str = "events"
) -> None:
    """Lying bars from the top in the order given, names at the left, values at their ends."""
    row, names = 14.0, 190.0
    width, high = document.inner, 26.0 + row * len(values)
    drawing = _shapes().Drawing(width, high)
    most = max((value for _, value in values), default=0.0) or 1.0
    _text(document, drawing, 0, high - 10, f"{title} ({unit})", bold=True, size=9, width=width)
    for place, (name, value) in enumerate(values):
        y = high - 26 - row * place - 6
        _text(document, drawing, names - 6, y, name, size=7.5, anchor="end", width=names - 10)
        long = (width - names - 60) * value / most
        drawing.add(
            _shapes().Rect(
                names,
                y - 2.5,
                max(long, 0.5),
                row - 4,
                fillColor=_color(COLORS[0]),
                strokeColor=None,
                strokeWidth=0,
            )
        )
        _text(document, drawing, names + long + 5, y, _number(value), size=7.5)
    _place(document, drawing)


def ticks(most: float) -> list[float]:
    """Four or five round values from 0 to at least `most`."""
    if most < _LEAST:
        return [0.0, 1.0]
    rough = most / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    if most >= 1:
        step = max(1.0, math.ceil(step) if step < 10 else step)  # noqa: PLR2004 (counts are whole)
    return [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]


def _legend(document: Document, drawing: Any, width: float, y: float, names: list[str]) -> None:
    x = width - 8
    for number, name in reversed(list(enumerate(names))):
        x -= document.setter(REGULAR, 7.5).width(name)
        _text(document, drawing, x, y, name, size=7.5)
        x -= 11
        color = _color(COLORS[number % len(COLORS)])
        drawing.add(_shapes().Rect(x, y - 0.5, 7, 7, fillColor=color, strokeColor=None, strokeWidth=0))
        x -= 12


def _text(
    document: Document,
    drawing: Any,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    bold: bool = False,
    anchor: str = "start",
    width: float | None = None,
) -> None:
    face = BOLD if bold else REGULAR
    setter = document.setter(face, size)
    text = setter.display(text[:_LONGEST])
    if width is not None:
        while len(text) > 1 and setter.width(text) > width:
            text = text[:-2] + "…"
    drawing.add(
        _shapes().String(x, y, text, fontName=face, fontSize=size, fillColor=_color(_TEXT), textAnchor=anchor)
    )


def _shapes() -> Any:
    return import_module("reportlab.graphics.shapes")


def _color(code: str) -> Any:
    from reportlab.lib.colors import HexColor

    return HexColor(code)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def _place(document: Document, drawing: Any) -> None:
    from reportlab.graphics import renderPDF

    document.room(drawing.height + 10)
    document.y -= drawing.height
    renderPDF.draw(drawing, document.canvas, document.left, document.y)
    document.y -= 10
