"""Where events go: the table that takes them, and what has to go one month or one tenant at a time.

Without row-level security all goes through the parent table. With it, PostgreSQL refuses COPY there: a writer
stores into the month's partition, on which nobody else has a grant; a role without a grant on partitions
inserts through the parent, whose policies see to it that it writes for no other tenant than the one that is
named, so its events go tenant by tenant.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from dotmac.platform.audit_trail.database import told
from dotmac.platform.audit_trail.ids import from_micros

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dotmac.platform.audit_trail.batch import Item

__all__ = ["PARENT", "STALE", "Target", "Targets", "name_tenant", "refusal"]

# What says that a target is not right any more: its partition was dropped, or tenants were kept apart, or
# not any more. Looked up anew, the same events find their place.
STALE = (
    asyncpg.CheckViolationError,
    asyncpg.UndefinedTableError,
    asyncpg.FeatureNotSupportedError,
    asyncpg.InsufficientPrivilegeError,
)

_MONTH = timedelta(days=31)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY = 86_400_000_000  # microseconds
_IS_ISOLATED = "SELECT row_security_active('audit_events'::regclass)"
_ENSURE = "SELECT audit_ensure_partition(moment) FROM unnest($1::timestamptz[]) AS moment"
_LOOK_UP = "SELECT relation, copy FROM audit_target($1)"


class Target(NamedTuple):
    """Where events go.

    Args:
        relation: the table.
        copy: by COPY, or else by INSERT.
        tenant: to be named for the transaction; None where it needs no naming.
    """

    relation: str
    copy: bool
    tenant: str | None = None


PARENT = Target("audit_events", copy=True)


class Targets:
    """What one writer knows of the months it has met, and of row-level security.

    Attributes: isolated: does row-level security apply to our role? None while that is not known.
    """

    def __init__(self) -> None:
        self.isolated: bool | None = None
        self._made: set[tuple[int, int]] = set()
        self._months: dict[tuple[int, int], Target] = {}

    async def learn(self, fetch: Any) -> None:
        """Find out whether row-level security applies. Args: fetch: runs a query with its parameters."""
        ((self.isolated,),) = await fetch(_IS_ISOLATED)

    async def ensure(self, fetch: Any, days: Iterable[int]) -> None:
        """Make the partitions of these days, counted from 1970, where they are missing."""
        moments = []
        for day in days:
            moment = _EPOCH + timedelta(days=day)
            if (moment.year, moment.month) not in self._made:
                moments.append(moment)
                if moment > datetime.now(UTC) - _MONTH:
                    moments.append(moment + _MONTH)  # next month's too, so that nobody waits at midnight
        if moments:
            await fetch(_ENSURE, moments)
            self._made.update((moment.year, moment.month) for moment in moments)

    async def apart(self, fetch: Any, items: Sequence[Item]) -> dict[Target, list[Item]]:
        """Under row-level security: the events by where they go, in the order in which they came."""
        await self.ensure(fetch, {item.entry.occurred_at // _DAY for item in items})
        found: dict[Target, list[Item]] = {}
        for item in items:
            moment = from_micros(item.entry.occurred_at)
            target = self._months.get((moment.year, moment.month))
            if target is None:
                target = Target(*(await fetch(_LOOK_UP, moment))[0])
                self._months[moment.year, moment.month] = target
            if not target.copy:
                target = target._replace(tenant=item.entry.fields().get("tenant_id") or "")
            found.setdefault(target, []).append(item)
        return found

    def forget(self) -> None:
        """Look everything up again."""
        self.isolated = None
        self._made.clear()
        self._months.clear()


async def name_tenant(connection: Any, tenant: str) -> None:
    """Name the tenant for the rest of the transaction."""
    await connection.execute("SELECT set_config('app.tenant_id', $1, true)", tenant)


def refusal(error: Exception, target: Target | None) -> str | None:
    """What row-level security has refused, in words; None where it has not."""
    if "row-level security" not in str(error):
        return None
    tenant = target.tenant if target is not None else None
    return (
        f"this database role may not log an event of tenant_id {tenant or None!r}: row-level security lets "
        f"it write for its own tenant alone ({told(error)})"
    )
