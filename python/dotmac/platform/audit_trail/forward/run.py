"""Delivering to one destination: batch after batch, in the order of storing, each at least once."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import asyncpg

from dotmac.platform import _semconv
from dotmac.platform.audit_trail.database import is_transient, meaning, told
from dotmac.platform.audit_trail.forward.destination import Refused
from dotmac.platform.audit_trail.forward.positions import (
    Batch,
    Holder,
    Lost,
    Position,
    Stored,
    advanced,
    next_batch,
)
from dotmac.platform.audit_trail.storing_order import Window
from dotmac.platform.errors import AuditUnavailable, DeliveryFailed, DotmacError
from dotmac.platform.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from dotmac.platform.audit_trail.database import Database
    from dotmac.platform.audit_trail.filters import Filters
    from dotmac.platform.audit_trail.forward.destination import Destination

__all__ = ["DEAD_LETTERS", "ForwardSummary", "Forwarder", "Pace"]

_logger = logging.getLogger(__name__)
DEAD_LETTERS = "audit.forward.dead_letters"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
_ONCE_ATTEMPTS = 5
_WINDOW = 64  # batches sent and not yet counted as delivered
_NOTE_IDLE = 30.0  # seconds after which a position that moved over events of others is stored


@dataclass(frozen=True, slots=True)
class Pace:
    """How events are delivered.

    Args:
        batch_size: events per batch at most.
        batch_bytes: bytes of metadata per batch, roughly, at most; one event alone may be larger.
        poll: seconds between looks for new events.
        max_attempts: tries of a batch after which it is put aside; 0: never.
        beat: seconds between looks at the lock.
    """

    batch_size: int = 200
    batch_bytes: int = 2 << 20
    poll: float = 0.5
    max_attempts: int = 50
    beat: float = 5.0


@dataclass(slots=True)
class ForwardSummary:
    """What a run of forwarding did.

    Attributes:
        delivered: events that the destination confirmed.
        dead_letters: events that were put aside.
        failures: attempts that failed.
        elsewhere: did another process hold the destination all the time?
    """

    delivered: int = 0
    dead_letters: int = 0
    failures: int = 0
    elsewhere: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


class Forwarder:
    """Delivers to one destination until it is cancelled.

    Args:
        database: of this event loop.
        destination, name: where to, and under which name its position is kept.
        filters: which events.
        pace: how.
        report: logs an event about dead letters, whose metadata it gets.
        start: line of a destination that is new; None: the present.
        tenant: whose events may be seen where row-level security applies.
        told: called with the summary after every change.
    """

    def __init__(
        self,
        database: Database,
        destination: Destination,
        name: str,
        filters: Filters,
        pace: Pace,
        report: Callable[[dict[str, Any]], Awaitable[None]],
        *,
        start: int | None,
        tenant: str | None = None,
        told: Callable[[ForwardSummary], None] | None = None,
    ) -> None:
        self._database = database
        self._destination = destination
        self._name = name
        self._filters = filters
        self._pace = pace
        self._report = report
        self._start = start
        self._tenant = tenant
        self._told = told
        self._holder = Holder(database, name)
        self._position = Position(0)  # confirmed and stored
        self._cursor = Position(0)  # sent
        self._window = Window()
        self._unsettled: deque[tuple[float, Sequence[Stored]]] = deque()
        self._tries = 0  # failed, since something was confirmed or put aside
        self._reason = ""
        self._aside: list[Stored] = []  # put aside, and not reported yet
        self._attributes = {_semconv.AUDIT_DESTINATION: name}
        self.summary = ForwardSummary()

    async def run(self, *, once: bool) -> ForwardSummary:
        """Deliver; for ever, or, `once`, until all that was there is delivered.

        Raises: DeliveryFailed: `once`, and the destination did not take a batch after some tries.
            AuditUnavailable: `once`, and the database does not answer. ServerRefused, SchemaOutdated.
        """
        attempt = 0
        while True:
            pause = _backoff(attempt)
            attempt += 1
            try:
                found = await self._holder.take(self._start)
                if found is not None:
                    attempt = 0
                    await self._hold(found, once=once)
                    return self.summary
                if once:
                    self.summary.elsewhere = True
                    return self.summary
                attempt, pause = 0, self._pace.beat * random.uniform(0.5, 1.0)  # noqa: S311 (spread, not secrecy)
            except (Lost, AuditUnavailable) as error:
                if once:
                    raise AuditUnavailable(str(error)) from error
                _logger.warning("forwarding to %s: %s", self._name, error)
            except DotmacError:
                raise
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                if not is_transient(error):
                    raise meaning(error) from error
                if once:
                    raise AuditUnavailable(f"the audit database does not answer: {told(error)}") from error
                _logger.warning("forwarding to %s: %s", self._name, told(error))
            await asyncio.sleep(pause)

    async def _hold(self, position: Position, *, once: bool) -> None:
        """Deliver for as long as the lock is ours."""
        self._position = self._cursor = position
        self._unsettled.clear()
        self._tries = position.attempts
        tasks = [
            asyncio.ensure_future(self._deliver_all(once=once)),
            asyncio.ensure_future(self._holder.beat(self._pace.beat)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._holder.aclose()

    async def _deliver_all(self, *, once: bool) -> None:
        loop = asyncio.get_running_loop()
        noted = loop.time()
        while True:
            batch = await self._next()
            if batch.events:
                await self._deliver(batch.events, once=once)
                await self._report_aside()
                noted = loop.time()
            else:
                self._cursor = replace(self._cursor, line=batch.line, after=None)
                if not self._unsettled:
                    is_end = once and batch.whole
                    if self._cursor != self._position and (is_end or loop.time() - noted > _NOTE_IDLE):
                        await self._holder.move(self._cursor)
                        noted, self._position = loop.time(), self._cursor
                    if is_end:
                        return
            if batch.whole or len(self._unsettled) >= _WINDOW:
                await asyncio.sleep(min(self._pace.poll, self._destination.settle or self._pace.poll))
            await self._settle(once=once)
            await self._report_aside()

    async def _next(self) -> Batch:
        cursor = self._cursor

        async def work(connection: Any) -> Batch:
            return await next_batch(connection, self._filters, cursor, self._pace.batch_size, self._window)

        try:
            batch = await self._database.read(work, self._database.settings.timeout, tenant=self._tenant)
        except AuditUnavailable:
            self._window.narrow()
            raise
        if cursor.pending is None:
            return self._cut(batch)
        if batch.events:
            return batch
        # The whole pending batch was dropped with its month.
        self._cursor = replace(cursor, pending=None, attempts=0)
        return await self._next()

    def _cut(self, batch: Batch) -> Batch:
        size = 0
        for count, one in enumerate(batch.events):
            size += len(repr(one.event.metadata))
            if size > self._pace.batch_bytes and count:
                return Batch(batch.events[:count], batch.line, whole=False)
        return batch

    async def _deliver(self, events: Sequence[Stored], *, once: bool) -> bool:
        """Send a batch until it is sent, or put aside; then go on behind it.

        Returns: False: what was sent before it goes again first.
        """
        end = events[-1].place
        if not self._destination.settle and self._cursor.pending is None:
            # A batch whose fate is unknown after a crash is sent again just as it was, under its own key.
            self._cursor = replace(self._cursor, pending=end)
            await self._holder.move(self._cursor)
        refusal: Refused | None = None
        while True:
            try:
                await self._destination.send([one.event for one in events], self._key(events))
            except Refused as error:
                self._count_failure(error)
                refusal = error
                break
            except DeliveryFailed as error:
                self._count_failure(error)
                if self._unsettled:
                    await self._rewind(error, once=once)
                    return False
                if await self._wait_or_give_up(events, error, once=once):
                    continue
                return True
            break
        if refusal is not None:
            return await self._drain(once=once) and await self._isolate(events, refusal, once=once)
        if self._destination.settle:
            self._unsettled.append((asyncio.get_running_loop().time(), events))
            self._cursor = advanced(self._cursor, end)
        else:
            await self._confirm(events)
        return True

    async def _drain(self, *, once: bool) -> bool:
        """Wait until all that was sent is confirmed, so that the position may move past it.

        Returns: False: the connection broke, and it goes again.
        """
        while self._unsettled:
            await asyncio.sleep(min(self._pace.poll, self._destination.settle))
            if not await self._settle(once=once):
                return False
        return True

    async def _wait_or_give_up(self, events: Sequence[Stored], error: DeliveryFailed, *, once: bool) -> bool:
        """Pause before another try. Returns: is there to be one?"""
        attempts = self._tries = self._tries + 1
        self._cursor = replace(self._cursor, attempts=attempts)
        if once and attempts >= _ONCE_ATTEMPTS:
            raise error
        if self._pace.max_attempts and attempts >= self._pace.max_attempts:
            await self._put_aside(events, str(error), attempts)
            return False
        # With a batch pending nothing is unsettled: what stands before it need not be looked through again.
        known = self._position if self._cursor.pending is None else self._cursor
        await self._holder.move(replace(known, attempts=attempts))
        pause = max(_backoff(attempts - 1), error.retry_after or 0.0)
        _logger.warning(
            "forwarding to %s: try %d of a batch failed, next in %.1f s: %s",
            self._name,
            attempts,
            pause,
            error,
        )
        await asyncio.sleep(pause)
        return True

    async def _isolate(self, events: Sequence[Stored], refusal: Refused, *, once: bool) -> bool:
        """The destination refuses something in the batch: find it, and deliver the rest.

        Returns: as `_deliver`.
        """
        if len(events) == 1:
            await self._put_aside(events, str(refusal), self._tries + 1)
            return True
        middle = len(events) // 2
        for half in (events[:middle], events[middle:]):
            if not self._destination.settle:
                # After a crash the half is sent again just as it was, not the whole that was refused.
                self._cursor = replace(self._cursor, pending=half[-1].place)
                await self._holder.move(self._cursor)
            if not await self._deliver(half, once=once):
                return False
        return True

    async def _put_aside(self, events: Sequence[Stored], reason: str, attempts: int) -> None:
        self._position = self._cursor = advanced(self._cursor, events[-1].place)
        self._tries = 0
        await self._holder.move(self._position, dead=events, reason=reason, attempts=attempts)
        self.summary.dead_letters += len(events)
        metrics.counter(_semconv.AUDIT_DEAD_LETTERS).add(len(events), self._attributes)
        self._tell()
        _logger.error("forwarding to %s: %d events put aside: %s", self._name, len(events), reason)
        self._aside += events
        self._reason = reason

    async def _report_aside(self) -> None:
        """One event about all that was put aside of a batch."""
        # A report that is refused itself is not reported: that would never end.
        told = [one for one in self._aside if one.event.action != DEAD_LETTERS]
        self._aside = []
        if not told:
            return
        try:
            await self._report(
                {
                    "destination": self._name,
                    "events": len(told),
                    "first_id": str(told[0].event.id),
                    "last_id": str(told[-1].event.id),
                    "reason": self._reason[:500],
                }
            )
        except DotmacError:
            _logger.exception("forwarding to %s: the event about it could not be stored", self._name)

    async def _settle(self, *, once: bool) -> bool:
        """Count as delivered what was sent long enough ago over a connection that is still whole.

        Returns: False: it was not whole, and what was sent goes again.
        """
        if not self._unsettled:
            return True
        try:
            if not self._destination.settled():
                return True
        except DeliveryFailed as error:
            self._count_failure(error)
            await self._rewind(error, once=once)
            return False
        due = asyncio.get_running_loop().time() - self._destination.settle
        while self._unsettled and self._unsettled[0][0] <= due:
            await self._confirm(self._unsettled.popleft()[1])
        return True

    async def _rewind(self, error: DeliveryFailed, *, once: bool) -> None:
        """What was sent and not confirmed goes again, after a pause: a failed try of its first batch."""
        first = self._unsettled[0][1]
        self._unsettled.clear()
        self._cursor = self._position
        await self._wait_or_give_up(first, error, once=once)

    async def _confirm(self, events: Sequence[Stored]) -> None:
        self._position = advanced(self._position, events[-1].place)
        self._tries = 0
        if not self._unsettled:
            self._cursor = self._position
        await self._holder.move(self._position, events=len(events))
        self.summary.delivered += len(events)
        metrics.counter(_semconv.AUDIT_FORWARDED).add(len(events), self._attributes)
        lag = (datetime.now(UTC) - events[-1].event.recorded_at).total_seconds()
        metrics.histogram(_semconv.AUDIT_FORWARD_DURATION).record(max(0.0, lag), self._attributes)
        self._tell()

    def _count_failure(self, error: Exception) -> None:
        self.summary.failures += 1
        kind = {**self._attributes, _semconv.ERROR_TYPE: type(error).__qualname__}
        metrics.counter(_semconv.AUDIT_FORWARD_FAILURES).add(1, kind)
        self._tell()

    def _tell(self) -> None:
        if self._told is not None:
            self._told(self.summary)

    def _key(self, events: Sequence[Stored]) -> str:
        digest = hashlib.sha256(self._name.encode())
        for one in events:
            digest.update(one.event.id.bytes)
        return f"msg_{digest.hexdigest()[:32]}"


def _backoff(attempt: int) -> float:
    """Seconds before the next try: doubling to a minute, with jitter (Brooker, "Exponential Backoff And
    Jitter", 2015), never 0.
    """
    ceiling: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt, 10))
    return ceiling * random.uniform(0.5, 1.0)  # noqa: S311 (spread, not secrecy)
