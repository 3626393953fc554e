"""`AuditAggregator`: the audit trail's one public service."""

from __future__ import annotations

import json
from asyncio import get_running_loop
from typing import TYPE_CHECKING, Any

from dotmac.platform import _semconv
from dotmac.platform.audit_trail import schema
from dotmac.platform.audit_trail.anomaly import anomaly_of
from dotmac.platform.audit_trail.bulk import Bulk
from dotmac.platform.audit_trail.context import NO_CONTEXT, current_audit_context
from dotmac.platform.audit_trail.database import Database, lone
from dotmac.platform.audit_trail.entry import make_entry
from dotmac.platform.audit_trail.exporting import Exporting
from dotmac.platform.audit_trail.forwarding import Forwarding
from dotmac.platform.audit_trail.holds import Holds
from dotmac.platform.audit_trail.ids import uuid_of
from dotmac.platform.audit_trail.indexes import Indexes
from dotmac.platform.audit_trail.integrity.service import Integrity
from dotmac.platform.audit_trail.models import AuditLevel
from dotmac.platform.audit_trail.privacy import Given, filled_in, protect
from dotmac.platform.audit_trail.queries import Queries
from dotmac.platform.audit_trail.reporting import Reporting
from dotmac.platform.audit_trail.roles import Roles
from dotmac.platform.audit_trail.subject_access import Accessing
from dotmac.platform.audit_trail.upkeep import Upkeep
from dotmac.platform.observability import metrics
from dotmac.platform.observability.tracing import span, trace_ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
    from datetime import datetime
    from ipaddress import IPv4Address, IPv6Address
    from uuid import UUID

    import asyncpg

    from dotmac.platform._native import AuditEntry
    from dotmac.platform.audit_trail.models import AuditCategory, AuditOutcome
    from dotmac.platform.audit_trail.state import LoopState, Process

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["AuditAggregator"]


