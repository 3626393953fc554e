"""Erasure of a person's data (GDPR, article 17): the key is destroyed, the events stay, and the proofs hold.

First the key goes, in one transaction with the tombstone that says who, when and why and which event will
certify it; then that event is logged. A process that dies in between leaves a tombstone without certificate,
which the next call for the subject completes: under the same event id, so that it is logged once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform.audit_trail.context import current_audit_context
from dotmac.platform.audit_trail.models import AuditCategory, AuditLevel, AuditOutcome
from dotmac.platform.audit_trail.personal import Personal, event_id_of
from dotmac.platform.audit_trail.subject_keys import Subject
from dotmac.platform.errors import ErasureRefused, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["PERSON_TYPES", "Erasing", "Erasure", "subject_of"]

# Resources that are persons, so that events about them are about the subject of that name.
PERSON_TYPES = ("person", "user", "customer", "patient", "subject", "account", "employee", "member")
_MAX_TEXT = 512
# The last erasure, and those that died before they were certified.
_TOMBSTONES = """
    SELECT id, fingerprint, erased_at, erased_by, reason, certificate, certified_at
    FROM audit_subject_keys WHERE tenant_id = $1 AND subject_id = $2 AND erased_at IS NOT NULL
    ORDER BY erased_at DESC, id
"""
_COUNT = """
    SELECT count(*) AS events, coalesce(sum((
        SELECT count(*) FROM jsonb_object_keys(CASE jsonb_typeof(personal->'fields')
            WHEN 'object' THEN personal->'fields' ELSE '{}' END))), 0)::bigint AS fields
    FROM audit_events WHERE subject_id = $1 AND personal->>'key' = $2
"""
_ERASE = """
    UPDATE audit_subject_keys
    SET wrapped = NULL, erased_at = now(), erased_by = $2, reason = $3, certificate = $4 WHERE id = $1
"""
_CERTIFIED = "UPDATE audit_subject_keys SET certified_at = now() WHERE id = $1 AND certified_at IS NULL"
# A hold that covers an event of the subject's, or that names the subject.
_HOLDS = """
    SELECT hold.id, hold.reason FROM audit_holds AS hold
    WHERE hold.released_at IS NULL AND (hold.tenant_id IS NULL OR hold.tenant_id = $1) AND (
        hold.user_id = $2 OR (hold.resource_id = $2 AND hold.resource_type = ANY($3::text[]))
        OR EXISTS (
            SELECT FROM audit_events AS e
            WHERE e.subject_id = $2 AND e.personal IS NOT NULL AND coalesce(e.tenant_id, '') = $1
                AND (hold.from_time IS NULL OR e.occurred_at >= hold.from_time)
                AND (hold.to_time IS NULL OR e.occurred_at < hold.to_time)
                AND (hold.user_id IS NULL OR hold.user_id IN (e.user_id, e.subject_id))
                AND (hold.resource_type IS NULL OR e.resource_type = hold.resource_type)
                AND (hold.resource_id IS NULL OR e.resource_id = hold.resource_id)))
    ORDER BY hold.placed_at, hold.id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """What `erase_subject` did, now or before.

    Attributes:
        key_id: of the destroyed key; None where the subject never had one: there was nothing to erase.
        fingerprint: of that key.
        events: events whose personal data can't be read any more.
        fields: fields of theirs.
        certificate: id of the event that certifies the erasure.
        new: False where an earlier call did it.
    """

    subject_id: str
    tenant_id: str | None
    key_id: UUID | None = None
    fingerprint: str | None = None
    erased_at: datetime | None = None
    erased_by: str | None = None
    reason: str | None = None
    events: int = 0
    fields: int = 0
    certificate: UUID | None = None
    new: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            name: value.isoformat()
            if isinstance(value, datetime)
            else str(value)
            if isinstance(value, UUID)
            else value
            for name, value in asdict(self).items()
        }


