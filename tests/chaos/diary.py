"""How a worker writes its requests down."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING, Any

from chaos.history import SECOND, now
from dotmac.platform.distributed_locks import SeveralLocks
from dotmac.platform.errors import (
    DeadlockDetected,
    LockLost,
    LockNotOffered,
    LockTimeout,
    ServerUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.history import Recorder
    from chaos.plans import Plan
    from dotmac.platform.distributed_locks import DistributedLock

    Held = DistributedLock | SeveralLocks


ENDINGS: dict[type[BaseException], str] = {
    LockTimeout: "timeout",
    DeadlockDetected: "deadlock",
    LockLost: "lost",
    LockNotOffered: "not offered",
    ServerUnavailable: "unavailable",
    asyncio.CancelledError: "cancelled",
}


class Diary:
    """Writes one request down: as many as it asks for locks.

    Args:
        record: where.
        numbers: one for each lock.
        plan: what is asked for.
        scope: who asks, as the engine names it within the process.
        adopted: it is taken over from somebody who offered it.
    """

    def __init__(
        self, record: Recorder, numbers: Iterator[int], plan: Plan, scope: str, *, adopted: bool = False
    ) -> None:
        self._record = record
        self.fences: dict[str, int] = {}
        # In the order in which they are acquired.
        self._numbers = {name: next(numbers) for name in sorted(plan.locks)}
        for place, (name, number) in enumerate(self._numbers.items()):
            record(
                "ask",
                number=number,
                lock=name,
                kind=plan.kind.name,
                cost=plan.kind.cost,
                capacity=plan.kind.capacity,
                timeout=int(plan.timeout * SECOND),
                fixed=plan.fixed,
                patience=None if plan.patience is None else int(plan.patience * SECOND),
                priority=plan.priority,
                scope=scope,
                place=place,
                of=len(plan.locks),
                adopted=adopted,
            )

    def held(self, lock: Held) -> None:
        """It was granted. Raises LockLost if it is lost again by now."""
        for name, number, one in self._each(lock):
            at = now()
            self.fences[name] = one.fencing_token
            self._record("held", at, number=number, fence=one.fencing_token)
        self.look(lock)

    def look(self, lock: Held) -> None:
        """It looks whether it still holds, and how long it may. Raises LockLost if it doesn't."""
        for _, number, one in self._each(lock):
            at = now()
            until = at + int(one.remaining * SECOND)
            self._record("seen", at, number=number, until=until)

    def again(self, lock: Held) -> None:
        """The same holder has entered it once more."""
        if isinstance(lock, SeveralLocks):
            return
        if lock.fencing_token != self.fences[lock.name]:
            self.complain(f"{lock.name!r} has token {lock.fencing_token} for who held {self.fences}")
        self.look(lock)

    def unsure(self) -> None:
        self._note("unsure")

    def leaving(self) -> None:
        self._note("leaving")

    def lost(self, error: LockLost) -> None:
        for name, number in self._numbers.items():
            # The others are given back because of the one that is lost.
            if len(self._numbers) == 1 or repr(name) in str(error):
                self._record("lost", number=number, reason=str(error))

    def end(self, how: str) -> None:
        self._note("end", how=how)

    def complain(self, text: str) -> None:
        self._record("complaint", text=text)

    def failed(self, error: BaseException) -> str:
        """How a request ended that raised this."""
        if isinstance(error, DeadlockDetected):
            self._note(
                "deadlock",
                edges=[
                    (edge.lock, edge.waiter, edge.process.get("pid", 0), edge.holder) for edge in error.edges
                ],
            )
        elif isinstance(error, LockLost):
            self.lost(error)
        how = next((how for kind, how in ENDINGS.items() if isinstance(error, kind)), "error")
        if how == "error":
            self.complain("".join(traceback.format_exception(error)))
        return how

    def _note(self, event: str, **facts: Any) -> None:
        for number in self._numbers.values():
            self._record(event, number=number, **facts)

    def _each(self, lock: Held) -> Iterator[tuple[str, int, DistributedLock]]:
        locks = lock.locks if isinstance(lock, SeveralLocks) else {lock.name: lock}
        for name, one in locks.items():
            yield name, self._numbers[name], one
