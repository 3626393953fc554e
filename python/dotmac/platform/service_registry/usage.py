"""One use of an instance: chosen on entering, counted until the block ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform.errors import NoInstanceAvailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from dotmac.platform import _native
    from dotmac.platform.service_registry.models import ServiceInstance

__all__ = ["Usage"]


class Usage:
    """What `use_service` returns, for one task or thread; may be entered again, each time choosing anew.

    An ordinary exception that leaves the block counts as a failed call; being cancelled or interrupted
    counts as
    no outcome.
    """

    __slots__ = ("_async_picker", "_name", "_picker", "_tickets")

    def __init__(
        self,
        name: str,
        async_picker: Callable[[], Awaitable[_native.Picker]],
        picker: Callable[[], _native.Picker],
    ) -> None:
        self._name, self._async_picker, self._picker = name, async_picker, picker
        self._tickets: list[_native.Ticket] = []

    async def __aenter__(self) -> ServiceInstance:
        return self._enter(await self._async_picker())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(kind)

    def __enter__(self) -> ServiceInstance:
        return self._enter(self._picker())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(kind)

    def _enter(self, picker: _native.Picker) -> ServiceInstance:
        entered = picker.enter()
        if entered is None:
            raise NoInstanceAvailable(
                f"no instance of {self._name!r} matches; check its name, its tags and that it is registered"
            )
        instance, ticket = entered
        self._tickets.append(ticket)
        return instance

    def _leave(self, kind: type[BaseException] | None) -> None:
        ticket = self._tickets.pop()
        if kind is None or issubclass(kind, Exception):
            ticket.finish(kind is None)
