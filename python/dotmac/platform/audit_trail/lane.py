"""A lane stores one batch at a time, over a connection of its own, in a chain of segments of its own.

What one try sends is one transaction: it is stored as a whole or not at all. Where the fate of a try is
unknown (a connection lost after sending), the batch stays as it is and the id of its first segment tells:
the segment is there, so is the batch; else it is sent again, and meets a first try that is still on its way
at the segment's primary key. Events that may be there already (ids of the callers, spools) are looked up in
the same transaction, and the rest is stored; if another process stores one of them meanwhile, its primary
key refuses the batch, which is looked up again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from dotmac.platform import _semconv
from dotmac.platform._native import AuditChain
from dotmac.platform.audit_trail.batch import Batch
from dotmac.platform.audit_trail.database import FAILURES, Database, backoff, is_transient, meaning, told
from dotmac.platform.audit_trail.ids import from_micros, uuid7
from dotmac.platform.audit_trail.partitions import PARENT, STALE, Target, Targets, name_tenant, refusal
from dotmac.platform.audit_trail.statements import FEW, PREPARE, copy_statement, present, store_few
from dotmac.platform.errors import InvalidEvent, ServerRefused
from dotmac.platform.observability import metrics
from dotmac.platform.observability.tracing import span

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform._native import AuditBatch
    from dotmac.platform.audit_trail.batch import Item

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Lane"]

# A chain that knows so many tenants is ended, and another begun: memory stays bounded.
_MOST_TENANTS = 20_000
_IS_STORED = "SELECT EXISTS (SELECT FROM audit_segments WHERE id = $1)"
_HEADS = """
    SELECT DISTINCT ON (tenant_id) tenant_id, seq, link FROM audit_segments
    WHERE writer = $1 AND tenant_id = ANY ($2::text[]) ORDER BY tenant_id, seq DESC
"""
_BEGIN_WRITER = "INSERT INTO audit_writers (id, host, pid) VALUES ($1, $2, $3) ON CONFLICT (id) DO NOTHING"
_END_WRITER = (
    "INSERT INTO audit_writer_ends (writer, segments) VALUES ($1, $2) ON CONFLICT (writer) DO NOTHING"
)


class Apart(Exception):
    """A batch can't be stored as a whole: row-level security asks for one month or one tenant at a time."""

    def __init__(self, parts: list[list[Item]]) -> None:
        super().__init__()
        self.parts = parts


