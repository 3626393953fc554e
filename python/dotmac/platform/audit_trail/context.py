"""Who and where, for every event that is logged meanwhile: `with audit_context(user_id="ada"): …`

What is given lives in a context variable (PEP 567): every asyncio task has it from whoever started it, and
so has `asyncio.to_thread`. A thread or an executor starts without; hand it over by
`contextvars.copy_context().run(function)`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, cast
from uuid import UUID

from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

__all__ = ["NO_CONTEXT", "AuditContext", "audit_context", "current_audit_context", "in_audit_context"]

P = ParamSpec("P")
R = TypeVar("R")

Identifier = str | int | UUID
Address = str | IPv4Address | IPv6Address
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditContext:
    """What `log_event` takes for arguments that it was not given."""

    user_id: Identifier | None = None
    tenant_id: Identifier | None = None
    correlation_id: Identifier | None = None
    ip_address: Address | None = None
    metadata: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)


class _Frame:
    """One entered `audit_context`, and those around it."""

    __slots__ = ("_settled", "block", "outer")

    def __init__(self, block: audit_context, outer: _Frame | None) -> None:
        self.block = block
        self.outer = outer
        self._settled: AuditContext | None = None

    def value(self) -> AuditContext:
        if self._settled is not None:
            return self._settled
        found, lasting = self.block.merged(self.outer)
        if lasting:
            self._settled = found
        return found

    def without(self, block: audit_context) -> _Frame | None:
        """The frames but the innermost one of `block`."""
        if self.block is block:
            return self.outer
        if self.outer is None:
            return self
        rest = self.outer.without(block)
        return self if rest is self.outer else _Frame(self.block, rest)

    def lasts(self) -> bool:
        return self._settled is not None


_frames: ContextVar[_Frame | None] = ContextVar("dotmac_audit_context", default=None)
# What is said outside of any block: this very object.
NO_CONTEXT = AuditContext()


def current_audit_context() -> AuditContext:
    """What an event that is logged here and now would be filled in with."""
    frame = _frames.get()
    return NO_CONTEXT if frame is None else frame.value()


def in_audit_context() -> bool:
    """Is any block around? Asks no function of a block for its value."""
    return _frames.get() is not None


class audit_context:  # noqa: N801 (used as a function is, in `with`, `async with` and as a decorator)
    """Fills in who and where for all events that are logged inside; arguments of `log_event` win.

    Use it as `with audit_context(…):`, `async with audit_context(…):`, or as a decorator of a function, a
    coroutine function, a generator or an asynchronous generator, whose signature and type stay. Blocks nest:
    what an inner one does not say, the outer one does; `metadata` are merged, the inner key wins.

    Args:
        user_id: who. Like all of these, a value, or a function without arguments that is asked at each event
            (for what is known later only); None leaves it to the block around.
        tenant_id: in whose realm.
        correlation_id: what ties the events of one piece of work together.
        ip_address: where from; an `ip_address` in the event's own metadata wins.
        metadata: entries for every event's metadata.
        inherit: False forgets the blocks around.

    Raises: InvalidArgument: a value is of a type that can't be stored.
    """

    def __init__(
        self,
        *,
        user_id: Identifier | Callable[[], Identifier | None] | None = None,
        tenant_id: Identifier | Callable[[], Identifier | None] | None = None,
        correlation_id: Identifier | Callable[[], Identifier | None] | None = None,
        ip_address: Address | Callable[[], Address | None] | None = None,
        metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any] | None] | None = None,
        inherit: bool = True,
    ) -> None:
        given = {
            "user_id": user_id,
            "tenant_id": tenant_id,
            "correlation_id": correlation_id,
            "ip_address": ip_address,
            "metadata": metadata,
        }
        self._given: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self._inherit = inherit
        self._asks = any(callable(value) for value in self._given.values())
        for name, value in self._given.items():
            if not callable(value):
                self._given[name] = _checked(name, value)

    # --- as a block. Nothing is kept in the object, so that one object may be entered at once by many tasks.

    def __enter__(self) -> Self:
        _frames.set(_Frame(self, _frames.get()))
        return self

    def __exit__(self, *_: object) -> None:
        # Not by the variable's token: that one fails where a generator ends in another context than it began.
        frame = _frames.get()
        if frame is not None:
            _frames.set(frame.without(self))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    # --- as a decorator

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, with this context around each call."""
        wrapped: Any
        if inspect.isasyncgenfunction(function):
            wrapped = self._around_async_generator(function)
        elif inspect.isgeneratorfunction(function):
            wrapped = self._around_generator(function)
        elif inspect.iscoroutinefunction(function):
            wrapped = self._around_coroutine(function)
        else:

            def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
                with self:
                    return function(*args, **kwargs)

        return cast("Callable[P, R]", functools.wraps(function)(wrapped))

    def _around_coroutine(self, function: Any) -> Any:
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await function(*args, **kwargs)

        return wrapped

    def _around_generator(self, function: Any) -> Any:
        # Entered anew at each step: between two steps the caller's own context holds.
        def wrapped(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            running = function(*args, **kwargs)
            step: Callable[[], Any] = functools.partial(next, running)
            try:
                while True:
                    try:
                        with self:
                            found = step()
                    except StopIteration as end:
                        return end.value
                    try:
                        sent = yield found
                    except GeneratorExit:
                        raise
                    except BaseException as error:  # noqa: BLE001 (it is the body's)
                        step = functools.partial(running.throw, error)
                    else:
                        step = functools.partial(running.send, sent)
            finally:
                with self:
                    running.close()

        return wrapped

    def _around_async_generator(self, function: Any) -> Any:
        async def wrapped(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            async with aclosing(_Steps(self, function(*args, **kwargs))) as running:
                step: Callable[[], Any] = running.first
                while True:
                    try:
                        found = await step()
                    except StopAsyncIteration:
                        return
                    try:
                        sent = yield found
                    except GeneratorExit:
                        raise
                    except BaseException as error:  # noqa: BLE001 (it is the body's)
                        step = functools.partial(running.throw, error)
                    else:
                        step = functools.partial(running.send, sent)

        return wrapped

    # --- what it says

    def merged(self, outer: _Frame | None) -> tuple[AuditContext, bool]:
        """What holds inside of it, and whether that stays so until it ends."""
        around = outer.value() if outer is not None and self._inherit else NO_CONTEXT
        lasting = not self._asks and (outer is None or not self._inherit or outer.lasts())
        values: dict[str, Any] = self._given
        if self._asks:
            values = {name: _answer(name, value) for name, value in values.items()}
        metadata = values.get("metadata")
        return AuditContext(
            user_id=_first(values.get("user_id"), around.user_id),
            tenant_id=_first(values.get("tenant_id"), around.tenant_id),
            correlation_id=_first(values.get("correlation_id"), around.correlation_id),
            ip_address=_first(values.get("ip_address"), around.ip_address),
            metadata={**around.metadata, **metadata} if metadata else around.metadata,
        ), lasting


class _Steps:
    """An asynchronous generator, each step of which runs inside of a block."""

    def __init__(self, block: audit_context, running: AsyncGenerator[Any, Any]) -> None:
        self._block, self._running = block, running

    async def first(self) -> Any:
        with self._block:
            return await anext(self._running)

    async def send(self, value: Any) -> Any:
        with self._block:
            return await self._running.asend(value)

    async def throw(self, error: BaseException) -> Any:
        with self._block:
            return await self._running.athrow(error)

    async def aclose(self) -> None:
        with self._block:
            await self._running.aclose()


def _first(inner: Any, outer: Any) -> Any:
    return outer if inner is None else inner


def _answer(name: str, value: Any) -> Any:
    if not callable(value):
        return value
    found = value()
    return None if found is None else _checked(name, found)


def _checked(name: str, value: Any) -> Any:
    if name == "metadata":
        if not isinstance(value, Mapping):
            raise InvalidArgument(name, type(value), "give a mapping with string keys")
        return dict(value)
    if name == "ip_address":
        from dotmac.platform.audit_trail.entry import parse_address

        if parse_address(value) is None:
            raise InvalidArgument(name, value, "give an IPv4 or IPv6 address")
    elif isinstance(value, bool) or not isinstance(value, str | int | UUID):
        raise InvalidArgument(name, value, "give a string, an integer or a UUID")
    return value
