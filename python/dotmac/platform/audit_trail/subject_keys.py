"""Keys of subjects: made once for each, whichever of several processes comes first, and kept for a while.

A key that is used for writing may be up to a lifetime old, so that an erasure elsewhere is known here that
soon; what was written meanwhile can't be read by anybody. Reading asks the database each time.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID, uuid4

from dotmac.platform.audit_trail.personal_key import KEY_BYTES, aes_gcm
from dotmac.platform.errors import AuditUnavailable, KeyServiceUnavailable, PersonalKeyMissing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    import asyncpg

    from dotmac.platform.audit_trail.personal_key import KeyRing

    Connection = asyncpg.Connection[asyncpg.Record]
    Run = Callable[[Callable[[Connection], Awaitable[Any]], str], Awaitable[Any]]

__all__ = ["KeyCache", "Subject", "SubjectKey", "SubjectKeys", "fingerprint"]

_MOST_AT_ONCE = 500
_WRAPS_AT_ONCE = 32
_TRIES = 5
_LIVING = """
    SELECT key.id, key.tenant_id, key.subject_id, key.kek, key.wrapped
    FROM unnest($1::text[], $2::text[]) AS wanted (tenant_id, subject_id)
    JOIN audit_subject_keys AS key USING (tenant_id, subject_id) WHERE key.erased_at IS NULL
"""
_MAKE = """
    INSERT INTO audit_subject_keys (id, tenant_id, subject_id, kek, wrapped, fingerprint)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[])
    ON CONFLICT (tenant_id, subject_id) WHERE erased_at IS NULL DO NOTHING
"""
_BY_ID = """
    SELECT id, tenant_id, subject_id, kek, wrapped FROM audit_subject_keys
    WHERE id = ANY($1::uuid[]) AND erased_at IS NULL
"""


class Subject(NamedTuple):
    """Whose data: a person of a tenant; the same name in another tenant is another person."""

    tenant_id: str
    subject_id: str


class SubjectKey(NamedTuple):
    """A subject's key, ready for use."""

    id: UUID
    subject: Subject
    aead: Any


class KeyCache:
    """Unwrapped keys of one process, for all of its threads.

    Args:
        size: keys at most; the one not used for longest goes first.
        lifetime: seconds after which a key is looked up again.
    """

    def __init__(self, size: int, lifetime: float) -> None:
        self._size = size
        self._lifetime = lifetime
        self._lock = threading.Lock()
        self._writing: OrderedDict[Subject, tuple[float, SubjectKey]] = OrderedDict()
        self._opened: OrderedDict[UUID, tuple[float, SubjectKey]] = OrderedDict()

    def for_writing(self, subject: Subject) -> SubjectKey | None:
        """The subject's key, unless it is too old."""
        return self._look(self._writing, subject)

    def opened(self, key_id: UUID) -> SubjectKey | None:
        """An unwrapped key, for who has just seen that it lives."""
        return self._look(self._opened, key_id)

    def add(self, key: SubjectKey, *, asked_at: float, writing: bool) -> None:
        """Keep a key that the database had at `asked_at` (of `time.monotonic`)."""
        with self._lock:
            if writing:
                self._keep(self._writing, key.subject, asked_at, key)
            self._keep(self._opened, key.id, asked_at, key)

    def forget(self, subject: Subject) -> None:
        """The subject was erased."""
        with self._lock:
            self._writing.pop(subject, None)
            for key_id in [key_id for key_id, (_, key) in self._opened.items() if key.subject == subject]:
                del self._opened[key_id]

    def _look(self, kept: OrderedDict[Any, tuple[float, SubjectKey]], name: Any) -> SubjectKey | None:
        with self._lock:
            found = kept.get(name)
            if found is None:
                return None
            if found[0] <= time.monotonic():
                del kept[name]
                return None
            kept.move_to_end(name)
            return found[1]

    def _keep(
        self, kept: OrderedDict[Any, tuple[float, SubjectKey]], name: Any, since: float, key: SubjectKey
    ) -> None:
        kept[name] = (since + self._lifetime, key)
        kept.move_to_end(name)
        while len(kept) > self._size:
            kept.popitem(last=False)


