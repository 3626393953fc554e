"""Text of any script as a page's operators: made visible, shaped, broken into lines, in display order."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from dotmac.platform.errors import MissingExtra

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.pdf.fonts import Fonts

__all__ = ["Lines", "Setter"]

_RIGHT_TO_LEFT = frozenset({"R", "AL"})
_ARABIC = (0x0600, 0x08FF)
# Where a line may end: after a space, or within ids, paths and addresses, which have no spaces.
_TO_LAST_BREAK = re.compile(r".*[ /\\_\-.:,;@?&=|)\]}]")
_JOINERS = "\u200c\u200d"
_CACHE, _CACHED_LENGTH = 20_000, 200


class Lines(NamedTuple):
    """A text broken to a width: operators that show each line, each line's width in points, was it cut?"""

    shown: tuple[str, ...]
    widths: tuple[float, ...]
    cut: bool


class Setter:
    """Sets text of one face and size in one document.

    Args:
        canvas: the reportlab canvas of the document.
        fonts: where characters are looked up.
        face: `fonts.REGULAR` or `fonts.BOLD`.
        size: points.
    """

    def __init__(self, canvas: Any, fonts: Fonts, face: str, size: float) -> None:
        self._document, self._fonts, self._face, self.size = canvas._doc, fonts, face, size  # noqa: SLF001 (reportlab has no other way to its subsets)
        self._canvas = canvas
        base = fonts.base(face)
        self._widths: dict[str, float] = {}
        self._ascii = [base.face.getCharWidth(code) for code in range(128)]
        base.splitString(" ", self._document)
        # Operator that selects the face; ASCII is in its first subset under its own codes.
        self.select = f"{base.getSubsetInternalName(0, self._document)} {size:g} Tf"
        self._cache: dict[tuple[str, float, int], Lines] = {}

    def lines(self, text: str, width: float, most: int = 1_000) -> Lines:
        """The text broken to a width in points, at most so many lines; the last one tells what was cut."""
        if len(text) > _CACHED_LENGTH:
            return self._lines(text, width, most)
        key = (text, width, most)
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= _CACHE:
                self._cache.clear()
            found = self._cache[key] = self._lines(text, width, most)
        return found

    def width(self, text: str) -> float:
        """Points that the text takes in one line."""
        return self._plain_width(self.visible(text))

    def _plain_width(self, text: str) -> float:
        if text.isascii():
            return float(sum(map(self._ascii.__getitem__, text.encode()))) * self.size / 1000
        return sum(map(self._char_width, text)) * self.size / 1000

    def line(self, text: str, width: float) -> Lines:
        """The text in one line, its end replaced by … where it is longer."""
        return self.lines(text, width, 1)

    def visible(self, text: str) -> str:
        """Characters that would command (controls, changes of direction) or that no font has become codes."""
        if text.isascii() and text.isprintable():
            return text
        text = unicodedata.normalize("NFC", text)
        if any(_ARABIC[0] <= ord(char) <= _ARABIC[1] for char in text):
            text = _shaper().reshape(text)
        return "".join(self._visible(char) for char in text if char not in _JOINERS)

    def display(self, text: str) -> str:
        """One line, visible, in the order of places, of the face's own characters alone: for charts."""
        text = self.visible(text).replace("\n", "")
        base = self._fonts.base(self._face)
        text = "".join(
            char if char.isascii() or ord(char) in base.face.charToGlyph else f"\\u{{{ord(char):x}}}"
            for char in text
        )
        if any(unicodedata.bidirectional(char) in _RIGHT_TO_LEFT for char in text):
            text = str(_display()(text, base_dir="L" if _base_direction(text) else "R"))
        return text

    def _visible(self, char: str) -> str:
        if char == "\n":
            return "↵\n"
        if unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" or self._font(char) is None:
            return f"\\u{{{ord(char):x}}}"
        return char

    def _font(self, char: str) -> tuple[Any, bool] | None:
        return self._fonts.find(self._face, char)

    def _char_width(self, char: str) -> float:
        found = self._widths.get(char)
        if found is None:
            font = self._font(char)
            if font is None:
                found = 0.0
            elif font[1]:
                found = float(font[0].stringWidth(char, 1000))
            else:
                found = float(font[0].face.getCharWidth(ord(char)))
            self._widths[char] = found
        return found

    def _lines(self, text: str, width: float, most: int) -> Lines:
        limit = width * 1000 / self.size
        if text.isascii() and text.isprintable():
            taken = sum(map(self._ascii.__getitem__, text.encode()))
            if taken <= limit:
                return Lines((_ascii(text),), (taken * self.size / 1000,), cut=False)
        # Of a very long text no more is looked at than could ever be shown.
        ceiling = int(most * limit / 150) + 1_000
        cleaned = self.visible(text[:ceiling])
        told = (f"… ({len(text):,} characters)", f"… ({len(text):,})", "…") if most > 1 else ("…",)
        parts, cut = self._broken(cleaned, limit, most, told)
        to_right = _base_direction(cleaned)
        shown = tuple(self._show(part, to_right) for part in parts)
        return Lines(shown, tuple(map(self._plain_width, parts)), cut or len(text) > ceiling)

    def _broken(self, text: str, limit: float, most: int, told: tuple[str, ...]) -> tuple[list[str], bool]:
        lines: list[str] = []
        for paragraph in text.split("\n"):
            if paragraph.isascii():
                ends = list(accumulate(map(self._ascii.__getitem__, paragraph.encode())))
            else:
                ends = list(accumulate(map(self._char_width, paragraph)))
            start, stop = 0, 0
            while True:
                if len(lines) == most:
                    lines[-1] = self._with_end(lines[-1], told, limit)
                    return lines, True
                stop = _stop(paragraph, ends, start, limit)
                lines.append(paragraph[start:stop].rstrip(" ") if stop < len(ends) else paragraph[start:])
                if stop >= len(ends):
                    break
                start = stop
        return lines, False

    def _with_end(self, line: str, told: tuple[str, ...], limit: float) -> str:
        """The line, its end replaced by the longest word about the cut for which there is room."""
        rooms = [limit - sum(map(self._char_width, one)) for one in told]
        end, room = next((pair for pair in zip(told, rooms, strict=True) if pair[1] >= 0), (told[-1], 0.0))
        while line and sum(map(self._char_width, line)) > room:
            line = line[:-1]
        return line + end

    def _show(self, line: str, to_right: bool) -> str:
        """Operators that show a line, characters in the order of their places."""
        if line.isascii() and line.isprintable():
            return _ascii(line)
        if any(unicodedata.bidirectional(char) in _RIGHT_TO_LEFT for char in line):
            line = _display()(line, base_dir="L" if to_right else "R")
        out: list[str] = []
        place, end, away = 0, len(line), False
        while place < end:
            start, font = place, self._font(line[place])
            while place < end and self._font(line[place]) == font:
                place += 1
            if font is None:  # what a library put in; `visible` left none
                continue
            away = self._show_run(line[start:place], font, out)
        if away:
            out.append(self.select)
        return " ".join(out)

    def _show_run(self, text: str, font: tuple[Any, bool], out: list[str]) -> bool:
        own = font[0] is self._fonts.base(self._face)
        if font[1]:
            # The document has to know a font before it can be named; the canvas tells it.
            name = self._document.getInternalFontName(font[0].fontName)
            out.append(f"{name} {self.size:g} Tf <{text.encode('utf-16-be').hex()}> Tj")
            return True
        away = True
        for subset, codes in font[0].splitString(text, self._document):
            name = font[0].getSubsetInternalName(subset, self._document)
            out.append(f"{name} {self.size:g} Tf <{codes.hex()}> Tj")
            away = not (own and subset == 0)
        return away


