"""Compliance reports as files: JSON, zipped CSV, HTML, PDF.

Promises:
- every form of every type is the same to the byte when it is asked for again, with the samples of the same
  seed; another seed draws another sample and is stated;
- an empty period and one of one event have all forms;
- no value gets out of its place: HTML runs nothing, loads nothing and is well-formed; CSV cells are no
  formulas; PDF operators and margins stay whole; changes of direction are shown as codes; long values say how
  long they are;
- HTML has headings, captions and scopes for those who hear it; every link within it leads somewhere;
- the PDF has contents, page numbers, the completeness block and lines to sign on;
- a month with something for every section leaves none empty.
"""

from __future__ import annotations

import asyncio
import csv
import io
import re
import zipfile
from datetime import UTC, date, datetime
from html.parser import HTMLParser

import pypdf
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.errors import InvalidArgument
from support import story
from support.pages import darkest_of_margins, texts_of

TYPES = ("access_log", "gdpr", "hipaa", "pci_dss", "soc2", "sox")
FORMS = (".json", ".zip", ".html", ".pdf")
VOID = {"meta", "rect", "line"}
DAY = date(2024, 3, 10)


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url) as aggregator:
        yield aggregator


@pytest.fixture(scope="module")
def told(migrated_url, run_apart):
    """The tenant of a month that has something for every section."""
    tenant = "story-of-report-forms"

    async def work():
        async with AuditAggregator(migrated_url) as audit:
            await story.tell(audit, tenant)

    run_apart(work())
    return tenant


def ask(audit, report_type, tenant, **more):
    if report_type == "gdpr":
        more = {"subject_id": "p3", "processing_records": story.RECORDS, **more}
    return audit.generate_compliance_report(story.FIRST, story.LAST, report_type, tenant, **more)


