"""Rules about who may hold what together, and under which tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from chaos.limits import may_be_below, may_overlap
from chaos.verdict import Violation, by_lock, fence_of, ms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.history import Attempt, History
    from chaos.verdict import Verdict


def overlaps(history: History, verdict: Verdict) -> Iterator[Violation]:
    """Never more holders at once than the lock takes, by what they did and by what they were told."""
    for name, attempts in by_lock(history).items():
        active: list[Attempt] = []
        for newcomer in sorted(attempts, key=lambda attempt: attempt.held or 0):
            begin = newcomer.held or 0
            active = [holder for holder in active if holder.promised > begin]
            if not _fit(active, newcomer):
                conflicting = _unexcused(history, verdict, active, newcomer)
                if not _fit(conflicting, newcomer):
                    others = ", ".join(
                        f"{holder}, which believed until +{ms(holder.acted - begin)} ms and could until "
                        f"+{ms(holder.promised - begin)} ms"
                        for holder in conflicting
                    )
                    yield Violation(
                        "overlap", begin, f"{name!r} was granted to {newcomer} while held by {others}"
                    )
            active.append(newcomer)


def order(history: History, verdict: Verdict) -> Iterator[Violation]:
    """Tokens grow from grant to grant and are never used again, unless the lock is handed on under one."""
    for name, attempts in by_lock(history).items():
        by_fence = sorted(attempts, key=lambda attempt: (fence_of(attempt), attempt.held or 0))
        for lower, higher in pairwise(by_fence):
            if lower.fence == higher.fence and not higher.adopted:
                yield Violation(
                    "reuse", higher.held or 0, f"{name!r}: {lower} and {higher} have the same token"
                )
        # The earliest grant among all with a higher token has to come after the request for a lower one.
        earliest: Attempt | None = None
        for attempt in reversed(by_fence):
            if (
                earliest is not None
                and (earliest.held or 0) < attempt.asked
                and not attempt.adopted
                and not _excused_order(history, verdict, attempt, earliest)
            ):
                yield Violation(
                    "order",
                    attempt.held or 0,
                    f"{name!r}: {attempt} was asked for after {earliest} had been granted",
                )
            if earliest is None or (attempt.held or 0) < (earliest.held or 0):
                earliest = attempt
        yield from _alone(history, verdict, name, attempts)


def register(history: History, _: Verdict) -> Iterator[Violation]:
    """The register let nobody write with a token lower than one that it had seen, and refused nobody else."""
    highest: dict[str, int] = defaultdict(int)
    highest_writer: dict[str, int] = defaultdict(int)
    for write in history.writes:
        seen = (highest if write.mode == "write" else highest_writer)[write.lock]
        if write.mode != "any" and write.accepted != (write.fence >= seen):
            done = "accepted" if write.accepted else "refused"
            yield Violation(
                "register", write.at, f"{write.lock!r}: {write.mode} with {write.fence} {done} after {seen}"
            )
        if write.accepted:
            highest[write.lock] = max(highest[write.lock], write.fence)
            if write.mode == "write":
                highest_writer[write.lock] = max(highest_writer[write.lock], write.fence)


def refused_while_held(history: History, verdict: Verdict) -> Iterator[Violation]:
    """Whoever still holds is refused nowhere: a higher token means that another was granted the lock
    meanwhile."""
    by_token = {(attempt.lock, attempt.fence): attempt for attempt in history.attempts}
    by_fence = {name: sorted(attempts, key=fence_of) for name, attempts in by_lock(history).items()}
    # From each on: when the first of them was asked for.
    asked = {
        name: list(accumulate((attempt.asked for attempt in reversed(attempts)), min))[::-1]
        for name, attempts in by_fence.items()
    }
    for write in history.writes:
        if write.accepted:
            continue
        holder = by_token.get((write.lock, write.fence))
        if holder is None:
            yield Violation("register", write.at, f"{write.lock!r}: nobody was granted {write.fence}")
        elif holder.acted > write.at:
            rivals, first = by_fence[holder.lock], asked[holder.lock]
            begin = bisect_right(rivals, fence_of(holder), key=fence_of)
            for rival in rivals[begin : bisect_left(first, write.at, begin)]:
                if rival.asked >= write.at:
                    continue
                excuse = may_overlap(history, holder, rival)
                if excuse is None or holder.acted > excuse.until:
                    excuse = may_be_below(history, holder, rival)
                if excuse is not None and write.at <= excuse.until:
                    verdict.counts[f"writes refused to a holder: {excuse.cause}"] += 1
                    break
            else:
                yield Violation("refused while held", write.at, f"{holder} was refused and went on believing")


def _fit(holders: list[Attempt], newcomer: Attempt) -> bool:
    return sum(holder.cost for holder in holders) + newcomer.cost <= newcomer.capacity


def _unexcused(history: History, verdict: Verdict, active: list[Attempt], newcomer: Attempt) -> list[Attempt]:
    """Those of the holders beside whom nothing excuses the newcomer."""
    begin = newcomer.held or 0
    conflicting = list(active)
    for holder in active:
        older, newer = sorted((holder, newcomer), key=fence_of)
        both_acted = min(holder.acted, newcomer.acted)
        excuse = may_overlap(history, older, newer)
        # Nobody acted on a promise broken unseen: a holder that does not look is not told.
        if excuse is not None and both_acted <= max(excuse.until, begin):
            conflicting.remove(holder)
            if both_acted > begin:
                verdict.counts[f"overlaps: {excuse.cause}"] += 1
                verdict.longest_overlap = max(verdict.longest_overlap, both_acted - begin)
    return conflicting


def _alone(history: History, verdict: Verdict, name: str, attempts: list[Attempt]) -> Iterator[Violation]:
    """Who holds a lock alone has a higher token than everybody before, and everybody after a higher one."""
    highest: Attempt | None = None
    highest_alone: Attempt | None = None
    for latter in sorted(attempts, key=lambda attempt: attempt.held or 0):
        alone = latter.cost == latter.capacity
        former = highest if alone else highest_alone
        if (
            former is not None
            and fence_of(latter) < fence_of(former)
            and not _excused_order(history, verdict, latter, former)
        ):
            yield Violation("order", latter.held or 0, f"{name!r}: {latter} held after {former}")
        if highest is None or fence_of(latter) > fence_of(highest):
            highest = latter
        if alone and (highest_alone is None or fence_of(latter) > fence_of(highest_alone)):
            highest_alone = latter


def _excused_order(history: History, verdict: Verdict, lower: Attempt, higher: Attempt) -> bool:
    """A server that has been replaced went on for a moment, which is an overlap that nobody may have seen."""
    for excuse in (may_overlap(history, lower, higher), may_be_below(history, lower, higher)):
        if excuse is not None and (lower.held or 0) <= excuse.until:
            verdict.counts[f"tokens out of order: {excuse.cause}"] += 1
            return True
    return False
