"""Sealing the personal data of events, opening them for readers, and giving the keys a new wrapping."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform.audit_trail.context import current_audit_context, in_audit_context
from dotmac.platform.audit_trail.entry import plain_text, when_and_id
from dotmac.platform.audit_trail.ids import micros, uuid7
from dotmac.platform.audit_trail.models import PersonalState
from dotmac.platform.audit_trail.personal_key import KeyRing, KeyService, LocalKey
from dotmac.platform.audit_trail.privacy import Given, filled_in, protect, redact, redactor_of
from dotmac.platform.audit_trail.sealing import SealedField, check_personal, open_fields, seal_fields
from dotmac.platform.audit_trail.service import Service, making
from dotmac.platform.audit_trail.subject_keys import KeyCache, Subject, SubjectKey, SubjectKeys
from dotmac.platform.errors import InvalidArgument, InvalidEvent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    import asyncpg

    from dotmac.platform._native import AuditEncoder
    from dotmac.platform.audit_trail.models import AuditEvent
    from dotmac.platform.audit_trail.redaction import Redactor

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Personal", "event_id_of"]

_TO_REWRAP = """
    SELECT id, kek, wrapped FROM audit_subject_keys
    WHERE erased_at IS NULL AND kek <> $1 AND id > $2 ORDER BY id LIMIT $3
"""
_REWRAP = """
    UPDATE audit_subject_keys AS key SET kek = $1, wrapped = fresh.wrapped, rewrapped_at = now()
    FROM unnest($2::uuid[], $3::text[], $4::bytea[]) AS fresh (id, kek, wrapped)
    WHERE key.id = fresh.id AND key.kek = fresh.kek AND key.erased_at IS NULL
