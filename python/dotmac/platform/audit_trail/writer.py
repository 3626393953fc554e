"""Group commit: the events of all waiting callers go in one COPY, each caller is released after its commit.

One writer belongs to one event loop.

A batch closes when the one before it is done, when it is full, or when its oldest event has waited for some
milliseconds (then a second lane takes it). The first try of a fresh batch is a COPY. Where the batch's fate
is unknown, or a row may be there already, it goes as one `INSERT … SELECT FROM unnest(…) ON CONFLICT DO
NOTHING` on (occurred_at, id) instead: one statement like a staging table's two, without the right to make
one, and it waits for a first try that is still committing; so nothing is stored twice.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import asyncpg

from dotmac.platform import _semconv
from dotmac.platform.audit_trail.database import Database, backoff, is_transient, meaning
from dotmac.platform.audit_trail.entry import COLUMNS, Row
from dotmac.platform.audit_trail.room import Room
from dotmac.platform.errors import AuditUnavailable, EngineClosed, InvalidEvent
from dotmac.platform.observability import metrics
from dotmac.platform.observability.tracing import span

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    Connection = asyncpg.Connection[asyncpg.Record]
    _Store = Callable[[Connection, list["Item"]], Awaitable[set[object] | None]]

__all__ = ["Item", "Writer"]

MAX_BATCH_BYTES = 16 << 20
MAX_PENDING_BYTES = 64 << 20
LANES = 2
_ROW_BYTES = 1_024  # a row without its metadata, roughly

_TYPES = {"occurred_at": "timestamptz", "id": "uuid", "ip_address": "inet", "metadata": "jsonb"} | {
    "anomaly_score": "float8",
    "anomaly_reasons": "jsonb",
}
_INSERT = (
    f"INSERT INTO audit_events ({', '.join(COLUMNS)}) SELECT * FROM unnest("  # noqa: S608 (constants and conditions of ours)
    + ", ".join(f"${place}::{_TYPES.get(name, 'text')}[]" for place, name in enumerate(COLUMNS, 1))
    + ") ON CONFLICT (occurred_at, id) DO NOTHING RETURNING id"
)


class Item:
    """One event on its way.

    Attributes: may_exist: the row may be stored already. fresh: if so, then by an earlier try of this call.
        done: resolves to whether this call stored it. size: bytes, roughly.
    """

    __slots__ = ("deadline", "done", "fresh", "may_exist", "row", "size", "tried")

    def __init__(self, row: Row, done: asyncio.Future[bool], deadline: float, *, may_exist: bool) -> None:
        self.row = row
        self.done = done
        self.deadline = deadline
        self.may_exist = may_exist
        self.fresh = not may_exist
        self.size = _ROW_BYTES + sys.getsizeof(row.metadata)
        self.tried = False

    def is_new(self, stored: set[object] | None) -> bool:
        """Did this call store it? `stored`: the ids that the last try stored, None for all of them."""
        return stored is None or self.fresh or self.row.id in stored


class Writer:
    """Collects events and commits them in groups.

    Args:
        database: where they go; its settings say how large a batch is, how long it waits, how many events
            may wait, and within how many seconds an event is durable or its caller has an error.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._timeout = database.settings.timeout
        self._max_pending = database.settings.max_pending
        self._max_batch = database.settings.batch_size
        self._max_wait = database.settings.batch_wait
        self._room = Room(self._max_pending, MAX_PENDING_BYTES)
        self._callers = 0
        self._loop = asyncio.get_running_loop()
        self._pending: deque[Item] = deque()
        self._lanes: set[asyncio.Task[None] | None] = set()
        self._idle: list[Connection] = []
        self._months: set[tuple[int, int]] = set()
        self._second_lane: asyncio.TimerHandle | None = None
        self._closed = False
        self._ended = False

    async def put(self, row: Row, *, may_exist: bool = False) -> bool:
        """Store one event; returns after its commit.

        Returns: False where the event was stored before under the same id.
        Raises: AuditUnavailable, SchemaOutdated, ServerRefused, InvalidEvent.
        """
        deadline = self._begin()
        try:
            item = Item(row, self._loop.create_future(), deadline, may_exist=may_exist)
            await self._admit(item)
            return await item.done
        finally:
            self._callers -= 1

    async def put_many(self, rows: Iterable[Row], *, may_exist: bool) -> list[bool]:
        """Store a block of events, as `put` does each; the block shares one deadline."""
        deadline = self._begin()
        items: list[Item] = []
        try:
            for row in rows:
                items.append(Item(row, self._loop.create_future(), deadline, may_exist=may_exist))
                await self._admit(items[-1])
            answers = await asyncio.gather(*(item.done for item in items), return_exceptions=True)
        except BaseException:
            for item in items:
                item.done.cancel()  # nobody waits for them any more
            raise
        finally:
            self._callers -= 1
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer is True for answer in answers]

    def _begin(self) -> float:
        if self._closed:
            raise EngineClosed("the audit writer of this event loop was closed while an event was on its way")
        self._callers += 1
        return self._loop.time() + self._timeout

    async def _admit(self, item: Item) -> None:
        if not self._room.enter_now(item.size):
            try:
                async with asyncio.timeout_at(item.deadline):
                    await self._room.enter(item.size)
            except TimeoutError:
                raise AuditUnavailable(
                    f"{self._max_pending} events wait for the audit database already, or "
                    f"{MAX_PENDING_BYTES >> 20} MiB of them, and too few left within {self._timeout:g} s; "
                    "this one was not stored",
                    item.row.id,
                ) from None
        self._pending.append(item)
        self._start_lane()

    # --- lanes

    def _start_lane(self) -> None:
        if not self._lanes or (len(self._lanes) < LANES and len(self._pending) >= self._max_batch):
            self._open_lane()
        elif len(self._lanes) < LANES and self._second_lane is None:
            self._second_lane = self._loop.call_later(self._max_wait, self._open_second_lane)

    def _open_lane(self) -> None:
        self._lanes.add(self._loop.create_task(self._run_lane(), name="dotmac-audit-writer"))

    def _open_second_lane(self) -> None:
        self._second_lane = None
        if self._pending and len(self._lanes) < LANES:
            self._open_lane()

    async def _run_lane(self) -> None:
        try:
            # One turn of the loop, so that callers that are ready now share the first batch.
            await asyncio.sleep(0)
            while self._pending:
                await self._run_batch(self._take())
        finally:
            # Here, not in a callback: an event that comes next must see that nobody is at work.
            self._lanes.discard(asyncio.current_task())
            if self._pending and not self._lanes and not self._loop.is_closed():
                self._open_lane()  # this lane was cancelled; what waits is not to suffer

    async def _run_batch(self, batch: list[Item]) -> None:
        try:
            await self._store(batch)
        finally:
            for item in batch:  # where the lane was cancelled in the middle: nobody may wait for ever
                self._not_confirmed(item, "the event loop is being stopped")
                self._room.leave(item.size)

    def _take(self) -> list[Item]:
        batch: list[Item] = []
        size = 0
        while self._pending and len(batch) < self._max_batch and size < MAX_BATCH_BYTES:
            item = self._pending.popleft()
            batch.append(item)
            size += item.size
        return batch

    async def _store(self, batch: list[Item]) -> None:  # noqa: C901, PLR0912 (one branch per fate)
        """Store the batch, or give each of its callers an error by its deadline."""
        attempt = 0
        partitions_looked_up = False
        cause: BaseException | None = None
        while batch := self._expire(batch, cause):
            try:
                async with asyncio.timeout_at(min(item.deadline for item in batch)):
                    new = await self._commit(batch)
            except asyncpg.UniqueViolationError:
                for item in batch:
                    item.may_exist = True
                continue
            except asyncpg.CheckViolationError as error:  # the month's partition was dropped meanwhile
                if partitions_looked_up:
                    self._fail(batch, meaning(error))
                    return
                self._months.clear()
                partitions_looked_up = True
                continue
            except asyncpg.DataError as error:
                await self._split(batch, error)
                return
            except (
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
                OSError,
            ) as error:
                if not is_transient(error):
                    self._fail(batch, meaning(error))
                    return
                cause = error
            except Exception as error:  # noqa: BLE001 (told to whom it concerns)
                self._fail(batch, error)
                return
            else:
                for item in batch:
                    if not item.done.done():
                        item.done.set_result(item.is_new(new))
                return
            for item in batch:
                item.may_exist = item.may_exist or item.tried
            pause = min(backoff(attempt), max(0.0, min(item.deadline for item in batch) - self._loop.time()))
            attempt += 1
            await asyncio.sleep(pause)

    async def _split(self, batch: list[Item], error: Exception) -> None:
        """One of these rows is refused, although it was checked: find it, and store the others."""
        if len(batch) == 1:
            text = f"the database does not take the event: {error}"
            self._fail(batch, InvalidEvent(text))
            return
        middle = len(batch) // 2
        await self._store(batch[:middle])
        await self._store(batch[middle:])

    async def _commit(self, batch: list[Item]) -> set[object] | None:
        """`_send`, measured."""
        began = time.monotonic()
        try:
            with span(_semconv.SPAN_AUDIT_COMMIT, {_semconv.DB_SYSTEM: "postgresql"}):
                new = await self._send(batch)
        except BaseException as error:
            failures = metrics.counter(_semconv.AUDIT_COMMIT_FAILURES)
            failures.add(1, {_semconv.ERROR_TYPE: type(error).__qualname__})
            raise
        metrics.histogram(_semconv.AUDIT_COMMIT_DURATION).record(time.monotonic() - began)
        metrics.histogram(_semconv.AUDIT_BATCH_SIZE).record(len(batch))
        kinds = Counter((item.row.category, item.row.level) for item in batch if item.is_new(new))
        for (category, level), count in kinds.items():
            attributes = {_semconv.AUDIT_CATEGORY: category, _semconv.AUDIT_LEVEL: level}
            metrics.counter(_semconv.AUDIT_EVENTS).add(count, attributes)
        return new

    async def _send(self, batch: list[Item]) -> set[object] | None:
        """One try. Returns the ids that it stored, or None for all of them."""
        connection = self._idle.pop() if self._idle else None
        try:
            if connection is None or connection.is_closed():
                connection = await self._database.connect()
            await self._ensure_partitions(connection, batch)
            repeated = any(item.may_exist for item in batch)
            for item in batch:
                item.tried = True
            store = self._insert if repeated else self._copy
            if self._database.lazy_commits:
                new = await self._durably(store, connection, batch)
            else:
                new = await store(connection, batch)
        except BaseException as error:
            if connection is not None:
                # Where the server answered, the connection is sound, unless the answer was its farewell.
                refused = isinstance(error, asyncpg.PostgresError) and not is_transient(error)
                self._put_back(connection, sound=refused and not connection.is_in_transaction())
            raise
        self._put_back(connection, sound=True)
        return new

    @staticmethod
    async def _insert(connection: Connection, batch: list[Item]) -> set[object]:
        columns: Sequence[tuple[object, ...]] = list(zip(*(item.row for item in batch), strict=True))
        return {record["id"] for record in await connection.fetch(_INSERT, *columns)}

    @staticmethod
    async def _copy(connection: Connection, batch: list[Item]) -> None:
        rows = [item.row for item in batch]
        await connection.copy_records_to_table("audit_events", records=rows, columns=COLUMNS)

    @staticmethod
    async def _durably(store: _Store, connection: Connection, batch: list[Item]) -> set[object] | None:
        """Acknowledged means durable. Asked for per transaction: a pooler forgets a session's settings."""
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SET LOCAL synchronous_commit = on")
        new = await store(connection, batch)
        await transaction.commit()
        return new

    def _put_back(self, connection: Connection, *, sound: bool) -> None:
        if sound and not connection.is_closed() and not self._ended:
            self._idle.append(connection)
        else:
            connection.terminate()

    async def _ensure_partitions(self, connection: Connection, batch: list[Item]) -> None:
        wanted = {
            (item.row.occurred_at.year, item.row.occurred_at.month): item.row.occurred_at for item in batch
        }
        for month, moment in wanted.items():
            if month not in self._months:
                # Next month's too, so that nobody waits at midnight; the bound is the function's own.
                await connection.execute(
                    "SELECT audit_ensure_partition(m) FROM unnest($1::timestamptz[]) AS m",
                    [moment, moment + timedelta(days=31)],
                )
                self._months.add(month)

    # --- ends

    def _expire(self, batch: list[Item], cause: BaseException | None) -> list[Item]:
        now = self._loop.time()
        why = f"{type(cause).__name__}: {cause}" if cause is not None else "it is busy"
        for item in batch:
            if item.deadline <= now:
                self._not_confirmed(item, why)
        # A caller that gave up before anything was sent is not stored behind its back.
        return [item for item in batch if not item.done.done()]

    def _not_confirmed(self, item: Item, why: str) -> None:
        if item.done.done():
            return
        fate = "may or may not have been stored" if item.tried else "was not stored"
        text = (
            f"the audit database did not confirm within {self._timeout:g} s ({why}); event {item.row.id} "
            f"{fate}; logging it again with this id can't store it twice"
        )
        item.done.set_exception(AuditUnavailable(text, item.row.id))

    @staticmethod
    def _fail(batch: list[Item], error: Exception) -> None:
        for item in batch:
            if not item.done.done():
                item.done.set_exception(error)

    async def aclose(self) -> None:
        """Store what waits, then close; takes at most the timeout."""
        self._closed = True
        if self._second_lane is not None:
            self._second_lane.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * self._timeout):
                # Callers that wait for room were let in before the end: they are served too.
                while self._callers or self._pending or self._lanes:
                    if self._pending and not self._lanes:
                        self._open_lane()
                    lanes = [lane for lane in self._lanes if lane is not None]
                    await (asyncio.wait(lanes) if lanes else asyncio.sleep(0))
        self._ended = True
        idle, self._idle = self._idle, []
        for connection in idle:
            try:
                await connection.close(timeout=1.0)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                connection.terminate()