class SubjectKeys:
    """Looks keys up and makes them; those that callers want at the same time go in one statement.

    Belongs to one event loop.

    Args:
        run: runs a repeatable piece of work on a connection, within the service's timeout, for a tenant.
        ring: wraps and unwraps.
        cache: of the process.
        timeout: seconds within which a caller has a key or an error; None for no bound.
    """

    def __init__(self, run: Run, ring: KeyRing, cache: KeyCache, timeout: float | None = None) -> None:
        self._run = run
        self._ring = ring
        self._cache = cache
        self._timeout = timeout
        self._wanted: dict[Subject, asyncio.Future[SubjectKey]] = {}
        self._working: asyncio.Task[None] | None = None

    async def for_writing(self, subject: Subject) -> SubjectKey:
        """The subject's living key, made if there is none; it is durable when this returns.

        Raises: PersonalKeyMissing, KeyServiceUnavailable, AuditUnavailable, ServerRefused, SchemaOutdated.
        """
        found = self._cache.for_writing(subject)
        if found is not None:
            return found
        _ = self._ring.name  # raises early
        waiting = self._wanted.get(subject)
        if waiting is None or waiting.done():  # answered while others of its batch still wait
            loop = asyncio.get_running_loop()
            waiting = self._wanted[subject] = loop.create_future()
            if self._working is None:
                self._working = loop.create_task(self._work(), name="dotmac-audit-keys")
        try:
            async with asyncio.timeout(self._timeout):
                # Shielded: a caller that is cancelled must not take the key away from the others.
                return await asyncio.shield(waiting)
        except TimeoutError:
            raise KeyServiceUnavailable(
                f"there was no key for the subject within {self._timeout:g} s; nothing was stored"
            ) from None

    async def _work(self) -> None:
        try:
            while self._wanted:
                await asyncio.sleep(0)  # callers that are ready now share the statement
                # One tenant at a time: row-level security may show no more.
                tenant = next(iter(self._wanted)).tenant_id
                same = [one for one in self._wanted.items() if one[0].tenant_id == tenant]
                batch = dict(same[:_MOST_AT_ONCE])
                try:
                    await self._find_or_make(batch)
                except Exception as error:  # noqa: BLE001 (told to whom it concerns)
                    for waiting in batch.values():
                        _settle(waiting, error)
                for subject, waiting in batch.items():
                    if self._wanted.get(subject) is waiting:
                        del self._wanted[subject]
        finally:
            self._working = None
            for waiting in self._wanted.values():
                _settle(waiting, AuditUnavailable("the event loop is being stopped; nothing was stored"))
            self._wanted.clear()

    async def _find_or_make(self, batch: dict[Subject, asyncio.Future[SubjectKey]]) -> None:
        """Give each subject its key, or why there is none: one that does not unwrap, or whose answer takes
        long, is not to hurt the others.
        """
        missing = list(batch)
        for _ in range(_TRIES):
            asked_at = time.monotonic()
            rows = await self._fetch(missing[0].tenant_id, _LIVING, *_columns(missing))
            await _each(partial(self._answer, batch, asked_at), rows)
            there = {_subject(row) for row in rows}
            # Read back by the next turn, whoever made it: of two processes at once only one did.
            missing = await self._make([subject for subject in missing if subject not in there], batch)
            if not missing:
                return
        raise AuditUnavailable("keys of subjects are erased as fast as they are made; nothing was stored")

    async def _answer(
        self, batch: dict[Subject, asyncio.Future[SubjectKey]], asked_at: float, row: asyncpg.Record
    ) -> None:
        waiting = batch[_subject(row)]
        try:
            key = await self._unwrapped(row)
        except (PersonalKeyMissing, KeyServiceUnavailable) as error:
            _settle(waiting, error)
        else:
            self._cache.add(key, asked_at=asked_at, writing=True)
            _settle(waiting, key)

    async def _make(
        self, subjects: list[Subject], batch: dict[Subject, asyncio.Future[SubjectKey]]
    ) -> list[Subject]:
        """Make keys; those whose key can't be wrapped are told. Returns the others."""
        made: dict[Subject, tuple[Any, ...]] = {}

        async def wrap(subject: Subject) -> None:
            key, key_id = os.urandom(KEY_BYTES), uuid4()
            try:
                wrapped = await self._ring.wrap(key, str(key_id))
            except (PersonalKeyMissing, KeyServiceUnavailable) as error:
                _settle(batch[subject], error)
            else:
                made[subject] = (key_id, *subject, self._ring.name, wrapped, fingerprint(key))

        await _each(wrap, subjects)
        if not made:
            return []

        async def work(connection: Connection) -> None:
            async with connection.transaction():
                # No event may be durable before the key that opens it.
                await connection.execute("SET LOCAL synchronous_commit = on")
                await connection.execute(_MAKE, *zip(*made.values(), strict=True))

        await self._run(work, subjects[0].tenant_id)
        return list(made)

    async def living(self, key_ids: Iterable[UUID], tenant: str | None = None) -> dict[UUID, SubjectKey]:
        """Those of the keys that were not destroyed, as the database has them now; without `aead` where the
        key-encryption key is another than those configured.

        Raises: PersonalKeyMissing: no key-encryption key is set at all. KeyServiceUnavailable, and as above.
        """
        asked_at = time.monotonic()
        _ = self._ring.name
        rows = await self._fetch(tenant or "", _BY_ID, list(key_ids))
        keys: dict[UUID, SubjectKey] = {}

        async def unwrap(row: asyncpg.Record) -> None:
            if self._ring.knows(row["kek"]):
                key = await self._unwrapped(row)
                self._cache.add(key, asked_at=asked_at, writing=False)
            else:
                key = SubjectKey(UUID(int=row["id"].int), _subject(row), None)
            keys[key.id] = key

        await _each(unwrap, rows)
        return keys

    async def _fetch(self, tenant: str, sql: str, *values: object) -> list[asyncpg.Record]:
        async def work(connection: Connection) -> list[asyncpg.Record]:
            return await connection.fetch(sql, *values)

        found: list[asyncpg.Record] = await self._run(work, tenant)
        return found

    async def _unwrapped(self, row: asyncpg.Record) -> SubjectKey:
        key_id = UUID(int=row["id"].int)
        key = self._cache.opened(key_id)
        if key is not None:
            return key
        raw = await self._ring.unwrap(row["wrapped"], row["kek"], str(key_id))
        if len(raw) != KEY_BYTES:
            raise KeyServiceUnavailable(f"subject key {key_id} unwraps to {len(raw)} bytes, not {KEY_BYTES}")
        return SubjectKey(key_id, _subject(row), aes_gcm(raw))


async def _each(work: Callable[[Any], Awaitable[None]], items: Iterable[Any]) -> None:
    """Do it for each, several at once; after an error no other is begun."""
    left = iter(items)

    async def some() -> None:
        for item in left:
            await work(item)

    workers = [asyncio.ensure_future(some()) for _ in range(_WRAPS_AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()


def _subject(row: asyncpg.Record) -> Subject:
    return Subject(row["tenant_id"], row["subject_id"])


def _settle(waiting: asyncio.Future[SubjectKey], answer: SubjectKey | Exception) -> None:
    if waiting.done():
        return
    if isinstance(answer, Exception):
        waiting.set_exception(answer)
        waiting.exception()  # whoever waited may have gone
    else:
        waiting.set_result(answer)


def fingerprint(key: bytes) -> str:
    """Says which key it was, and nothing about it."""
    return hashlib.sha256(b"dotmac subject key v1\x00" + key).hexdigest()[:32]


def _columns(subjects: list[Subject]) -> tuple[list[str], list[str]]:
    return [one.tenant_id for one in subjects], [one.subject_id for one in subjects]
