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
    │   ├── DeadlockDetected                   waiting would have closed a cycle
    │   ├── LockMismatch                       the name is in use as another kind of lock
    │   ├── LockNotOffered                     nothing was offered under this token, or not any more
    │   ├── LoopStalled                        an event loop stood still for longer than max_loop_stall
    │   └── ReplicasMissing                    too few replicas know of the grant
    ├── RegistryError
    │   ├── InstanceConflict                   the id is registered by another live session
    │   ├── InstanceNotFound (LookupError)     no such instance
    │   └── NoInstanceAvailable (LookupError)  no instance matches
    └── AuditError
        ├── InvalidEvent (ValueError)          an event can't be stored as it is
        ├── SchemaOutdated                     the tables are missing or of an older version
        ├── AuditUnavailable (ConnectionError) the database could not be reached in time; retryable
        ├── SpoolFailed (OSError)              the local spool can't be used
        │   └── SpoolFull                      it is full, or its disk; retryable
        ├── InvalidCursor (ValueError)         a page cursor is not one of ours
        ├── InvalidCheckpoint (ValueError)     a signed note is malformed, or no trusted key signed it
        ├── InvalidProof (ValueError)          a proof is malformed, or does not hold
        ├── NotProvable (LookupError)          an event has no proof yet, or never will; may be retryable
        ├── LogInconsistent                    a log does not go on from its last checkpoint
        ├── AnchorUnavailable (ConnectionError) a place outside the database did not take or give checkpoints
        ├── ArchiveError                       an archive can't be written, is missing or not what was written
        ├── HoldNotFound (LookupError)         no such legal hold
        ├── ExportFailed (OSError)             the place of an export can't be written
        ├── DeliveryFailed (ConnectionError)   a destination did not take the events; retryable
        ├── TransactionsRewound                the database's transactions are behind a follower's place
        ├── PersonalKeyMissing                 no key-encryption key is set for personal data, or not this one
        ├── KeyServiceUnavailable (ConnectionError)  the key service did not wrap or unwrap; retryable
        └── ErasureRefused (PermissionError)   a legal hold forbids to erase the subject

`code` is stable and has a page under docs/errors/, the text is not; `retryable` says whether the same call
can succeed later without a change. This module imports nothing of the platform.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

