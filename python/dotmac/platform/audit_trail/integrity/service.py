"""Integrity, as a part of `AuditAggregator`: sealing, verifying, proving."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from dotmac.platform.audit_trail.arguments import check_count
from dotmac.platform.audit_trail.database import last_try, lone
from dotmac.platform.audit_trail.entry import aware
from dotmac.platform.audit_trail.service import Service
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from datetime import datetime

    import asyncpg

    from dotmac.platform.audit_trail.integrity.readers import Opening
    from dotmac.platform.audit_trail.integrity.report import IntegrityReport, VerifyProgress
    from dotmac.platform.audit_trail.integrity.sealer import SealOptions, SealResult
    from dotmac.platform.audit_trail.state import LoopState

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Integrity"]

Answer = TypeVar("Answer")

_LOST = "the audit database was lost"


class Integrity(Service):
    """The part of `AuditAggregator` that makes tampering evident."""

    async def verify_integrity(
        self,
        start: datetime | None = None,
        end: datetime | None = None,
        *,
        tenant_id: str | int | UUID | None = None,
        keys: Iterable[str | bytes] | None = None,
        anchors: Iterable[str] | None = None,
        progress: Callable[[VerifyProgress], None] | None = None,
        max_findings: int = 1_000,
        connection: Connection | None = None,
        connections: int | None = None,
    ) -> IntegrityReport:
        """Compare every event, segment, log and checkpoint with what was noted when they were made.

        Reads one state of the database, in constant memory, while others write. Logs and chains are always
        checked from their beginning, since their proofs start there.

        Args:
            start: first moment of the events to check; naive means local time. Whole segments are checked:
                those with an event at or after it.
            end: moment after the last.
            tenant_id: only this tenant's events and log; `""` for those without a tenant. Where row-level
                security shows our role one tenant at a time, it must be named (or by `audit_context`, or the
                role is bound to one).
            keys: public keys whose signatures are trusted, in base64, PEM or as verifier keys; default: the
                signing key's own and those of `AUDIT_TRAIL_PUBLIC_KEYS`. Without any, the database's own word
                is taken, and the report says so.
            anchors: places outside the database to read checkpoints back from; default: those of
                `AUDIT_TRAIL_ANCHORS`.
            progress: called with a `VerifyProgress` now and then.
            max_findings: findings of each kind that are told one by one; the others are counted.
            connection: verify by way of this connection, in its transaction if it is in one.
            connections: so many read a large trail at once, all of them the same state of it; default: one
                per processor, 2 at least and 4 at most. Not with `connection`.

        Returns: a report; `ok` is False where something is not as it was.
        Raises:
            AnchorUnavailable: a place did not give its checkpoints back.
            AuditUnavailable: the database did not answer, or was lost on the way.
            InvalidArgument, ConfigurationError, SchemaOutdated, ServerRefused.
        """
        from dotmac.platform.audit_trail.integrity.anchors import anchor_at, anchors_at
        from dotmac.platform.audit_trail.integrity.keys import public_key
        from dotmac.platform.audit_trail.integrity.readers import USUAL_READERS
        from dotmac.platform.audit_trail.integrity.verify import verify

        section = self._section()
        if keys is None:
            trusted = tuple(self.trusted_keys())
        else:
            trusted = tuple(public_key(one, name="keys") for one in keys)
        if isinstance(max_findings, bool) or not isinstance(max_findings, int) or max_findings < 1:
            raise InvalidArgument("max_findings", max_findings, "give a number from 1 on")
        check_count("connections", connections, 1)
        places = anchors_at(section.anchors) if anchors is None else [anchor_at(one) for one in anchors]

        async def work(connection: Connection, opening: Opening | None = None) -> IntegrityReport:
            return await verify(
                connection,
                start=None if start is None else aware("start", start),
                end=None if end is None else aware("end", end),
                tenant_id=None if tenant_id is None else str(tenant_id),
                keys=trusted,
                origin=section.origin,
                anchors=places,
                progress=progress,
                max_findings=max_findings,
                overdue=timedelta(seconds=max(900.0, 3 * section.checkpoint_interval)),
                opening=opening,
                connections=connections or USUAL_READERS,
            )

        if connection is not None:
            if connections is not None:
                raise InvalidArgument("connections", connections, "leave it out where you give a connection")
            return await work(connection)
        database = (await self._state()).database
        return await self._alone(lambda own: work(own, database.connect))

    async def prove(self, event_id: UUID | str) -> dict[str, Any]:
        """The proof that an event is in the trail.

        `check_proof` and `dotmac audit verify --proof` check it without the database.

        Returns: a JSON object: the event, its path to a signed checkpoint.
        Raises: NotProvable: the event is unknown, not covered, or no checkpoint covers it yet (`later`).
        """
        from dotmac.platform.audit_trail.integrity.proof import prove

        try:
            wanted = event_id if isinstance(event_id, UUID) else UUID(event_id)
        except (ValueError, AttributeError, TypeError):
            raise InvalidArgument("event_id", event_id, "give a UUID") from None
        return await self._alone(lambda connection: prove(connection, wanted))

    async def checkpoint(self) -> SealResult:
        """Seal what has settled, sign every log that grew, hand the checkpoints to the anchors: at once.

        Returns: what was done, and an error for each log or anchor that was left out.
        Raises: ConfigurationError: there is no signing key. AuditUnavailable, SchemaOutdated, ServerRefused.
        """
        from dotmac.platform.audit_trail.integrity.sealer import Sealer
        from dotmac.platform.errors import ConfigurationError

        options = self.seal_options()
        if options.key is None:
            right = "set one of them, or give signing_key to the aggregator"
            raise ConfigurationError(
                f"AUDIT_TRAIL_SIGNING_KEY, AUDIT_TRAIL_SIGNING_KEY_FILE: there is no signing key; {right}",
                [("AUDIT_TRAIL_SIGNING_KEY", "unset", right)],
            )
        state = await self._state()
        sealer = Sealer(state.database, options)

        with last_try(_LOST):
            try:
                return await sealer.run_once(timedelta(0))
            finally:
                await sealer.aclose()

    def trusted_keys(self) -> list[bytes]:
        """The public keys whose checkpoints are trusted: the signing key's own, and those of the settings."""
        from dotmac.platform.audit_trail.integrity.keys import public_keys, signing_key

        section = self._section()
        own = signing_key(self._signing_key, section)
        return list(dict.fromkeys([*([own.public_key] if own else []), *public_keys(section)]))

    def seal_options(self) -> SealOptions:
        """How this aggregator seals, by its arguments and settings."""
        from dotmac.platform.audit_trail.integrity.anchors import anchors_at
        from dotmac.platform.audit_trail.integrity.keys import signing_key
        from dotmac.platform.audit_trail.integrity.sealer import SealOptions

        section = self._section()
        return SealOptions(
            key=signing_key(self._signing_key, section),
            interval=section.checkpoint_interval,
            origin=section.origin,
            anchors=tuple(anchors_at(section.anchors)),
        )

    async def _start_state(self) -> LoopState:
        state = await super()._start_state()
        if self._seals():
            from dotmac.platform.audit_trail.integrity.sealer import Sealer

            state.sealer = Sealer(state.database, self.seal_options())
            state.sealer.start()
        return state

    def _seals(self) -> bool:
        section = self._section()
        wanted = section.sealing if self._sealing is None else self._sealing
        if wanted is not None:
            return wanted
        return any((self._signing_key, section.signing_key))

    async def explain_writer(self, writer: UUID | str, reason: str) -> None:
        """Say why a writer ended without closing (it crashed, its machine was lost), so that it is no longer
        told. What it stored is counted now: less than that is found from now on.

        Raises: InvalidArgument: no such writer, it has closed or was explained, or no reason is given.
        """
        try:
            wanted = writer if isinstance(writer, UUID) else UUID(writer)
        except (ValueError, AttributeError, TypeError):
            raise InvalidArgument("writer", writer, "give a UUID") from None
        if not isinstance(reason, str) or not reason.strip():
            raise InvalidArgument("reason", reason, "say in words what happened")

        async def work(connection: Connection) -> bool:
            # Once only; to be told that it was not is harmless where the first answer was lost.
            done = await connection.execute(
                "INSERT INTO audit_explanations (writer, reason, segments) "
                "SELECT id, $2, (SELECT count(*) FROM audit_segments WHERE writer = id) FROM audit_writers "
                "WHERE id = $1 AND NOT EXISTS (SELECT FROM audit_writer_ends WHERE writer = id) "
                "ON CONFLICT DO NOTHING",
                wanted,
                reason,
            )
            return done == "INSERT 0 1"

        if not await self._alone(work):
            raise InvalidArgument(
                "writer", str(wanted), "give one that began, did not close and is unexplained"
            )

    async def _alone(self, work: Callable[[Connection], Awaitable[Answer]]) -> Answer:
        """Run `work` on a connection of its own: it may take longer than a query."""
        state = await self._state()
        with last_try(_LOST):
            async with lone(state.database.connect()) as connection:
                return await work(connection)
