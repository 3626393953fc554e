"""Group commit: the events of all waiting callers are stored together, each is released after its commit.

One writer belongs to one event loop and has two lanes, each of which has one batch on its way at a time. A
batch holds half of all events on their way at most, so that callers make the next one while the server
stores this one; small ones are not split. A second lane takes what waits beside the first when that is worth
a commit of its own, or when the oldest has waited for some milliseconds. How a batch is stored is the lane's
business.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING
from uuid import UUID

from dotmac.platform.audit_trail.batch import Batch, Item
from dotmac.platform.audit_trail.lane import Lane
from dotmac.platform.audit_trail.partitions import Targets
from dotmac.platform.audit_trail.room import Room
from dotmac.platform.errors import AuditUnavailable, EngineClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dotmac.platform._native import AuditEntry
    from dotmac.platform.audit_trail.database import Database

__all__ = ["Writer"]

MAX_BATCH_BYTES = 16 << 20
MAX_PENDING_BYTES = 64 << 20
LANES = 2
# So few events are not shared out among lanes: a commit costs about as much as they do.
WORTH_A_COMMIT = 16
# So many commits after which the counts of a writer are summed up.
COMPACT_EVERY = 2_000


class Writer:
    """Collects events and commits them in groups.

    Args:
        database: where they go; its settings say how large a batch is, how long it waits, how many events
            may wait, and within how many seconds an event is durable or its caller has an error.

    Attributes:
        on_committed: called in the loop with the number of events after each commit; must not raise.
    """

    def __init__(self, database: Database) -> None:
        self.on_committed: Callable[[int], None] | None = None
        self._database = database
        self._timeout = database.settings.timeout
        self._max_pending = database.settings.max_pending
        self._max_batch = database.settings.batch_size
        self._max_wait = database.settings.batch_wait
        self._room = Room(self._max_pending, MAX_PENDING_BYTES)
        self._callers = 0
        self._loop = asyncio.get_running_loop()
        self._pending: deque[Item] = deque()
        self._blocks: deque[tuple[list[Item], asyncio.Future[None]]] = deque()
        targets = Targets()
        self._idle = [Lane(database, targets, self._committed) for _ in range(LANES)]
        self._lanes: dict[asyncio.Task[None], Lane] = {}
        self._second_lane: asyncio.TimerHandle | None = None
        self._commits = 0
        self._compacting: asyncio.Task[None] | None = None
        self._closed = False

    async def put(self, entry: AuditEntry, *, own_id: bool = False) -> Item:
        """Store one event; returns after its commit.

        Returns: its item: `answer` is False where it was stored before under the same id, and `entry` is
            what was stored, whose id is another where that of `entry` was taken by another event.
        Raises: AuditUnavailable, SchemaOutdated, ServerRefused, InvalidEvent.
        """
        loop = self._loop
        done = loop.create_future()
        item = Item(entry, done, loop.time() + self._timeout, own_id)
        if self._closed or not self._room.enter_now(entry.size):
            await self._wait_for_room(item)
        self._pending.append(item)
        if not self._lanes:
            self._open_lane()
        elif len(self._lanes) < LANES:
            self._think_of_second_lane()
        item.answer = await done
        return item

    async def put_block(self, entries: Sequence[AuditEntry], *, own_ids: Sequence[bool] | bool) -> list[Item]:
        """Store a block of events in one commit; as `put` for each.

        Returns: the items, in the order of the entries.
        """
        if not entries:
            return []
        deadline = self._loop.time() + self._timeout
        flags = [own_ids] * len(entries) if isinstance(own_ids, bool) else own_ids
        items = [Item(entry, None, deadline, own) for entry, own in zip(entries, flags, strict=True)]
        size = sum(entry.size for entry in entries)
        await self._wait_for_room(items[0], size)
        done = self._loop.create_future()
        self._blocks.append((items, done))
        try:
            if len(self._lanes) < LANES:
                self._open_lane()
            # Shielded: what is on its way is not to suffer where the caller waits no more.
            await asyncio.shield(done)
        finally:
            done.add_done_callback(lambda _: self._room.leave(size))
        for item in items:
            if isinstance(item.answer, BaseException):
                raise item.answer
        return items

    async def _wait_for_room(self, item: Item, size: int | None = None) -> None:
        if self._closed:
            raise EngineClosed("the audit writer of this event loop was closed while an event was on its way")
        self._callers += 1
        try:
            async with asyncio.timeout_at(item.deadline):
                await self._room.enter(item.entry.size if size is None else size)
        except TimeoutError:
            raise AuditUnavailable(
                f"{self._max_pending} events wait for the audit database already, or "
                f"{MAX_PENDING_BYTES >> 20} MiB of them, and too few left within {self._timeout:g} s; "
                "this one was not stored",
                UUID(int=item.entry.id),
            ) from None
        finally:
            self._callers -= 1

    # --- lanes

    def _think_of_second_lane(self) -> None:
        waiting = len(self._pending)
        on_way = self._room.events - waiting
        # With nothing on its way, the first lane has yet to take its share.
        if waiting >= (WORTH_A_COMMIT if on_way else 2 * WORTH_A_COMMIT) and 3 * waiting >= on_way:
            self._open_lane()
        elif self._second_lane is None:
            self._second_lane = self._loop.call_later(self._max_wait, self._open_second_lane)

    def _open_lane(self) -> None:
        lane = self._idle.pop()
        task = self._loop.create_task(self._run_lane(lane), name="dotmac-audit-writer")
        self._lanes[task] = lane

    def _open_second_lane(self) -> None:
        self._second_lane = None
        if self._pending and len(self._lanes) < LANES:
            self._open_lane()

    async def _run_lane(self, lane: Lane) -> None:
        try:
            while True:
                # One turn of the loop, so that callers that are ready now share the batch.
                await asyncio.sleep(0)
                if not self._pending and not self._blocks:
                    break
                if self._pending:
                    await self._run_batch(lane, *self._take())
                if self._blocks:
                    await self._run_block(lane, *self._blocks.popleft())
        finally:
            # Here, not in a callback: an event that comes next must see that nobody is at work.
            task = asyncio.current_task()
            if task is not None:
                self._idle.append(self._lanes.pop(task))
            if (self._pending or self._blocks) and not self._lanes and not self._loop.is_closed():
                self._open_lane()  # this lane was cancelled; what waits is not to suffer

    async def _run_batch(self, lane: Lane, items: list[Item], size: int) -> None:
        try:
            await self._store(lane, items)
        finally:
            self._room.leave(size, len(items))

    async def _run_block(self, lane: Lane, items: list[Item], done: asyncio.Future[None]) -> None:
        try:
            await self._store(lane, items)
        finally:
            if not done.done():
                done.set_result(None)

    async def _store(self, lane: Lane, items: list[Item]) -> None:
        batch = Batch(items)
        try:
            await lane.store(batch)
        except BaseException:
            self._abandon(items, batch)
            raise

    def _abandon(self, items: list[Item], batch: Batch) -> None:
        """The lane was cancelled in the middle: nobody may wait for ever."""
        for item in items:
            item.not_confirmed("the event loop is being stopped", self._timeout, sent=batch.sent)

    def _take(self) -> tuple[list[Item], int]:
        batch: list[Item] = []
        size = 0
        most = min(self._max_batch, max(2 * WORTH_A_COMMIT, (self._room.events + 1) // 2))
        while self._pending and len(batch) < most and size < MAX_BATCH_BYTES:
            item = self._pending.popleft()
            batch.append(item)
            size += item.entry.size
        return batch, size

    def _committed(self, events: int) -> None:
        self._commits += 1
        if self._commits % COMPACT_EVERY == 0 and self._compacting is None:
            self._compacting = self._loop.create_task(self._compact(), name="dotmac-audit-compact")
        if self.on_committed is not None:
            self.on_committed(events)

    async def _compact(self) -> None:
        try:
            await self._database.compact()
        finally:
            self._compacting = None

    # --- ends

    async def aclose(self) -> None:
        """Store what waits, then close; takes at most twice the timeout."""
        self._closed = True
        if self._second_lane is not None:
            self._second_lane.cancel()
        try:
            async with asyncio.timeout(2 * self._timeout):
                # Callers that wait for room were let in before the end: they are served too.
                while self._callers or self._pending or self._blocks or self._lanes:
                    if (self._pending or self._blocks) and not self._lanes:
                        self._open_lane()
                    await (asyncio.wait(self._lanes) if self._lanes else asyncio.sleep(0))
        except TimeoutError:
            for task in self._lanes:
                task.cancel()
            if self._lanes:
                await asyncio.wait(self._lanes)
        if self._compacting is not None:
            self._compacting.cancel()
        for lane in self._idle:
            await lane.aclose()
