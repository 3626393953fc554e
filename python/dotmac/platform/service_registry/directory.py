"""What this process knows of services: one snapshot per service that is looked up, and the pickers on it."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, Any

from dotmac.platform import _native
from dotmac.platform.connection.engine import failure
from dotmac.platform.errors import EngineClosed, InvalidArgument
from dotmac.platform.service_registry.arguments import check_filter, check_name, check_tags
from dotmac.platform.service_registry.models import ServiceInstance

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform.connection.engine import Link

__all__ = ["Directory", "check_strategy"]

# Names under which nothing is registered may come from anywhere, such as a request: so many are followed at
# most, and none for longer than this (seconds) after its last use.
_MOST_EMPTY = 256
_IDLE = 300.0
_TIDY_EVERY = 60.0
_MOST_PICKERS = 1024


def check_strategy(strategy: object) -> str:
    """The plain name of a strategy, given as text or enum; empty for None."""
    value = getattr(strategy, "value", strategy)
    if value is None:
        return ""
    if not isinstance(value, str) or value not in _native.STRATEGIES:
        raise InvalidArgument("strategy", strategy, f"it must be one of {', '.join(_native.STRATEGIES)}")
    return value


class Directory:
    """Snapshots and pickers of one registry.

    Args:
        link: the way to the engine, which follows the services.
        strategy: how to choose where a call doesn't say.
        panic: percentage of healthy instances below which all are chosen from.
    """

    def __init__(self, link: Link, strategy: str, panic: int) -> None:
        self.strategy = strategy
        self._link, self._panic = link, panic
        self._closed = False
        self.forget()

    def forget(self) -> None:
        """Nothing is known: at the beginning, and in a forked child."""
        self._services: dict[str, _native.Service] = {}
        self._pickers: dict[tuple[str, str, tuple[str, ...]], _native.Picker] = {}
        # The commonest pick of each service, found by its name alone.
        self.plain: dict[str, Callable[[], ServiceInstance | None]] = {}
        # When each service was used last, as far as is known, and how often it had been picked from then.
        self._used: dict[str, tuple[float, int]] = {}
        self._tidy_at = time.monotonic() + _TIDY_EVERY
        self._most = _MOST_EMPTY

    def close(self) -> None:
        """Nothing can be looked up any more."""
        self._closed = True
        self.forget()

    def is_stale(self, name: str) -> bool:
        """Whether the snapshot of a service may be out of date."""
        service = self._services.get(name)
        return service is None or not service.known or service.stale

    async def ask(self, request: _native.RegistryRequest, what: str) -> Any:
        """The server's reply. Raises: ServerUnavailable, ServerRefused: the server's side failed."""
        side = await self._link.side()
        reply = await side.bridge.registry(request)
        if isinstance(reply, tuple):
            raise failure(reply, what, self._link)
        return reply

    async def everything(self, page: int, what: str) -> list[Any]:
        """Every live instance as it is stored, in all partitions, so many at a time. Raises: as `ask`."""

        async def read(partition: int) -> list[Any]:
            after, found = b"", []
            while True:
                request = _native.RegistryRequest.list(after, page, partition)
                after, *entries = await self.ask(request, what)
                found += entries
                if not after:
                    return found

        parts = await asyncio.gather(*map(read, await self._partitions()))
        return [entry for part in parts for entry in part]

    async def meet(self, monitor: str, live: int, what: str) -> tuple[Any, list[str]]:
        """Tells every partition that this monitor lives, for so many milliseconds; 0 leaves.

        Returns: something that changes whenever an instance does, and the monitors that live.
        Raises: as `ask`.
        """

        async def tell(partition: int) -> list[Any]:
            request = _native.RegistryRequest.monitors(monitor, live, partition)
            return [_text(item) for item in await self.ask(request, what)]

        replies = await asyncio.gather(*map(tell, await self._partitions()))
        # Everybody tells all of them, so any will do; the first is the one that every process uses.
        return tuple(reply[0] for reply in replies), replies[0][1:]

    async def _partitions(self) -> range:
        await self._link.side()
        return range(self._link.engine().partitions)

    async def follow(self, name: str) -> _native.Service:
        """The snapshot of a service, read if it never was."""
        await self._link.side()
        service = self._service(name)
        if not service.known:
            await self.ask(_native.RegistryRequest.follow(name, False), f"reading {name!r}")
        return service

    async def picker(self, name: str, strategy: object, tags: object) -> _native.Picker:
        """The picker for these arguments."""
        key = self._key(name, strategy, tags)
        return self._pickers.get(key) or self._new_picker(await self.follow(name), key)

    def picker_sync(self, name: str, strategy: object, tags: object) -> _native.Picker:
        """The same, blocking where the service was never read."""
        key = self._key(name, strategy, tags)
        known = self._pickers.get(key)
        if known is not None:
            return known
        service = self._service(name)
        if not service.known:
            reply = self._link.engine().registry(_native.RegistryRequest.follow(name, False))
            if isinstance(reply, tuple):
                raise failure(reply, f"reading {name!r}", self._link)
        return self._new_picker(service, key)

    def _key(self, name: object, strategy: object, tags: object) -> tuple[str, str, tuple[str, ...]]:
        if self._closed:
            raise EngineClosed("this registry was closed; make a new one")
        return check_name(name), check_strategy(strategy), check_tags(tags)

    def _service(self, name: str) -> _native.Service:
        service = self._services.get(check_name(name))
        now = time.monotonic()
        if service is None:
            made = self._link.engine().service(name, ServiceInstance.from_record)
            service = self._services.setdefault(name, made)
        self._used[name] = (now, service.picks)
        if now >= self._tidy_at or len(self._services) > self._most:
            self._tidy(now)
        return service

    def _tidy(self, now: float) -> None:
        """Follows no longer what is empty and was not used for long; the engine drops what nobody holds."""
        empty = []
        for name, service in list(self._services.items()):
            at, picks = self._used.get(name, (now, 0))
            if service.picks != picks:
                at = now
            self._used[name] = (at, service.picks)
            if service.empty:
                empty.append((at, name))
        empty.sort()
        # A quarter more than necessary, so that not every new name looks at all of them.
        excess = len(empty) - _MOST_EMPTY * 3 // 4 if len(empty) > _MOST_EMPTY else 0
        gone = {name for n, (at, name) in enumerate(empty) if n < excess or at + _IDLE <= now}
        for name in gone:
            for known in (self.plain, self._services, self._used):
                known.pop(name, None)
        for key in [key for key in list(self._pickers) if key[0] in gone]:
            self._pickers.pop(key, None)
        self._most = len(self._services) + max(1, _MOST_EMPTY - (len(empty) - len(gone)))
        self._tidy_at = now + _TIDY_EVERY

    def _new_picker(self, service: _native.Service, key: tuple[str, str, tuple[str, ...]]) -> _native.Picker:
        name, strategy, tags = key
        conditions = check_filter(tags, (), (), None, None)
        made = service.picker(strategy or self.strategy, conditions, self._panic, secrets.randbits(64))
        if len(self._pickers) >= _MOST_PICKERS:
            self._pickers.pop(next(iter(list(self._pickers))), None)
        picker = self._pickers.setdefault(key, made)
        if not strategy and not tags:
            self.plain[name] = picker.pick
        return picker


def _text(item: bytes | int) -> str:
    return item.decode() if isinstance(item, bytes) else str(item)
