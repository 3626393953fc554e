"""The report as one HTML file: no scripts, nothing from elsewhere, readable on screen, on paper and aloud."""

# ruff: noqa: E501 (markup and styles read best by the line)

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.reports import wording

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dotmac.platform.audit_trail.reports.model import Cell, Chart, ComplianceReport, Section

__all__ = ["render"]

# Characters that command, turn or break a line: shown as codes, so that no value can pose as another.
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_COLORS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#6b7280")
_STYLE = """
:root{--ink:#1a1f29;--muted:#55606e;--rule:#c7ced6;--shade:#eef2f6;--tint:#1e4a7d}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;color:var(--ink);background:#fff;
max-width:1280px;margin:0 auto;padding:1.5rem}
h1{font-size:1.8rem;color:var(--tint);margin:.2rem 0}
h2{font-size:1.25rem;color:var(--tint);margin:2.2rem 0 .3rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
a{color:#0b5394}
.skip{position:absolute;left:-999px}
.skip:focus{left:1rem;top:1rem;background:#fff;padding:.5rem;outline:3px solid #0b5394}
.control,.about,.count{color:var(--muted)}
.control{font-weight:600}
.note{background:var(--shade);border-inline-start:4px solid var(--tint);padding:.5rem .8rem;margin:.5rem 0}
.scroll{overflow-x:auto}
.scroll:focus{outline:2px solid #0b5394}
table{border-collapse:collapse;width:100%;font-size:.82rem;margin:.5rem 0}
caption{text-align:start;color:var(--muted);padding:.2rem 0}
th,td{padding:.25rem .5rem;text-align:start;vertical-align:top;border-bottom:1px solid var(--rule);overflow-wrap:anywhere}
thead th{background:var(--tint);color:#fff}
tbody tr:nth-child(even){background:var(--shade)}
tbody th{font-weight:600}
td.n,th.n{text-align:end;font-variant-numeric:tabular-nums}
dl.pairs{display:grid;grid-template-columns:minmax(11rem,17rem) 1fr;margin:.5rem 0}
dl.pairs>*{margin:0;padding:.25rem .5rem;border-bottom:1px solid var(--rule);overflow-wrap:anywhere}
dl.pairs dt{color:var(--muted);font-weight:600}
figure{margin:1rem 0}
svg{max-width:100%;height:auto}
svg text{font:12px system-ui,"DejaVu Sans",sans-serif;fill:var(--ink)}
.line{border-bottom:1px solid var(--ink);min-height:2.2rem}
nav ol{columns:2;padding-inline-start:1.5rem}
@media (max-width:700px){nav ol{columns:1}dl.pairs{grid-template-columns:1fr}}
@media print{@page{size:A4 landscape;margin:14mm}body{max-width:none;padding:0;font-size:10pt}
.scroll{overflow:visible}thead{display:table-header-group}tr,figure{break-inside:avoid}h2{break-after:avoid}
nav,.skip{display:none}}
"""


def render(report: ComplianceReport) -> str:
    """The whole file."""
    return "".join(_parts(report))


def _parts(report: ComplianceReport) -> Iterator[str]:
    header = report.header
    title = f"{header['framework']}: {header['tenant']}, {header['period']['start'][:10]}"
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a value might smuggle in: nothing runs and nothing is fetched.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the report</a>\n'
        f"<header><h1>{_text(header['framework'])}</h1>\n<p>{_text(_period(report))}</p></header>\n"
    )
    yield from _contents(report)
    yield '<main id="main">\n'
    yield _heading("scope") + _pairs(wording.header_pairs(report)) + "</section>\n"
    yield _heading("completeness")
    yield f'<p class="note" role="note">{_text(report.completeness["verification"]["said"])}</p>'
    for title, pairs in wording.completeness_blocks(report):
        yield f"<h3>{_text(title)}</h3>" + (_pairs(pairs) if pairs else "<p>None.</p>")
    yield "</section>\n"
    yield _heading("summary")
    yield from (_figure(number, chart) for number, chart in enumerate(report.charts))
    yield from _table("Sections", ("control", "section", "rows", "said"), wording.summary_rows(report))
    yield "</section>\n"
    for number, section in enumerate(report.sections, 1):
        yield from _section(number, section)
    yield _heading("unanswered")
    yield from _table(
        "Questions of the framework without an answer in the log",
        ("control", "question", "why not", "what would be needed"),
        [(one.control, one.question, one.why, one.needed) for one in report.cannot_answer],
    )
    yield "</section>\n" + _heading("attachments")
    yield from _table(
        "Files of this report and their SHA-256", ("file", "sha256"), list(report.attachments.items())
    )
    yield f"<p>SHA-256 of the report's body (report.json without this digest): <code>{report.body_sha256}</code></p>"
    yield "</section>\n" + _heading("sign_off") + '<dl class="pairs">'
    for name, value in report.sign_off.items():
        yield f'<dt>{_text(wording.SIGN_OFF.get(name, name))}</dt><dd class="line">{_text(value)}</dd>'
    yield "</dl></section>\n</main>\n</body>\n</html>\n"


def _period(report: ComplianceReport) -> str:
    period = report.header["period"]
    return f"{period['start']} until before {period['end_excluded']}, tenant {report.header['tenant']}"


def _contents(report: ComplianceReport) -> Iterator[str]:
    yield '<nav aria-label="Contents"><h2>Contents</h2><ol>'
    for name in ("scope", "completeness", "summary"):
        yield f'<li><a href="#{name}">{wording.PARTS[name]}</a></li>'
    for section in report.sections:
        yield f'<li><a href="#s-{_text(section.name)}">{_text(section.title)}</a></li>'
    for name in ("unanswered", "attachments", "sign_off"):
        yield f'<li><a href="#{name}">{wording.PARTS[name]}</a></li>'
    yield "</ol></nav>\n"


