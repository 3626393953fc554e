"""A document: pages with header and footer, a table of contents, headings, paragraphs, pairs."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Self

from dotmac.platform.audit_trail.pdf.fonts import BOLD, REGULAR, Fonts
from dotmac.platform.audit_trail.pdf.text import Setter
from dotmac.platform.errors import InvalidArgument, MissingExtra

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from typing import BinaryIO

__all__ = ["INK", "MUTED", "PAGE_SIZES", "RULE", "SHADE", "TINT", "Document"]

# Points, in landscape.
PAGE_SIZES = {"A4": (841.89, 595.28), "letter": (792.0, 612.0)}
INK, MUTED, RULE, SHADE, TINT = (
    "0.10 0.12 0.16",
    "0.38 0.42 0.48",
    "0.78 0.81 0.85",
    "0.93 0.95 0.97",
    "0.12 0.29 0.49",
)
_MARGIN, _TOP, _BOTTOM = 40.0, 46.0, 42.0
_OF, _TOTAL = 44.0, "total"
_CONTENTS_LINE, _CONTENTS_HEAD = 16.0, 46.0
# Level 3 takes a third of the time of level 6 for a tenth more bytes.
_COMPRESSION = 3
_SIZES = {0: 20.0, 1: 14.0, 2: 10.5}


class Document:
    """A PDF in the making; `save` writes it.

    Args:
        title: of the document; shown by viewers and at the head of each page.
        head: text at the right of each page's head, such as the period.
        foot: text at the left of each page's foot.
        contents: titles of the headings of level 1 in their order, for a table of contents after the first
            page; none: no table of contents.
        page_size: `A4` or `letter`, in landscape.
        fonts: paths of TrueType fonts for characters that DejaVu lacks.
        lang: language of the text, BCP 47.

    Raises: MissingExtra: reportlab is not installed. InvalidArgument.
    """

    def __init__(
        self,
        title: str,
        *,
        head: str = "",
        foot: str = "",
        contents: Sequence[str] = (),
        page_size: str = "A4",
        fonts: Sequence[str | os.PathLike[str]] = (),
        lang: str = "en",
    ) -> None:
        try:
            from reportlab.pdfgen.canvas import Canvas
        except ImportError as error:
            raise MissingExtra(
                "documents in PDF need reportlab: pip install 'dotmac-platform[pdf]'"
            ) from error
        if page_size not in PAGE_SIZES:
            raise InvalidArgument("page_size", page_size, f"give one of {', '.join(PAGE_SIZES)}")
        self.width, self.height = PAGE_SIZES[page_size]
        self._fonts = Fonts(fonts)
        # invariant: no time, no random id; the first argument is never written to.
        canvas = Canvas("", (self.width, self.height), pageCompression=0, invariant=1, lang=lang)
        self.canvas: Any = canvas
        canvas.setTitle(title)
        canvas.setSubject(head)
        canvas.setAuthor(foot)
        canvas.setCreator("dotmac-platform")
        self._title, self._head, self._foot = title, head, foot
        self._setters: dict[tuple[str, float], Setter] = {}
        self._contents = list(contents)
        self._starts: list[tuple[str, int]] = []
        self._page, self._section = 0, ""
        self.y = 0.0
        self._open = False

    # --- measures

    @property
    def left(self) -> float:
        """Left edge of the text, points."""
        return _MARGIN

    @property
    def inner(self) -> float:
        """Width of the text, points."""
        return self.width - 2 * _MARGIN

    @property
    def bottom(self) -> float:
        """Lowest place of the text, points."""
        return _BOTTOM

    @property
    def pages(self) -> int:
        """Pages begun so far."""
        return self._page

    def setter(self, face: str = REGULAR, size: float = 8.5) -> Setter:
        """What sets text of that face and size in this document."""
        key = (face, size)
        if key not in self._setters:
            self._setters[key] = Setter(self.canvas, self._fonts, face, size)
        return self._setters[key]

    # --- pages

    def new_page(self) -> None:
        """End this page and begin the next."""
        if self._open:
            self._close_page()
        self._page += 1
        self._open = True
        self.y = self.height - _TOP - 14

    def room(self, points: float) -> None:
        """Begin a new page unless so many points are left on this one."""
        if not self._open or self.y - points < _BOTTOM:
            self.new_page()

    def _close_page(self) -> None:
        self._frame()
        canvas = self.canvas
        name = canvas._doc.thisPageName()  # noqa: SLF001 (reportlab keeps whole pages until the end; see below)
        canvas.showPage()
        # Compressed now, not when the document is written: a thousand pages of operators are many megabytes.
        page = canvas._doc.idToObject[name]  # noqa: SLF001
        page.Contents, page.stream = _stream(page.stream), None
        self._open = False

    def _frame(self) -> None:
        top, line = self.height - _TOP, f"{RULE} RG 0.6 w"
        small, bold = self.setter(size=7.5), self.setter(BOLD, 7.5)
        self.operators(
            f"{line} {_MARGIN:g} {top:g} m {self.width - _MARGIN:g} {top:g} l "
            f"{_MARGIN:g} {_BOTTOM - 8:g} m {self.width - _MARGIN:g} {_BOTTOM - 8:g} l S"
        )
        half = self.inner / 2
        self.put(bold, self._title, _MARGIN, top + 6, half, TINT)
        self.put(small, self._head, _MARGIN + half, top + 6, half, MUTED, right=True)
        foot = f"{self._foot}   ·   {self._section}" if self._section else self._foot
        self.put(small, foot, _MARGIN, _BOTTOM - 19, self.inner - 120, MUTED)
        self.put(small, f"page {self._page}", _MARGIN, _BOTTOM - 19, self.inner - _OF, MUTED, right=True)
        self._form(_TOTAL, self.width - _MARGIN - _OF, _BOTTOM - 19)

    def _form(self, name: str, x: float, y: float) -> None:
        """Draw what is known only at the end: reportlab takes forms that are defined later."""
        self.canvas.saveState()
        self.canvas.translate(x, y)
        self.canvas.doForm(name)
        self.canvas.restoreState()

    # --- text

    def operators(self, text: str) -> None:
        """Put operators of the page description as they are."""
        self.canvas._code.append(text)  # noqa: SLF001 (the canvas's own methods take ten times as long)

    def put(
        self,
        setter: Setter,
        text: str,
        x: float,
        y: float,
        width: float,
        color: str = INK,
        *,
        right: bool = False,
    ) -> None:
        """One line of text at a place, cut to a width."""
        if not text:
            return
        line = setter.line(text, width)
        x = x + width - line.widths[0] if right else x
        self.operators(f"BT {setter.select} {color} rg 1 0 0 1 {x:.2f} {y:.2f} Tm {line.shown[0]} ET")

    def heading(self, text: str, level: int = 1, note: str = "") -> None:
        """A heading; one of level 1 is in the contents and in the viewer's outline.

        Args: note: text at the right, such as the control that a section answers.
        """
        size = _SIZES[level]
        self.room(size * 2 + (90 if level == 1 else 50))
        if level == 1:
            self._section = text
            key = f"section-{len(self._starts)}"
            self.canvas.bookmarkPage(key, fit="XYZ", left=0, top=self.y + 6, zoom=0)
            self.canvas.addOutlineEntry(self.setter(BOLD, size).visible(text), key, 0)
            self._starts.append((text, self._page))
        # Apart from what stands above, unless this is the head of the page.
        self.y -= size if self.y >= self.height - _TOP - 14 else size * 1.5
        noted = min(self.inner * 0.45, self.setter(size=9.0).width(note)) if note else 0.0
        for line in self.setter(BOLD, size).lines(text, self.inner - noted - 12).shown:
            self._show(self.setter(BOLD, size), line, self.left, TINT if level < 2 else INK)  # noqa: PLR2004
            self.y -= size * 1.25
        if note:
            self.put(
                self.setter(size=9.0), note, self.left, self.y + size * 1.25, self.inner, MUTED, right=True
            )
        self.y += size * 0.55

    def paragraph(self, text: str, *, size: float = 8.5, color: str = INK, face: str = REGULAR) -> None:
        """Text over the whole width, broken into lines and over pages."""
        setter, step = self.setter(face, size), size * 1.38
        for line in setter.lines(text, self.inner).shown:
            self.room(step)
            self.y -= step
            self._show(setter, line, self.left, color)
        self.y -= size * 0.5

    def note(self, text: str) -> None:
        """A sentence in a shaded box: something is missing, was cut, or there is nothing."""
        setter = self.setter(size=8.5)
        lines = setter.lines(text, self.inner - 20).shown
        step = 8.5 * 1.38
        self.room(min(len(lines), 4) * step + 14)
        while lines:
            fit = max(1, int((self.y - _BOTTOM - 12) / step))
            shown, lines = lines[:fit], lines[fit:]
            high = len(shown) * step + 10
            self.operators(
                f"{SHADE} rg {self.left:.2f} {self.y - high:.2f} {self.inner:.2f} {high:.2f} re f "
                f"{TINT} rg {self.left:.2f} {self.y - high:.2f} 2.5 {high:.2f} re f"
            )
            self.y -= 4
            for line in shown:
                self.y -= step
                self._show(setter, line, self.left + 11, INK)
            self.y -= 12
            if lines:
                self.new_page()

    def pairs(self, pairs: Iterable[tuple[str, str]], *, label_width: float = 170.0) -> None:
        """Names and values, a line each; long values are broken."""
        bold, setter, step = self.setter(BOLD, 8.5), self.setter(size=8.5), 8.5 * 1.38
        for label, value in pairs:
            names = bold.lines(label, label_width - 10).shown
            values = setter.lines(value, self.inner - label_width).shown
            for number in range(max(len(names), len(values))):
                self.room(step + 3)
                self.y -= step
                if number < len(names):
                    self._show(bold, names[number], self.left, MUTED)
                if number < len(values):
                    self._show(setter, values[number], self.left + label_width, INK)
            self.y -= 3.5
            right = self.left + self.inner
            self.operators(f"{RULE} RG 0.4 w {self.left:g} {self.y:.2f} m {right:g} {self.y:.2f} l S")

    def _show(self, setter: Setter, shown: str, x: float, color: str) -> None:
        self.operators(f"BT {setter.select} {color} rg 1 0 0 1 {x:.2f} {self.y:.2f} Tm {shown} ET")

    # --- contents and end

    def contents(self) -> None:
        """Pages with the table of contents; the numbers come when the document is saved."""
        for start in range(0, len(self._contents), self._contents_fit):
            self.new_page()
            self._section = "Contents"
            self._form(f"contents-{start}", 0, 0)
            y = self.y - _CONTENTS_HEAD
            for number in range(start, min(start + self._contents_fit, len(self._contents))):
                self.canvas.linkRect(
                    "", f"section-{number}", (self.left, y - 4, self.left + self.inner, y + 11), relative=0
                )
                y -= _CONTENTS_LINE

    @property
    def _contents_fit(self) -> int:
        return int((self.height - _TOP - 14 - _CONTENTS_HEAD - _BOTTOM) / _CONTENTS_LINE)

    def _draw_contents(self) -> None:
        setter, bold = self.setter(size=9.5), self.setter(BOLD, 20.0)
        for start in range(0, len(self._contents), self._contents_fit):
            self.canvas.beginForm(f"contents-{start}")
            y = self.height - _TOP - 14
            self.put(bold, "Contents", self.left, y - 20, self.inner, TINT)
            y -= _CONTENTS_HEAD
            for title, page in self._starts[start : start + self._contents_fit]:
                self.put(setter, title, self.left, y, self.inner - 60)
                self.put(setter, str(page), self.left, y, self.inner, right=True)
                from_x = self.left + min(self.inner - 60, setter.width(title)) + 6
                self.operators(
                    f"q {RULE} RG 0.6 w [1 3] 0 d {from_x:.2f} {y + 1:.2f} m "
                    f"{self.left + self.inner - setter.width(str(page)) - 6:.2f} {y + 1:.2f} l S Q"
                )
                y -= _CONTENTS_LINE
            self.canvas.endForm()

    def to_bytes(self) -> bytes:
        """Finish the document. Raises: RuntimeError: the headings are not those of the contents."""
        if not self._open:
            self.new_page()
        self._close_page()
        if self._contents and [title for title, _ in self._starts] != self._contents:
            raise RuntimeError("the headings of level 1 are not those that the contents were made for")
        self._draw_contents()
        self.canvas.beginForm(_TOTAL, 0, -4, _OF, 12)
        self.put(self.setter(size=7.5), f" of {self._page}", 0, 0, _OF, MUTED)
        self.canvas.endForm()
        # Without this the canvas would add an empty page.
        data = self.canvas._doc.GetPDFData(self.canvas)  # noqa: SLF001
        return data if isinstance(data, bytes) else data.encode("latin-1")

    def save(self, target: BinaryIO) -> int:
        """Finish the document and write it. Returns: bytes written."""
        data = self.to_bytes()
        target.write(data)
        return len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._setters.clear()


def _stream(code: str) -> Any:
    from reportlab.pdfbase.pdfdoc import PDFArray, PDFName, PDFStream

    stream = PDFStream()
    stream.content = zlib.compress(code.encode("ascii"), _COMPRESSION)
    stream.dictionary["Filter"] = PDFArray([PDFName("FlateDecode")])
    return stream
