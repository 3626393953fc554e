"""Every error that the platform raises on purpose.

    DotmacError
    ├── ConfigurationError (ValueError)        a setting is wrong; lists every one of them
    ├── InvalidArgument (ValueError)           an argument is wrong; names field, value, what is right
    ├── ServerUnavailable (ConnectionError)    the server could not be reached in time; retryable
    │   └── RequestTimeout (TimeoutError)      the server did not answer within the request's timeout
    ├── ServerRefused                          the server answered with an error (password, ACL, memory …)
    │   └── AuthenticationFailed (PermissionError)  the server refused the user or the password
    ├── UnreadableClient (TypeError)           a client was passed whose connection can't be read
    ├── ForkedHandle (RuntimeError)            an object of the parent process was used in a forked child
    ├── EngineClosed (RuntimeError)            the service was closed
    ├── MissingExtra (ImportError)             an optional dependency is not installed
    ├── LockError
    │   ├── LockTimeout (TimeoutError)         not granted within blocking_timeout
    │   ├── LockLost                           the lease ended before the body did
    │   ├── LockNotOwned                       release or extend of a lock that is not held
    │   └── DeadlockDetected                   waiting would have closed a cycle
    ├── RegistryError
    │   ├── InstanceConflict                   the id is registered by another live session
    │   ├── InstanceNotFound (LookupError)     no such instance
    │   └── NoInstanceAvailable (LookupError)  no instance matches
    └── AuditError
        ├── InvalidEvent (ValueError)          an event can't be stored as it is
        ├── SchemaOutdated                     the tables are missing or of an older version
        ├── AuditUnavailable (ConnectionError) the database could not be reached in time; retryable
        └── InvalidCursor (ValueError)         a page cursor is not one of ours

`code` is stable and has a page under docs/errors/, the text is not; `retryable` says whether the same call
can succeed later without a change. This module imports nothing of the platform.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

__all__ = [
    "AuditError",
    "AuditUnavailable",
    "AuthenticationFailed",
    "ConfigurationError",
    "DeadlockDetected",
    "DotmacError",
    "EngineClosed",
    "ForkedHandle",
    "InstanceConflict",
    "InstanceNotFound",
    "InvalidArgument",
    "InvalidCursor",
    "InvalidEvent",
    "LockError",
    "LockLost",
    "LockNotOwned",
    "LockTimeout",
    "MissingExtra",
    "NoInstanceAvailable",
    "RegistryError",
    "RequestTimeout",
    "SchemaOutdated",
    "ServerRefused",
    "ServerUnavailable",
    "UnreadableClient",
]

_SHOWN = 120


class DotmacError(Exception):
    """Base of every error raised on purpose; `code` is stable, the text is not."""

    code: ClassVar[str] = "dotmac"
    retryable: ClassVar[bool] = False


class ConfigurationError(DotmacError, ValueError):
    """One or more settings are wrong.

    Args:
        message: the whole text.
        problems: one `(variable, shown value, what is allowed)` per bad setting, secrets masked.
    """

    code = "configuration"

    def __init__(self, message: str, problems: Sequence[tuple[str, str, str]] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[tuple[str, str, str], ...] = tuple(problems)


class InvalidArgument(DotmacError, ValueError):
    """An argument is wrong.

    Args:
        field: name of the argument.
        value: what was given; shortened in the text.
        allowed: what would be right.
    """

    code = "argument.invalid"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        try:
            shown = repr(value[:_SHOWN]) if isinstance(value, str | bytes) else repr(value)
        except ValueError:  # an integer of more digits than Python writes out
            shown = f"a {type(value).__name__} too long to show"
        if len(shown) > _SHOWN:
            shown = shown[:_SHOWN] + "…"
        super().__init__(f"{field}: {shown} is not allowed; {allowed}")
        self.field, self.value, self.allowed = field, value, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed)


class ServerUnavailable(DotmacError, ConnectionError):
    """The server could not be reached within the time allowed."""

    code, retryable = "server.unavailable", True


class RequestTimeout(ServerUnavailable, TimeoutError):
    """The server did not answer within the request's timeout."""

    code, retryable = "server.timeout", True


class ServerRefused(DotmacError):
    """The server answered with an error."""

    code = "server.refused"


class AuthenticationFailed(ServerRefused, PermissionError):
    """The server refused the user name or the password."""

    code = "server.authentication"


class UnreadableClient(DotmacError, TypeError):
    """A client was passed whose connection parameters can't be read."""

    code = "client.unreadable"


class ForkedHandle(DotmacError, RuntimeError):
    """An object that belongs to the parent process was used in a forked child."""

    code = "fork.handle"


class EngineClosed(DotmacError, RuntimeError):
    """The service, or the engine under it, was closed."""

    code = "engine.closed"


class MissingExtra(DotmacError, ImportError):
    """An optional dependency is not installed."""

    code = "extra.missing"


class LockError(DotmacError):
    """Base of the lock manager's errors."""

    code = "lock"


class LockTimeout(LockError, TimeoutError):
    """The lock was not granted within the blocking timeout."""

    code, retryable = "lock.timeout", True


class LockLost(LockError):
    """The lease ended before its holder gave it back."""

    code = "lock.lost"


class LockNotOwned(LockError):
    """The lock is not held by this object."""

    code = "lock.not_owned"


class DeadlockDetected(LockError):
    """Waiting for the lock would have closed a cycle of waiters.

    Args:
        message: the whole text.
        cycle: names of the locks in the cycle, beginning with the one asked for.
    """

    code, retryable = "lock.deadlock", True

    def __init__(self, message: str, cycle: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.cycle: tuple[str, ...] = tuple(cycle)


class RegistryError(DotmacError):
    """Base of the service registry's errors."""

    code = "registry"


class InstanceConflict(RegistryError):
    """The instance id is registered by another live session."""

    code = "registry.conflict"


class InstanceNotFound(RegistryError, LookupError):
    """No such instance is registered."""

    code = "registry.not_found"


class NoInstanceAvailable(RegistryError, LookupError):
    """No registered instance matches."""

    code, retryable = "registry.none_available", True


class AuditError(DotmacError):
    """Base of the audit trail's errors."""

    code = "audit"


class InvalidEvent(AuditError, ValueError):
    """The event can't be stored as it is."""

    code = "audit.invalid_event"


class SchemaOutdated(AuditError):
    """The audit tables are missing or of another version."""

    code = "audit.schema"


class AuditUnavailable(AuditError, ConnectionError):
    """The audit database could not be reached within the time allowed.

    Args:
        message: the whole text.
        event_id: id of the event that was to be stored; logging it again with this id (and the same
            `occurred_at`, if one was given) can't store it twice. None where it was no event.
    """

    code, retryable = "audit.unavailable", True

    def __init__(self, message: str, event_id: UUID | None = None) -> None:
        super().__init__(message)
        self.event_id = event_id


class InvalidCursor(AuditError, ValueError):
    """The cursor does not come from this query."""

    code = "audit.cursor"