def _stop(text: str, ends: list[float], start: int, limit: float) -> int:
    """Where the line that begins at `start` ends, as a reader would end it.

    Args: ends: places of the characters' right edges.
    """
    before = ends[start - 1] if start else 0.0
    stop = max(start + 1, bisect_right(ends, before + limit, lo=start))
    if stop >= len(ends):
        return len(ends)
    found = _TO_LAST_BREAK.match(text, start, stop)
    # A break far to the left wastes more room than it helps.
    return found.end() if found and found.end() - start > (stop - start) // 3 else stop


def _ascii(text: str) -> str:
    if "\\" in text or "(" in text or ")" in text:
        text = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    return f"({text}) Tj"


def _base_direction(text: str) -> bool:
    """Does the text run to the right? Its first strong character says so (UAX 9, P2 and P3)."""
    for char in text:
        kind = unicodedata.bidirectional(char)
        if kind == "L":
            return True
        if kind in _RIGHT_TO_LEFT:
            return False
    return True


_shapers: list[Any] = []


def _shaper() -> Any:
    if not _shapers:
        try:
            shaping: Any = import_module("arabic_reshaper")
        except ImportError as error:
            raise MissingExtra(
                "Arabic text in PDF needs arabic-reshaper: pip install 'dotmac-platform[pdf]'"
            ) from error
        _shapers.append(
            shaping.ArabicReshaper({"delete_harakat": False, "use_unshaped_instead_of_isolated": True})
        )
    return _shapers[0]


def _display() -> Any:
    try:
        # The algorithm in Python, which mirrors brackets; the one in Rust does not.
        return import_module("bidi.algorithm").get_display
    except ImportError as error:
        raise MissingExtra(
            "text from right to left in PDF needs python-bidi: pip install 'dotmac-platform[pdf]'"
        ) from error
