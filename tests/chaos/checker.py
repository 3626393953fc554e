"""The rules that a history has to keep. Each is a function from the history to what breaks it.

What a process wrote down is less than what it believed: `held` is stamped after the grant and each look
before it is taken. So what overlaps here did overlap.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from chaos.endings import complaints, every_end, losses
from chaos.exclusion import order, overlaps, refused_while_held, register
from chaos.history import SECOND
from chaos.limits import GRACE, HARMLESS, LOSES_DATA, SERVER_BACK, TAKEOVER
from chaos.turns import deadlocks, fifo, starvation
from chaos.verdict import Verdict, Violation, ms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chaos.history import Fault, History

SHOWN = 40

RULES: tuple[Callable[[History, Verdict], Iterable[Violation]], ...] = (
    overlaps,
    order,
    register,
    refused_while_held,
    fifo,
    starvation,
    deadlocks,
    every_end,
    losses,
    complaints,
)


def check(history: History) -> Verdict:
    """Applies all rules."""
    history = replace(history)  # without what another check remembered of it
    verdict = Verdict()
    counts = verdict.counts
    counts["requests"] = len(history.attempts)
    counts["grants"] = sum(attempt.held is not None for attempt in history.attempts)
    counts["losses"] = sum(attempt.lost is not None for attempt in history.attempts)
    for attempt in history.attempts:
        counts[f"ended {attempt.how or 'never'}"] += 1
        if attempt.held is not None:
            counts[f"grants of kind {attempt.kind!r}"] += 1
            counts["grants of several together"] += attempt.of > 1
            counts["grants taken over"] += attempt.adopted
    counts["writes accepted"] = sum(write.accepted for write in history.writes)
    counts["writes refused"] = len(history.writes) - counts["writes accepted"]
    counts["faults"] = sum(map(_fault, history.faults))
    counts["takeovers seen"] = sum(fault.kind == TAKEOVER for fault in history.faults)
    emptied = [fault for fault in history.faults if fault.kind in LOSES_DATA]
    counts["losses of data"] = len(emptied)
    counts["losses of data without a whole grace"] = sum(fault.grace < GRACE for fault in emptied)
    for rule in RULES:
        verdict.violations += rule(history, verdict)
    verdict.violations.sort(key=lambda violation: violation.at)
    return verdict


def report(history: History, verdict: Verdict) -> str:
    """What was looked at and what was found, for people."""
    start = min((attempt.asked for attempt in history.attempts), default=0)
    faults = Counter(fault.kind for fault in filter(_fault, history.faults))
    lines = [f"  {count:>8}  {what}" for what, count in sorted(verdict.counts.items())]
    lines.append(f"  {ms(verdict.longest_overlap):>8}  ms, the longest overlap that the limits excuse")
    lines.append("faults: " + ", ".join(f"{count} × {kind}" for kind, count in sorted(faults.items())))
    lag = sum(fault.end - fault.begin for fault in history.faults if fault.target == "machine")
    if lag:
        lines.append(f"the machine ran late for {ms(lag)} ms in all")
    found = Counter(violation.rule for violation in verdict.violations)
    lines.append("violations: " + (", ".join(f"{count} × {rule}" for rule, count in found.items()) or "none"))
    for violation in verdict.violations[:SHOWN]:
        nearby = [
            f"{fault.kind} at {fault.target} {_s(fault.begin - start)} to {_s(fault.end - start)}"
            for fault in history.faults
            if fault.begin <= violation.at <= fault.end + 5 * SECOND and fault.kind not in HARMLESS
        ]
        lines.append(f"  {_s(violation.at - start)} {violation.rule}: {violation.text}")
        if nearby:
            lines.append(f"      during or after: {'; '.join(nearby[-4:])}")
    return "\n".join(lines)


def _fault(fault: Fault) -> bool:
    """It was made to happen."""
    return fault.target != "machine" and fault.kind not in (SERVER_BACK, TAKEOVER)


def _s(nanoseconds: int) -> str:
    return f"{nanoseconds / SECOND:.3f} s"
