"""Legal holds: what must not be dropped, whatever its age, until somebody releases it.

A hold covers events by time, tenant, user and resource; all that it names must fit. As long as one covers an
event of a month, the whole month stays in the database.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4, uuid5

from dotmac.platform.audit_trail.maintenance import Maintenance, patiently
from dotmac.platform.errors import HoldNotFound, InvalidArgument

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Holds", "LegalHold", "holds_on"]

_MAX_TEXT = 2_000
_MAX_NAME = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LegalHold:
    """What is held, why, and by whom. `released_at` is None while it holds."""

    id: UUID
    reason: str
    placed_by: str
    placed_at: datetime
    from_time: datetime | None = None
    to_time: datetime | None = None
    tenant_id: str | None = None
    user_id: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    released_at: datetime | None = None
    released_by: str | None = None
    release_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The hold as JSON types."""
        return {
            name: value.isoformat() if isinstance(value, datetime) else str(value) if name == "id" else value
            for name, value in asdict(self).items()
        }


_NAMES = ", ".join(field.name for field in fields(LegalHold))
_PLACE = f"""
    INSERT INTO audit_holds (id, reason, placed_by, from_time, to_time, tenant_id, user_id, resource_type,
        resource_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    ON CONFLICT (id) DO NOTHING RETURNING {_NAMES}
"""  # noqa: S608 (names of our columns)
_RELEASE = f"""
    UPDATE audit_holds SET released_at = now(), released_by = $2, release_reason = $3
    WHERE id = $1 AND released_at IS NULL RETURNING {_NAMES}
"""  # noqa: S608
_ONE = f"SELECT {_NAMES} FROM audit_holds WHERE id = $1"  # noqa: S608
_ALL = f"SELECT {_NAMES} FROM audit_holds WHERE $1 OR released_at IS NULL ORDER BY placed_at, id"  # noqa: S608
_NEAR = f"""
    SELECT {_NAMES} FROM audit_holds WHERE released_at IS NULL
        AND (from_time IS NULL OR from_time < $2) AND (to_time IS NULL OR to_time > $1)
    ORDER BY placed_at, id
"""  # noqa: S608
_EQUAL = ("tenant_id", "resource_type", "resource_id")


