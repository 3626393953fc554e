"""Filters on a place in an event's metadata: `{"order.total": {"gte": 100}}`.

A path names keys from the outside in, separated by dots (`\\.` is a dot in a key); a number is a place in a
list, or a key. Values compare as jsonb does: 1 equals 1.0, and a number is never less than a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OPERATORS", "Condition", "conditions_of", "like_pattern"]

# jsonpath, strict: lists are not unwrapped, and what can't be compared does not match instead of failing.
_COMPARE = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
OPERATORS = ("eq", "ne", *_COMPARE, "in", "exists", "like", "contains")
_TEMPLATES = {
    "eq": "({place}) = {value}",
    "ne": "({place}) <> {value}",
    "in": "({place}) = ANY(ARRAY(SELECT jsonb_array_elements({value})))",
    "contains": "(jsonb_typeof({place}) = 'array' AND ({place}) @> jsonb_build_array({value}))",
}
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_MOST_KEYS = 32


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold at one place; `value` is JSON text, or what `like` and `exists` take."""

    path: tuple[str, ...]
    operator: str
    value: str | bool

    def sql(self, add: Callable[[Any], str]) -> str:
        """The condition in SQL; `add` takes a parameter and returns its name."""
        place = f"metadata #> {add(list(self.path))}::text[]"
        if self.operator == "exists":
            return f"({place}) IS {'NOT ' if self.value else ''}NULL"
        if self.operator == "like":
            wanted = add(like_pattern(str(self.value)))
            return f"(jsonb_typeof({place}) = 'string' AND ({place}) #>> '{{}}' LIKE {wanted})"
        value = f"{add(self.value)}::jsonb"
        if self.operator in _COMPARE:
            sign = _COMPARE[self.operator]
            return f"jsonb_path_match({place}, 'strict $ {sign} $v', jsonb_build_object('v', {value}), true)"
        template = _TEMPLATES[self.operator].format(place=place, value=value)
        within = self._containment() if self.operator == "eq" else None
        # Implied by the equality, and what a GIN index on metadata can answer, where there is one.
        return template if within is None else f"(metadata @> {add(within)}::jsonb AND {template})"

    def _containment(self) -> str | None:
        if any(key.lstrip("-").isdecimal() for key in self.path):
            return None  # it may be a place in a list
        text = str(self.value)
        for key in reversed(self.path):
            text = f"{{{json.dumps(key)}: {text}}}"
        return text


def like_pattern(text: str) -> str:
    """The pattern of SQL's LIKE for one whose `*` stands for anything."""
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%")


def conditions_of(given: object) -> tuple[Condition, ...] | None:
    """The conditions that a caller gave as a mapping from paths to values or to operators with values.

    Raises: InvalidArgument: names the path and what would be right.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InvalidArgument("metadata", given, "give a mapping such as {'order.total': {'gte': 100}}")
    made: list[Condition] = []
    for path, wanted in given.items():
        keys = _path(path)
        if not isinstance(wanted, Mapping):
            made.append(Condition(keys, "eq", _json(path, wanted)))
            continue
        unknown = [name for name in wanted if name not in OPERATORS]
        if unknown or not wanted:
            raise InvalidArgument(
                f"metadata[{path!r}]",
                wanted,
                f"the operators are {', '.join(OPERATORS)}; to compare with an object give {{'eq': {{…}}}}",
            )
        made += [Condition(keys, name, _value(path, name, value)) for name, value in wanted.items()]
    return tuple(made)


def _path(path: object) -> tuple[str, ...]:
    if isinstance(path, str):
        keys = _split(path)
        if "" in keys:
            raise InvalidArgument("metadata", path, r"give keys separated by dots (a dot in a key: \.)")
    elif isinstance(path, tuple) and path and all(isinstance(key, str) for key in path):
        keys = list(path)
    else:
        raise InvalidArgument("metadata", path, "give a path such as 'order.total' or ('order', 'total')")
    if len(keys) > _MOST_KEYS:
        raise InvalidArgument("metadata", path, f"at most {_MOST_KEYS} keys are allowed")
    _check_text(path, "".join(keys))
    return tuple(keys)


def _split(path: str) -> list[str]:
    keys, letters = [""], iter(path)
    for letter in letters:
        if letter == ".":
            keys.append("")
        else:
            keys[-1] += next(letters, "\\") if letter == "\\" else letter
    return keys


def _value(path: object, operator: str, value: object) -> str | bool:
    where = f"metadata[{path!r}][{operator!r}]"
    if operator == "exists":
        if not isinstance(value, bool):
            raise InvalidArgument(where, value, "give True or False")
        return value
    if operator == "like":
        if not isinstance(value, str):
            raise InvalidArgument(where, value, "give a string; * stands for anything")
        _check_text(path, value)
        return value
    if operator in _COMPARE and (isinstance(value, bool) or not isinstance(value, int | float | str)):
        raise InvalidArgument(where, value, "give a number or a string")
    if operator == "in" and not isinstance(value, list | tuple | set | frozenset):
        raise InvalidArgument(where, value, "give a list of values")
    if operator == "contains" and isinstance(value, Mapping | list | tuple):
        raise InvalidArgument(where, value, "give a string, number, True, False or None")
    return _json(path, sorted(value, key=repr) if isinstance(value, set | frozenset) else value)


def _json(path: object, value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise InvalidArgument(f"metadata[{path!r}]", value, "give JSON types, without NaN") from None
    if _NUL.search(text):
        raise InvalidArgument(f"metadata[{path!r}]", value, "it can't contain the NUL character")
    _check_text(path, text)
    return text


def _check_text(path: object, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"metadata[{path!r}]", text, "give valid Unicode") from None
    if "\x00" in text:
        raise InvalidArgument(f"metadata[{path!r}]", text, "it can't contain the NUL character")