class Lane:
    """Stores batches, one after another.

    Args:
        database: where they go.
        targets: what is known of the partitions; shared by a writer's lanes.
        on_committed: called with the number of events after each commit.
    """

    def __init__(
        self,
        database: Database,
        targets: Targets,
        on_committed: Callable[[int], None],
    ) -> None:
        self._database = database
        self._targets = targets
        self._on_committed = on_committed
        self._timeout = database.settings.timeout
        # Behind a pooler nothing may be prepared in one transaction and run in another.
        self._pooled = database.settings.statement_cache_size == 0
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._prepared = False
        self._closed = False
        self._begin_chain()

    def _begin_chain(self) -> None:
        self.writer = uuid7(time.time_ns() // 1000, int.from_bytes(os.urandom(8)))
        self._chain = AuditChain(self.writer.bytes, seed=int.from_bytes(os.urandom(8)))
        self._registered = False
        # Tenants whose last segment is not known: their last batch was given up in doubt.
        self._stale: set[str] = set()

    # --- one batch

    async def store(self, batch: Batch) -> None:
        """Store the batch, or give each of its callers an error by its deadline."""
        try:
            await self._store(batch)
        finally:
            if batch.in_doubt and batch.packed is not None:
                self._stale.update(batch.packed.tenants)

    async def _store(self, batch: Batch) -> None:  # noqa: C901, PLR0911, PLR0912 (one branch per fate)
        attempt = 0
        looked_up_again = False
        why = "it is busy"
        while True:
            deadline = batch.expire(self._loop.time(), why, self._timeout)
            if not batch.items:
                return
            try:
                async with asyncio.timeout_at(deadline):
                    await self._commit(batch)
            except asyncpg.UniqueViolationError as error:
                await self._meet(batch, error)
                continue
            except Apart as apart:
                for items in apart.parts:
                    await self.store(Batch(items))
                return
            except STALE as error:
                if looked_up_again:
                    batch.forget_packed()
                    if isinstance(error, asyncpg.CheckViolationError):  # a constraint that somebody added
                        await self._split(batch, error)
                    else:
                        refused = refusal(error, batch.target)
                        batch.fail(meaning(error) if refused is None else ServerRefused(refused))
                    return
                looked_up_again = True
                self._targets.forget()
                batch.target = None
                continue
            except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
                batch.forget_packed()
                await self._split(batch, error)
                return
            except FAILURES as error:
                if not is_transient(error):
                    batch.fail(meaning(error))
                    return
                why = told(error)
            except Exception as error:  # noqa: BLE001 (told to whom it concerns)
                batch.fail(error)
                return
            else:
                return
            pause = min(backoff(attempt), max(0.0, deadline - self._loop.time()))
            attempt += 1
            await asyncio.sleep(pause)

    async def _meet(self, batch: Batch, error: asyncpg.UniqueViolationError) -> None:
        """Something of the batch is there already: an event, or the place of a segment in the chain."""
        if error.table_name != "audit_segments":
            batch.look_up = True
            # Where tenants are kept apart since a moment ago, it is to be looked for in the partition.
            self._targets.isolated = batch.target = None
        elif batch.packed is not None:
            # An earlier batch, given up in doubt, came through: the chain goes on from there.
            self._stale.update(batch.packed.tenants)
        if batch.in_doubt:
            batch.refused = True  # or the batch itself is there: the next try looks first
        else:
            batch.forget_packed()
        await asyncio.sleep(0)

    async def _split(self, batch: Batch, error: Exception) -> None:
        """One of these events is refused, although it was checked: find it, and store the others."""
        if len(batch.items) == 1:
            batch.fail(InvalidEvent(f"the database does not take the event: {told(error)}"))
            return
        middle = len(batch.items) // 2
        for half in (batch.items[:middle], batch.items[middle:]):
            await self.store(Batch(half))

    async def _commit(self, batch: Batch) -> None:
        """`_try`, measured."""
        began = time.monotonic()
        try:
            with span(_semconv.SPAN_AUDIT_COMMIT, {_semconv.DB_SYSTEM: "postgresql"}):
                stored = await self._try(batch)
        except BaseException as error:
            failures = metrics.counter(_semconv.AUDIT_COMMIT_FAILURES)
            failures.add(1, {_semconv.ERROR_TYPE: type(error).__qualname__})
            raise
        if stored is None:
            return
        events = 0
        for _, category, level, count in stored.counts:
            attributes = {_semconv.AUDIT_CATEGORY: category, _semconv.AUDIT_LEVEL: level}
            metrics.counter(_semconv.AUDIT_EVENTS).add(count, attributes)
            events += count
        metrics.histogram(_semconv.AUDIT_COMMIT_DURATION).record(time.monotonic() - began)
        metrics.histogram(_semconv.AUDIT_BATCH_SIZE).record(events)
        self._on_committed(events)

    async def _try(self, batch: Batch) -> AuditBatch | None:
        """One try: each item gets its answer. Returns what was stored, None for nothing."""
        in_doubt = batch.in_doubt
        try:
            connection = self._connection
            if connection is None or connection.is_closed():
                connection = self._connection = await self._database.connect()
                self._prepared = False
            target = batch.target or await self._find_target(connection, batch)
            if not (in_doubt and await self._is_stored(connection, batch)):
                in_doubt = batch.in_doubt
                steps = self._database.lazy_commits or target.tenant is not None
                if steps or (batch.look_up and batch.packed is None):
                    await self._send_in_steps(connection, batch)
                else:
                    if batch.packed is None:
                        await self._pack(connection, batch)
                    await self._send(connection, batch)
        except BaseException as error:
            if await self._was_refused(error):
                batch.in_doubt = in_doubt  # this try is not stored; those before it are as they were
            batch.doubted = batch.doubted or batch.in_doubt
            raise
        packed = batch.packed
        batch.in_doubt = False
        if packed is not None:
            self._chain.commit(packed)
            self._registered = self._registered or packed.first_segment is not None
        batch.decide()
        return packed

    async def _find_target(self, connection: Connection, batch: Batch) -> Target:
        """Where the batch goes. Raises: Apart: not all of it to the same place."""
        fetch = partial(self._fetch, connection)
        if self._targets.isolated is None:
            await self._targets.learn(fetch)
        target = PARENT
        if self._targets.isolated:
            parts = await self._targets.apart(fetch, batch.items)
            if len(parts) > 1:
                raise Apart(list(parts.values()))
            (target,) = parts
        if batch.packed is not None and batch.packed.json is None and not target.copy:
            batch.forget_packed()  # it was refused as it is packed
        batch.target = target
        return target

    async def _is_stored(self, connection: Connection, batch: Batch) -> bool:
        """Was the batch stored by a try whose answer was lost?"""
        packed = batch.packed
        if packed is None or packed.first_segment is None:
            batch.forget_packed()  # without segments, its events are looked up one by one
            batch.look_up = True
            return False
        stored = UUID(int=packed.first_segment)
        if await self._ask(connection, _IS_STORED, stored, tenant=_tenant(batch)):
            return True
        late = await self._read_heads(connection, packed.tenants, packed)
        if late or batch.refused:
            # Another segment has the place of one of its own: no earlier try can come through any more.
            batch.forget_packed()
            batch.refused = False
        return False

    async def _send_in_steps(self, connection: Connection, batch: Batch) -> None:
        await connection.execute("BEGIN")  # not asyncpg's own, which does not learn of a ROLLBACK by hand
        if self._database.lazy_commits:
            # Acknowledged means durable. Per transaction: a pooler forgets a session's settings.
            await connection.execute("SET LOCAL synchronous_commit = on")
        if (tenant := _tenant(batch)) is not None:
            await name_tenant(connection, tenant)
        if batch.packed is None:
            if batch.look_up:
                await self._look_up(connection, batch)
            if batch.items:
                await self._pack(connection, batch)
        await self._send(connection, batch)
        await connection.execute("COMMIT")

    async def _look_up(self, connection: Connection, batch: Batch) -> None:
        """Answer the items that are stored already, and find those that repeat another of the batch."""
        seen: set[tuple[int, int]] = set()
        batch.repeats.clear()
        for item in batch.items:
            key = (item.entry.occurred_at, item.entry.id)
            if key in seen:
                batch.repeats.add(item)
            seen.add(key)
        times = [from_micros(item.entry.occurred_at) for item in batch.items]
        ids = [UUID(int=item.entry.id) for item in batch.items]
        for record in await connection.fetch(present(_relation(batch)), times, ids):
            item = batch.items[record["place"] - 1]
            if item.own_id:
                item.decide(new=False)
            elif batch.doubted:
                item.decide(new=True)  # by a try whose answer was lost
            else:
                # Another event has the id that this one was given: it gets a new one.
                item.entry = item.entry.renamed(int.from_bytes(os.urandom(8)))
        batch.items = [item for item in batch.items if not item.is_decided()]

    async def _pack(self, connection: Connection, batch: Batch) -> None:
        if self._chain.tenants > _MOST_TENANTS:
            await self._end_chain(connection)
            self._begin_chain()
        if self._stale:
            await self._read_heads(connection, list(self._stale))
            self._stale.clear()
        entries = [item.entry for item in batch.items if item not in batch.repeats]
        few = 0 if self._pooled else FEW
        if batch.target is not None and not batch.target.copy:
            few = len(entries)
        packed = self._chain.pack(entries, few)
        if packed.first_segment is not None and not self._registered:
            await self._ask(connection, _BEGIN_WRITER, self.writer, socket.gethostname(), os.getpid())
        batch.packed = packed

    async def _send(self, connection: Connection, batch: Batch) -> None:
        packed = batch.packed
        if packed is None:
            return
        try:
            await self._targets.ensure(partial(self._fetch, connection), {day for day, *_ in packed.counts})
            if packed.json is None and not self._pooled and not self._prepared:
                await self._prepare(connection)
        except BaseException:
            if not batch.in_doubt:
                # Nothing of it is on its way: whoever's time is up meanwhile is told so, and not stored.
                batch.forget_packed()
            raise
        batch.in_doubt = True
        batch.sent = True
        if packed.json is not None:
            sql = store_few(_relation(batch))
            await connection.execute(sql, packed.json, packed.segments, packed.rollup, packed.leaves)
        else:
            # Not public, but copy_to_table() takes one statement alone, and so costs three more round trips.
            # A memoryview, because bytes would be taken for the name of a file.
            sql = copy_statement(packed, _relation(batch), prepared=not self._pooled)
            await connection._copy_in(sql, memoryview(packed.copy or b""), None)  # type: ignore[attr-defined]  # noqa: SLF001

    async def _prepare(self, connection: Connection) -> None:
        try:
            await connection.execute(PREPARE)
        except BaseException:
            # The first of the two statements may be there, whatever became of the transaction.
            self._connection = None
            connection.terminate()
            raise
        self._prepared = True

    async def _read_heads(
        self, connection: Connection, tenants: list[str], packed: AuditBatch | None = None
    ) -> bool:
        """Note the last segments of these tenants; returns whether `packed` comes too late for one."""
        late = False
        wanted = dict(packed.places) if packed is not None else {}
        # Under row-level security a role that is no writer sees the segments of one tenant at a time.
        asked = [(tenant, [tenant]) for tenant in tenants] if self._targets.isolated else [(None, tenants)]
        for named, some in asked:
            rows = await self._fetch(connection, _HEADS, self.writer, some, tenant=named)
            for tenant, seq, link in rows:
                self._chain.note(tenant, seq, link)
                late = late or seq >= wanted.get(tenant, seq + 1)
        return late

    async def _ask(
        self, connection: Connection, sql: str, *values: object, tenant: str | None = None
    ) -> object:
        rows = await self._fetch(connection, sql, *values, tenant=tenant)
        return rows[0][0] if rows else None

    async def _fetch(
        self, connection: Connection, sql: str, *values: object, tenant: str | None = None
    ) -> list[asyncpg.Record]:
        if connection.is_in_transaction() or (not self._pooled and tenant is None):
            return await connection.fetch(sql, *values)
        # A pooler may change servers between a statement's preparation and its run, but in a transaction;
        # and there alone a tenant is named.
        await connection.execute("BEGIN")  # not asyncpg's own, which does not learn of a ROLLBACK by hand
        if tenant is not None:
            await name_tenant(connection, tenant)
        rows = await connection.fetch(sql, *values)
        await connection.execute("COMMIT")
        return rows

    async def _was_refused(self, error: BaseException) -> bool:
        """Did the server refuse the try? If so the connection is sound, unless that was its farewell."""
        connection = self._connection
        refused = isinstance(error, asyncpg.LockNotAvailableError) or (
            isinstance(error, asyncpg.PostgresError) and not is_transient(error)
        )
        if connection is None:
            return refused
        if refused and not connection.is_closed() and not self._closed:
            if not connection.is_in_transaction():
                return True
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await connection.execute("ROLLBACK")
                return True
        self._connection = None
        connection.terminate()
        return refused

    # --- the end

    async def _end_chain(self, connection: Connection) -> None:
        if self._registered and not self._stale:
            await self._ask(connection, _END_WRITER, self.writer, self._chain.segments)

    async def aclose(self) -> None:
        """Say that no segment follows, then close; takes at most the timeout."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            async with asyncio.timeout(self._timeout):
                if self._stale:
                    await self._read_heads(connection, list(self._stale))
                    self._stale.clear()
                await self._end_chain(connection)
                await connection.close(timeout=1.0)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            connection.terminate()
        except BaseException:
            connection.terminate()
            raise


def _tenant(batch: Batch) -> str | None:
    return batch.target.tenant if batch.target is not None else None


def _relation(batch: Batch) -> str:
    return (batch.target or PARENT).relation
