"""A registered instance, as callers get it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ServiceInstance"]


@dataclass(frozen=True, slots=True)
class ServiceInstance:
    """One instance of a service. The same object is handed out as long as nothing about it changes.

    Args:
        id: unique in its service.
        name: the service.
        version: its version.
        host: host name or address.
        port: port.
        tags: its tags.
        metadata: whatever was registered with it; shared, so not to be changed.
        health_check_url: where its health is asked for.
        weight: its share of the traffic against others of the same service.
        zone: where it stands.
        ttl: seconds for which it outlives its process's last sign of life.
        registered_at: seconds since 1970, by the clock of the one who registered it.
        healthy: what the health checks say; True until one has failed often enough.
        epoch: which registration of this id it is.
    """

    id: str
    name: str
    version: str
    host: str
    port: int
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    health_check_url: str | None = None
    weight: int = 1
    zone: str | None = None
    ttl: float = 60.0
    registered_at: float = 0.0
    healthy: bool = True
    epoch: int = 0

    @property
    def address(self) -> str:
        """`host:port`, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """`http://host:port`, without a path."""
        return f"http://{self.address}"

    @property
    def status(self) -> str:
        """`healthy` or `unhealthy`."""
        return "healthy" if self.healthy else "unhealthy"

    def as_dict(self) -> dict[str, Any]:
        """Everything in it as values that JSON knows."""
        return {**self._record(), "healthy": self.healthy, "epoch": self.epoch}

    def to_record(self) -> str:
        """What is stored on the server: everything but what the server keeps beside it."""
        return json.dumps(self._record(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_record(cls, record: str, healthy: bool, epoch: int) -> ServiceInstance:
        """The instance that a stored record describes; unknown fields, of a later version, are left out."""
        known = {key: value for key, value in json.loads(record).items() if key in _STORED}
        known["tags"] = tuple(known.get("tags") or ())
        return cls(**known, healthy=healthy, epoch=epoch)

    @classmethod
    def from_entry(cls, entry: bytes) -> ServiceInstance:
        """The instance in `session epoch ttl status \\0 record`, as the server lists it.

        Raises: ValueError: it can't be read.
        """
        try:
            head, record = entry.decode().split("\0", 1)
            _, epoch, _, status = head.split(" ")
            instance = cls.from_record(record, status == "up", int(epoch))
        except (TypeError, AttributeError) as error:  # not an object, or a field is missing
            raise ValueError(str(error)) from error
        texts = (instance.id, instance.name, instance.version, instance.host)
        if not all(isinstance(text, str) for text in texts) or not isinstance(instance.port, int):
            raise ValueError(f"a field of the wrong type in {record}")
        return instance

    def _record(self) -> dict[str, Any]:
        stored = {name: getattr(self, name) for name in _STORED}
        return {**stored, "tags": list(self.tags), "metadata": dict(self.metadata)}


_STORED = tuple(name for name in ServiceInstance.__slots__ if name not in {"healthy", "epoch"})
