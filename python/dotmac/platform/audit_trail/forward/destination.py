"""What a destination of forwarding is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dotmac.platform.errors import DeliveryFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dotmac.platform.audit_trail.models import AuditEvent

__all__ = ["Destination", "Refused", "payload_of", "told"]

PAYLOADS = ("json", "ocsf")


class Refused(DeliveryFailed):
    """The destination answered that it will never take these events: trying them again changes nothing."""

    retryable = False


@runtime_checkable
class Destination(Protocol):
    """Takes batches of events, one at a time.

    Attributes:
        label: names it in logs, metrics and, by default, in the table of positions; without secrets.
        settle: seconds for which the connection has to stay whole after a batch, before the batch counts as
            delivered: for protocols that have no acknowledgement. 0: `send` returns after one.
    """

    label: str
    settle: float

    async def send(self, events: Sequence[AuditEvent], key: str) -> None:
        """Deliver a batch, in order.

        Args: key: the same whenever the same batch is sent again.
        Raises: DeliveryFailed: it may or may not have arrived. Refused: it never will.
        """

    def settled(self) -> bool:
        """Is everything sent so far on its way past this machine, and the connection whole?

        Raises: DeliveryFailed: the connection broke after a batch was sent.
        """

    async def aclose(self) -> None:
        """Let go of connections."""


def payload_of(event: AuditEvent, payload: str) -> dict[str, Any]:
    """An event as JSON types, in our own form or as OCSF."""
    said = event.to_dict()
    if payload == "ocsf":
        from dotmac.platform.audit_trail.exports.ocsf import ocsf_event

        return ocsf_event(said)
    return said


def told(said: dict[str, Any]) -> str:
    """Compact JSON."""
    return json.dumps(said, ensure_ascii=False, separators=(",", ":"))