def _heading(name: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{wording.PARTS[name]}</h2>'


def _section(number: int, section: Section) -> Iterator[str]:
    anchor = f"s-{_text(section.name)}"
    yield f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{_text(wording.section_title(number, section))}</h2>'
    yield f'<p><span class="control">{_text(section.control)}</span> <span class="count">{wording.row_count(section)}</span></p>'
    if section.about:
        yield f'<p class="about">{_text(section.about)}</p>'
    if section.note or section.needed:
        yield f'<p class="note" role="note">{_text(" ".join(filter(None, (section.note, section.needed))))}</p>'
    if section.rows:
        yield from _table(section.title, section.columns, section.rows)
    yield "</section>\n"


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return (
        '<dl class="pairs">'
        + "".join(f'<dt>{_text(name)}</dt><dd dir="auto">{_text(value)}</dd>' for name, value in pairs)
        + "</dl>"
    )


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Iterator[str]:
    numbers = [
        any(row[place] is not None for row in rows)
        and all(isinstance(row[place], int | float | None) for row in rows)
        for place in range(len(columns))
    ]
    yield f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}"><table>'
    yield f"<caption>{_text(caption)}</caption><thead><tr>"
    for column, number in zip(columns, numbers, strict=True):
        kind = ' class="n"' if number else ""
        yield f'<th scope="col"{kind}>{_text(column.replace("_", " "))}</th>'
    yield "</tr></thead><tbody>\n"
    for row in rows:
        cells = "".join(
            f'<td class="n">{_cell(value)}</td>' if number else f'<td dir="auto">{_cell(value)}</td>'
            for value, number in zip(row, numbers, strict=True)
        )
        yield f"<tr>{cells}</tr>\n"
    yield "</tbody></table></div>"


def _cell(value: Cell) -> str:
    if value is None:
        return '<span aria-label="none">–</span>'  # noqa: RUF001 (a dash, on purpose)
    return _text(f"{value:.6g}" if isinstance(value, float) else str(value))


def _figure(number: int, chart: Chart) -> str:
    """A chart as SVG; its numbers follow for those who can't see it."""
    drawn = _columns(chart) if chart.over_time else _bars(chart)
    names = list(chart.series)
    rows = list(zip(chart.labels, *chart.series.values(), strict=True))
    legend = "".join(
        f'<span style="white-space:nowrap"><svg width="11" height="11" aria-hidden="true"><rect width="11" height="11" '
        f'fill="{_COLORS[place % len(_COLORS)]}"/></svg> {_text(name)}&ensp;</span>'
        for place, name in enumerate(names)
    )
    table = "".join(_table(chart.title, (chart.unit if not chart.over_time else "from", *names), rows))
    return (
        f'<figure aria-labelledby="c-{number}"><figcaption id="c-{number}"><strong>{_text(chart.title)}</strong> {legend}</figcaption>'
        f"{drawn}<details><summary>The numbers of this chart</summary>{table}</details></figure>\n"
    )


def _columns(chart: Chart) -> str:
    width, high, left, low = 1_000, 220, 60, 30
    values = list(chart.series.values())
    most = (
        max((sum(series[place] for series in values) for place in range(len(chart.labels))), default=0) or 1
    )
    step = (width - left) / max(1, len(chart.labels))
    every = max(1, -(-len(chart.labels) // 12))
    out = []
    for part in (0.0, 0.5, 1.0):
        y = high - low - part * (high - low - 12)
        out.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c7ced6"/>')
        out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most * part:g}</text>')
    for place, label in enumerate(chart.labels):
        y = float(high - low)
        for number, series in enumerate(values):
            tall = series[place] / most * (high - low - 12)
            if tall:
                y -= tall
                out.append(
                    f'<rect x="{left + place * step + step * 0.1:.1f}" y="{y:.1f}" width="{step * 0.8:.1f}" '
                    f'height="{tall:.1f}" fill="{_COLORS[number % len(_COLORS)]}"/>'
                )
        if place % every == 0:
            out.append(
                f'<text x="{left + place * step + step / 2:.1f}" y="{high - 10}" text-anchor="middle">{_text(label)}</text>'
            )
    return _svg(chart, width, high, out)


def _bars(chart: Chart) -> str:
    values = next(iter(chart.series.values()))
    width, row, names = 1_000, 22, 260
    most = max(values, default=0) or 1
    out = []
    for place, (label, value) in enumerate(zip(chart.labels, values, strict=True)):
        y, long = place * row, (width - names - 90) * value / most
        shown = label if len(label) <= 38 else label[:37] + "…"  # noqa: PLR2004 (what fits)
        out.append(f'<text x="{names - 8}" y="{y + 15}" text-anchor="end">{_text(shown)}</text>')
        out.append(
            f'<rect x="{names}" y="{y + 3}" width="{max(1, long):.1f}" height="{row - 7}" fill="{_COLORS[0]}"/>'
        )
        out.append(f'<text x="{names + long + 6:.1f}" y="{y + 15}">{value:g}</text>')
    return _svg(chart, width, row * len(values) + 4, out)


def _svg(chart: Chart, width: int, high: int, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {width} {high}" role="img" aria-label="{_text(chart.title)}">{"".join(parts)}</svg>'


def _text(value: str) -> str:
    """Escaped for text and attributes, commands shown as codes."""
    return html.escape(_COMMANDS.sub(lambda found: f"\\u{{{ord(found.group()):x}}}", value))
