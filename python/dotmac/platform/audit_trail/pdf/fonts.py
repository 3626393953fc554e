"""The fonts of a document: DejaVu Sans Condensed, fonts of the caller's, and names that every viewer knows.

DejaVu is embedded (as the subset in use) and has Latin, Greek, Cyrillic, Hebrew, Arabic, Armenian, Georgian.
For Chinese, Japanese and Korean, whose fonts are tens of megabytes, the document names a standard font that
viewers have or replace; who wants these embedded gives a TrueType font of their own.
"""

from __future__ import annotations

import io
import threading
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotmac.platform.errors import InvalidArgument, MissingExtra

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = ["BOLD", "REGULAR", "Fonts"]

REGULAR, BOLD = "DotmacSans", "DotmacSans-Bold"
_FILES = {REGULAR: "DejaVuSansCondensed.ttf", BOLD: "DejaVuSansCondensed-Bold.ttf"}
# Adobe's standard faces for East Asia (Technical Notes 5078 to 5080, 5093), by Unicode block.
_STANDARD = (
    ("HeiseiKakuGo-W5", ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F))),
    ("HYGothic-Medium", ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF))),
    (
        "STSong-Light",
        ((0x2E80, 0x2FDF), (0x3000, 0x303F), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xFF01, 0xFF65)),
    ),
)
_REGISTERING = threading.Lock()


class Fonts:
    """Which font shows a character, and how wide.

    Args: extra: paths of TrueType fonts, asked in this order for what DejaVu lacks.
    Raises: MissingExtra: reportlab is not installed. InvalidArgument: a file is no TrueType font.
    """

    def __init__(self, extra: Sequence[str | os.PathLike[str]] = ()) -> None:
        self._extra = [_load_extra(number, path) for number, path in enumerate(extra)]
        self._chains = {name: [_registered(name), *self._extra] for name in _FILES}

    def find(self, face: str, char: str) -> tuple[Any, bool] | None:
        """The font that has the character, and whether it is a standard one; None: no font has it."""
        code = ord(char)
        for font in self._chains[face]:
            if code in font.face.charToGlyph:
                return font, False
        for name, blocks in _STANDARD:
            if any(first <= code <= last for first, last in blocks):
                return _standard(name), True
        return None

    def base(self, face: str) -> Any:
        """The face's own font."""
        return self._chains[face][0]


def _reportlab() -> Any:
    try:
        from reportlab.pdfbase import cidfonts, pdfmetrics, ttfonts
    except ImportError as error:
        raise MissingExtra("documents in PDF need reportlab: pip install 'dotmac-platform[pdf]'") from error
    return pdfmetrics, ttfonts, cidfonts


def _registered(name: str) -> Any:
    """The embedded font, under its name in reportlab's table, where its charts look for it."""
    pdfmetrics, ttfonts, _ = _reportlab()
    with _REGISTERING:
        if name not in pdfmetrics.getRegisteredFontNames():
            data = resources.files(__package__).joinpath("dejavu", _FILES[name]).read_bytes()
            # From memory: the document names no path of this machine.
            pdfmetrics.registerFont(ttfonts.TTFont(name, io.BytesIO(data), asciiReadable=True))
        return pdfmetrics.getFont(name)


def _load_extra(number: int, path: str | os.PathLike[str]) -> Any:
    _, ttfonts, _ = _reportlab()
    try:
        data = Path(path).read_bytes()
        return ttfonts.TTFont(f"Extra{number}", io.BytesIO(data), asciiReadable=False)
    except (OSError, ttfonts.TTFError) as error:
        raise InvalidArgument(
            "fonts", str(path), f"give TrueType fonts (.ttf, with glyf outlines): {error}"
        ) from error


def _standard(name: str) -> Any:
    pdfmetrics, _, cidfonts = _reportlab()
    with _REGISTERING:
        if name not in pdfmetrics.getRegisteredFontNames():
            pdfmetrics.registerFont(cidfonts.UnicodeCIDFont(name))
        return pdfmetrics.getFont(name)
