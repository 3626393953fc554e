"""What the locks do not promise: the only place that excuses what a history shows.

A server that lost its data (a restart without persistence, FLUSHALL) grants nothing for a grace, in which all
who held something take it back: nothing is lost, and nobody overlaps. That fails for those whom something
else keeps from the server all through the grace, and where a newcomer, who can't know that there was
anything, is the first to come: then there is a shorter grace or none. A holder whose lock was granted to
another meanwhile is told by the answer to its next heartbeat.

There, too, tokens may be below earlier ones, if the clock was stepped back meanwhile: until the first of
those who knew the data has opened, and said which tokens it had heard of.

A server that takes over from another may lack the last writes. What nobody else was granted by then is taken
back; else the older holder is told by its next heartbeat, too.

Where a holder has not given back, those who wait are called, and who does not answer in time is passed over
once.

Never may anybody believe beyond its own deadline, which needs no excuse to end it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos.history import SECOND

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chaos.history import Attempt, Fault, History

# The longest time between two heartbeats.
HEARTBEAT = 1 * SECOND
# A grant out of the queue counts this long at most until it has been claimed.
CLAIM = 3 * SECOND
# Reconnecting, and a loaded machine that runs a thread late.
LATE = 1 * SECOND
# An answer is waited for this long: `request_timeout` of the workers' managers.
ANSWER = 4 * SECOND
# A live waiter is served within this time once nothing goes wrong any more: the longest lease of a dead
# holder, dead waiters that were granted it, the queue's own turns.
TURN = 25 * SECOND
# Whoever asks this long after another stands behind it in the queue, if nothing held the first one's request
# up.
SETTLED = 1 * SECOND
# An emptied server grants nothing for this long if one of those who knew the data opens first.
GRACE = 3 * SECOND
# After a takeover leases can be taken back for this long.
TAKING_BACK = 10 * SECOND
# A machine that runs late for less than this keeps nobody from anything for a whole grace or heartbeat.
STALL = SECOND // 2

# A server that was replaced, or a replica, comes back and copies what the others have.
SERVER_BACK = "server back"
# Another server was seen to serve, whether a fault was meant to bring that about or not: sentinels may fail
# over once more by themselves.
TAKEOVER = "takeover"
# They cost nobody a lease, an answer or a place.
HARMLESS = frozenset({"server clock", "worker clock", "script flush", SERVER_BACK})
LOSES_DATA = frozenset({"flushall", "server emptied"})
# Another server takes over, with or without the last writes.
FAILS_OVER = frozenset({"primary killed", "primary killed ahead", "primary stopped", "failover", TAKEOVER})

NEWCOMER = "newcomer without a grace"
UNREACHED = "holder could not reach the server within the grace"
LOST_WRITE = "grant lost in a failover"


@dataclass(frozen=True, slots=True)
class Excuse:
    """Until when something is excused, and why."""

    until: int
    cause: str


def disturbances(
    history: History, worker: str, begin: int, end: int, *, besides: Iterable[str] = ()
) -> list[Fault]:
    """What may have kept a worker from the server, or it from answering, at some time from `begin` to
    `end`; but for faults of the kinds `besides`."""
    targets = ("server", "machine", history.process(worker).place)
    return [
        fault
        for target in targets
        for fault in history.timeline.between(target, begin, end)
        if fault.kind not in HARMLESS and fault.kind not in besides
    ]


def lost_by_data(history: History, worker: str, loss: Fault) -> str | None:
    """Why a process's leases may not have outlived a loss of data; None if they have to."""
    begin, end = loss.end, loss.end + GRACE
    died = history.process(worker).died
    if died is not None and died < end:
        return UNREACHED  # for ever; what it was promised nobody believes any more
    others = [
        fault
        for fault in disturbances(history, worker, loss.begin, end)
        if fault is not loss and _long(fault)
    ]
    # It needs to reach the server once, for a moment.
    at, longest = begin, 0
    for fault in sorted(others, key=lambda fault: fault.begin):
        longest = max(longest, fault.begin - at)
        at = max(at, fault.end)
    if max(longest, end - at) < LATE:
        return UNREACHED
    return None if loss.grace >= GRACE else NEWCOMER


def may_overlap(history: History, older: Attempt, newer: Attempt) -> Excuse | None:
    """Until when two holders that exclude each other may both believe; None if they must not at all. The
    older is the one with the lower token."""
    found = None
    both = max(older.held or 0, newer.held or 0)
    for loss in history.timeline.of(LOSES_DATA | FAILS_OVER):
        if loss.kind in LOSES_DATA:
            if older.asked > loss.end or (newer.held or 0) < loss.begin:
                continue
            cause = lost_by_data(history, older.worker, loss)
            if cause is None:
                continue
            until = _told(history, older.worker, loss, loss.end)
        else:
            # The newer one was granted by the server that took over, the older one by the one before.
            if not _fence(older) < loss.wall <= _fence(newer) or older.asked > loss.end + LATE:
                continue
            cause = LOST_WRITE
            until = _told(history, older.worker, loss, max(both, loss.end))
        if found is None or until > found.until:
            found = Excuse(until, cause)
    return found


def may_be_below(history: History, lower: Attempt, higher: Attempt) -> Excuse | None:
    """Until when somebody may be granted a lower token than one that was granted before."""
    found = None
    for loss in history.timeline.of(LOSES_DATA):
        if loss.grace >= GRACE or higher.asked > loss.end or (lower.held or 0) < loss.begin:
            continue
        knew = [
            process.name
            for process in history.processes.values()
            if process.begun < loss.begin and (process.died is None or process.died > loss.end)
        ]
        until = min((_told(history, worker, loss, loss.end) for worker in knew), default=history.end)
        if found is None or until > found.until:
            found = Excuse(until, NEWCOMER)
    return found


def may_forget(history: History, attempt: Attempt, at: int) -> Excuse | None:
    """Why the server may have told a holder that it knew nothing of its lease."""
    for loss in history.timeline.of(LOSES_DATA | FAILS_OVER):
        if attempt.asked > loss.end + LATE or at < loss.begin:
            continue
        if loss.kind in LOSES_DATA and (cause := lost_by_data(history, attempt.worker, loss)):
            return Excuse(at, cause)
        if loss.kind in FAILS_OVER and _fence(attempt) < loss.wall:
            rivals = [
                rival
                for rival in history.attempts
                if rival.lock == attempt.lock
                and rival is not attempt
                and rival.asked < at
                and (rival.ended is None or rival.ended > loss.begin)
                and (rival.fence is None or rival.fence >= loss.wall)
            ]
            # Who gave it back before it could be taken back is told that the server knew nothing of it.
            given_back = attempt.lost is not None and "had ended" in attempt.lost[1]
            if rivals or given_back or at > loss.end + TAKING_BACK - LATE:
                return Excuse(at, LOST_WRITE)
    return None


def _told(history: History, worker: str, loss: Fault, reachable: int) -> int:
    """When a process has heard from the server at the latest, which can reach it from then on unless
    something else keeps it from it."""
    told = reachable + HEARTBEAT + LATE
    reached = False
    while not reached:
        others = disturbances(history, worker, loss.begin, told)
        ends = [fault.end for fault in others if _long(fault) and fault is not loss]
        later = max(ends, default=0) + HEARTBEAT + LATE
        reached, told = later <= told, max(told, later)
    return told


def _long(fault: Fault) -> bool:
    return fault.target != "machine" or fault.end - fault.begin >= STALL


def _fence(attempt: Attempt) -> int:
    return attempt.fence or 0