class AuditAggregator(
    Queries, Accessing, Reporting, Exporting, Forwarding, Integrity, Roles, Holds, Upkeep, Indexes
):
    """Stores audit events, finds them again, reports on them.

    Made at import time, it does nothing until it is used; then it works in any event loop, several one
    after another or at once in several threads, and in a forked child, which starts anew. After
    `aclose()`, or after its loop has ended, the next use starts anew too.

    Args:
        postgres_url: `postgresql://…`, `postgresql+asyncpg://…` or `embedded://`; default: `config`, then
            the environment (`AUDIT_TRAIL_POSTGRES_URL`, `DATABASE_URL`).
        redis_url: Redis or Valkey; default as above. Nothing is kept there by this version.
        config: settings; arguments win over it, it wins over the environment.
        timeout: seconds within which an event is durable or `log_event` raises, and a query answers;
            defaults of this and the next four: the configuration's.
        max_pending: events that may wait for the database at once, 64 MiB of them at most; further callers
            wait.
        statement_cache_size: prepared statements kept per connection; 0 behind pgbouncer in transaction
            mode.
        anomaly_detection: score events as they are logged.
        anomaly_threshold: score in (0, 1] from which an event is an anomaly.
        on_anomaly: called with an `Anomaly` after an anomalous event is stored; may be async. What it
            raises is logged, since the event is stored all the same. `log_event` waits for an async one
            for as long as is left of its `timeout`; then it goes on beside, for another `timeout` at most,
            and `aclose()` waits for it.
        signing_key: Ed25519 key that signs checkpoints: PEM, base64, or a `SigningKey` around a callable
            (KMS); default: `AUDIT_TRAIL_SIGNING_KEY` or `AUDIT_TRAIL_SIGNING_KEY_FILE`.
        sealing: append segments to the tenants' logs in the background, sign and anchor checkpoints;
            default: where there is a signing key.
        redaction: rules for what is not to be stored as it is, before those of the configuration.
        personal_key: key that wraps the keys of subjects, or a `KeyService`; default: the configuration's.
        decrypt_personal: queries show personal data unless they are told otherwise.

    Raises: InvalidArgument: an argument is wrong. ConfigurationError: nothing says where the database is.
    """

    # --- events

    async def log_event(
        self,
        category: AuditCategory | str,
        action: str,
        level: AuditLevel | str = AuditLevel.INFO,
        *,
        outcome: AuditOutcome | str | None = None,
        user_id: str | int | UUID | None = None,
        tenant_id: str | int | UUID | None = None,
        resource_type: str | None = None,
        resource_id: str | int | UUID | None = None,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        correlation_id: str | int | UUID | None = None,
        metadata: dict[str, Any] | None = None,
        personal: Mapping[str, Any] | None = None,
        subject_id: str | int | UUID | None = None,
        occurred_at: datetime | None = None,
        id: UUID | str | None = None,  # noqa: A002 (the column's name, and the one a retry needs)
        wait: bool = True,
    ) -> UUID:
        """Store one event; it is durable when this returns.

        Args:
            category: what kind of thing happened: a member, or its name in any case.
            action: what happened, such as `user.login`; at most 512 characters.
            level: how grave it is.
            outcome: how it ended; default: read from the action's words (`login.failed` is a failure,
                `access.denied` was denied), else success.
            user_id: who did it; at most 512 characters, like the other names. Where this and the next ones
                are left out, `audit_context` tells them.
            tenant_id: in whose realm.
            resource_type: what kind of thing it was done to.
            resource_id: to which one.
            ip_address: where from; default: `metadata["ip_address"]` where that is an address.
            correlation_id: what ties the events of one piece of work together.
            metadata: anything else, as JSON types; at most 1 MiB, 32 levels deep. NUL characters, lone
                surrogates, NaN and infinity are refused, because PostgreSQL's jsonb can't hold them.
            personal: personal data, by field: stored encrypted under a key of the subject's own, so that
                `erase_subject` can make them unreadable. At most 100 fields, 256 KiB.
            subject_id: whom they are about; default: `user_id`.
            occurred_at: when; naive means local time; default: now (or the time in `id`, if version 7).
            id: an id of your own; logging it again stores nothing new. Without `occurred_at` it must be of
                version 7, which holds the time.
            wait: for the database. False: return as soon as the event is on the local disk; it is stored
                from there, in the order of this loop's events, exactly once, by this process or the next.

        Returns: the event's id; one that is not your own is a UUID of version 7.
        Raises:
            InvalidEvent: a field is wrong; nothing was stored.
            AuditUnavailable: not confirmed within the timeout; says whether it may have been stored. Its
                `event_id`, given as `id`, makes another try safe.
            SchemaOutdated: run `dotmac db upgrade`.
            ServerRefused: the database refused (login, rights).
            SpoolFull, SpoolFailed: with `wait=False`: the event was not kept.
            PersonalKeyMissing, KeyServiceUnavailable: personal data can't be encrypted; nothing was stored.
        """
        process = self._here()
        given: tuple[Any, ...] = (
            action, user_id, tenant_id, resource_type, resource_id, ip_address, correlation_id, metadata,
            personal, subject_id,
        )  # fmt: skip
        context = current_audit_context()
        if context is not NO_CONTEXT:
            given = filled_in(Given(*given), context)
        screens = (self._made_redactor or self._redactor()).screens
        fields = (category, given[0], level, outcome, *given[1:], occurred_at, id)
        entry = process.encoder.entry(screens, trace_ids(), *fields)
        if entry is None:
            entry = await self._unusual(category, level, outcome, Given(*given), occurred_at, id)
        state = process.logging.get(get_running_loop()) or await self._logging(process)
        new = True
        if wait:
            with span(_semconv.SPAN_AUDIT_LOG):
                item = await state.writer.put(entry, own_id=id is not None)
            entry, new = item.entry, item.answer is True
        else:
            with span(_semconv.SPAN_AUDIT_SPOOL):
                await state.spool.put(entry)
        if new and (score := entry.score) is not None and score >= process.threshold:
            await self._tell(state, entry, process.threshold, state.loop.time() + self._seconds())
        return uuid_of(entry.id)

    async def _unusual(
        self,
        category: object,
        level: object,
        outcome: object,
        given: Given,
        occurred_at: object,
        event_id: object,
    ) -> AuditEntry:
        """An event in which something may have to be redacted, sealed or put into plain types."""
        given = protect(self._redactor(), category, given)
        if given.personal is not None:
            given, event_id = await self._sealed(given, occurred_at, event_id)
        return make_entry(
            self._here().encoder,
            category=category,
            level=level,
            outcome=outcome,
            occurred_at=occurred_at,
            event_id=event_id,
            **given._asdict(),
        )

    async def _logging(self, process: Process) -> LoopState:
        state = await self._state()
        state.spool.look()
        process.logging[state.loop] = state
        return state

    @staticmethod
    async def _tell(state: LoopState, entry: AuditEntry, threshold: float, deadline: float) -> None:
        anomaly = anomaly_of(entry, threshold)
        if anomaly is not None:
            metrics.counter(_semconv.AUDIT_ANOMALIES).add(1, {_semconv.AUDIT_DETECTOR: "rate"})
            await state.teller.tell(anomaly, deadline)

    async def log_events(
        self, events: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]
    ) -> list[UUID]:
        """Store many events; all of them are durable when this returns.

        They go in blocks of some thousand, in their order; each block is stored as a whole or not at all.
        Beside the ids, no more than a few blocks are in memory, however many events there are.

        Args:
            events: the arguments of `log_event` for each, without `wait`, as mappings.

        Returns: their ids, in their order.
        Raises:
            InvalidEvent: one is wrong: names its place, from 0; those before it are stored.
            AuditUnavailable, SchemaOutdated, ServerRefused: as `log_event`; with ids of your own
                (`id=…`) the same events can be given again.
        """
        process = self._here()
        state = process.logging.get(get_running_loop()) or await self._logging(process)
        return await Bulk(process, state, self._seconds(), self._tell, self._protected_block).run(events)

    async def store_rows(self, entries: Sequence[AuditEntry]) -> list[bool]:
        """Store events whose ids may be there already (imports). Returns which were new."""
        state = await self._state()
        return [item.answer is True for item in await state.writer.put_block(entries, own_ids=True)]

    async def load_import(self, source: str) -> tuple[int, int, dict[str, Any]] | None:
        """Where the last import of that source stopped: byte, line, the parser's state."""

        async def work(connection: Connection) -> tuple[int, int, dict[str, Any]] | None:
            sql = "SELECT position, line, state::text AS state FROM audit_imports WHERE source = $1"
            found = await connection.fetchrow(sql, source)
            return (found["position"], found["line"], json.loads(found["state"])) if found else None

        return await self._read(work, tenant="")

    async def save_import(
        self, source: str, position: int, line: int, state: dict[str, Any], *, start_over: bool = False
    ) -> None:
        """Note where an import stands; idempotent, so that it may be repeated after a lost connection.

        Args: start_over: also where the note so far, about another file, is further on.
        """

        async def work(connection: Connection) -> None:
            await connection.execute(
                "INSERT INTO audit_imports AS old (source, position, line, state) VALUES ($1, $2, $3, $4) "
                "ON CONFLICT (source) DO UPDATE SET position = $2, line = $3, state = $4, updated_at = now() "
                "WHERE $5 OR old.position < $2",
                source,
                position,
                line,
                json.dumps(state),
                start_over,
            )

        await self._read(work, tenant="")

    # --- tables

    async def migrate(self, *, tenants: bool | None = None) -> schema.SchemaStatus:
        """Bring the tables up to date; several processes at once wait for one another.

        Args: tenants: keep tenants apart by row-level security from now on; default: the configuration's
            `row_level_security`. False leaves it as it is.
        Returns: the version found before (`current`) and the one there is now (`wanted`).
        Raises: AuditUnavailable, ServerRefused.
        """
        database = Database(await self._settings())
        found = await self._once(schema.upgrade(database.open))
        if found.current != found.wanted:
            await self.apply_roles()
        await self.build_indexes()
        if self._section().row_level_security if tenants is None else tenants:
            await self.enable_tenants()
        return found

    async def schema_status(self) -> schema.SchemaStatus:
        """The version of the tables and the one that this library wants."""
        database = Database(await self._settings())

        async def look() -> schema.SchemaStatus:
            async with lone(database.open()) as connection:
                return await schema.status(connection)

        return await self._once(look())

    async def ping(self) -> None:
        """Raise unless the database answers and its tables fit."""

        async def work(connection: Connection) -> None:
            await schema.check(connection)

        await self._read(work, tenant="")
