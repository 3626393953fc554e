"""Rules about how requests, leases and processes end, and what they leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.limits import ANSWER, HEARTBEAT, LATE, disturbances, may_forget
from chaos.verdict import Violation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.history import Attempt, History
    from chaos.verdict import Verdict

# What a holder is told where the server did not know the lease, though it could be reached.
FORGOTTEN = ("no longer knows", "had ended when it was given back", "had ended before")
# It takes no time and keeps nobody from anything: what is lost by it has a cause of its own.
AT_ONCE = frozenset({"flushall"})


def every_end(history: History, _: Verdict) -> Iterator[Violation]:
    """Every request ended, unless its process was killed."""
    for attempt in history.attempts:
        process = history.process(attempt.worker)
        if attempt.ended is None and not process.killed:
            yield Violation("unended", attempt.asked, f"{attempt} never ended")
        if attempt.how == "error":
            yield Violation("error", attempt.ended or 0, f"{attempt} ended with an error that nobody expects")
    for process in history.processes.values():
        if process.killed:
            continue
        if process.status != 0 or not process.said_goodbye:
            text = f"{process.name} ended with {process.status}" + (
                "" if process.said_goodbye else ", before it had closed"
            )
            yield Violation("process", history.end, text)


def losses(history: History, verdict: Verdict) -> Iterator[Violation]:
    """No lease ends early: a loss has a cause, and so has an answer that did not come."""
    for attempt in history.attempts:
        if attempt.lost is not None and not _full_length(attempt):
            at, reason = attempt.lost
            # It was lost at some time after the last look that still found it held. Who waits for others of
            # several is told of it in the end.
            unseen = attempt.held is None and attempt.of > 1
            seen = attempt.asked if unseen else attempt.acted or at
            begin = max(attempt.asked, seen - attempt.timeout - HEARTBEAT - LATE)
            excuse = may_forget(history, attempt, at) if any(map(reason.__contains__, FORGOTTEN)) else None
            if excuse is not None:
                verdict.counts[f"losses: {excuse.cause}"] += 1
            elif "no longer knows" in reason:
                yield Violation("forgotten", at, f"{attempt} was not taken back: {reason}")
            elif disturbances(history, attempt.worker, begin, at, besides=AT_ONCE):
                verdict.counts["losses: out of the server's reach"] += 1
            else:
                yield Violation("lost early", at, f"{attempt} was lost without a cause: {reason}")
        if attempt.how == "unavailable" and attempt.ended is not None:
            begin = min(attempt.asked, attempt.ended - ANSWER) - LATE
            connecting = (
                attempt.patience is not None and attempt.ended < history.process(attempt.worker).begun + LATE
            )
            if not connecting and not disturbances(history, attempt.worker, begin, attempt.ended):
                yield Violation("unavailable", attempt.ended, f"{attempt} had no answer, without a cause")


def complaints(history: History, _: Verdict) -> Iterator[Violation]:
    """Nothing is left behind, and nobody complained."""
    for at, text in history.complaints:
        yield Violation("left behind", at, text)


def _full_length(attempt: Attempt) -> bool:
    """It was not to be renewed and had its whole length."""
    if attempt.lost is None or not attempt.fixed:
        return False
    at = attempt.lost[0]
    if attempt.held is None:
        # One of several, while the others were waited for. It counts from the last heartbeat before it,
        # of which there are three in the length of a lease, and less what two clocks may differ by.
        length = attempt.timeout - min(HEARTBEAT, attempt.timeout // 3)
        return at >= attempt.asked + length * 98 // 100
    return at > attempt.promised
