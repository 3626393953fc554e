"""What one registry has registered itself, and what the server says to it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from dotmac.platform import _native
from dotmac.platform.connection.engine import failure
from dotmac.platform.errors import InstanceConflict, InstanceNotFound, InvalidArgument
from dotmac.platform.service_registry import arguments
from dotmac.platform.service_registry.models import ServiceInstance

if TYPE_CHECKING:
    from dotmac.platform.connection.engine import Link

__all__ = ["Registrations", "check_reply", "register_request"]


class Registrations:
    """Instances by service and id, and their ids by address."""

    def __init__(self) -> None:
        self._instances: dict[tuple[str, str], ServiceInstance] = {}
        self._ids: dict[tuple[str, str, int], str] = {}
        self._last_epoch = 0

    def next_epoch(self) -> int:
        """Above every earlier one, of earlier processes too as far as clocks agree."""
        self._last_epoch = max(self._last_epoch + 1, time.time_ns() // 1000)
        return self._last_epoch

    def put(self, instance: ServiceInstance) -> None:
        """Adds it, in the place of one with the same service and id."""
        self.drop(instance)
        self._instances[instance.name, instance.id] = instance
        self._ids[instance.name, instance.host, instance.port] = instance.id

    def drop(self, instance: ServiceInstance) -> None:
        """Forgets what has the same service and id, if anything has."""
        known = self._instances.pop((instance.name, instance.id), None)
        if known is not None:
            self._ids.pop((known.name, known.host, known.port), None)

    def take_all(self) -> list[ServiceInstance]:
        """All of them, which are forgotten."""
        instances, self._instances, self._ids = list(self._instances.values()), {}, {}
        return instances

    def get(self, name: str, instance_id: str) -> ServiceInstance | None:
        """The instance of that service and id."""
        return self._instances.get((name, instance_id))

    def id_at(self, name: str, host: str, port: int) -> str | None:
        """The id of the service's instance at that address."""
        return self._ids.get((name, host, port))

    def find(self, instance: object) -> ServiceInstance:
        """The own instance that a caller means, by itself or by its id.

        Raises: InstanceNotFound: it is not registered here. InvalidArgument: it is neither.
        """
        if isinstance(instance, ServiceInstance):
            own = self.get(instance.name, instance.id)
        elif isinstance(instance, str):
            own = next((mine for mine in self._instances.values() if mine.id == instance), None)
        else:
            raise InvalidArgument("instance", instance, "it must be a ServiceInstance or the id of one")
        if own is None:
            raise InstanceNotFound(
                f"{instance!r} is not registered by this registry; only the one that did can take it out"
            )
        return own


def register_request(instance: ServiceInstance, *, replace: bool) -> _native.RegistryRequest:
    """What registers an instance. Raises: InvalidArgument: its record is too large."""
    record = arguments.check_record_size(instance.to_record())
    ttl = round(instance.ttl * 1000)
    return _native.RegistryRequest.register(instance.name, instance.id, instance.epoch, ttl, replace, record)


def check_reply(reply: Any, instance: ServiceInstance, link: Link) -> None:
    """Raises what the answer to a registration says, unless it was accepted."""
    if isinstance(reply, tuple):
        raise failure(reply, f"registering {instance.name!r}", link)
    if reply[0] >= 0:
        return
    if len(reply) > 2:  # noqa: PLR2004 - the session that has it, and who that is
        who = json.loads(reply[2])
        raise InstanceConflict(
            f"{instance.name!r} instance {instance.id!r} is registered by process {who.get('pid')} on "
            f"{who.get('host')}, which is alive; choose another instance_id, or replace=True"
        )
    raise InstanceConflict(f"{instance.name!r} instance {instance.id!r} has a newer registration")
