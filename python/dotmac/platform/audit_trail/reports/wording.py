"""What HTML and PDF say alike: the blocks of a report as names and values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.reports.model import ComplianceReport, Section

__all__ = [
    "PARTS",
    "SIGN_OFF",
    "completeness_blocks",
    "flat",
    "header_pairs",
    "row_count",
    "section_title",
    "summary_rows",
]

# Headings of the parts that every report has, before and after its sections.
PARTS = {
    "scope": "Scope and parameters",
    "completeness": "Completeness",
    "summary": "Summary",
    "unanswered": "What the log cannot answer",
    "attachments": "Attachments",
    "sign_off": "Review and sign-off",
}
SIGN_OFF = {
    "prepared_by": "Prepared by",
    "prepared_on": "Prepared on",
    "reviewer": "Reviewer",
    "role": "Role",
    "reviewed_on": "Reviewed on",
    "findings": "Findings",
    "conclusion": "Conclusion",
    "signature": "Signature",
}


def header_pairs(report: ComplianceReport) -> list[tuple[str, str]]:
    """The scope: names and values in the order in which they are shown."""
    header = report.header
    pairs = [
        ("Report", report.report_type),
        ("Framework", header["framework"]),
        ("Period", f"{header['period']['start']} until before {header['period']['end_excluded']}"),
        ("Tenant", header["tenant"]),
    ]
    if header["subject"] is not None:
        pairs.append(("Person or patient", header["subject"]))
    pairs += [
        ("Time zone", header["time_zone"]),
        ("Clock source", header["clock"]),
        ("Filters", header["filters"]),
        ("Exclusions", header["exclusions"]),
        ("Redactions", header["redactions"]),
        ("Generator", header["generator"]),
        ("Sample seed", header["sample_seed"]),
        ("SHA-256 of the parameters", header["parameters_sha256"]),
    ]
    pairs += [(f"Parameter {name}", _value(value)) for name, value in header["parameters"].items()]
    return pairs


def completeness_blocks(report: ComplianceReport) -> list[tuple[str, list[tuple[str, str]]]]:
    """The completeness block in parts: a heading each, with names and values."""
    known = report.completeness
    plain = {name: value for name, value in known.items() if not isinstance(value, dict)}
    inner = {name: value for name, value in known.items() if isinstance(value, dict)}
    return [
        ("Verification", flat(inner["verification"])),
        ("Events", flat(plain)),
        ("Events by category", flat(inner["events_by_category"])),
        ("Segments of the period", flat(inner["segments"])),
        ("Logs at the start and the end of the period", flat(inner["log"])),
        ("Encrypted and redacted", flat(inner["personal_and_redacted"])),
    ]


def flat(block: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """A block of blocks as names and values."""
    pairs: list[tuple[str, str]] = []
    for name, value in block.items():
        told = f"{before}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            pairs += flat(value, f"{told}: ") or [(told, "none")]
        elif isinstance(value, list):
            if not value:
                pairs.append((told, "none"))
            for number, one in enumerate(value, 1):
                if isinstance(one, dict):
                    pairs += flat(one, f"{told} {number}: ")
                else:
                    pairs.append((f"{told} {number}", _value(one)))
        else:
            pairs.append((told, _value(value)))
    return pairs


def section_title(number: int, section: Section) -> str:
    """A section's heading."""
    return f"{number}. {section.title}"


def row_count(section: Section) -> str:
    """How many rows a section has."""
    if section.total == len(section.rows):
        return f"{section.total} row" + ("" if section.total == 1 else "s")
    return f"{len(section.rows)} of {section.total} rows"


def summary_rows(report: ComplianceReport) -> list[tuple[str, str, int, str]]:
    """Each section's control, title, rows, and what is said of it."""
    return [
        (section.control, section_title(number, section), section.total, section.note)
        for number, section in enumerate(report.sections, 1)
    ]


def _value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