"""


class _Vault:
    """The keys of one process: its cache, and a worker for each of its loops."""

    def __init__(self, ring: KeyRing, cache: KeyCache) -> None:
        self.pid = os.getpid()
        self.ring = ring
        self.cache = cache
        self.lock = threading.Lock()
        self.loops: dict[asyncio.AbstractEventLoop, SubjectKeys] = {}


class Personal(Service):
    """The part of `AuditAggregator` that seals and opens personal data."""

    _made_redactor: Redactor | None = None
    _made_vault: _Vault | None = None

    def _redactor(self) -> Redactor:
        made = self._made_redactor
        if made is None:
            made = self._made_redactor = redactor_of(self._section(), self._redaction)
        return made

    def redacted(self, category: object, given: Given) -> Given:
        """What is stored of an event that comes from elsewhere (imports): redacted, not filled in."""
        return redact(self._redactor(), category, given)

    async def _sealed(self, given: Given, occurred_at: object, event_id: object) -> tuple[Given, UUID]:
        """The arguments with their personal data encrypted under the key of its subject, for that event id; a
        new one where there is none.

        Raises: InvalidEvent, PersonalKeyMissing, KeyServiceUnavailable, AuditUnavailable.
        """
        fields = check_personal(given.personal)
        subject = subject_of_event(given.tenant_id, given.subject_id)
        event = event_id_of(self._here().encoder, occurred_at, event_id)
        key = await self._keys().for_writing(subject)
        sealed = {"key": str(key.id), "fields": seal_fields(key.aead, event, subject.subject_id, fields)}
        return given._replace(personal=sealed), event

    async def _protected_block(self, items: list[Any]) -> tuple[list[Any], Exception | None]:
        """Arguments of `log_event` as mappings, filled in, redacted and sealed, up to the first for which
        that can't be done; and why it can't."""
        redactor = self._redactor()
        if in_audit_context():
            places: Iterable[int] = range(len(items))
        else:
            places = self._here().encoder.flagged(redactor.screens, items)
        done = list(items)
        sealing: list[tuple[int, Given]] = []
        failed: Exception | None = None
        for place in places:
            item = done[place]
            if not isinstance(item, Mapping):
                continue  # refused later
            known = {name: item[name] for name in Given._fields if name in item}
            before = Given(**{"action": None, **known})
            try:
                given = protect(redactor, item.get("category"), filled_in(before, current_audit_context()))
            except (InvalidEvent, InvalidArgument) as error:
                failed = error
                del done[place:]
                break
            if given.personal is not None:
                sealing.append((place, given))
            changed = {
                name: value
                for name, value in zip(Given._fields, given, strict=True)
                if value is not getattr(before, name)
            }
            if changed:
                done[place] = {**item, **changed}
        answers = await asyncio.gather(
            *(self._sealed(given, done[at].get("occurred_at"), done[at].get("id")) for at, given in sealing),
            return_exceptions=True,
        )
        for (at, _), answer in zip(sealing, answers, strict=True):
            if isinstance(answer, Exception):
                return done[:at], answer
            if isinstance(answer, BaseException):
                raise answer
            given, event = answer
            done[at] = {**done[at], "personal": given.personal, "id": event}
        return done, failed

    async def open_personal(
        self, events: Iterable[AuditEvent], *, tenant_id: str | None = None
    ) -> list[AuditEvent]:
        """Events with their personal data decrypted, as queries with `decrypt_personal=True` give them.

        Args: tenant_id: whose keys row-level security is to show; needed where it keeps tenants apart.

        Where that can't be, `personal` says why: `erased` (the subject's key was destroyed), `sealed` (its
        key-encryption key is not configured), `unreadable` (the ciphertext is not what was stored).

        Raises: PersonalKeyMissing: no key is configured. KeyServiceUnavailable, AuditUnavailable.
        """
        found = list(events)
        wanted = {key_id for event in found if (key_id := _key_of(event)) is not None}
        keys = await self._keys().living(wanted, tenant_id) if wanted else {}
        return [
            event if event.sealed is None else dataclasses.replace(event, personal=_opened(event, keys))
            for event in found
        ]

    async def _for_reader(
        self, events: list[AuditEvent], decrypt: bool | None, tenant: str | None = None
    ) -> list[AuditEvent]:
        wanted = self._decrypt_personal if decrypt is None else decrypt
        if not wanted or all(event.sealed is None for event in events):
            return events
        return await self.open_personal(events, tenant_id=tenant)

    async def rotate_personal_key(
        self, *, batch_size: int = 500, progress: Callable[[int], None] | None = None
    ) -> int:
        """Wrap the keys of all subjects anew by the key-encryption key that is configured now.

        Events are not touched. Interrupted, the next call goes on. Afterwards the old key opens nothing but
        backups: destroying it makes the keys in them useless, those of erased subjects among them.

        Args:
            batch_size: keys per statement, 1 to 10,000.
            progress: called with the number of keys done so far.

        Returns: how many keys were wrapped anew.
        Raises: PersonalKeyMissing: the key that wrapped one is not configured as an old key.
            KeyServiceUnavailable, AuditUnavailable, ServerRefused (the role may not update the keys).
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= 10_000:  # noqa: PLR2004
            raise InvalidArgument("batch_size", batch_size, "give a number from 1 to 10000")
        ring, done, last = self._vault().ring, 0, UUID(int=0)
        while True:
            rows = await self._keys_to_rewrap(ring.name, last, batch_size)
            if not rows:
                return done
            # Nothing is locked while the key service works: what was erased meanwhile stays so.
            fresh = [
                await ring.wrap(await ring.unwrap(row["wrapped"], row["kek"], key_id), key_id)
                for row in rows
                for key_id in [str(row["id"])]
            ]
            done += await self._store_rewrapped(ring.name, rows, fresh)
            last = rows[-1]["id"]
            if progress is not None:
                progress(done)

    async def _keys_to_rewrap(self, name: str, last: UUID, limit: int) -> list[asyncpg.Record]:
        async def work(connection: Connection) -> list[asyncpg.Record]:
            return await connection.fetch(_TO_REWRAP, name, last, limit)

        return await self._read(work, tenant="")

    async def _store_rewrapped(self, name: str, rows: list[asyncpg.Record], fresh: list[bytes]) -> int:
        async def work(connection: Connection) -> int:
            ids, names = [row["id"] for row in rows], [row["kek"] for row in rows]
            return int((await connection.execute(_REWRAP, name, ids, names, fresh)).split()[-1])

        return await self._read(work, tenant="")

    # --- keys

    async def _on_keys(self, work: Callable[[Connection], Awaitable[Any]], tenant: str) -> Any:
        return await self._read(work, tenant=tenant)

    def _keys(self) -> SubjectKeys:
        vault, loop = self._vault(), asyncio.get_running_loop()
        with vault.lock:
            found = vault.loops.get(loop)
            if found is None:
                for ended in [one for one in vault.loops if one.is_closed()]:
                    del vault.loops[ended]
                found = vault.loops[loop] = SubjectKeys(
                    self._on_keys, vault.ring, vault.cache, self._seconds()
                )
        return found

    def _vault(self) -> _Vault:
        made = self._made_vault
        if made is None or made.pid != os.getpid():
            with making():
                made = self._made_vault  # another thread may have made it meanwhile
                if made is None or made.pid != os.getpid():
                    section = self._section()
                    ring = made.ring if made is not None else self._make_ring()
                    cache = KeyCache(section.personal_cache_size, section.personal_cache_seconds)
                    made = self._made_vault = _Vault(ring, cache)
        return made

    def _make_ring(self) -> KeyRing:
        section = self._section()
        given: Any = self._personal_key
        if given is None and section.personal_key is not None:
            given = section.personal_key.get_secret_value()
        current = given if given is None or isinstance(given, KeyService) else LocalKey(given)
        older = section.personal_old_keys.get_secret_value() if section.personal_old_keys is not None else ""
        # Half of the time, so that a stuck wrap leaves the rest to the others of its batch.
        return KeyRing(
            current, [LocalKey(text) for text in older.split(",") if text.strip()], self._seconds() / 2
        )


def subject_of_event(tenant_id: object, subject_id: object) -> Subject:
    """Whose key an event's personal data are sealed by. Raises: InvalidEvent: no such names."""
    return Subject(plain_text("tenant_id", tenant_id) or "", plain_text("subject_id", subject_id) or "")


def event_id_of(encoder: AuditEncoder, occurred_at: object, event_id: object) -> UUID:
    """The id that an event will have: what is sealed for it is bound to that. Raises: InvalidEvent."""
    moment, identity = when_and_id(occurred_at, event_id)
    if identity is not None:
        return identity
    now = time.time_ns() // 1000 if moment is None else micros(moment)
    return uuid7(now, encoder.chance())


def _key_of(event: AuditEvent) -> UUID | None:
    try:
        return UUID(event.sealed["key"]) if event.sealed is not None else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _opened(event: AuditEvent, keys: dict[UUID, SubjectKey]) -> dict[str, Any] | PersonalState:
    key_id = _key_of(event)
    if key_id is None or event.sealed is None:
        return PersonalState.UNREADABLE
    key = keys.get(key_id)
    if key is None:
        return PersonalState.ERASED
    if key.aead is None:
        return PersonalState.SEALED
    try:
        return open_fields(key.aead, event.id, str(event.subject_id), event.sealed["fields"])
    except (SealedField, KeyError, TypeError, AttributeError):
        return PersonalState.UNREADABLE
