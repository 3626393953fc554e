"""Which events a query is about: filters, checked, and as conditions in SQL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform.audit_trail.entry import parse_address
from dotmac.platform.audit_trail.metadata_filters import Condition, conditions_of, like_pattern
from dotmac.platform.audit_trail.models import (
    AuditCategory,
    AuditLevel,
    AuditOutcome,
    Choice,
    parse_choice,
)
from dotmac.platform.errors import InvalidArgument, InvalidEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FILTERS", "Filters", "Parameters"]

_IDENTIFIERS = (
    "user_id", "tenant_id", "resource_type", "resource_id", "correlation_id", "trace_id",
    "subject_id",
)  # fmt: skip
_OPTIONAL = (*_IDENTIFIERS, "ip_address", "anomaly_score")
_CHOICES = (("category", "categories"), ("level", "levels"), ("outcome", "outcomes"))
# What is searched for text; jsonb is written with a blank after each colon and comma.
_TEXT = ("action", "(metadata::text)")


class Parameters(list[Any]):
    """The parameters of a statement."""

    def add(self, value: Any) -> str:
        """Take one more and return its name."""
        self.append(value)
        return f"${len(self)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Checked filters; all of them must hold. Make one with `Filters.of`."""

    start_time: datetime | None = None
    end_time: datetime | None = None
    categories: tuple[AuditCategory, ...] | None = None
    levels: tuple[AuditLevel, ...] | None = None
    outcomes: tuple[AuditOutcome, ...] | None = None
    actions: tuple[str, ...] | None = None
    user_id: tuple[str, ...] | None = None
    tenant_id: tuple[str, ...] | None = None
    resource_type: tuple[str, ...] | None = None
    resource_id: tuple[str, ...] | None = None
    correlation_id: tuple[str, ...] | None = None
    trace_id: tuple[str, ...] | None = None
    subject_id: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    text: tuple[str, ...] | None = None
    metadata: tuple[Condition, ...] | None = None
    min_anomaly_score: float | None = None
    missing: tuple[str, ...] | None = None
    exclude: Filters | None = None

    @classmethod
    def of(
        cls,
        *,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        categories: Iterable[AuditCategory | str] | AuditCategory | str | None = None,
        levels: Iterable[AuditLevel | str] | AuditLevel | str | None = None,
        outcome: Iterable[AuditOutcome | str] | AuditOutcome | str | None = None,
        actions: Iterable[str] | str | None = None,
        user_id: object = None,
        tenant_id: object = None,
        resource_type: object = None,
        resource_id: object = None,
        correlation_id: object = None,
        trace_id: object = None,
        subject_id: object = None,
        ip_address: object = None,
        text: Iterable[str] | str | None = None,
        metadata: Mapping[Any, Any] | None = None,
        min_anomaly_score: float | None = None,
        missing: Iterable[str] | str | None = None,
        exclude: Mapping[str, Any] | None = None,
    ) -> Filters:
        """Check what a caller gave; the meaning of each is told at `AuditAggregator.query_events`."""
        if min_anomaly_score is not None and not _is_score(min_anomaly_score):
            raise InvalidArgument("min_anomaly_score", min_anomaly_score, "give a number from 0 to 1")
        return cls(
            start_time=_moment("start_time", start_time),
            end_time=_moment("end_time", end_time),
            categories=_choices(AuditCategory, "categories", categories),
            levels=_choices(AuditLevel, "levels", levels),
            outcomes=_choices(AuditOutcome, "outcome", outcome),
            actions=_several("actions", actions, _text),
            user_id=_several("user_id", user_id, _identifier),
            tenant_id=_several("tenant_id", tenant_id, _identifier),
            resource_type=_several("resource_type", resource_type, _identifier),
            resource_id=_several("resource_id", resource_id, _identifier),
            correlation_id=_several("correlation_id", correlation_id, _identifier),
            trace_id=_several("trace_id", trace_id, _identifier),
            subject_id=_several("subject_id", subject_id, _identifier),
            networks=_several("ip_address", ip_address, _network),
            text=_several("text", text, _text),
            metadata=conditions_of(metadata),
            min_anomaly_score=min_anomaly_score,
            missing=_several("missing", missing, _optional),
            exclude=_exclude(exclude),
        )

    def conditions(self) -> tuple[list[str], list[Any]]:
        """SQL conditions with numbered parameters, and the parameters."""
        values = Parameters()
        return list(self.parts(values.add)), values

    def parts(self, add: Callable[[Any], str]) -> Iterable[str]:
        """The conditions; `add` takes a parameter and returns its name."""
        if self.start_time is not None:
            yield f"occurred_at >= {add(self.start_time)}"
        if self.end_time is not None:
            yield f"occurred_at < {add(self.end_time)}"
        yield from self._of_columns(add)
        if self.networks is not None:
            yield f"ip_address <<= ANY({add(list(self.networks))}::text[]::inet[])"
        for needle in self.text or ():
            yield _contains_text(needle, add)
        for condition in self.metadata or ():
            yield condition.sql(add)
        if self.min_anomaly_score is not None:
            yield f"anomaly_score >= {add(self.min_anomaly_score)}"
        for column in self.missing or ():
            yield f"{column} IS NULL"
        if self.exclude is not None:
            for part in self.exclude.parts(add):
                yield f"({part}) IS NOT TRUE"

    def _of_columns(self, add: Callable[[Any], str]) -> Iterable[str]:
        for column, name in _CHOICES:
            members = getattr(self, name)
            if members is not None:
                yield f"{column} = ANY({add([member.value for member in members])}::text[])"
        if self.actions is not None:
            yield f"action LIKE ANY({add([like_pattern(action) for action in self.actions])}::text[])"
        for column in _IDENTIFIERS:
            wanted = getattr(self, column)
            if wanted is not None and len(wanted) == 1:
                yield f"{column} = {add(wanted[0])}"  # the form whose order an index gives
            elif wanted is not None:
                yield f"{column} = ANY({add(list(wanted))}::text[])"

    def given(self) -> frozenset[str]:
        """Names of the filters that are set."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def digest(self, order: str, position: bytes) -> bytes:
        """Ties a cursor to its query; not to its times, for `now - 7 days` moves between pages."""
        told = [str(order)]
        told += [repr(getattr(self, name)) for name in self.__slots__ if not name.endswith("_time")]
        return hashlib.blake2b("\x1f".join(told).encode() + position, digest_size=8).digest()


# Names that `Filters.of` takes, for messages.
FILTERS = tuple(name for name in Filters.of.__annotations__ if name != "return")


def _contains_text(needle: str, add: Callable[[Any], str]) -> str:
    written = json.dumps(needle, ensure_ascii=False)[1:-1]  # as it stands inside a JSON string
    patterns = [f"%{_literal(needle)}%", f"%{_literal(written)}%"]
    # Letters of ASCII need no locale to be compared in both cases, which takes a third of the time away.
    collation = ' COLLATE "C"' if needle.isascii() else ""
    return "(" + " OR ".join(
        f"{place}{collation} ILIKE {add(pattern)}" for place, pattern in zip(_TEXT, patterns, strict=True)
    ) + ")"  # fmt: skip


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _moment(field: str, value: object) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise InvalidArgument(field, value, "give a datetime (a naive one is local time)")
    try:
        return value.astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        raise InvalidArgument(field, value, "give a datetime between the years 2 and 9998") from None


def _choices(kind: type[Choice], field: str, value: object) -> tuple[Choice, ...] | None:
    if value is None:
        return None
    items: Sequence[object] = [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]  # checked by the caller's types
    try:
        return tuple(parse_choice(kind, field, item) for item in items)
    except InvalidEvent as error:
        raise InvalidArgument(field, value, f"{error.args[0]}") from None


def _several(field: str, value: object, check: Callable[[str, object], str]) -> tuple[str, ...] | None:
    """One value or several of them, each checked, none twice."""
    if value is None:
        return None
    one = isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)
    # A network is iterable too: over its addresses.
    one = one or isinstance(value, IPv4Network | IPv6Network)
    items: Iterable[object] = [value] if one else value  # type: ignore[assignment]  # as `one` says
    return tuple(dict.fromkeys(check(field, item) for item in items))


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(field, value, "give a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(field, value, "give valid Unicode") from None
    if "\x00" in value:
        raise InvalidArgument(field, value, "it can't contain the NUL character")
    return value


def _identifier(field: str, value: object) -> str:
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        value = str(value)
    return _text(field, value)


def _network(field: str, value: object) -> str:
    try:
        if isinstance(value, str | IPv4Address | IPv6Address | IPv4Network | IPv6Network):
            return parse_address(value) or str(ip_network(value, strict=False))
    except ValueError:
        pass
    raise InvalidArgument(field, value, "give an address or a network such as 10.0.0.0/8")


def _optional(field: str, value: object) -> str:
    if value not in _OPTIONAL:
        raise InvalidArgument(field, value, f"give one or several of {', '.join(_OPTIONAL)}")
    return str(value)


def _exclude(given: object) -> Filters | None:
    if given is None:
        return None
    known = [name for name in FILTERS if name not in {"start_time", "end_time", "exclude"}]
    if not isinstance(given, Mapping):
        raise InvalidArgument("exclude", given, f"give a mapping of filters: {', '.join(known)}")
    for name in given:
        if name not in known:
            raise InvalidArgument(f"exclude[{name!r}]", given[name], f"the filters are {', '.join(known)}")
    try:
        made = Filters.of(**given)
    except InvalidArgument as error:
        raise InvalidArgument(f"exclude[{error.field!r}]", error.value, error.allowed) from None
    return made if made.given() else None
