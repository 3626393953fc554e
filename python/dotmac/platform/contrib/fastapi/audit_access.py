"""Who may see which events through the audit router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from starlette.exceptions import HTTPException

from dotmac.platform.errors import ConfigurationError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AuditAccess", "unprotected"]


@dataclass(frozen=True, slots=True)
class AuditAccess:
    """What one caller may see: the answer of the function that guards an `audit_router`.

    Attributes: tenants: whose events; None for all of them, those of no tenant included.
    """

    tenants: frozenset[str] | None

    @classmethod
    def of(cls, *tenants: str) -> Self:
        """The events of these tenants alone. Raises: InvalidArgument: none is named, or not by a string."""
        if not tenants or not all(isinstance(tenant, str) and tenant for tenant in tenants):
            raise InvalidArgument(
                "tenants", tenants, "give ids of tenants; for all: AuditAccess.everything()"
            )
        return cls(frozenset(tenants))

    @classmethod
    def everything(cls) -> Self:
        """The events of all tenants."""
        return cls(None)

    def covers(self, tenant: str | None) -> bool:
        """May events of this tenant be seen? None: of no tenant."""
        return self.tenants is None or tenant in self.tenants

    def narrow(self, asked: Sequence[str] | None) -> list[str] | None:
        """The tenants to filter by where those were asked for; None for no filter.

        Raises: HTTPException: 403, one of them may not be seen.
        """
        if self.tenants is None:
            return list(asked) if asked else None
        hidden = sorted(set(asked or ()) - self.tenants)
        if hidden:
            raise HTTPException(403, f"tenant_id: you may not see events of {', '.join(map(repr, hidden))}")
        return sorted(asked or self.tenants)


def checked(answer: object) -> AuditAccess:
    """The answer of a guard. Raises: ConfigurationError: it is something else, so nothing may be seen."""
    if not isinstance(answer, AuditAccess):
        raise ConfigurationError(
            f"authorize returned {type(answer).__name__}: return AuditAccess.of(tenant, …) or "
            "AuditAccess.everything(), and raise HTTPException for those who may see nothing"
        )
    return answer


def unprotected() -> AuditAccess:
    """A guard that lets everybody see everything: only where something before the application guards it."""
    return AuditAccess.everything()
