"""What an audit event is: categories, levels, outcomes and the stored event itself."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from dotmac.platform.errors import InvalidEvent

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

__all__ = [
    "AuditCategory",
    "AuditEvent",
    "AuditLevel",
    "AuditOutcome",
    "PersonalState",
    "parse_choice",
    "stored_choice",
    "stored_event",
]


class AuditCategory(enum.StrEnum):
    """What kind of thing happened; the value is what is stored."""

    AUTHENTICATION = "authentication"
    AUTHORIZATION = "authorization"
    DATA_ACCESS = "data_access"
    DATA_CHANGE = "data_change"
    DATA_EXPORT = "data_export"
    CONFIGURATION = "configuration"
    ADMINISTRATION = "administration"
    SECURITY = "security"
    PRIVACY = "privacy"
    SYSTEM = "system"
    SYSTEM_TASK = "system_task"
    BUSINESS = "business"


class AuditLevel(enum.StrEnum):
    """How grave it is."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class AuditOutcome(enum.StrEnum):
    """How it ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    DENIED = "denied"
    UNKNOWN = "unknown"


class PersonalState(enum.StrEnum):
    """Why a reader does not see an event's personal data."""

    SEALED = "sealed"
    ERASED = "erased"
    UNREADABLE = "unreadable"


Choice = TypeVar("Choice", AuditCategory, AuditLevel, AuditOutcome)


def parse_choice(kind: type[Choice], field: str, value: object) -> Choice:
    """The member of `kind` that `value` means.

    Args:
        kind: the enumeration.
        field: name of the argument, for the error.
        value: a member, or its name or value in any case.
    Returns: the member.
    Raises: InvalidEvent: no such member; the text lists all of them and the nearest.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        try:
            return kind(value.lower())  # every value is its member's name in lower case
        except ValueError:
            pass
    names = [member.name for member in kind]
    shown = repr(value)[:80] if isinstance(value, str | int) else f"a value of type {type(value).__name__}"
    near = difflib.get_close_matches(value.upper(), names, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidEvent(f"{field}: {shown} is not known{hint} Allowed: {', '.join(names)}")


@lru_cache(maxsize=256)  # asking an enumeration takes five times as long, and every row asks for three
def stored_choice(kind: type[Choice], value: str) -> Choice:
    """The member that a stored value means; for one that this version does not know, a member made for it.

    A later version may have stored it: that must not hide the event, nor the others of its page.
    """
    try:
        return kind(value)
    except ValueError:
        made = str.__new__(kind, value)
        made._name_, made._value_ = value.upper(), value
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One stored event.

    `occurred_at` is when it happened by the clock of the process that logged it, `recorded_at` when the
    database took it. `personal` holds the personal data where they were asked for and can be read, else why
    not; `sealed` is what is stored of them. `anomaly_score` is None where no detector looked at the event. A
    category, level or outcome of a later version is a member of its enumeration that the enumeration does
    not list.
    """

    id: UUID
    occurred_at: datetime
    recorded_at: datetime
    category: AuditCategory
    action: str
    level: AuditLevel
    outcome: AuditOutcome
    user_id: str | None = None
    tenant_id: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    ip_address: str | None = None
    correlation_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    metadata: Mapping[str, Any]
    anomaly_score: float | None = None
    anomaly_reasons: tuple[str, ...] = ()
    subject_id: str | None = None
    personal: Mapping[str, Any] | PersonalState | None = None
    sealed: Mapping[str, Any] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON types; times are ISO 8601 in UTC with microseconds."""
        return {
            "id": str(self.id),
            "occurred_at": self.occurred_at.isoformat(timespec="microseconds"),
            "recorded_at": self.recorded_at.isoformat(timespec="microseconds"),
            "category": self.category.value,
            "action": self.action,
            "level": self.level.value,
            "outcome": self.outcome.value,
            "user_id": self.user_id,
            "tenant_id": self.tenant_id,
            "resource_type": self.resource_type,
            "resource_id": self.resource_id,
            "ip_address": self.ip_address,
            "correlation_id": self.correlation_id,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "metadata": dict(self.metadata),
            "anomaly_score": self.anomaly_score,
            "anomaly_reasons": list(self.anomaly_reasons),
            "subject_id": self.subject_id,
            "personal": dict(self.personal) if isinstance(self.personal, Mapping) else self.personal,
        }


_Open = make_dataclass("_Open", [one.name for one in fields(AuditEvent)], slots=True)


def stored_event(*values: Any) -> AuditEvent:
    """The event of these values, which come in the order of its fields.

    A frozen dataclass sets each field by a call, and for 21 of them that takes longer than all else that a
    row needs. So an open twin, which has the same slots, takes the values and then becomes the event.
    """
    event: Any = _Open(*values)
    event.__class__ = AuditEvent
    return event  # type: ignore[no-any-return]  # since the line before
