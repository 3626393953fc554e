"""Whose events a reader sees where row-level security keeps tenants apart.

The database decides, by its policies on the setting `app.tenant_id`. This side names the tenant for one
transaction at a time (`set_config(…, true)`), so that neither a pool nor a transaction pooler hands one
caller's tenant on to the next.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dotmac.platform.audit_trail.context import current_audit_context
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = [
    "MISSING",
    "Sight",
    "TenantMissing",
    "check_named",
    "in_transaction",
    "name_tenant",
    "sight_of",
    "tenant_of",
    "warn_of_missing",
]

Answer = TypeVar("Answer")

MISSING = (
    "row-level security shows this database role the events of one tenant at a time, and none was named, so "
    "there is nothing to see: give tenant_id, or read inside audit_context(tenant_id=…)"
)
_NAME_TENANT = "SELECT set_config('app.tenant_id', $1, true)"


class TenantMissing(UserWarning):
    """A query gave nothing because row-level security applies and no tenant was named."""


class Sight(NamedTuple):
    """What the database shows to our role.

    Args: one_tenant: only the events of the tenant that a transaction names. bound: the tenant to which the
        role is bound, which then need not be named.
    """

    one_tenant: bool
    bound: str | None

    def is_blind(self, tenant: str | None) -> bool:
        """Does a query that names this tenant see nothing, whatever there is?"""
        return self.one_tenant and not (tenant or self.bound)

    def setting(self, tenant: str | None) -> str | None:
        """What `app.tenant_id` has to be for that tenant; None where nothing depends on it.

        An empty name is one, too: a session behind a pooler may have kept somebody's.
        """
        return (tenant or self.bound or "") if self.one_tenant else None


def warn_of_missing() -> None:
    """Say why a query gives nothing."""
    warnings.warn(TenantMissing(MISSING), stacklevel=2)


def check_named(sight: Sight, tenant: str | None) -> None:
    """For what must not come out empty and look complete.

    Raises: InvalidArgument: the role sees one tenant at a time, and none is named.
    """
    if sight.is_blind(tenant):
        raise InvalidArgument("tenant_id", tenant, MISSING)


async def name_tenant(connection: Any, setting: str | None) -> None:
    """Name the tenant for the transaction under way; None leaves the setting as it is."""
    if setting is not None:
        await connection.execute(_NAME_TENANT, setting)


async def sight_of(connection: Any) -> Sight:
    """What the database shows to the connection's role."""
    (found,) = await connection.fetch("SELECT one_tenant, tenant_id FROM audit_sight()")
    return Sight(found["one_tenant"], found["tenant_id"])


def tenant_of(filters: Any) -> str | None:
    """The one tenant that a query's filters ask for; where they ask for none, `audit_context`'s, if any."""
    wanted = getattr(filters, "tenant_id", None)
    if isinstance(wanted, tuple):
        return wanted[0] if len(wanted) == 1 else None
    if wanted is None:
        around = current_audit_context().tenant_id
        return None if around is None else str(around)
    return str(wanted)


async def in_transaction(
    connection: Any,
    work: Callable[[Any], Awaitable[Answer]],
    tenant: str | None,
    *,
    partitions: bool,
) -> Answer:
    """Run `work` in one transaction whose statements all see the same, for that tenant.

    Whatever is raised, the caller drops the connection: a rollback would wait for a server that is silent.

    Args: tenant: None leaves the setting as it is. partitions: all statements see the same partitions, too.
    """
    transaction = connection.transaction(isolation="repeatable_read")
    await transaction.start()
    if partitions:
        # Before the snapshot is taken: DETACH … CONCURRENTLY waits for whoever holds the table, not for
        # whoever took a snapshot and has not come to the table yet.
        await connection.execute("LOCK TABLE audit_events IN ACCESS SHARE MODE")
    await name_tenant(connection, tenant)
    answer = await work(connection)
    await transaction.commit()
    return answer
