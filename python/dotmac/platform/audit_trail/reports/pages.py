"""The report as PDF: what a person hands over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.pdf.charts import bars, named_bars
from dotmac.platform.audit_trail.pdf.document import MUTED, Document
from dotmac.platform.audit_trail.pdf.fonts import BOLD
from dotmac.platform.audit_trail.pdf.table import draw_table
from dotmac.platform.audit_trail.reports import wording

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from dotmac.platform.audit_trail.reports.model import Chart, ComplianceReport, Section

__all__ = ["render"]

_TITLE_SIZE = 26.0


def render(report: ComplianceReport, *, page_size: str, fonts: Sequence[str | os.PathLike[str]]) -> bytes:
    """The whole document."""
    header, parts = report.header, wording.PARTS
    titles = [wording.section_title(number, one) for number, one in enumerate(report.sections, 1)]
    period = f"{header['period']['start'][:16]} to {header['period']['end_excluded'][:16]} UTC"
    document = Document(
        header["framework"],
        head=f"tenant {header['tenant']}   ·   {period}",
        foot=f"{header['generator']}   ·   parameters {header['parameters_sha256'][:16]}",
        contents=[
            parts["scope"], parts["completeness"], parts["summary"], *titles, parts["unanswered"],
            parts["attachments"], parts["sign_off"],
        ],
        page_size=page_size,
        fonts=fonts,
    )  # fmt: skip
    _cover(document, report, period)
    document.contents()
    document.new_page()
    document.heading(parts["scope"])
    document.pairs(wording.header_pairs(report))
    document.new_page()
    document.heading(parts["completeness"])
    document.note(report.completeness["verification"]["said"])
    for title, pairs in wording.completeness_blocks(report):
        document.heading(title, 2)
        if pairs:
            document.pairs(pairs, label_width=250)
        else:
            document.paragraph("None.")
    document.new_page()
    _summary(document, report)
    for title, section in zip(titles, report.sections, strict=True):
        _section(document, title, section)
    _end(document, report)
    return document.to_bytes()


def _cover(document: Document, report: ComplianceReport, period: str) -> None:
    header, known = report.header, report.completeness
    document.new_page()
    document.y -= 90
    document.heading(header["framework"], 0)
    document.paragraph(f"Compliance report {report.report_type}", size=13, color=MUTED)
    document.y -= 20
    document.pairs(
        [
            ("Period", period),
            ("Tenant", header["tenant"]),
            *([("Person or patient", header["subject"])] if header["subject"] is not None else []),
            ("Events in the period", f"{known['events']:,}"),
            ("Verification", known["verification"]["said"]),
            ("Generator", header["generator"]),
            ("SHA-256 of the parameters", header["parameters_sha256"]),
            ("SHA-256 of the report's body", report.body_sha256),
        ]
    )
    document.y -= 16
    document.paragraph(
        "An audit trail proves only the part that is in the log. Each section names the control or article "
        "that it answers, says where the log has nothing, and what would be needed; the questions that "
        "no log answers stand in a section of their own. "
        "The same parameters over the same events give the same bytes.",
        color=MUTED,
    )


def _summary(document: Document, report: ComplianceReport) -> None:
    document.heading(wording.PARTS["summary"])
    if not report.charts:
        document.note("There are no events in the period, so there is nothing to draw.")
    for chart in report.charts:
        _chart(document, chart)
    document.heading("Sections", 2)
    draw_table(document, ("control", "section", "rows", "said"), wording.summary_rows(report))


def _chart(document: Document, chart: Chart) -> None:
    if chart.over_time:
        bars(document, chart.title, chart.labels, chart.series, chart.unit)
        return
    values = next(iter(chart.series.values()))
    named_bars(document, chart.title, list(zip(chart.labels, values, strict=True)), chart.unit)


def _section(document: Document, title: str, section: Section) -> None:
    document.heading(title, note=section.control)
    document.paragraph(wording.row_count(section), color=MUTED)
    if section.about:
        document.paragraph(section.about, color=MUTED)
    said = " ".join(filter(None, (section.note, section.needed)))
    if said:
        document.note(said)
    if section.rows:
        drawn = draw_table(document, section.columns, section.rows)
        if drawn.shortened:
            document.note(
                f"{drawn.shortened} values are too long for the page and end with … and their length; "
                "the CSV file and report.json have them whole."
            )
    document.y -= 8


def _end(document: Document, report: ComplianceReport) -> None:
    parts = wording.PARTS
    document.heading(parts["unanswered"])
    document.paragraph(
        "Questions of the framework that an audit trail alone can't answer, and what would.", color=MUTED
    )
    draw_table(
        document,
        ("control", "question", "why not", "what would be needed"),
        [(one.control, one.question, one.why, one.needed) for one in report.cannot_answer],
    )
    document.heading(parts["attachments"])
    document.paragraph("Files of this report, as the .zip form holds them.", color=MUTED)
    draw_table(document, ("file", "sha256"), list(report.attachments.items()))
    document.pairs([("SHA-256 of the report's body", report.body_sha256)])
    document.new_page()
    document.heading(parts["sign_off"])
    document.paragraph(
        "The reviewer confirms to have read this report, its completeness block and what it can't answer.",
        color=MUTED,
    )
    document.y -= 10
    for name, value in report.sign_off.items():
        tall = 64.0 if name in ("findings", "conclusion") else 34.0
        document.room(tall)
        document.y -= tall
        label = wording.SIGN_OFF.get(name, name)
        document.put(document.setter(BOLD, 9.0), label, document.left, document.y + 4, 150, MUTED)
        document.put(
            document.setter(size=9.0), value, document.left + 160, document.y + 4, document.inner - 160
        )
        left, right, y = document.left + 160, document.left + document.inner, document.y
        document.operators(f"{MUTED} RG 0.7 w {left:g} {y:.2f} m {right:g} {y:.2f} l S")