__all__ = [
    "AnchorUnavailable",
    "ArchiveError",
    "AuditError",
    "AuditUnavailable",
    "AuthenticationFailed",
    "ConfigurationError",
    "DeadlockDetected",
    "DeliveryFailed",
    "DotmacError",
    "EngineClosed",
    "ErasureRefused",
    "ExportFailed",
    "ForkedHandle",
    "HoldNotFound",
    "InstanceConflict",
    "InstanceNotFound",
    "InvalidArgument",
    "InvalidCheckpoint",
    "InvalidCursor",
    "InvalidEvent",
    "InvalidProof",
    "KeyServiceUnavailable",
    "LockError",
    "LockLost",
    "LockMismatch",
    "LockNotOffered",
    "LockNotOwned",
    "LockTimeout",
    "LogInconsistent",
    "LoopStalled",
    "MissingExtra",
    "NoInstanceAvailable",
    "NotProvable",
    "PersonalKeyMissing",
    "RegistryError",
    "ReplicasMissing",
    "RequestTimeout",
    "SchemaOutdated",
    "ServerRefused",
    "ServerUnavailable",
    "SpoolFailed",
    "SpoolFull",
    "TransactionsRewound",
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


class DeadlockEdge(NamedTuple):
    """One step of a cycle: somebody waits for a lock that the next one holds.

    Args:
        lock: what is waited for.
        waiter: owner that waits.
        process: the waiter's process: host, pid, service, start.
        waiting_at: file and line where it was asked for.
        holder: owner that holds it.
        acquired_at: file and line where that one asked for it.
    """

    lock: str
    waiter: str
    process: dict[str, Any]
    waiting_at: str
    holder: str
    acquired_at: str


class DeadlockDetected(LockError):
    """Waiting for the lock closed a cycle of waiters, and this one was chosen to give up.

    Args:
        message: the whole text.
        cycle: names of the locks in the cycle, in the order in which they are waited for.
        edges: the same with owners, processes and call sites.
    """

    code, retryable = "lock.deadlock", True

    def __init__(self, message: str, cycle: Sequence[str] = (), edges: Sequence[DeadlockEdge] = ()) -> None:
        super().__init__(message)
        self.cycle: tuple[str, ...] = tuple(cycle)
        self.edges: tuple[DeadlockEdge, ...] = tuple(edges)


class LockMismatch(LockError):
    """The name is in use as another kind of lock, or as a semaphore of another size."""

    code = "lock.mismatch"


class LockNotOffered(LockError):
    """Nothing was offered under this token, somebody else took it over, or the offer has run out."""

    code = "lock.not_offered"


class LoopStalled(LockError):
    """An event loop of this process stood still for longer than `max_loop_stall`: nothing is granted."""

    code, retryable = "lock.stalled", True


class ReplicasMissing(LockError):
    """Fewer replicas than asked for know of the grant; the lock was given back."""

    code, retryable = "lock.replicas", True


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


class SpoolFailed(AuditError, OSError):
    """The local spool of `log_event(wait=False)` can't be used; the event was not kept."""

    code = "audit.spool"


class SpoolFull(SpoolFailed):
    """The local spool, or its disk, is full; the event was not kept."""

    code, retryable = "audit.spool_full", True


class InvalidCursor(AuditError, ValueError):
    """The cursor does not come from this query."""

    code = "audit.cursor"


class InvalidCheckpoint(AuditError, ValueError):
    """A signed note is malformed, or no trusted key signed it.

    Args:
        message: the whole text.
        reason: "malformed", "unknown_key" (none of its signatures is by a key that is trusted) or
            "signature" (one is said to be, and does not hold).
    """

    code = "audit.checkpoint"

    def __init__(self, message: str, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.reason)


class InvalidProof(AuditError, ValueError):
    """A proof is malformed, or does not hold."""

    code = "audit.proof"


class NotProvable(AuditError, LookupError):
    """An event has no proof: it is unknown, not covered, or no checkpoint covers it yet.

    Args:
        message: the whole text.
        later: will there be a proof soon?
    """

    code = "audit.not_provable"

    def __init__(self, message: str, later: bool = False) -> None:
        super().__init__(message)
        self.later = later

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.later)


class LogInconsistent(AuditError):
    """A log does not go on from its last checkpoint; nothing was signed."""

    code = "audit.log_inconsistent"


class AnchorUnavailable(AuditError, ConnectionError):
    """A place outside the database did not take a checkpoint, or did not give its checkpoints back."""

    code, retryable = "audit.anchor", True


class ArchiveError(AuditError):
    """An archive of old events can't be written, is missing, or is not what was written."""

    code = "audit.archive"


class HoldNotFound(AuditError, LookupError):
    """There is no legal hold with this id."""

    code = "audit.hold_not_found"


class ExportFailed(AuditError, OSError):
    """The place of an export could not be written."""

    code = "audit.export_failed"


class DeliveryFailed(AuditError, ConnectionError):
    """A destination did not take the events that were forwarded to it.

    Args:
        message: the whole text.
        retry_after: seconds after which the destination asked to be tried again; None where it did not.
    """

    code, retryable = "audit.delivery_failed", True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TransactionsRewound(AuditError):
    """The database's transactions are behind a follower's place: what is stored now would be taken for what
    was seen.

    It was restored from a dump into another cluster, or a standby answers that has not got everything.

    Args: message: the whole text. stood, horizon: the follower's transaction, and the database's.
    """

    code = "audit.rewound"

    def __init__(self, message: str, stood: int = 0, horizon: int = 0) -> None:
        super().__init__(message)
        self.stood = stood
        self.horizon = horizon


class PersonalKeyMissing(AuditError):
    """The key-encryption key of personal data is not set, or another one than was used."""

    code = "audit.personal_key"


class KeyServiceUnavailable(AuditError, ConnectionError):
    """The service that wraps the keys of subjects failed; nothing was stored."""

    code, retryable = "audit.key_service", True


class ErasureRefused(AuditError, PermissionError):
    """The subject can't be erased: a legal hold covers its events."""

    code = "audit.erasure_refused"
