"""What several registry tests need: registries, waiting, and records written by hand."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotmac.platform.service_registry import ServiceRegistry, ServiceRegistryConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import redis

SCRIPTS = Path(__file__).parents[2] / "rust/engine/src/scripts"


def make(url: str, namespace: str, **arguments: Any) -> ServiceRegistry:
    """A registry whose settings don't come from the environment."""
    return ServiceRegistry(url, config=ServiceRegistryConfig(), namespace=namespace, **arguments)


async def until(condition: Callable[[], Awaitable[bool]], within: float = 20.0) -> float:
    """Seconds until the condition held; fails after `within`."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within, "the condition did not come true in time"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def register_by_hand(
    client: redis.Redis, namespace: str, sid: str, record: str, *, instance: str = "i", ttl: int = 60_000
) -> None:
    """Registers any text as a record, under a session that exists."""
    text = "".join(
        (SCRIPTS / f"{name}.lua").read_text() for name in ("common", "registry_common", "registry_register")
    )
    keys = [f"{{{namespace}:0}}:{suffix}" for suffix in ("s", "m", "ri", "rv", "rn", "re", "rm")]
    script = client.register_script(text)
    arguments = ["api", instance, sid, 10**9, 1, ttl, 0, record, f"{{{namespace}:0}}:reg"]
    assert script(keys=keys, args=arguments)[0] == 1
