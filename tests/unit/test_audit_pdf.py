"""Documents in PDF, without a database.

Promises:
- every line of a broken text fits its width, and the lines together are the text;
- a cut text says how long it was; characters that command or that no font has become codes;
- text from right to left is put in display order, brackets mirrored, Arabic letters joined;
- a table has every row once, its head on every page, numbers at the right, and nothing stands in the margins;
- pages say "page x of y"; the contents lead to the headings' pages; the same calls give the same bytes;
- a thousand pages take some megabytes, not hundreds;
- ticks of charts are round, start at 0 and reach the largest value.
"""

from __future__ import annotations

import io
import re
import tracemalloc

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dotmac.platform.audit_trail.pdf.charts import bars, named_bars, ticks
from dotmac.platform.audit_trail.pdf.document import Document
from dotmac.platform.audit_trail.pdf.fonts import BOLD
from dotmac.platform.audit_trail.pdf.table import draw_table
from dotmac.platform.errors import InvalidArgument
from support.pages import darkest_of_margins, texts_of

SHOWN = re.compile(r"\((?P<ascii>(?:[^()\\]|\\.)*)\) Tj")


def plain(shown: str) -> str:
    """The text that operators show, where it is ASCII."""
    return "".join(re.sub(r"\\(.)", r"\1", found["ascii"]) for found in SHOWN.finditer(shown))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300), st.floats(20, 300))
def test_lines_fit_and_are_the_text(text: str, width: float) -> None:
    setter = Document("x").setter()
    lines = setter.lines(text, width)
    assert not lines.cut
    assert all(wide <= width + 0.01 for wide in lines.widths)
    told = "".join(map(plain, lines.shown))
    assert told.replace(" ", "") == text.replace(" ", "")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120), st.floats(30, 200))
def test_any_text_at_all_is_set(text: str, width: float) -> None:
    document = Document("x")
    setter = document.setter(BOLD, 7.0)
    assert all(wide <= width + 0.01 for wide in setter.lines(text, width).widths)
    document.paragraph(text)
    assert document.to_bytes().startswith(b"%PDF-")


def test_a_cut_text_says_how_long_it_was() -> None:
    setter = Document("x").setter()
    lines = setter.lines("x" * 1_000_000, 100, 3)
    assert lines.cut
    assert len(lines.shown) == 3
    data = Document("x")
    draw_table(data, ("a",), [["y" * 1_000_000]])
    assert "1,000,000 characters" in texts_of(data.to_bytes())[0]


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("a\x00b", r"a\u{0}b"),
        ("abc\u202edcba", r"abc\u{202e}dcba"),
        ("a\u2028b\ud800", r"a\u{2028}b\u{d800}"),
        ("a\nb", "a↵\nb"),
        ("\U0001faf6", r"\u{1faf6}"),
        ("e\u0301", "é"),
        ("Ελληνικά Русский żółć", "Ελληνικά Русский żółć"),
    ],
)
def test_what_commands_or_has_no_glyph_is_shown_as_a_code(text: str, visible: str) -> None:
    assert Document("x").setter().visible(text) == visible


def test_right_to_left_is_put_in_display_order() -> None:
    setter = Document("x").setter()
    assert setter.display("שלום (abc)") == "(abc) םולש"
    assert setter.display("abc (שלום)") == "abc (םולש)"
    # Joined: the letters' presentation forms, from the right.
    assert setter.display("مرحبا") == "ﺎﺒﺣﺮﻣ"


def test_a_table_has_every_row_once_and_its_head_on_every_page() -> None:
    document = Document("Title", head="right", foot="left", contents=["One", "Two"])
    document.contents()
    document.new_page()
    document.heading("One", note="control 1")
    drawn = draw_table(
        document,
        ("name_of_it", "number", "long"),
        ((f"row{n:05}", n / 4, "word " * (n % 40)) for n in range(700)),
    )
    assert (drawn.rows, drawn.shortened) == (700, 0)
    document.heading("Two")
    document.note("nothing " * 2_000)
    document.pairs([("a" * 200, "b" * 5_000)])
    data = document.to_bytes()
    pages = texts_of(data)
    whole = "\n".join(pages)
    assert sorted(re.findall(r"row\d{5}", whole)) == [f"row{n:05}" for n in range(700)]
    for number, page in enumerate(pages, 1):
        assert f"page {number}" in page
        assert f"of {len(pages)}" in page
        if re.search(r"row\d{5}", page):
            assert "number long" in page
    second = next(number for number, page in enumerate(pages, 1) if "nothing" in page and "Two" in page)
    assert re.search(rf"One\s*2\s+Two\s*{second}\b", pages[0])
    assert darkest_of_margins(data) >= 200
    links = [one.get_object() for one in pypdf.PdfReader(io.BytesIO(data)).pages[0]["/Annots"]]
    assert len(links) == 2


@pytest.mark.parametrize("page_size", ["A4", "letter"])
def test_wide_and_hostile_tables_stay_within_the_margins(page_size: str) -> None:
    document = Document("T" * 300, head="h" * 300, foot="f" * 300, page_size=page_size)
    values = ["x" * 400, "שלום " * 80, "مرحبا " * 80, "a\n" * 60, None, 3.25, "W" * 50, "i" * 50]
    draw_table(document, [f"column_{n}_{'wide' * (n % 3)}" for n in range(16)], [(values * 2)] * 40)
    document.heading("h" * 400, note="n" * 400)
    document.paragraph("p" * 3_000)
    bars(document, "t" * 300, [f"2024-03-{n:02}" for n in range(1, 32)], {"s" * 20: range(31)})
    named_bars(document, "names", [("n" * 300, 1e9), ("中文", 1), ("ש" * 90, 5)])
    assert darkest_of_margins(document.to_bytes()) >= 200


def test_the_same_calls_give_the_same_bytes() -> None:
    def make() -> bytes:
        document = Document("Title", contents=["One"])
        document.contents()
        document.heading("One")
        draw_table(document, ("a", "b"), [("é", 1), ("שלום", None), ("中文 한국어 かな", 2)])
        bars(document, "chart", ["a", "b"], {"x": [1, 2], "y": [0, 3]})
        return document.to_bytes()

    assert make() == make()


def test_a_wrong_table_of_contents_is_a_bug_that_is_told() -> None:
    document = Document("Title", contents=["One", "Two"])
    document.heading("One")
    with pytest.raises(RuntimeError, match="contents"):
        document.to_bytes()


def test_fonts_and_page_sizes_are_checked(tmp_path) -> None:
    (tmp_path / "x.ttf").write_bytes(b"OTTO" + bytes(100))
    for fonts in ([tmp_path / "x.ttf"], [tmp_path / "missing.ttf"]):
        with pytest.raises(InvalidArgument, match="TrueType"):
            Document("x", fonts=fonts)
    with pytest.raises(InvalidArgument, match=r"A4.*letter"):
        Document("x", page_size="A5")


def test_a_thousand_pages_take_little_memory() -> None:
    document = Document("Title")
    tracemalloc.start()
    draw_table(document, ("a", "b", "c"), ((f"{n:08}", f"value {n}", n) for n in range(40_000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert document.pages > 800
    assert peak < 25_000_000


@given(st.floats(0, 1e12))
def test_ticks_are_round_and_reach_the_top(most: float) -> None:
    marks = ticks(most)
    assert marks[0] == 0
    assert marks[-1] >= most * (1 - 1e-9)
    assert 2 <= len(marks) <= 7
