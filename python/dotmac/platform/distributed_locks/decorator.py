"""`with_lock`: a lock around each call of a function, named after the call's arguments."""

from __future__ import annotations

import asyncio
import functools
import inspect
import string
import sys
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from dotmac.platform.connection import background
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from dotmac.platform.distributed_locks.lock import DistributedLock

__all__ = ["Decorator", "locked"]

P = ParamSpec("P")
R = TypeVar("R")
_formatter = string.Formatter()


class Decorator(Protocol):
    """Takes a function and gives one of the same type."""

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...


def locked(template: str, make: Callable[[str], DistributedLock]) -> Decorator:
    """A decorator that holds `make(name)` around each call, `name` being the filled template."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, classmethod | staticmethod):
            return cast("Callable[P, R]", type(function)(decorate(function.__func__)))
        if (
            not callable(function)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise InvalidArgument(
                "with_lock",
                getattr(function, "__qualname__", function),
                "it must be a function or a coroutine function, not a generator",
            )
        name_of = _binder(template, function)
        if _is_asynchronous(function) or _is_asynchronous(type(function).__call__):
            return cast("Callable[P, R]", _asynchronous(cast("Any", function), name_of, make))

        @functools.wraps(function)
        def synchronous(*args: P.args, **kwargs: P.kwargs) -> R:
            with make(name_of(args, kwargs)):
                return function(*args, **kwargs)

        return synchronous

    return decorate


def _is_asynchronous(function: Callable[..., Any]) -> bool:
    # Before 3.12 only asyncio sees its own mark, which `_asynchronous` leaves.
    return inspect.iscoroutinefunction(function) or (
        sys.version_info < (3, 12) and asyncio.iscoroutinefunction(function)
    )


def _asynchronous(
    function: Callable[..., Coroutine[Any, Any, R]],
    name_of: Callable[[tuple[Any, ...], dict[str, Any]], str],
    make: Callable[[str], DistributedLock],
) -> Callable[..., Any]:
    async def holding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        async with make(name_of(args, kwargs)):
            return await function(*args, **kwargs)

    # A plain function that is marked as a coroutine function: a Celery worker calls it and takes what it
    # returns for the result, so that the coroutine has to be run to its end here.
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        coroutine = holding(args, kwargs)
        return background.run(coroutine) if _called_by_celery() else coroutine

    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(call)
    call._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # noqa: SLF001 - 3.11 has no other mark
    return call


def _called_by_celery() -> bool:
    """True inside a Celery task, executed by a worker, in a thread where no event loop runs."""
    state = sys.modules.get("celery._state")
    if state is None:
        return False
    task = state.get_current_task()
    if task is None or task.request.called_directly:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def _binder(template: str, function: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], str]:
    """How to fill the template from a call's arguments; refuses one that can't be filled."""
    where = getattr(function, "__qualname__", repr(function))
    try:
        fields = _fields(template)
    except ValueError as error:
        raise InvalidArgument("template", template, f"write it like 'user:{{user_id}}' ({error})") from None
    if not fields:
        name = template.format()
        return lambda _args, _kwargs: name
    signature = inspect.signature(function)
    for field in fields:
        first = _root(field)
        if first not in signature.parameters:
            known = ", ".join(signature.parameters) or "none"
            raise InvalidArgument(
                "template", template, f"{{{field}}} is no parameter of {where}; it has: {known}"
            )

    def name_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            return _formatter.vformat(template, (), bound.arguments)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise InvalidArgument(
                "template", template, f"it can't be filled from this call of {where}: {error!r}"
            ) from error

    return name_of


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