class Erasing(Personal):
    """The part of `AuditAggregator` that erases."""

    if TYPE_CHECKING:
        log_event: Callable[..., Any]  # the aggregator's

    async def erase_subject(
        self,
        subject_id: str | int | UUID,
        *,
        reason: str,
        by: str | int | UUID | None = None,
        tenant_id: str | int | UUID | None = None,
    ) -> Erasure:
        """Make the personal data of a subject unreadable for ever, by destroying their key.

        It is durable when this returns, and so is the event that certifies it (category PRIVACY, action
        `subject.erased`); calling it again changes nothing. Readers are refused at once; a process that was
        logging about the subject may use the old key for `AUDIT_TRAIL_PERSONAL_CACHE_SECONDS` more, for what
        nobody can read then. Later events about the subject get a new key. Copies of the keys' table in
        backups still hold the key, wrapped: see `rotate_personal_key`.

        Args:
            subject_id: whose.
            reason: why; at most 512 characters, it is stored and reported.
            by: who decided it; default: the user of `audit_context`.
            tenant_id: the subject's tenant; default: that of `audit_context`, else none.

        Raises:
            ErasureRefused: a legal hold covers the subject; that is logged as `subject.erasure_refused`.
            InvalidArgument: nobody and no reason is given, or the subject is one of a tenant.
            AuditUnavailable: not confirmed in time; call it again. ServerRefused: the role may not do it.
        """
        context = current_audit_context()
        who = _text("by", by if by is not None else context.user_id)
        why = _text("reason", reason)
        rules = self._redactor().of(AuditCategory.PRIVACY)
        if rules is not None:
            why = rules.text("reason", why, {}) or "***"
        subject = subject_of(subject_id, tenant_id)
        certificate = self._new_id()
        held: list[asyncpg.Record] = []

        async def work(connection: Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                await connection.execute("SET LOCAL synchronous_commit = on")
                held[:] = await _holds(connection, subject)
                if held:
                    return []
                living = await connection.fetchval(
                    "SELECT id FROM audit_subject_keys WHERE tenant_id = $1 AND subject_id = $2 "
                    "AND erased_at IS NULL FOR UPDATE",
                    *subject,
                )
                if living is not None:
                    await connection.execute(_ERASE, living, who, why, certificate)
                return await connection.fetch(_TOMBSTONES, *subject)

        tombstones = await self._read(work, 10 * self._seconds(), tenant=subject.tenant_id)
        vault = self._vault()
        if held:
            await self._refuse(subject, who, why, held)
        vault.cache.forget(subject)
        if not tombstones:
            await self._check_tenant(subject)
            return Erasure(subject_id=subject.subject_id, tenant_id=subject.tenant_id or None)
        for older in tombstones[1:]:
            if older["certified_at"] is None:
                await self._certify(subject, older, new=False)
        return await self._certify(subject, tombstones[0], new=tombstones[0]["certificate"] == certificate)

    async def _certify(self, subject: Subject, tombstone: asyncpg.Record, *, new: bool) -> Erasure:
        key_id, certificate = UUID(int=tombstone["id"].int), UUID(int=tombstone["certificate"].int)

        async def count(connection: Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(_COUNT, subject.subject_id, str(key_id))

        counted = await self._read(count, 10 * self._seconds(), tenant=subject.tenant_id)
        assert counted is not None  # an aggregate has one row
        done = Erasure(
            subject_id=subject.subject_id,
            tenant_id=subject.tenant_id or None,
            key_id=key_id,
            fingerprint=tombstone["fingerprint"],
            erased_at=tombstone["erased_at"].astimezone(UTC),
            erased_by=tombstone["erased_by"],
            reason=tombstone["reason"],
            events=counted["events"],
            fields=counted["fields"],
            certificate=certificate,
            new=new,
        )
        if tombstone["certified_at"] is None:
            await self._log(
                subject,
                "subject.erased",
                tombstone["erased_by"],
                {
                    "key_id": str(key_id),
                    "key_fingerprint": done.fingerprint,
                    "erased_at": done.to_dict()["erased_at"],
                    "events": done.events,
                    "fields": done.fields,
                    "scope": f"personal data of {done.events} events",
                    "justification": done.reason,
                },
                id=certificate,
            )

            async def note(connection: Connection) -> None:
                await connection.execute(_CERTIFIED, key_id)

            await self._read(note, tenant=subject.tenant_id)
        return done

    async def _refuse(self, subject: Subject, who: str, why: str, held: list[asyncpg.Record]) -> None:
        holds = [str(row["id"]) for row in held]
        await self._log(
            subject,
            "subject.erasure_refused",
            who,
            {"scope": "legal hold", "holds": holds, "justification": why},
            level=AuditLevel.WARNING,
            outcome=AuditOutcome.DENIED,
        )
        raise ErasureRefused(
            f"subject {subject.subject_id!r} is under legal hold {', '.join(holds)} ({held[0]['reason']}); "
            "release it first"
        )

    async def _log(
        self, subject: Subject, action: str, who: str | None, metadata: dict[str, Any], **more: Any
    ) -> None:
        await self.log_event(
            AuditCategory.PRIVACY,
            action,
            user_id=who,
            tenant_id=subject.tenant_id or None,
            resource_type="subject",
            resource_id=subject.subject_id,
            subject_id=subject.subject_id,
            metadata={"subject_id": subject.subject_id, **metadata},
            **more,
        )

    async def _check_tenant(self, subject: Subject) -> None:
        """Nobody is told that there was nothing to erase where only the tenant was left out."""
        if subject.tenant_id:
            return

        async def work(connection: Connection) -> bool:
            sql = "SELECT EXISTS (SELECT FROM audit_subject_keys WHERE subject_id = $1 AND tenant_id <> '')"
            return bool(await connection.fetchval(sql, subject.subject_id))

        if await self._read(work, tenant=""):
            raise InvalidArgument(
                "tenant_id", None, f"subject {subject.subject_id!r} is one of a tenant: say which"
            )

    def _new_id(self) -> UUID:
        return event_id_of(self._here().encoder, None, None)


async def _holds(connection: Connection, subject: Subject) -> list[asyncpg.Record]:
    """The legal holds over a subject; a role that may say so keeps others out until the transaction ends."""
    if await connection.fetchval("SELECT to_regclass('audit_holds') IS NULL"):
        return []
    if await connection.fetchval("SELECT has_table_privilege('audit_holds', 'UPDATE')"):
        await connection.execute("LOCK TABLE audit_holds IN SHARE MODE")
    return await connection.fetch(_HOLDS, *subject, list(PERSON_TYPES))


def subject_of(subject_id: object, tenant_id: object) -> Subject:
    """The subject that arguments mean; the tenant defaults to that of `audit_context`."""
    if tenant_id is None:
        tenant_id = current_audit_context().tenant_id
    tenant = "" if tenant_id is None else _text("tenant_id", tenant_id)
    return Subject(tenant, _text("subject_id", subject_id))


def _text(field: str, value: object) -> str:
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or len(value) > _MAX_TEXT or "\x00" in value:
        raise InvalidArgument(field, value, f"give a text of 1 to {_MAX_TEXT} characters")
    return value
