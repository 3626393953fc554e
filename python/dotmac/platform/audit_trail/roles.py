"""Who may do what with the trail: database roles, and tenants kept apart by row-level security.

The rules themselves are functions in the database (revision 0004), so that a DBA can call them from psql.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dotmac.platform.audit_trail.maintenance import Maintenance, patiently
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from datetime import datetime

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["KINDS", "RoleGrant", "Roles"]

# kind → what it may do
KINDS = {
    "writer": "log events of every tenant; reads none of them",
    "reader": "read the events of the tenant that a query names, or of the one it is bound to",
    "member": "both, for that one tenant alone",
    "auditor": "read the events of every tenant",
}
_LIST = """
    SELECT known.rolname AS name, kind, tenant_id, granted_at FROM audit_roles
    JOIN pg_catalog.pg_roles AS known ON known.oid = role ORDER BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class RoleGrant:
    """What a database role may do with the trail. `tenant_id`: the tenant that it is bound to, if any."""

    role: str
    kind: str
    tenant_id: str | None
    granted_at: datetime


class Roles(Maintenance):
    """The part of `AuditAggregator` that grants rights; it needs the tables' owner."""

    async def enable_tenants(self) -> None:
        """Keep tenants apart by row-level security: a role sees the events of the tenant that is named for
        the transaction (`app.tenant_id`), and nothing where none is. Roles that log events have to be
        granted `writer` or `member`, for PostgreSQL refuses COPY through a table with row-level security.

        Raises: ServerRefused: not the owner, or a granted reader is a superuser or has BYPASSRLS.
        """
        await self._as_owner("SELECT audit_enable_tenants()")

    async def disable_tenants(self) -> None:
        """Lift row-level security; grants stay."""
        await self._as_owner("SELECT audit_disable_tenants()")

    async def tenants_are_kept_apart(self) -> bool:
        """Is row-level security on?"""
        return bool(await self._as_owner("SELECT audit_isolated()"))

    async def grant_role(self, kind: str, role: str, *, tenant_id: str | None = None) -> None:
        """Give a database role its rights on the trail; repeating it changes nothing.

        Args:
            kind: `writer`, `reader`, `member` or `auditor`; see `KINDS`.
            role: name of the database role, which exists.
            tenant_id: for `reader` and `member`: the only tenant that it can ever name.
        Raises: InvalidArgument. ServerRefused: no such role, or one that goes not with what it has.
        """
        if tenant_id is not None and kind not in {"reader", "member"}:
            raise InvalidArgument("tenant_id", tenant_id, "only a reader or a member is bound to a tenant")
        if tenant_id == "":
            raise InvalidArgument("tenant_id", tenant_id, "give a name of at least one character, or None")
        await self._as_owner(
            "SELECT audit_grant($1, quote_ident($2)::regrole, $3)", _kind(kind), role, tenant_id
        )

    async def revoke_role(self, kind: str, role: str) -> bool:
        """Take the rights of that kind away again. Returns: False where it had none."""
        return bool(
            await self._as_owner("SELECT audit_revoke($1, quote_ident($2)::regrole)", _kind(kind), role)
        )

    async def apply_roles(self) -> None:
        """Give the roles what they are to have on tables that came later; `migrate()` does it."""
        await self._as_owner("SELECT audit_apply_roles()")

    async def list_roles(self) -> list[RoleGrant]:
        """All roles with rights on the trail."""

        async def work(connection: Connection) -> list[RoleGrant]:
            return [RoleGrant(*row) for row in await connection.fetch(_LIST)]

        return await self._maintain(work)

    async def _as_owner(self, sql: str, *values: object) -> object:
        async def work(connection: Connection) -> object:
            return await patiently(lambda: connection.fetchval(sql, *values))

        return await self._maintain(work)


def _kind(kind: str) -> str:
    if kind not in KINDS:
        raise InvalidArgument("kind", kind, f"give one of {', '.join(KINDS)}")
    return kind
