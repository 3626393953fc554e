"""Events that one commit stores together, and what becomes of each."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING
from uuid import UUID

from dotmac.platform.errors import AuditUnavailable

if TYPE_CHECKING:
    import asyncio

    from dotmac.platform._native import AuditBatch, AuditEntry
    from dotmac.platform.audit_trail.partitions import Target

__all__ = ["Batch", "Item"]


class Item:
    """One event on its way.

    Attributes:
        done: resolves to whether this call stored it; None in a block, whose caller reads `answer`.
        deadline: when its caller has an answer at the latest, by the loop's clock.
        own_id: its id is the caller's, so it may be stored already.
        answer: in a block: whether this call stored it, or why it did not; None so far.
    """

    __slots__ = ("answer", "deadline", "done", "entry", "own_id")

    def __init__(
        self, entry: AuditEntry, done: asyncio.Future[bool] | None, deadline: float, own_id: bool
    ) -> None:
        self.entry = entry
        self.done = done
        self.deadline = deadline
        self.own_id = own_id
        self.answer: bool | BaseException | None = None

    def is_decided(self) -> bool:
        """Has it an answer, or a caller that waits no more?"""
        return self.done.done() if self.done is not None else self.answer is not None

    def decide(self, new: bool) -> None:
        """It is stored: by this call, or before."""
        if self.done is None:
            self.answer = new
        elif not self.done.done():
            self.done.set_result(new)

    def fail(self, error: BaseException) -> None:
        """Its caller gets this error, unless it has an answer."""
        if self.is_decided():
            return
        if self.done is None:
            self.answer = error
        else:
            self.done.set_exception(error)

    def not_confirmed(self, why: str, timeout: float, *, sent: bool) -> None:
        """Time is up; `sent`: it has been on its way to the database."""
        if self.is_decided():
            return
        fate = "may or may not have been stored" if sent else "was not stored"
        event_id = UUID(int=self.entry.id)
        self.fail(
            AuditUnavailable(
                f"the audit database did not confirm within {timeout:g} s ({why}); event {event_id} {fate}; "
                "logging it again with this id can't store it twice",
                event_id,
            )
        )


class Batch:
    """What one lane stores at a time.

    Attributes:
        items: without an answer so far.
        packed: what goes to the database; kept while its fate is unknown, since its segments' ids tell it.
        in_doubt: `packed` may have been stored by an earlier try.
        doubted: it ever was in doubt.
        sent: it has been on its way to the database.
        repeats: items for which another of the batch has the same id and time.
        refused: while in doubt, a later try met something that is there already.
        look_up: some of its events may be there already.
        target: where they go, once it is known.
    """

    __slots__ = (
        "doubted", "in_doubt", "items", "look_up", "packed", "refused", "repeats", "sent", "target",
    )  # fmt: skip

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self.packed: AuditBatch | None = None
        self.in_doubt = False
        self.doubted = False
        self.refused = False
        self.sent = False
        self.repeats: set[Item] = set()
        self.look_up = any(item.own_id for item in items)
        self.target: Target | None = None

    def expire(self, now: float, why: str, timeout: float) -> float:
        """Answer those whose time is up; what was never sent is not stored behind their backs.

        Returns: when the first of the others needs its answer; infinity where nobody waits any more.
        """
        first = inf
        waiting = []
        for item in self.items:
            if item.is_decided():
                continue
            if item.deadline <= now:
                item.not_confirmed(why, timeout, sent=self.sent)
                continue
            waiting.append(item)
            first = min(first, item.deadline)
        # While its fate is unknown, the batch stays as it was sent, until nobody waits for it any more.
        if not self.in_doubt or not waiting:
            self.items = waiting
        return first

    def forget_packed(self) -> None:
        """It can't be stored any more: what is sent next may be something else."""
        self.packed = None
        self.in_doubt = False

    def decide(self) -> None:
        """All of it is stored."""
        repeats = self.repeats
        for item in self.items:
            item.decide(not repeats or item not in repeats)

    def fail(self, error: BaseException) -> None:
        """None of it will be stored."""
        for item in self.items:
            item.fail(error)