class Holds(Maintenance):
    """The part of `AuditAggregator` that holds events back from retention."""

    async def legal_hold(
        self,
        reason: str,
        *,
        placed_by: str,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        tenant_id: str | int | UUID | None = None,
        user_id: str | int | UUID | None = None,
        resource_type: str | None = None,
        resource_id: str | int | UUID | None = None,
        hold_id: UUID | None = None,
    ) -> LegalHold:
        """Keep events from being dropped; they fit where all that is given here fits.

        Args:
            reason: why, such as the case's number.
            placed_by: who asks for it.
            start_time: events from here on; naive means local time.
            end_time: events before this.
            tenant_id: of this tenant.
            user_id: of this user, as the one who acted or the one whom the event is about.
            resource_type: about resources of this type.
            resource_id: about this resource.
            hold_id: an id of your own, with which the call may be repeated.
        Returns: the hold, which is also in the trail as `audit.hold.placed`.
        Raises: InvalidArgument: nothing but a reason is given, or an argument is wrong. AuditUnavailable,
            ServerRefused.
        """
        names = {
            "tenant_id": _name("tenant_id", tenant_id),
            "user_id": _name("user_id", user_id),
            "resource_type": _name("resource_type", resource_type),
            "resource_id": _name("resource_id", resource_id),
        }
        start, end = _moment("start_time", start_time), _moment("end_time", end_time)
        if start is None and end is None and not any(names.values()):
            raise InvalidArgument(
                "start_time", None, "say what is held: start_time, end_time, " + ", ".join(names)
            )
        if start is not None and end is not None and start >= end:
            raise InvalidArgument("end_time", end, f"give a time after start_time ({start})")
        identity = uuid4() if hold_id is None else hold_id
        values = (identity, _text("reason", reason), _text("placed_by", placed_by), start, end)

        async def work(connection: Connection) -> LegalHold:
            # It waits for a partition that is just being dropped; whatever comes later sees the hold.
            made = await patiently(lambda: connection.fetchrow(_PLACE, *values, *names.values()))
            return _hold(made or await connection.fetchrow(_ONE, identity))

        hold = await self._maintain(work)
        await self._tell_of_hold(hold, "placed", hold.placed_by, hold.placed_at)
        return hold

    async def release_hold(self, hold_id: UUID | str, *, released_by: str, reason: str) -> LegalHold:
        """Let retention have the events again; a hold that is released already stays as it is.

        Returns: the hold; its release is in the trail as `audit.hold.released`.
        Raises: HoldNotFound, InvalidArgument, AuditUnavailable, ServerRefused.
        """
        identity = _identity(hold_id)
        who, why = _text("released_by", released_by), _text("reason", reason)

        async def work(connection: Connection) -> LegalHold:
            found = await patiently(lambda: connection.fetchrow(_RELEASE, identity, who, why))
            found = found or await connection.fetchrow(_ONE, identity)
            if found is None:
                raise HoldNotFound(
                    f"there is no legal hold {identity}: list_holds(released=True) has them all"
                )
            return _hold(found)

        hold = await self._maintain(work)
        await self._tell_of_hold(hold, "released", str(hold.released_by), hold.released_at)
        return hold

    async def list_holds(self, *, released: bool = False) -> list[LegalHold]:
        """The holds, oldest first. Args: released: those that were released, too."""

        async def work(connection: Connection) -> list[LegalHold]:
            return [_hold(row) for row in await connection.fetch(_ALL, released)]

        return await self._maintain(work)

    async def _tell_of_hold(self, hold: LegalHold, what: str, who: str, when: datetime | None) -> None:
        """Into the trail, once, however often the call is repeated."""
        await self.log_event(
            "ADMINISTRATION",
            f"audit.hold.{what}",
            "WARNING",
            outcome="success",
            user_id=who,
            tenant_id=hold.tenant_id,
            resource_type="audit_hold",
            resource_id=hold.id,
            metadata={name: value for name, value in hold.to_dict().items() if value is not None},
            occurred_at=when,
            id=uuid5(hold.id, what),
        )


async def holds_on(connection: Connection, partition: str, start: datetime, end: datetime) -> list[UUID]:
    """The holds that cover an event of a partition, which lies between these times."""
    found = []
    for row in await connection.fetch(_NEAR, start, end):
        hold = _hold(row)
        parts: list[str] = []
        values: list[Any] = []

        def add(template: str, value: Any, parts: list[str] = parts, values: list[Any] = values) -> None:
            if value is not None:
                values.append(value)
                parts.append(template.format(f"${len(values)}"))

        add("occurred_at >= {}", hold.from_time)
        add("occurred_at < {}", hold.to_time)
        for column in _EQUAL:
            add(column + " = {}", getattr(hold, column))
        add("({0} IN (user_id, subject_id))", hold.user_id)
        where = " AND ".join(parts) or "true"
        if await connection.fetchval(
            f'SELECT EXISTS (SELECT FROM "{partition}" WHERE {where})',  # noqa: S608 (our names and conditions)
            *values,
        ):
            found.append(hold.id)
    return found


def _hold(row: Any) -> LegalHold:
    return LegalHold(**dict(row))


def _name(field: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        return str(value)
    return _text(field, value, _MAX_NAME)


def _text(field: str, value: object, longest: int = _MAX_TEXT) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > longest or "\x00" in value:
        raise InvalidArgument(field, value, f"give a text of 1 to {longest} characters")
    return value


def _moment(field: str, value: object) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise InvalidArgument(field, value, "give a datetime (a naive one is local time)")
    return value.astimezone(UTC)


def _identity(value: object) -> UUID:
    try:
        return value if isinstance(value, UUID) else UUID(value)  # type: ignore[arg-type]  # told below
    except (ValueError, AttributeError, TypeError):
        raise InvalidArgument("hold_id", value, "give a UUID") from None
