"""Names of locks from the arguments of calls: by a template or a callable, checked against the function."""

from __future__ import annotations

import inspect
import string
from typing import TYPE_CHECKING, Any

from dotmac.platform.distributed_locks.arguments import check_name
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    NameOf = Callable[[tuple[Any, ...], dict[str, Any]], str]

__all__ = ["check_template", "fill", "name_of_call", "roots"]

_formatter = string.Formatter()
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_template(template: Any) -> str | Callable[..., str]:
    """A template or a callable that could name a lock, whatever the function."""
    if callable(template):
        if inspect.iscoroutinefunction(template):
            raise InvalidArgument("template", template, "it must return the name, not a coroutine")
        return template  # type: ignore[no-any-return]
    return check_name(template, "template")


def name_of_call(template: str | Callable[..., str], function: Callable[..., Any]) -> NameOf:
    """How to name the lock of a call of `function`.

    Args:
        template: as in `DistributedLockManager.with_lock`.
        function: the function, of which only the signature is read.
    Returns: takes a call's positional and keyword arguments, gives the name.
    Raises: InvalidArgument: the template does not fit the function; at a call: it can't be filled from that.
    """
    if callable(template):
        return _by_callable(template, function)
    return _by_template(template, function)


def roots(template: str) -> list[str]:
    """The names that a template's braces begin with, each once.

    Raises: InvalidArgument: it is no template.
    """
    return list(dict.fromkeys(_root(field) for field in _checked_fields(template)))


def fill(template: str, values: Mapping[str, Any], where: str) -> str:
    """The name that a template makes of these values.

    Args: where: what was called, for the text of an error.
    Raises: InvalidArgument: it can't be filled from them.
    """
    try:
        return _formatter.vformat(template, (), values)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidArgument(
            "template", template, f"it can't be filled from this call of {where}: {error!r}"
        ) from error


def _by_template(template: str, function: Callable[..., Any]) -> NameOf:
    fields = _checked_fields(template)
    where = _called(function)
    if not fields:
        name = template.format()
        return lambda _args, _kwargs: name
    signature = _signature(function)
    for field in fields:
        if _root(field) not in signature.parameters:
            raise InvalidArgument("template", template, _no_parameter(f"{{{field}}}", where, signature))

    def name_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return fill(template, bound.arguments, where)

    return name_of


def _by_callable(key: Callable[..., str], function: Callable[..., Any]) -> NameOf:
    """A callable asks for arguments by the names of its own parameters."""
    where = _called(function)
    signature = _signature(function)
    try:
        parameters = inspect.signature(key).parameters.values()
    except (TypeError, ValueError):
        raise InvalidArgument("template", key, "its parameters can't be read; write a lambda") from None
    extras = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    asked = [p for p in parameters if p.kind in _NAMED]
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise InvalidArgument(
                "template", key, f"it is given arguments by name, and takes {parameter} by position"
            )
    for parameter in asked:
        unknown = parameter.name not in signature.parameters
        if unknown and parameter.default is parameter.empty and extras is None:
            raise InvalidArgument("template", key, _no_parameter(parameter.name, where, signature))

    def name_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        known = dict(bound.arguments)
        if extras is not None:
            known = known.pop(extras) | known
        given = known if rest else {p.name: known[p.name] for p in asked if p.name in known}
        for parameter in asked:
            if parameter.default is parameter.empty and parameter.name not in given:
                raise InvalidArgument("template", key, f"this call of {where} has no {parameter.name}")
        return key(**given)

    return name_of


def _checked_fields(template: str) -> list[str]:
    try:
        return _fields(template)
    except ValueError as error:
        raise InvalidArgument("template", template, f"write it like 'user:{{user_id}}' ({error})") from None


def _fields(template: str) -> list[str]:
    found = []
    for _, field, spec, conversion in _formatter.parse(template):
        if field is not None:
            found += [field, *_fields(spec or "")]
            if conversion not in (None, "r", "s", "a"):
                raise ValueError(f"unknown conversion {conversion!r}")
    return found


def _root(field: str) -> str:
    for at, letter in enumerate(field):
        if letter in ".[":
            return field[:at]
    return field


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError:
        raise InvalidArgument(
            "with_lock", _called(function), "its parameters can't be read; wrap it in a function"
        ) from None


def _called(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))


def _no_parameter(what: str, where: str, signature: inspect.Signature) -> str:
    return f"{what} is no parameter of {where}; it has: {', '.join(signature.parameters) or 'none'}"
