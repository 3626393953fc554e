"""The service registry: register instances, find them, choose one, watch their health."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import time
import weakref
from typing import TYPE_CHECKING, Any

from dotmac.platform import _native, _semconv
from dotmac.platform._closing import AsyncClosing
from dotmac.platform.connection.clients import target_from_client
from dotmac.platform.connection.engine import Link, failure
from dotmac.platform.errors import DotmacError, EngineClosed, InstanceConflict
from dotmac.platform.observability.metrics import counter
from dotmac.platform.observability.tracing import span
from dotmac.platform.observability.unified_logging import get_logger
from dotmac.platform.service_registry import arguments
from dotmac.platform.service_registry.directory import Directory, check_strategy
from dotmac.platform.service_registry.health import HealthMonitor, HealthSettings
from dotmac.platform.service_registry.models import ServiceInstance
from dotmac.platform.service_registry.registrations import Registrations, check_reply, register_request
from dotmac.platform.service_registry.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dotmac.platform.service_registry.config import ServiceRegistryConfig

__all__ = ["ServiceRegistry"]

_log = get_logger(__name__)
_PAGE = 500
_everyone: weakref.WeakSet[ServiceRegistry] = weakref.WeakSet()


class ServiceRegistry(AsyncClosing):
    """Instances of services on one server.

    Opens nothing until it is used, so it may be made at import time, and works in every event loop, thread
    and
    forked child from then on. What it registers is kept alive by the engine, whatever the interpreter does,
    and
    taken out by `aclose` and at the end of the process.

    Args:
        redis_url: the server; None takes the configuration's. A redis-py or valkey-py client may be given
            too.
        config: settings; arguments win over it, and it wins over the environment.
        default_ttl: seconds for which a registration outlives its process, where a call names none.
        load_balancing_strategy: "round_robin", "random", "least_connections", "power_of_two" or "peak_ewma".
        health_check_interval: seconds between two health checks of one instance.
        health_check_timeout: seconds for one health check.
        health_check_rise: successes in a row that make an instance healthy again.
        health_check_fall: failures in a row that make it unhealthy.
        allowed_health_hosts: hosts that health checks may ask beside the registered one.
        panic_threshold: share of healthy instances below which all are chosen from, 0 to 1.
        namespace: first part of the server's keys.
        request_timeout: seconds that the server may take for an answer.

    Raises: InvalidArgument, ConfigurationError: an argument or a setting can't be used.
    """

    _own: Registrations
    _monitor: HealthMonitor | None

    def __init__(
        self,
        redis_url: object = None,
        *,
        config: ServiceRegistryConfig | None = None,
        default_ttl: float | None = None,
        load_balancing_strategy: str | None = None,
        health_check_interval: float | None = None,
        health_check_timeout: float | None = None,
        health_check_rise: int | None = None,
        health_check_fall: int | None = None,
        allowed_health_hosts: Iterable[str] = (),
        panic_threshold: float = 0.5,
        namespace: str | None = None,
        request_timeout: float | None = None,
    ) -> None:
        if config is None:
            from dotmac.platform.core.unified_config import get_config

            config = get_config().service_registry
        if redis_url is None:
            redis_url = config.redis_url
        if redis_url is None:
            from dotmac.platform.core.unified_config import get_config

            everything = get_config()
            redis_url = everything.service_registry.redis_url or everything.get_redis_url()
        namespace = config.namespace if namespace is None else namespace
        if isinstance(redis_url, str):
            timeout = config.request_timeout if request_timeout is None else request_timeout
            self._link = Link(
                redis_url,
                namespace=namespace,
                request_timeout=arguments.check_number(timeout, "request_timeout", 0.001, 3600),
                connect_timeout=config.connect_timeout,
                partitions=config.partitions,
            )
        else:
            target = target_from_client(redis_url)
            self._link = Link(target=target, namespace=namespace, partitions=config.partitions)
        self._ttl = self._check_ttl(config.default_ttl if default_ttl is None else default_ttl, "default_ttl")
        strategy = (
            config.load_balancing_strategy if load_balancing_strategy is None else load_balancing_strategy
        )
        threshold = arguments.check_number(panic_threshold, "panic_threshold", 0, 1, "parts of one")
        self._directory = Directory(self._link, check_strategy(strategy), round(threshold * 100))
        self._allowed = frozenset(
            host.lower() for host in arguments.check_tags(allowed_health_hosts, "allowed_health_hosts")
        )
        self._health = HealthSettings.read(
            interval=config.health_check_interval if health_check_interval is None else health_check_interval,
            timeout=config.health_check_timeout if health_check_timeout is None else health_check_timeout,
            rise=config.health_check_rise if health_check_rise is None else health_check_rise,
            fall=config.health_check_fall if health_check_fall is None else health_check_fall,
            allowed_hosts=self._allowed,
        )
        self._closed = False
        self._after_fork()
        _everyone.add(self)

    def __repr__(self) -> str:
        return f"<ServiceRegistry {self._link.where}>"

    # ---- registration

    async def register_service(
        self,
        name: str,
        version: str,
        host: str,
        port: int,
        tags: Iterable[str] = (),
        metadata: Mapping[str, Any] | None = None,
        health_check_url: str | None = None,
        *,
        ttl: float | None = None,
        weight: int = 1,
        zone: str | None = None,
        instance_id: str | None = None,
        replace: bool = False,
    ) -> ServiceInstance:
        """Registers an instance, and keeps it until `deregister_service`, `aclose` or the end of the process.

        The same name, host and port again change the registration that this registry made before.

        Args:
            name: the service, 1 to 255 bytes.
            version: its version.
            host: host name or address under which others reach it.
            port: 1 to 65,535.
            tags: what lookups can ask for.
            metadata: what JSON can say; lookups can ask for equality.
            health_check_url: where its health is asked for; its host must be `host` unless allowed.
            ttl: seconds for which it outlives this process's last sign of life, 0.5 s to 7 days; None for
                the registry's.
            weight: its share of the traffic, 1 to 10,000.
            zone: where it stands.
            instance_id: a name of its own, unique in the service; None makes one.
            replace: take `instance_id` over from a live session that has it.
        Returns: the instance.
        Raises: InvalidArgument: an argument can't be used. InstanceConflict: a live session has that
            instance_id.
            ServerUnavailable, ServerRefused: the server's side failed; what was registered before stays so,
            and nothing else is registered.
        """
        name, host, port = arguments.check_name(name), arguments.check_host(host), arguments.check_port(port)
        if instance_id is None:
            instance_id = self._own.id_at(name, host, port) or f"{name[:64]}-{secrets.token_hex(8)}"
        instance = ServiceInstance(
            id=arguments.check_name(instance_id, "instance_id"),
            name=name,
            version=arguments.check_text(version, "version"),
            host=host,
            port=port,
            tags=arguments.check_tags(tags),
            metadata=arguments.check_metadata(metadata),
            health_check_url=arguments.check_health_url(health_check_url, host, self._allowed),
            weight=arguments.check_weight(weight),
            zone=None if zone is None else arguments.check_text(zone, "zone"),
            ttl=self._ttl if ttl is None else self._check_ttl(ttl),
            registered_at=round(time.time(), 3),
            epoch=self._own.next_epoch(),
        )
        request = register_request(instance, replace=replace)
        with span(_semconv.SPAN_REGISTRY_REGISTER, {_semconv.REGISTRY_SERVICE: name}):
            self._check_open()
            side = await self._link.side()
            engine, before = self._link.engine(), self._own.get(name, instance.id)
            try:
                check_reply(await side.bridge.registry(request), instance, self._link)
                self._check_open()  # it may have been closed meanwhile
                self._own.put(instance)
                await self._reread(name)
            except InstanceConflict:
                self._own.drop(instance)
                raise
            except BaseException:
                self._undo(engine, instance, before)
                raise
        counter(_semconv.REGISTRY_REGISTRATIONS).add(1)
        return instance

    async def deregister_service(self, instance: ServiceInstance | str) -> bool:
        """Takes out an instance that this registry has registered.

        Args:
            instance: what `register_service` returned, or its id.
        Returns: True if it was still registered; False if it had expired or was taken over.
        Raises: InstanceNotFound: this registry did not register it. ServerUnavailable: the server did not
            answer
            in time; it is told as soon as it answers again.
        """
        own = self._own.find(instance)
        with span(_semconv.SPAN_REGISTRY_DEREGISTER, {_semconv.REGISTRY_SERVICE: own.name}):
            side = await self._link.side()
            self._own.drop(own)
            reply = await side.bridge.registry(_native.RegistryRequest.deregister(own.name, own.id))
            if isinstance(reply, tuple):
                raise failure(reply, f"deregistering {own.name!r}", self._link)
            await self._reread(own.name)
        counter(_semconv.REGISTRY_DEREGISTRATIONS).add(1)
        return bool(reply[0] == 1)

    # ---- lookup

    async def discover_services(
        self,
        name: str,
        *,
        tags: Iterable[str] = (),
        any_tags: Iterable[str] = (),
        no_tags: Iterable[str] = (),
        metadata: Mapping[str, Any] | None = None,
        zone: str | None = None,
        healthy_only: bool = True,
    ) -> list[ServiceInstance]:
        """The instances of a service, from a local snapshot that follows every change.

        Args:
            name: the service.
            tags: tags that an instance must all have.
            any_tags: tags of which it must have one.
            no_tags: tags that it must not have.
            metadata: metadata that it must have with exactly these values.
            zone: where it must stand.
            healthy_only: leave those out whose health checks fail.
        Returns: a list in the order of their ids; empty where there is none.
        Raises: InvalidArgument: an argument can't be used. ServerUnavailable, ServerRefused: the service was
            never
            read before and can't be read now.
        """
        conditions = arguments.check_filter(tags, any_tags, no_tags, metadata, zone)
        with span(_semconv.SPAN_REGISTRY_DISCOVER, {_semconv.REGISTRY_SERVICE: str(name)}):
            service = await self._directory.follow(name)
        counter(_semconv.REGISTRY_DISCOVERIES).add(1)
        return service.instances(conditions, healthy_only)

    async def get_service(
        self, name: str, *, strategy: str | None = None, tags: Iterable[str] = ()
    ) -> ServiceInstance | None:
        """Chooses one instance. From the second time on without any I/O, and without suspending.

        Nothing is counted as in flight: that is what `use_service` is for, and what the strategies that look
        at
        load feed on.

        Args:
            name: the service.
            strategy: how to choose; None for the registry's.
            tags: tags that it must all have.
        Returns: the instance; None where there is none. Below the panic threshold unhealthy ones are chosen
            too.
        Raises: InvalidArgument: an argument can't be used. ServerUnavailable, ServerRefused: the service was
            never
            read before and can't be read now.
        """
        try:
            if strategy is None and not tags:
                return self._directory.plain[name]()
        except (KeyError, TypeError):
            pass  # the first time, or a name that is refused below
        return (await self._directory.picker(name, strategy, tags)).pick()

    def pick(
        self, name: str, *, strategy: str | None = None, tags: Iterable[str] = ()
    ) -> ServiceInstance | None:
        """`get_service` without an event loop. Blocks only on the first use of a service."""
        try:
            if strategy is None and not tags:
                return self._directory.plain[name]()
        except (KeyError, TypeError):
            pass  # the first time, or a name that is refused below
        return self._directory.picker_sync(name, strategy, tags).pick()

    def use_service(self, name: str, *, strategy: str | None = None, tags: Iterable[str] = ()) -> Usage:
        """Chooses one instance for the length of a block, counting the call, its latency and its outcome.

        Args: as in `get_service`.
        Returns: a context manager for `async with` or `with`, whose target is the instance.
        Raises: on entering: NoInstanceAvailable: there is none; and what `get_service` raises.
        """
        return Usage(
            name,
            lambda: self._directory.picker(name, strategy, tags),
            lambda: self._directory.picker_sync(name, strategy, tags),
        )

    def explain_pick(
        self, name: str, *, strategy: str | None = None, tags: Iterable[str] = ()
    ) -> dict[str, Any]:
        """What a pick chooses from: strategy, how many match and are chosen from, panic, staleness."""
        matching, chosen, panicking = self._directory.picker_sync(name, strategy, tags).explain()
        return {
            "service": name,
            "strategy": check_strategy(strategy) or self._directory.strategy,
            "matching": matching,
            "chosen_from": chosen,
            "panicking": panicking,
            "stale": self.is_stale(name),
        }

    def is_stale(self, name: str) -> bool:
        """Whether the snapshot of a service may be out of date: never read, or the server is away."""
        return self._directory.is_stale(name)

    async def list_services(self) -> dict[str, list[ServiceInstance]]:
        """Every live instance in this namespace by service, read from the server.

        A record that can't be read is left out, and logged.

        Raises: ServerUnavailable, ServerRefused: the server's side failed.
        """
        found: dict[str, list[ServiceInstance]] = {}
        malformed, why = 0, ""
        for entry in await self._directory.everything(_PAGE, "listing services"):
            try:
                instance = ServiceInstance.from_entry(entry)
            except ValueError as error:
                malformed += 1
                why = str(error)
            else:
                found.setdefault(instance.name, []).append(instance)
        if malformed:
            _log.warning("registrations can't be read", count=malformed, last=why)
        return found

    # ---- health

    async def start_health_monitoring(self) -> None:
        """Checks the health of every registered instance that names a health check URL, in the running loop.

        All monitors of a namespace share the work: each instance is checked by one of them. Errors of the
        server
        are logged and survived. Calling it again changes nothing.

        Raises: EngineClosed: the registry was closed.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._monitor is not None and self._monitor.runs_in(loop):
            return
        self._monitor = HealthMonitor(
            self._health, self._directory.ask, self._directory.meet, self.list_services
        )
        self._monitor.start()

    async def stop_health_monitoring(self) -> None:
        """Ends what `start_health_monitoring` began; the other monitors take over at once. Idempotent."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.stop()

    # ---- end

    def stats(self) -> dict[str, Any]:
        """Counters of this process's engine since it started."""
        return self._link.engine().stats()

    async def aclose(self) -> None:
        """Takes out what it registered, ends its health checks and leaves the server. Idempotent."""
        if self._closed:
            return
        self._say_goodbye()
        try:
            await self.stop_health_monitoring()
        finally:
            await self._link.aclose()

    def close(self) -> None:
        """`aclose` for threads without an event loop."""
        if self._closed:
            return
        self._say_goodbye()
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.abandon()
        self._link.close()

    # ---- inside

    def _after_fork(self) -> None:
        """A new process: nothing is registered here, nothing is followed, no task runs."""
        self._own = Registrations()
        self._directory.forget()
        self._monitor = None

    def _say_goodbye(self) -> None:
        """Waits for nothing: the engine repeats it until it is answered, or ends the session."""
        self._closed = True
        self._directory.close()
        for instance in self._own.take_all():
            self._link.engine().tell(_native.RegistryRequest.deregister(instance.name, instance.id))

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("this registry was closed; make a new one")

    def _undo(
        self, engine: _native.Engine, instance: ServiceInstance, before: ServiceInstance | None
    ) -> None:
        """A registration failed, though it may have arrived: what was there before is told again, or nothing.

        The engine repeats both until they are answered.
        """
        if before is None or self._closed:
            self._own.drop(instance)
            engine.tell(_native.RegistryRequest.deregister(instance.name, instance.id))
        else:
            before = dataclasses.replace(before, epoch=self._own.next_epoch())
            self._own.put(before)
            engine.tell(register_request(before, replace=False))

    def _check_ttl(self, value: object, field: str = "ttl") -> float:
        return arguments.check_number(value, field, arguments.SHORTEST_TTL, arguments.LONGEST_TTL)

    async def _reread(self, name: str) -> None:
        """After a change of our own: the next lookup sees it, if this process follows the service."""
        if not self._link.engine().follows(name):
            return
        try:
            await self._directory.ask(_native.RegistryRequest.follow(name, True), f"reading {name!r}")
        except (
            DotmacError
        ) as error:  # the change itself was made, and its announcement leads to a reading too
            _log.warning("a service can't be read after a change", service=name, error=str(error))


def _in_child() -> None:
    for registry in list(_everyone):
        registry._after_fork()  # noqa: SLF001 - our own


os.register_at_fork(after_in_child=_in_child)