class Page(HTMLParser):
    """Reads HTML strictly: every element is closed in its turn."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags, self.attributes, self.text = [], set(), set(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, name, value) for name, value in attrs)
        known = dict(attrs)
        if "id" in known:
            assert known["id"] not in self.ids
            self.ids.add(known["id"])
        if tag == "a":
            self.links.add(known["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, name, value) for name, value in attrs)

    def handle_data(self, data):
        self.text.append(data)


def is_harmless(page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "img", "form", "link", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "xlink:href", "action")
        assert not (name == "href" and not value.startswith("#"))
    assert {link.removeprefix("#") for link in page.links} <= page.ids


def is_whole(data: bytes) -> None:
    """Every page says its number, does nothing by itself, and its margins are blank."""
    reader = pypdf.PdfReader(io.BytesIO(data))
    assert "/OpenAction" not in reader.trailer["/Root"]
    for number, page in enumerate(reader.pages, 1):
        text = page.extract_text()
        assert re.search(rf"page {number}\s+of {len(reader.pages)}\b", text)
        for link in page.get("/Annots") or ():
            assert "/A" not in link.get_object()
    assert darkest_of_margins(data) > 200


@pytest.mark.parametrize("report_type", TYPES)
async def test_a_full_month_leaves_no_section_empty_and_every_form_is_whole(audit, told, report_type):
    report = await ask(audit, report_type, told)
    empty = {section.name for section in report.sections if not section.rows}
    assert empty <= {"anomalies"}
    assert report.completeness["verification"]["result"] == "ok"
    assert report.completeness["segments"]["events_without_a_segment"] == 0
    page = Page(report.to_html())
    is_harmless(page)
    assert "Content-Security-Policy" in report.to_html()
    assert page.tags.count("caption") == page.tags.count("table")
    assert all(value == "col" for tag, name, value in page.attributes if (tag, name) == ("th", "scope"))
    heard = " ".join(page.text)
    data = report.to_pdf()
    is_whole(data)
    read = "\n".join(texts_of(data))
    for section in report.sections:
        assert section.title in heard
        assert section.control in heard
        assert section.control in read
    for said in (
        "Completeness",
        "What the log cannot answer",
        "Signature",
        report.header["parameters_sha256"],
    ):
        assert said in heard
        assert said in read
    assert "Contents" in read
    outline = [entry.title for entry in pypdf.PdfReader(io.BytesIO(data)).outline]
    assert len(outline) == len(report.sections) + 6
    for digest in report.attachments.values():
        assert digest in heard
        assert digest in read.replace("\n", "")


@pytest.mark.parametrize("report_type", TYPES)
async def test_every_form_is_the_same_to_the_byte(audit, migrated_url, told, report_type):
    first = await ask(audit, report_type, told)
    async with AuditAggregator(migrated_url) as other:
        again = await ask(other, report_type, told)
    for form in FORMS:
        assert first.to_bytes(form) == again.to_bytes(form), form
    assert first.to_pdf(page_size="letter") == again.to_pdf(page_size="letter")


async def test_samples_are_drawn_by_the_stated_seed(audit, told):
    first = await ask(audit, "sox", told, seed="alpha")
    same = await ask(audit, "sox", told, seed="alpha")
    other = await ask(audit, "sox", told, seed="beta", sample_size=30)
    assert first.header["sample_seed"] == "alpha"
    assert first.section("changes_sample").rows == same.section("changes_sample").rows
    assert set(first.section("changes_sample").rows) != set(other.section("changes_sample").rows)
    assert len(other.section("changes_sample").rows) == 30
    assert first.header["parameters_sha256"] != other.header["parameters_sha256"]
    population = {row[:4] for row in first.section("changes").rows}
    assert {row[:4] for row in first.section("changes_sample").rows} <= population


@pytest.mark.parametrize("events", [0, 1])
@pytest.mark.parametrize("report_type", TYPES)
async def test_hardly_anything_has_all_forms_too(audit, unique, report_type, events):
    for _ in range(events):
        await audit.log_event(
            "DATA_ACCESS", "user.read", tenant_id=unique, occurred_at=datetime(2024, 3, 10, 12, tzinfo=UTC)
        )
    report = await audit.generate_compliance_report(DAY, DAY, report_type, unique)
    is_harmless(Page(report.to_html()))
    is_whole(report.to_pdf())
    for name, text in report.to_csv().items():
        assert len(list(csv.reader(io.StringIO(text)))) >= 2, (
            name
        )  # the head, and rows or the reason for none
    assert report.completeness["events"] == events


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": '" onmouseover="alert(1)',
    "entity": "&lt;b&gt; &amp; </td></table><h1>",
    "formula": '=HYPERLINK("http://evil.example","x")',
    "operators": ") Tj ET Q q 0 0 900 900 re f BT (\\",
    "override": "user\u202egnp.exe\u2066\u200b",
    "hebrew": "שלום עולם (123)",
    "arabic": "مرحبا بالعالم",
    "cjk": "中文 日本語 한국어",
    "lines": "one\r\ntwo\ttab\x1b[31m",
    "long": "x" * 120_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_no_value_gets_out_of_its_place(audit, unique, kind):
    value = HOSTILE[kind]
    short = value[:400]
    tenant = f"{unique}{short[:60]}"
    await audit.log_event(
        "DATA_ACCESS", short, tenant_id=tenant, user_id=short, resource_type=short, resource_id=short,
        correlation_id=short, occurred_at=datetime(2024, 3, 10, 12, tzinfo=UTC),
        metadata={
            "user_agent": value, "method": value, "session_id": value, "purpose": value,
            "data_category": value, "recipient": value, "subject_id": short, "patient_id": short,
        },
    )  # fmt: skip
    await audit.log_event(
        "SECURITY", "breach.detected", tenant_id=tenant, occurred_at=datetime(2024, 3, 10, 13, tzinfo=UTC),
        metadata={
            "breach_id": value, "nature": value, "aware_at": value, "notified_at": value,
            "subject_ids": [value],
        },
    )  # fmt: skip
    for report_type in ("access_log", "gdpr", "hipaa"):
        subject = None if report_type == "access_log" else short
        report = await audit.generate_compliance_report(DAY, DAY, report_type, tenant, subject_id=subject)
        text = report.to_html()
        page = Page(text)
        is_harmless(page)
        assert "\u202e" not in text
        if kind == "script":
            assert value in "".join(page.text)
            assert "<script" not in text
        for cells in report.to_csv().values():
            for row in csv.reader(io.StringIO(cells)):
                assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row)
        data = report.to_pdf()
        is_whole(data)
        read = "\n".join(texts_of(data))
        if kind == "override":
            assert "\\u{202e}" in read
        if kind == "long":
            assert re.search(r"… \(120,000( characters)?\)", read)
            assert "values are too long for the page" in read
            assert value in report.to_json()
            assert value in "".join(report.to_csv().values())
        if kind == "operators":
            assert "0 0 900 900 re f" in read


async def test_forms_are_written_by_their_suffix(audit, unique, tmp_path):
    report = await audit.generate_compliance_report(DAY, DAY, "soc2", unique)
    for form in FORMS:
        target = report.write(tmp_path / f"r{form}")
        assert target.read_bytes() == report.to_bytes(form)
    with zipfile.ZipFile(tmp_path / "r.zip") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    for wrong in ("r.doc", "r"):
        with pytest.raises(InvalidArgument, match=r"\.pdf"):
            report.write(tmp_path / wrong)


async def test_progress_and_cancellation(audit, told):
    steps = []
    await ask(audit, "sox", told, progress=lambda done, total, title: steps.append((done, total, title)))
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[-1][0] == steps[-1][1]
    for _ in range(5):
        task = asyncio.create_task(ask(audit, "hipaa", told))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (await ask(audit, "hipaa", told)).completeness["events"] > 0
