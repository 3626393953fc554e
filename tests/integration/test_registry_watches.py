"""Promises about the services that a process follows, on a real server:

- however many unknown names are looked up, a bounded number of them is followed, and read after a reconnect;
- what has instances, or is in use, stays followed and up to date; what was dropped is read again when it is
  looked up; counts of picks stay;
- an unknown name that is not looked up any more is dropped after some minutes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform.service_registry import directory
from support.registry import make, until

if TYPE_CHECKING:
    import pytest

    from dotmac.platform.service_registry import ServiceRegistry


def follows(registry: ServiceRegistry, name: str) -> bool:
    return registry._link.engine().follows(name)


async def test_unknown_names_are_followed_in_a_bounded_number(valkey_url: str, unique: str) -> None:
    async with make(valkey_url, unique) as registry, make(valkey_url, unique, request_timeout=9.0) as other:
        instance = await registry.register_service("api", "1", "h", 1)
        for _ in range(3):
            assert await registry.get_service("api") == instance
        for n in range(1500):
            assert await registry.get_service(f"unknown-{n}") is None
            assert registry.pick("unknown-0") is None
        known = registry._directory
        assert len(known._services) <= directory._MOST_EMPTY + 2
        assert len(known._pickers) <= directory._MOST_EMPTY + 2
        assert len(known.plain) <= directory._MOST_EMPTY + 2

        async def bounded() -> bool:
            return int(registry.stats()["followed"]) <= directory._MOST_EMPTY + 2

        await until(bounded)
        assert registry.stats()["picks"] == 3 + 2 * 1500, "what is dropped still counts"
        assert follows(registry, "api")
        assert follows(registry, "unknown-1499")
        assert not follows(registry, "unknown-1")

        # What was dropped is known as soon as it is asked for, and followed from then on.
        assert await registry.get_service("unknown-1") is None
        late = await other.register_service("unknown-1", "1", "h", 1)

        async def seen() -> bool:
            return await registry.get_service("unknown-1") == late

        await until(seen)


async def test_an_unknown_name_is_dropped_when_it_was_not_used_for_minutes(
    valkey_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make(valkey_url, unique) as registry:
        await registry.register_service("api", "1", "h", 1)
        assert await registry.get_service("api")
        await registry.discover_services("forgotten")
        assert await registry.get_service("used") is None
        known = registry._directory
        began = known._tidy_at - directory._TIDY_EVERY
        for minutes in range(1, 8):
            registry.pick("used")
            monkeypatch.setattr(directory.time, "monotonic", lambda at=began + minutes * 61.0: at)
            await registry.discover_services("api")
        monkeypatch.undo()
        assert set(known._services) == {"api", "used"}

        async def dropped() -> bool:
            return not follows(registry, "forgotten")

        await until(dropped)
        assert follows(registry, "used")
        assert follows(registry, "api")


async def test_pickers_of_many_filters_are_bounded(valkey_url: str, unique: str) -> None:
    async with make(valkey_url, unique) as registry:
        instance = await registry.register_service("api", "1", "h", 1, tags=["a"])
        for n in range(directory._MOST_PICKERS + 50):
            registry.pick("api", tags=[f"t{n}"])
        assert len(registry._directory._pickers) <= directory._MOST_PICKERS
        assert registry.pick("api", tags=["a"]) == instance
