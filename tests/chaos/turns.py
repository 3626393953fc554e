"""Rules about who waits for whom, and for how long."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from chaos.history import SECOND
from chaos.limits import (
    ANSWER,
    CLAIM,
    LATE,
    LOSES_DATA,
    SETTLED,
    TURN,
    disturbances,
    lost_by_data,
)
from chaos.verdict import Violation, by_lock, fence_of, ms, waited_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.history import Attempt, History
    from chaos.verdict import Verdict


def fifo(history: History, verdict: Verdict) -> Iterator[Violation]:
    """Nobody is overtaken: who asked clearly later, or with a lower priority, and is granted clearly earlier,
    has pushed in."""
    for name, attempts in by_lock(history, granted=False).items():
        queue: list[Attempt] = []
        for later in sorted(attempts, key=lambda attempt: attempt.asked):
            queue = [earlier for earlier in queue if waited_until(earlier) > later.asked]
            for earlier in queue:
                if later.priority > earlier.priority:
                    first, second = later, earlier
                else:
                    first, second = earlier, later
                if _overtaken(history, verdict, first, second):
                    yield Violation(
                        "overtaken", second.held or 0, f"{name!r}: {second} was granted before {first}"
                    )
            queue.append(later)


def starvation(history: History, verdict: Verdict) -> Iterator[Violation]:
    """A waiter is served within a bound once nothing goes wrong any more, and gives up when it said it
    would."""
    for attempt in history.attempts:
        process = history.process(attempt.worker)
        over = waited_until(attempt)
        if attempt.ended is None and attempt.held is None:
            if process.killed:
                continue
            over = history.end
        waited = over - attempt.asked
        if history.calm is not None and over > history.calm:
            verdict.counts["waits after the faults"] += 1
            late = over - max(attempt.asked, history.calm)
            if late > TURN:
                yield Violation("starved", over, f"{attempt} waited for {ms(late)} ms after the last fault")
        if attempt.patience is not None and waited > attempt.patience + ANSWER + LATE:
            stopped = [
                fault
                for fault in disturbances(history, attempt.worker, attempt.asked, over)
                if fault.target != "server"
            ]
            if not stopped:
                text = f"{attempt} waited for {ms(waited)} ms with {ms(attempt.patience)} ms of patience"
                yield Violation("patience", over, text)


def deadlocks(history: History, verdict: Verdict) -> Iterator[Violation]:
    """Whoever is refused because of a cycle was in one: each waited for what the next held."""
    by_scope: dict[tuple[str, str, str], list[Attempt]] = defaultdict(list)
    for attempt in history.attempts:
        by_scope[attempt.worker, attempt.scope, attempt.lock].append(attempt)
    workers = {process.pid: process.name for process in history.processes.values() if process.pid}
    for refused in history.attempts:
        if refused.how != "deadlock" or not refused.edges:
            continue
        verdict.counts["cycles looked at"] += 1
        at = refused.ended or 0
        # Who waits in one edge holds in another, and so its process is known.
        place = {edge[1].rpartition("/")[0]: workers.get(edge[2], "") for edge in refused.edges}
        for edge, following in zip(refused.edges, (*refused.edges[1:], refused.edges[0]), strict=True):
            if edge[3] != following[1]:
                yield Violation("no cycle", at, f"{refused}: {edge} does not lead to {following}")
        mine = {edge[0] for edge in refused.edges if edge[1].endswith(f"/{refused.scope}")}
        # One of several locks that are asked for together is refused for all of them.
        if refused.of == 1 and refused.lock not in mine:
            yield Violation("no cycle", at, f"{refused} does not wait in {refused.edges}")
        for lock, waiter, _, holder in refused.edges:
            for owner, fits, does in ((waiter, _waited, "waited for"), (holder, _held, "held")):
                seed, _, scope = owner.rpartition("/")
                worker = place.get(seed, "")
                known = by_scope.get((worker, scope, lock), [])
                if not any(fits(history, attempt, at) for attempt in known):
                    yield Violation(
                        "no cycle", at, f"{refused}: {worker or owner} never {does} {lock!r} in {scope}"
                    )


def _overtaken(history: History, verdict: Verdict, first: Attempt, second: Attempt) -> bool:
    if second.held is None or not _clearly_first(first, second):
        return False
    over = waited_until(first)
    lost = [loss for loss in history.faults if loss.kind in LOSES_DATA and first.asked <= loss.end <= over]
    # Places are kept, if those who had them could take them back.
    kept = all(lost_by_data(history, first.worker, loss) is None for loss in lost)
    besides = {"flushall"} if kept else set()
    if disturbances(history, first.worker, first.asked, over, besides=besides):
        return False
    if first.priority != second.priority and disturbances(
        history, second.worker, second.asked, second.held, besides=besides
    ):
        return False  # it may have been granted long before it heard of it
    verdict.counts["places in queues compared"] += 1
    if lost:
        verdict.counts["places in queues compared over lost data"] += 1
    soon = over <= second.held + SETTLED
    if first.fence is None:
        return not (soon or _may_have_held(first, second.held))
    if soon and fence_of(first) > fence_of(second) and _lease_ran_out(history, second):
        verdict.counts["slow to answer a roll call"] += 1
        return False
    return fence_of(first) > fence_of(second)


def _lease_ran_out(history: History, second: Attempt) -> bool:
    """Somebody may have held it who did not give it back. Then those who wait are called, and who is slow to
    answer is passed over, once: it asks again at once, and has its old place."""
    assert second.held is not None
    return any(
        attempt.lock == second.lock
        and attempt is not second
        and attempt.left is None
        and attempt.asked < second.held
        and (attempt.ended or history.end) > second.held
        and (history.process(attempt.worker).killed or attempt.how in ("unavailable", "lost"))
        for attempt in history.attempts
    )


def _may_have_held(attempt: Attempt, until: int) -> bool:
    """One of several that are asked for together is held while the others are waited for, and nobody is told
    of that if these can't be had."""
    return attempt.lost is not None or (
        attempt.of > 1 and attempt.fixed and attempt.asked + attempt.timeout <= until
    )


def _clearly_first(first: Attempt, second: Attempt) -> bool:
    """It stood in the queue before the other one was granted anything, and goes before it."""
    alike = first.priority == second.priority
    latest = second.asked if alike else max(second.asked, (second.held or 0) - SETTLED)
    return (
        first.asked + SETTLED <= latest
        and first.worker != second.worker
        and 0 not in (first.patience, second.patience)
        and not (first.adopted or second.adopted)
        # Of several that are asked for together, all but the first are really asked for later, and all are
        # granted before that is heard.
        and first.place == 0
        and (alike or second.of == 1)
    )


def _waited(history: History, attempt: Attempt, at: int) -> bool:
    # A place of a session that was cut off stays for the claim window.
    over = waited_until(attempt) if attempt.ended is not None or attempt.held is not None else at
    return attempt.asked <= at <= over + _slack(history, attempt, at)


def _held(history: History, attempt: Attempt, at: int) -> bool:
    over = at if attempt.ended is None else attempt.ended
    return attempt.asked <= at <= over + _slack(history, attempt, at)


def _slack(history: History, attempt: Attempt, at: int) -> int:
    """How long the server may have thought so after the process had stopped doing it, because of what was on
    its way."""
    begin = (attempt.ended or at) - LATE
    if disturbances(history, attempt.worker, begin, at):
        return attempt.timeout + CLAIM + 10 * SECOND
    return LATE
