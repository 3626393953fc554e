"""Filters written as text, for the options of a command and the parameters of a URL.

| text                          | means                                  |
|-------------------------------|----------------------------------------|
| `order.total>=100`            | compares; also `>`, `<`, `<=`          |
| `status=paid`, `status!=paid` | equal, or there and different          |
| `status in ["new", "paid"]`   | one of them                            |
| `items.0.sku~A-*`             | `*` stands for anything                |
| `order`, `!order`             | is there, is not there                 |
| `user_id=ada` (to exclude)    | a filter and its value                 |
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.filters import FILTERS
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["SINGULAR", "exclusions_of", "metadata_of"]

# Filters of several values that are given one at a time here.
SINGULAR = {"category": "categories", "level": "levels", "action": "actions"}
_SIGNS = {"=": "eq", "!=": "ne", "~": "like", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte", "in": "in"}
_CONDITION = re.compile(
    r"(?P<no>!?)(?P<path>(?:\\.|[^=<>!~\s\\])+)(?:\s*(?P<sign>>=|<=|!=|=|<|>|~|\bin\b)\s*(?P<value>.*))?",
    re.DOTALL,
)
_GRAMMAR = "give path=value (or != < <= > >=, ~ where * stands for anything), path in [...], path or !path"
_NOT_HERE = {"start_time", "end_time", "exclude", *SINGULAR.values()}
_EXCLUDABLE = (*SINGULAR, *(name for name in FILTERS if name not in _NOT_HERE))


def metadata_of(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The filter `metadata` for conditions written as text; a value that is no JSON is a string.

    Raises: InvalidArgument.
    """
    made: dict[str, dict[str, Any]] = {}
    for text in texts:
        match = _CONDITION.fullmatch(text.strip())
        if match is None or (match["no"] and match["sign"]):
            raise InvalidArgument("metadata", text, _GRAMMAR)
        operator = "exists"
        value: Any = not match["no"]
        if match["sign"]:
            operator = _SIGNS[match["sign"]]
            value = match["value"] if operator == "like" else _read(match["value"])
        wanted = made.setdefault(match["path"], {})
        if operator in wanted:
            raise InvalidArgument("metadata", text, f"{match['path']} has another condition of this kind")
        wanted[operator] = value
    return made


def exclusions_of(texts: Iterable[str]) -> dict[str, Any]:
    """The filter `exclude` for `filter=value` written as text, each of which leaves events out.

    Raises: InvalidArgument.
    """
    given: dict[str, list[str]] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name.strip() not in _EXCLUDABLE:
            raise InvalidArgument(
                "exclude", text, f"give filter=value; the filters are {', '.join(_EXCLUDABLE)}"
            )
        given.setdefault(name.strip(), []).append(value)
    made: dict[str, Any] = {SINGULAR.get(name, name): values for name, values in given.items()}
    if "metadata" in made:
        made["metadata"] = metadata_of(made["metadata"])
    if "min_anomaly_score" in made:
        made["min_anomaly_score"] = _read(made["min_anomaly_score"][-1])
    return made


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
