"""Forwarding of events to other systems."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail import query
from dotmac.platform.audit_trail.arguments import check_count, check_seconds, filters_of
from dotmac.platform.audit_trail.forward.destination import Refused
from dotmac.platform.audit_trail.service import Service
from dotmac.platform.audit_trail.tenancy import check_named, tenant_of
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import asyncpg

    from dotmac.platform.audit_trail.forward.destination import Destination
    from dotmac.platform.audit_trail.forward.run import ForwardSummary
    from dotmac.platform.audit_trail.models import AuditEvent

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Forwarding"]

_MAX_BATCH = 10_000
_MAX_NAME = 200
_STARTS = ("now", "beginning")


class Forwarding(Service):
    """The part of `AuditAggregator` that forwards events."""

    async def forward_events(
        self,
        destination: Destination,
        *,
        name: str | None = None,
        start: str = "now",
        once: bool = False,
        batch_size: int | None = None,
        poll: float | None = None,
        max_attempts: int | None = None,
        progress: Callable[[ForwardSummary], None] | None = None,
        **filters: Any,
    ) -> ForwardSummary:
        """Deliver every stored event to a destination, in the order of storing, each at least once.

        How far it is, is kept in the database under the destination's name, so it goes on there after any
        stop. Of several processes that forward to the same name one delivers, the others stand by. A
        destination that fails is tried again with growing pauses; what it refuses, or what failed
        `max_attempts` times, is put aside as dead letters, which an event `audit.forward.dead_letters` tells.

        Args:
            destination: a `SyslogDestination`, a `WebhookDestination`, or a class of your own; not closed.
            name: of the position; default: the destination's label (its URL without secrets).
            start: where a name that is new begins: `"now"` or `"beginning"`.
            once: return when all that is stored now is delivered; else it goes on until it is cancelled.
            batch_size: events per batch, 1 to 10,000; this and the next two by default as configured.
            poll: seconds between looks for new events.
            max_attempts: tries of a batch; 0: never put one aside because of failures.
            progress: called with the summary after every change.
            **filters: as for `query_events`.

        Returns: what was delivered and put aside.
        Raises:
            InvalidArgument: also where row-level security shows one tenant at a time and none is named.
            DeliveryFailed: `once`, and the destination failed five times in a row.
            TransactionsRewound: the database was restored from a dump into a cluster whose count of
                transactions is behind the position; says what to do.
            AuditUnavailable: `once`, and the database does not answer. SchemaOutdated, ServerRefused.
        """
        from dotmac.platform.audit_trail.forward.run import Forwarder, Pace

        if start not in _STARTS:
            raise InvalidArgument("start", start, f"give one of {', '.join(_STARTS)}")
        check_count("batch_size", batch_size, 1)
        check_count("max_attempts", max_attempts, 0)
        check_seconds("poll", poll)
        if batch_size is not None and batch_size > _MAX_BATCH:
            raise InvalidArgument("batch_size", batch_size, f"give a number from 1 to {_MAX_BATCH}")
        section = self._section()
        pace = Pace(
            batch_size=batch_size or section.forward_batch_size,
            poll=poll or section.forward_poll,
            max_attempts=section.forward_max_attempts if max_attempts is None else max_attempts,
        )
        named, checked = _name(name, destination), filters_of(None, None, filters)
        tenant = tenant_of(checked)
        check_named(await self._sight(), tenant)
        state = await self._state()
        return await Forwarder(
            state.database,
            destination,
            named,
            checked,
            pace,
            self._report_dead_letters,
            start=None if start == "now" else 0,
            tenant=tenant,
            told=progress,
        ).run(once=once)

    async def dead_letters(self, name: str, *, limit: int = 1_000) -> list[tuple[AuditEvent, str]]:
        """Events that a destination did not take, the oldest first, each with the reason.

        Args: name: of the destination's position. limit: at most so many.
        """
        check_count("limit", limit, 1)

        async def work(connection: Connection) -> list[tuple[AuditEvent, str]]:
            rows = await connection.fetch(
                f"{query.SELECT}, letters.reason FROM audit_events JOIN ("  # noqa: S608 (constants of ours)
                "SELECT occurred_at AS letter_at, id AS letter_id, reason FROM audit_forward_dead_letters "
                "WHERE destination = $1 ORDER BY occurred_at, id LIMIT $2) AS letters "
                "ON occurred_at = letter_at AND id = letter_id ORDER BY occurred_at, id",
                name,
                limit,
            )
            return [(query.event_of(row), row["reason"]) for row in rows]

        return await self._read(work)

    async def retry_dead_letters(self, destination: Destination, *, name: str | None = None) -> int:
        """Deliver what was put aside, one event at a time; each that is confirmed is a dead letter no more.

        Over syslog that is once the connection stayed whole for a while after up to 200 of them; where it
        breaks before, they stay, and may arrive again.

        Returns: how many were taken. Raises: DeliveryFailed: one was not; those behind it were not tried.
        """
        known = _name(name, destination)
        taken = 0
        while letters := await self.dead_letters(known, limit=200):
            sent: list[AuditEvent] = []
            refusal: Refused | None = None
            for event, _ in letters:
                try:
                    await destination.send([event], f"msg_{event.id.hex}")
                except Refused as error:
                    refusal = error
                    break
                sent.append(event)
                if not destination.settle:
                    await self._forget_dead_letters(known, [event])
            if destination.settle and sent:
                await _settled(destination)
                await self._forget_dead_letters(known, sent)
            if refusal is not None:
                raise refusal
            taken += len(sent)
        return taken

    async def _forget_dead_letters(self, name: str, events: Sequence[AuditEvent]) -> None:
        async def work(connection: Connection) -> None:
            await connection.execute(
                "DELETE FROM audit_forward_dead_letters "
                "WHERE destination = $1 AND (occurred_at, id) IN "
                "(SELECT * FROM unnest($2::timestamptz[], $3::uuid[]))",
                name,
                [event.occurred_at for event in events],
                [event.id for event in events],
            )

        await self._read(work)

    async def _report_dead_letters(self, said: dict[str, Any]) -> None:
        from dotmac.platform.audit_trail.forward.run import DEAD_LETTERS

        await self.log_event(
            "SYSTEM",
            DEAD_LETTERS,
            "ERROR",
            outcome="failure",
            resource_type="audit_destination",
            resource_id=str(said["destination"])[:512],
            metadata=said,
        )

    if TYPE_CHECKING:

        async def log_event(self, *args: Any, **kwargs: Any) -> Any:
            """See `AuditAggregator`."""


async def _settled(destination: Destination) -> None:
    """Wait until what was sent counts as delivered. Raises: DeliveryFailed: the connection broke."""
    due = asyncio.get_running_loop().time() + destination.settle
    while not destination.settled() or asyncio.get_running_loop().time() < due:  # noqa: ASYNC110 (only asking tells)
        await asyncio.sleep(min(0.05, destination.settle))


def _name(name: str | None, destination: Destination) -> str:
    found = destination.label if name is None else name
    if not isinstance(found, str) or not 1 <= len(found) <= _MAX_NAME or not found.isprintable():
        raise InvalidArgument("name", found, f"give 1 to {_MAX_NAME} printable characters")
    return found
