"""Checks of what callers give to `AuditAggregator`; each error names the argument and what would be right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from dotmac.platform.audit_trail.filters import FILTERS, Filters
from dotmac.platform.audit_trail.query import Order
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["check_count", "check_seconds", "check_threshold", "filters_of", "order_of"]

_DAY = 86_400


def check_seconds(field: str, value: object) -> None:
    """None, or a length of time. Raises: InvalidArgument."""
    if value is not None and not (_is_number(value) and 0 < value < _DAY):
        raise InvalidArgument(field, value, f"give seconds, more than 0 and less than {_DAY}")


def check_count(field: str, value: object, least: int) -> None:
    """None, or a whole number. Raises: InvalidArgument."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise InvalidArgument(field, value, f"give a whole number, at least {least}")


def check_threshold(field: str, value: object) -> None:
    """None, or a score. Raises: InvalidArgument."""
    if value is not None and not (_is_number(value) and 0 < value <= 1):
        raise InvalidArgument(field, value, "give a number, more than 0, at most 1")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def filters_of(start: datetime | None, end: datetime | None, given: dict[str, Any]) -> Filters:
    """The filters of a query.

    Raises: InvalidArgument: one is wrong, or unknown: names those that there are.
    """
    for name, value in given.items():
        if name not in FILTERS:
            raise InvalidArgument(name, value, f"the filters are {', '.join(FILTERS)}")
    return Filters.of(start_time=start, end_time=end, **given)


def order_of(order: str) -> Order:
    """The direction of a query. Raises: InvalidArgument."""
    try:
        return Order(order)
    except ValueError:
        raise InvalidArgument("order", order, "give 'desc' (newest first) or 'asc'") from None
