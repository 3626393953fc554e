"""Verification: everything that the trail says, against everything that was noted about it.

One transaction sees one state of all tables, so writers go on meanwhile. Rows stream through; what is kept
grows with what is wrong, up to a bound, not with the trail.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.context import current_audit_context
from dotmac.platform.audit_trail.database import FAILURES
from dotmac.platform.audit_trail.integrity.drops import Drops, check_counts, find_drops
from dotmac.platform.audit_trail.integrity.events import (
    check_events,
    check_uncovered,
    count_events,
    readers_for,
)
from dotmac.platform.audit_trail.integrity.logs import (
    check_anchors,
    check_lateness,
    check_logs,
    check_unsealed,
)
from dotmac.platform.audit_trail.integrity.readers import LOCK, readers_of
from dotmac.platform.audit_trail.integrity.report import (
    Finding,
    FindingKind,
    IntegrityReport,
    VerifyProgress,
)
from dotmac.platform.audit_trail.integrity.writers import check_chains, check_ends
from dotmac.platform.audit_trail.partitions import name_tenant
from dotmac.platform.audit_trail.tenancy import MISSING, Sight, sight_of
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    import asyncpg

    from dotmac.platform.audit_trail.integrity.anchors import Anchor
    from dotmac.platform.audit_trail.integrity.readers import Opening

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Scope", "verify"]

_OVERDUE = timedelta(minutes=15)
_OWN: dict[str, Any] = {"isolation": "repeatable_read", "readonly": True}


@dataclass(slots=True)
class Scope:
    """What is verified, and what for."""

    report: IntegrityReport
    keys: tuple[bytes, ...]
    trail: str | None = None
    progress: Callable[[VerifyProgress], None] | None = None
    # Row-level security shows one tenant's rows alone, so the events that tell of drops are hidden.
    one_tenant: bool = False
    # From when on what was sealed should be signed, and what was signed be anchored.
    overdue: timedelta = _OVERDUE
    # By place, the largest size of each tenant's log that it gave back.
    reached: dict[str, dict[str, int]] = field(default_factory=dict)
    drops: Drops = field(default_factory=Drops)

    @property
    def tenant(self) -> str | None:
        """The tenant asked for; None for all."""
        return self.report.tenant_id

    @property
    def keys_given(self) -> bool:
        """Does the caller say which keys to trust?"""
        return bool(self.keys)

    @property
    def is_partial(self) -> bool:
        """Are there segments out of scope?"""
        report = self.report
        return report.tenant_id is not None or report.start is not None or report.end is not None

    def segments(self) -> tuple[str, list[Any]]:
        """Condition for `audit_segments s`, and its values."""
        return self._condition(
            "s.tenant_id = {}", "s.last_at >= {}::text::timestamptz", "s.first_at < {}::text::timestamptz"
        )

    def events(self) -> tuple[str, list[Any]]:
        """Condition for `audit_events`, and its values."""
        return self._condition(
            "coalesce(tenant_id, '') = {}",
            "occurred_at >= {}::text::timestamptz",
            "occurred_at < {}::text::timestamptz",
        )

    def _condition(self, *templates: str) -> tuple[str, list[Any]]:
        report = self.report
        wanted = zip(templates, (report.tenant_id, report.start, report.end), strict=True)
        parts, values = ["true"], []
        for template, value in wanted:
            if value is not None:
                # As text that means the same whatever the session's DateStyle and TimeZone: a copy, which
                # has no parameters, gets it so, and all that is asked has to mean the same.
                values.append(value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value)
                parts.append(template.format(f"${len(values)}"))
        return " AND ".join(parts), values

    def tell(self, stage: str, done: int, total: int | None) -> None:
        """Tell the caller how far it is."""
        if self.progress is not None:
            self.progress(VerifyProgress(stage, done, total))


async def verify(
    connection: Connection,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    tenant_id: str | None = None,
    keys: Iterable[bytes] = (),
    origin: str | None = None,
    anchors: Iterable[Anchor] = (),
    progress: Callable[[VerifyProgress], None] | None = None,
    max_findings: int = 1_000,
    overdue: timedelta = _OVERDUE,
    opening: Opening | None = None,
    connections: int = 1,
) -> IntegrityReport:
    """Verify by way of a connection; see `AuditAggregator.verify_integrity`.

    In a transaction of the caller's it sees what that transaction sees; else it begins one of its own, which
    only reads. A checkpoint that was signed after the caller's transaction took its snapshot is missing in
    it: give no anchors then. Where row-level security shows the role one tenant at a time, that tenant alone
    is verified. Who cancels it closes the connection: its transaction is left open.

    In a transaction of its own, of many events so many `connections` read at once, which `opening` gives it.

    Raises: InvalidArgument: the role sees one tenant, and none is named, or another one than it is bound to.
    """
    sight = await sight_of(connection)
    tenant_id = _tenant(sight, tenant_id)
    own = not connection.is_in_transaction()
    before = await connection.fetchval("SELECT current_setting('app.tenant_id', true)")
    began = time.monotonic()
    # Not now(): a caller's transaction may be old.
    ((started, stored),) = await connection.fetch(
        "SELECT clock_timestamp(), (SELECT origin FROM audit_trail)"
    )
    report = IntegrityReport(
        started_at=started,
        start=start,
        end=end,
        tenant_id=tenant_id,
        origin=stored,
        max_findings=max_findings,
    )
    scope = Scope(report, tuple(keys), origin or stored, progress, sight.one_tenant, overdue)
    scope.tell("anchors", 0, None)
    # Before the snapshot: each checkpoint is stored first and anchored then, so what is read here must be in
    # it. And nothing is held up while places elsewhere answer.
    anchored = await check_anchors(connection, scope, anchors)
    # A savepoint, where the caller's transaction is used. Not `async with`, whose ROLLBACK would wait for a
    # server that is silent when the caller has given up.
    transaction = connection.transaction(**(_OWN if own else {}))
    await transaction.start()
    try:

        async def prepare(reader: Connection) -> None:
            if own:
                # Stretches of segments are found by a small index, which the planner would mistrust without
                # statistics. A statement may take as long as the trail is large, and who is done with a
                # stretch wait for another one's as long.
                await reader.execute(
                    "SET LOCAL enable_seqscan = off; SET LOCAL statement_timeout = 0; "
                    "SET LOCAL idle_in_transaction_session_timeout = 0"
                )
            if sight.one_tenant:
                await name_tenant(reader, tenant_id or "")

        await prepare(connection)
        if own:
            await connection.execute(LOCK)

        async def events() -> None:
            total = await count_events(connection, scope)
            wanted = min(connections, readers_for(total)) if own else 1
            async with readers_of(connection, opening, wanted, prepare) as readers:
                await check_events(readers, scope, total)

        await _verify(connection, scope, anchored, origin, events)
        if sight.one_tenant and not own:
            await name_tenant(connection, before or "")
    except asyncio.CancelledError:
        raise
    except BaseException:
        with suppress(*FAILURES):  # the first error is the one to tell
            await transaction.rollback()
        raise
    await transaction.commit()
    report.seconds = time.monotonic() - began
    return report


def _tenant(sight: Sight, wanted: str | None) -> str | None:
    """The tenant to verify: where the role sees one alone, that is asked for or implied, and no other."""
    if not sight.one_tenant:
        return wanted
    around = current_audit_context().tenant_id
    tenant = wanted if wanted is not None else sight.bound
    if tenant is None and around is not None:
        tenant = str(around)
    if sight.is_blind(tenant or None):
        raise InvalidArgument("tenant_id", wanted, MISSING)
    if not tenant or sight.bound not in (None, tenant):
        right = f"give {sight.bound!r}: row-level security shows this database role no other tenant"
        raise InvalidArgument("tenant_id", wanted, right)
    return tenant


async def _verify(
    connection: Connection,
    scope: Scope,
    anchored: dict[str, list[Any]],
    origin: str | None,
    events: Callable[[], Awaitable[None]],
) -> None:
    report = scope.report
    # Reading the anchors took its time.
    report.started_at = await connection.fetchval("SELECT clock_timestamp()")
    stored = report.origin = await connection.fetchval("SELECT origin FROM audit_trail")
    await find_drops(connection, scope)
    if origin is not None and stored not in (None, origin):
        report.add(
            Finding(
                kind=FindingKind.ORIGIN_CHANGED,
                text=f"the trail calls itself {stored}, not {origin}",
                expected=origin,
                found=stored or "",
            )
        )
    await events()
    check_counts(scope)
    await check_uncovered(connection, scope)
    await check_logs(connection, scope, anchored)
    await check_lateness(connection, scope)
    await check_unsealed(connection, scope)
    await check_chains(connection, scope)
    if scope.tenant is None:
        await check_ends(connection, scope)
    if not scope.keys and report.checkpoints:
        report.add(
            Finding(
                kind=FindingKind.KEYS_NOT_GIVEN,
                text="no trusted key was given: signatures were checked with the keys that the database "
                "names, which whoever changes the database can change, too",
            )
        )
