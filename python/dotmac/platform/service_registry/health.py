"""Active health checks over HTTP, shared by all monitors of a namespace.

Each monitor announces itself to the server; each instance is checked by the one monitor that rendezvous
hashing
(Thaler and Ravishankar 1998, https://doi.org/10.1109/90.663936) gives it to. A monitor that falls silent is
left
out after three beats, and only what it checked moves to others.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dotmac.platform import _native, _semconv
from dotmac.platform.errors import DotmacError, InvalidArgument
from dotmac.platform.observability.metrics import counter, histogram
from dotmac.platform.observability.unified_logging import get_logger
from dotmac.platform.service_registry.arguments import check_number
from dotmac.platform.service_registry.probe import Prober

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dotmac.platform.service_registry.models import ServiceInstance

__all__ = ["HealthMonitor", "HealthSettings", "assigned", "judge"]

_log = get_logger(__name__)
_LONGEST_BEAT = 5.0
_AT_ONCE = 64
_MOST_IN_A_ROW = 100
_NOT_REGISTERED = -1
# What changes in no other way, such as an instance whose record a failing server did not hand out, is seen
# by then.
_RELOAD_BEATS = 12


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """How health is checked.

    Args:
        interval: seconds between two checks of one instance.
        timeout: seconds for one check.
        rise: successes in a row that make an instance healthy.
        fall: failures in a row that make it unhealthy.
        allowed_hosts: hosts that may be asked beside the registered one.
    """

    interval: float
    timeout: float
    rise: int
    fall: int
    allowed_hosts: frozenset[str] = frozenset()

    @classmethod
    def read(
        cls, *, interval: object, timeout: object, rise: object, fall: object, allowed_hosts: frozenset[str]
    ) -> HealthSettings:
        """Settings from arguments. Raises: InvalidArgument: one of them is out of its range."""
        return cls(
            interval=check_number(interval, "health_check_interval", 0.05, 86400),
            timeout=check_number(timeout, "health_check_timeout", 0.01, 3600),
            rise=_count(rise, "health_check_rise"),
            fall=_count(fall, "health_check_fall"),
            allowed_hosts=allowed_hosts,
        )


@dataclass(eq=False, slots=True)
class _Check:
    """One instance that this monitor checks.

    Args:
        instance: as it was when the checks began.
        healthy: what the server says of it.
        task: the checks.
    """

    instance: ServiceInstance
    healthy: bool
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """Ends the checks."""
        if self.task is not None:
            self.task.cancel()


def _count(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_IN_A_ROW:
        raise InvalidArgument(field, value, "it must be a whole number from 1 to 100")
    return value


def judge(healthy: bool, run: int, rise: int, fall: int) -> bool:
    """What an instance is after checks in a row.

    Args:
        healthy: what it was taken for.
        run: successes in a row, or failures in a row as a negative number.
        rise, fall: as in `HealthSettings`.
    """
    if healthy:
        return run > -fall
    return run >= rise


def assigned(monitors: list[str], instance: str) -> str:
    """The monitor that checks an instance: the one with the highest hash of both names."""
    return max(
        monitors,
        key=lambda monitor: hashlib.blake2b(f"{monitor}\0{instance}".encode(), digest_size=8).digest(),
    )


class HealthMonitor:
    """Checks instances from one event loop until it is stopped.

    Args:
        settings: how.
        ask: sends a request of the registry to the server.
        meet: says that this monitor lives; tells what changes with any instance, and which monitors live.
        load: reads every live instance.
    """

    def __init__(
        self,
        settings: HealthSettings,
        ask: Callable[[_native.RegistryRequest, str], Awaitable[Any]],
        meet: Callable[[str, int, str], Awaitable[tuple[Any, list[str]]]],
        load: Callable[[], Awaitable[dict[str, list[ServiceInstance]]]],
    ) -> None:
        self._settings, self._ask, self._meet, self._load = settings, ask, meet, load
        self._name = secrets.token_hex(8)
        self._loop = asyncio.get_running_loop()
        self._prober = Prober(settings.timeout, settings.allowed_hosts)
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._checks: dict[tuple[str, str, int], _Check] = {}
        self._task: asyncio.Task[None] | None = None
        # Moments are spread so that processes that start together do not check together.
        self._chance = random.Random(secrets.randbits(64))  # noqa: S311 - jitter

    def runs_in(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether it still runs; it need not be in the loop that asks, if its own one is alive."""
        alive = self._loop is loop or (not self._loop.is_closed() and self._loop.is_running())
        return alive and self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begins, in the running loop."""
        self._task = self._loop.create_task(self._run(), name="dotmac-health-monitor")

    async def stop(self) -> None:
        """Ends, from any loop."""
        if self._task is None or self._loop.is_closed():
            return
        if self._loop is not asyncio.get_running_loop():
            self.abandon()
            return
        self._task.cancel()
        await asyncio.wait([self._task])

    def abandon(self) -> None:
        """Ends without waiting for it, from any thread."""
        if self._task is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def _run(self) -> None:
        beat = min(self._settings.interval, _LONGEST_BEAT)
        seen: tuple[Any, list[str]] | None = None
        beats = 0
        try:
            while True:
                try:
                    live = round(beat * 3000)
                    now = await self._meet(self._name, live, "meeting the other monitors")
                    if now != seen or beats % _RELOAD_BEATS == 0:
                        self._divide(now[1], await self._load())
                        seen = now
                    beats += 1
                except DotmacError as error:
                    _log.warning("health monitoring can't reach the registry", error=str(error))
                except Exception:  # noqa: BLE001 - one turn that fails must not end the checks of all instances
                    _log.exception("a turn of health monitoring failed")
                await asyncio.sleep(beat * self._chance.uniform(0.9, 1.0))
        finally:
            await self._end()

    async def _end(self) -> None:
        checks, self._checks = list(self._checks.values()), {}
        for check in checks:
            check.cancel()
        await asyncio.gather(*(check.task for check in checks if check.task), return_exceptions=True)
        await self._prober.aclose()
        try:
            await self._meet(self._name, 0, "leaving the other monitors")
        except DotmacError as error:
            _log.info("the other monitors take over only after a while", error=str(error))

    def _divide(self, monitors: list[str], services: dict[str, list[ServiceInstance]]) -> None:
        """Takes on what is this monitor's to check, and leaves what is not."""
        mine = {
            (instance.name, instance.id, instance.epoch): instance
            for instances in services.values()
            for instance in instances
            if instance.health_check_url is not None
            and assigned(monitors, f"{instance.name}\0{instance.id}") == self._name
        }
        for key in self._checks.keys() - mine.keys():
            self._checks.pop(key).cancel()
        for key, instance in mine.items():
            check = self._checks.get(key)
            if check is None:
                check = self._checks[key] = _Check(instance, instance.healthy)
                check.task = self._loop.create_task(self._watch(check))
            # What the server had lost and was told again is healthy there, under the same epoch.
            check.healthy = instance.healthy

    async def _watch(self, check: _Check) -> None:
        interval, run = self._settings.interval, 0
        await asyncio.sleep(self._chance.uniform(0, interval))
        while True:
            async with self._slots:
                began = time.monotonic()
                problem = await self._probe(check.instance)
                took = time.monotonic() - began
            counter(_semconv.REGISTRY_HEALTH_CHECKS).add(
                1, {_semconv.REGISTRY_HEALTH: "unhealthy" if problem else "healthy"}
            )
            histogram(_semconv.REGISTRY_HEALTH_DURATION).record(took)
            run = min(run, 0) - 1 if problem else max(run, 0) + 1
            now = judge(check.healthy, run, self._settings.rise, self._settings.fall)
            if now != check.healthy and await self._report(check.instance, now, problem):
                check.healthy = now
            await asyncio.sleep(max(0.0, interval * self._chance.uniform(0.9, 1.1) - took))

    async def _probe(self, instance: ServiceInstance) -> str | None:
        try:
            return await self._prober.probe(instance)
        except Exception as error:  # noqa: BLE001 - whatever it is, this instance can't be found well
            _log.exception("a health check failed by itself", service=instance.name, instance=instance.id)
            return f"{type(error).__name__}: {error}"

    async def _report(self, instance: ServiceInstance, healthy: bool, problem: str | None) -> bool:
        """Tells everybody; False if the next check has to try again.

        That is so where the server can't be told now, and where it has lost the registration, of which it may
        be told again.
        """
        request = _native.RegistryRequest.status(instance.name, instance.id, instance.epoch, healthy)
        try:
            reply = await self._ask(request, f"reporting the health of {instance.name!r}")
        except DotmacError as error:
            _log.warning("health can't be reported", service=instance.name, error=str(error))
            return False
        if reply == _NOT_REGISTERED:
            return False
        _log.info(
            "instance is healthy again" if healthy else "instance is unhealthy",
            service=instance.name,
            instance=instance.id,
            address=instance.address,
            reason=problem,
        )
        return True
