"""Options that several commands of `dotmac audit` share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer

from dotmac.platform.errors import InvalidArgument

__all__ = ["AsJson", "Since", "Tenant", "Until", "Url", "filtered", "moment_of", "zone_of"]

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON; for tail, one object per line.")]
Url = Annotated[str | None, typer.Option("--url", help="Database; default: the configuration's.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Tenant id.")]

_TIME = "ISO 8601, or 30m, 12h, 7d, 2w ago."
Since = Annotated[str | None, typer.Option("--since", help=f"First moment: {_TIME}")]
Until = Annotated[str | None, typer.Option("--until", help=f"Moment after the last: {_TIME}")]

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_ONE = str | None
_SEVERAL = list[str] | None
# Option, filter of `query_events`, type, help.
_FILTERS: tuple[tuple[str, str, Any, str], ...] = (
    ("category", "categories", _SEVERAL, "Repeatable."),
    ("level", "levels", _SEVERAL, "Repeatable."),
    ("action", "actions", _SEVERAL, "Repeatable; * stands for anything."),
    ("outcome", "outcome", _SEVERAL, "Repeatable."),
    ("user", "user_id", _SEVERAL, "User id; repeatable."),
    ("tenant", "tenant_id", _ONE, "Tenant id."),
    ("resource-type", "resource_type", _SEVERAL, "Repeatable."),
    ("resource-id", "resource_id", _SEVERAL, "Repeatable."),
    ("address", "ip_address", _SEVERAL, "Address or network, 10.0.0.0/8; repeatable."),
    ("correlation", "correlation_id", _SEVERAL, "Correlation id; repeatable."),
    ("trace", "trace_id", _SEVERAL, "Trace id; repeatable."),
    ("subject", "subject_id", _SEVERAL, "Whom personal data is about; repeatable."),
    ("text", "text", _SEVERAL, "Occurs in the action or the metadata; repeatable."),
    ("metadata", "metadata", _SEVERAL, "order.total>=100, status=paid, name~A*, order, !order; repeatable."),
    ("min-score", "min_anomaly_score", float | None, "Least anomaly score, 0 to 1."),
    ("missing", "missing", _SEVERAL, "Field that is not set, such as user_id; repeatable."),
    ("exclude", "exclude", _SEVERAL, "What is left out: action=health.*; repeatable."),
)


def filtered(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is a query's filters, with an option for each of them."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    options = [
        inspect.Parameter(
            name.replace("-", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind, typer.Option(f"--{name}", help=told)],
        )
        for name, _, kind, told in _FILTERS
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        from dotmac.platform.audit_trail.filter_text import exclusions_of, metadata_of

        given = {of: values.pop(name.replace("-", "_")) for name, of, _, _ in _FILTERS}
        filters = {name: value for name, value in given.items() if value not in (None, [])}
        if "metadata" in filters:
            filters["metadata"] = metadata_of(filters["metadata"])
        if "exclude" in filters:
            filters["exclude"] = exclusions_of(filters["exclude"])
        command(filters, **values)

    # Positional arguments of the command stay before its options; what typer reads is the signature.
    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *options]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions have it
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def moment_of(option: str, text: str | None) -> datetime | None:
    """The moment that an option names. Raises: InvalidArgument."""
    if text is None:
        return None
    if text[-1:] in _UNITS and text[:-1].isdecimal():
        try:
            return datetime.now(UTC) - timedelta(**{_UNITS[text[-1]]: int(text[:-1])})
        except OverflowError:
            raise InvalidArgument(option, text, "that is before the year 1") from None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(option, text, "give ISO 8601 (2026-01-31T12:00) or 30m, 12h, 7d, 2w") from None


def zone_of(name: str | None) -> ZoneInfo | None:
    """The time zone that an option names. Raises: InvalidArgument."""
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidArgument("--time-zone", name, "give an IANA name such as Europe/Berlin") from None
