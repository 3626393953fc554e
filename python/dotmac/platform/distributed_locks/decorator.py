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
        name_of = _binder(template, function)
        if inspect.iscoroutinefunction(function):
            return cast("Callable[P, R]", _asynchronous(function, name_of, make))
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidArgument(
                "with_lock",
                function.__qualname__,
                "it must be a function or a coroutine function, not a generator",
            )

        @functools.wraps(function)
        def synchronous(*args: P.args, **kwargs: P.kwargs) -> R:
            with make(name_of(args, kwargs)):
                return function(*args, **kwargs)

        return synchronous

    return decorate


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
        fields = [field for _, field, _, _ in _formatter.parse(template) if field is not None]
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


def _root(field: str) -> str:
    for at, letter in enumerate(field):
        if letter in ".[":
            return field[:at]
    return field
