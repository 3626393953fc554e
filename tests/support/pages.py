"""PDF documents as a test sees them."""

from __future__ import annotations

import io

import pypdf
import pypdfium2


def texts_of(data: bytes) -> list[str]:
    """What stands on each page."""
    return [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]


def darkest_of_margins(data: bytes) -> int:
    """The darkest point left, right, above or below of where pages have text; 255 where nothing is drawn."""
    darkest = 255
    for page in pypdfium2.PdfDocument(data):
        image = page.render(scale=1).to_pil().convert("L")
        wide, high = image.size
        for box in (
            (0, 0, 38, high),
            (wide - 38, 0, wide, high),
            (0, 0, wide, 20),
            (0, high - 18, wide, high),
        ):
            darkest = min(darkest, image.crop(box).getextrema()[0])
    return darkest
