"""`with_lock`: a lock around each call of a function, named after the call's arguments."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from dotmac.platform.connection import background
from dotmac.platform.distributed_locks.generators import asynchronous_generator, generator
from dotmac.platform.distributed_locks.naming import check_template, name_of_call
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from dotmac.platform.distributed_locks.generators import LockOf
    from dotmac.platform.distributed_locks.lock import DistributedLock
    from dotmac.platform.distributed_locks.quorum import QuorumLock

__all__ = ["Decorator", "called_by_celery", "locked"]

P = ParamSpec("P")
R = TypeVar("R")


class Decorator(Protocol):
    """Takes a function and gives one of the same type."""

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...


def locked(
    template: str | Callable[..., str], make: Callable[[str], DistributedLock | QuorumLock]
) -> Decorator:
    """A decorator that holds `make(name)` around each call, `name` being what the template makes of it."""
    template = check_template(template)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, classmethod | staticmethod):
            return cast("Callable[P, R]", type(function)(decorate(function.__func__)))
        if not callable(function):
            raise InvalidArgument("with_lock", function, "it must be something to call")
        name_of = name_of_call(template, function)

        def lock_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> DistributedLock | QuorumLock:
            return make(name_of(args, kwargs))

        for kind, wrap in _KINDS:
            if kind(function) or kind(type(function).__call__):
                return cast("Callable[P, R]", wrap(function, lock_of))
        return _synchronous(function, lock_of)

    return decorate


def _synchronous(function: Callable[P, R], lock_of: LockOf) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with lock_of(args, kwargs):
            result = function(*args, **kwargs)
        if inspect.iscoroutine(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
            # From a decorator below that does not say what it wraps. Nothing of the body has run yet.
            if not inspect.isasyncgen(result):
                result.close()
            raise InvalidArgument(
                "with_lock",
                getattr(function, "__qualname__", function),
                f"it returned a {type(result).__name__}, which would run without the lock; "
                "put with_lock right above the function itself",
            )
        return result

    return call


def _asynchronous(function: Callable[..., Coroutine[Any, Any, R]], lock_of: LockOf) -> Callable[..., Any]:
    async def holding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        async with lock_of(args, kwargs):
            return await function(*args, **kwargs)

    # A plain function that is marked as a coroutine function: a Celery worker calls it and takes what it
    # returns for the result, so that the coroutine has to be run to its end here.
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        coroutine = holding(args, kwargs)
        return background.run(coroutine) if called_by_celery() else coroutine

    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(call)
    call._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # noqa: SLF001 - 3.11 has no other mark
    return call


def _is_asynchronous(function: Callable[..., Any]) -> bool:
    # Before 3.12 only asyncio sees its own mark, which `_asynchronous` leaves.
    return inspect.iscoroutinefunction(function) or (
        sys.version_info < (3, 12) and asyncio.iscoroutinefunction(function)
    )


def called_by_celery() -> bool:
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


# What a function is, and how the lock goes around it.
_KINDS: tuple[tuple[Callable[..., bool], Callable[..., Callable[..., Any]]], ...] = (
    (_is_asynchronous, _asynchronous),
    (inspect.isgeneratorfunction, generator),
    (inspect.isasyncgenfunction, asynchronous_generator),
)
