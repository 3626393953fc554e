"""A real log of sshd in the audit trail: who attacked, and what was flagged."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail import import_events

if TYPE_CHECKING:
    from pathlib import Path

    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.audit_trail.importer import Flagged
    from dotmac.platform.cli.demo.report import Report

__all__ = ["run"]

_SHOWN = 10


async def run(report: Report, audit: AuditAggregator, path: Path) -> None:
    """Import the file, list the attackers, and check the list against the database.

    Args:
        report: where findings go.
        audit: the trail.
        path: a log of sshd.
    """
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    began = time.monotonic()
    done = await import_events(audit, path, format="sshd")
    seconds = time.monotonic() - began
    report.claim(
        done.lines == lines,
        f"{done.lines:,} lines of {path.name} imported in {seconds:.1f} s: {done.stored:,} events, "
        f"{done.skipped:,} lines that tell of no event, {done.bad:,} bad lines",
    )
    for number, why in done.bad_lines[:_SHOWN]:
        report.note(f"line {number}: {why}")
    attackers = done.top_attackers(_SHOWN)
    if attackers:
        report.table(
            ("attacking address", "failed logins", "flagged events", "score", "reason"),
            [(address, f"{count:,}", *_flagged(done.flagged.get(address))) for address, count in attackers],
        )
    found = [
        await audit.count_events(ip_address=address, outcome=["FAILURE", "DENIED"], actions=["ssh.*"])
        for address, _ in attackers
    ]
    report.claim(
        found == [count for _, count in attackers],
        f"the database has as many failures of each of the {len(attackers)} addresses",
    )
    report.note(f"{done.anomalies:,} events of {len(done.flagged)} addresses were flagged as anomalies")


def _flagged(one: Flagged | None) -> tuple[str, str, str]:
    if one is None:
        return "0", "", ""
    return f"{one.events:,}", f"{one.score:.2f}", one.reasons[0] if one.reasons else ""
