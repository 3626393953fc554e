"""Promises: every bad argument of the registry is refused by a typed error that names field and value, before
anything is sent; a registry can be made at import time without a server; instances are values.
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dotmac.platform import _native
from dotmac.platform.errors import InvalidArgument
from dotmac.platform.service_registry import (
    LoadBalancingStrategy,
    ServiceInstance,
    ServiceRegistry,
    ServiceRegistryConfig,
)

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def registry() -> ServiceRegistry:
    return ServiceRegistry(NOWHERE, config=ServiceRegistryConfig())


GOOD: dict[str, Any] = {"name": "api", "version": "1.0", "host": "localhost", "port": 8000}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("name", value)
            for value in ("", " api", "a\0b", "a\nb", "x" * 256, "\udc80", None, 5, b"api", ["api"])
        ],
        *[("version", value) for value in ("", None, 1.0, "v" * 129)],
        *[
            ("host", value)
            for value in (
                "",
                "a b",
                "http://a",
                "a:80",
                "[::1]",
                "-a",
                "ä.example",
                None,
                "h" * 254,
                "a..b",
                ".a",
                "h" * 64,
                "a-",
                "a.b-",
            )
        ],
        *[("port", value) for value in (0, -1, 65536, "80", 80.0, True, None)],
        *[
            ("tags", value)
            for value in ("user", [""], [1], 5, None, {"a": 1}, ["a\0"], [str(n) for n in range(65)])
        ],
        *[
            ("metadata", value)
            for value in ([], {1: 2}, {"a": math.nan}, {"a": {1, 2}}, {"a": "\udc80"}, "x")
        ],
        ("metadata", {"a": "x" * 70_000}),
        *[
            ("health_check_url", value)
            for value in (
                "",
                "localhost:8000/health",
                "ftp://localhost/health",
                "file:///etc/passwd",
                "http://169.254.169.254/latest",
                "http://other:8000/health",
                "http://user:secret@localhost/health",
                "http://localhost:99999/",
                "http://local host/",
                5,
            )
        ],
        *[("ttl", value) for value in (0, -1, 0.1, math.nan, math.inf, "60", True, 1e9)],
        *[("weight", value) for value in (0, -1, 1.5, "2", True, 10_001)],
        *[("zone", value) for value in ("", 5, "z" * 129)],
        *[("instance_id", value) for value in ("", 5, "i" * 256)],
    ],
)
async def test_a_bad_registration_names_the_field(
    registry: ServiceRegistry, field: str, value: object
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await registry.register_service(**{**GOOD, field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("name", {"name": ""}),
        ("name", {"name": ["api"]}),
        ("strategy", {"name": "api", "strategy": "best"}),
        ("strategy", {"name": "api", "strategy": 5}),
        ("tags", {"name": "api", "tags": "user"}),
    ],
)
async def test_a_bad_lookup_names_the_field(
    registry: ServiceRegistry, field: str, arguments: dict[str, Any]
) -> None:
    for call in (registry.pick, registry.explain_pick):
        with pytest.raises(InvalidArgument) as caught:
            call(**arguments)
        assert caught.value.field == field
    with pytest.raises(InvalidArgument):
        await registry.get_service(**arguments)
    with pytest.raises(InvalidArgument):
        async with registry.use_service(**arguments):
            pass


async def test_bad_conditions_of_a_discovery_name_the_field(registry: ServiceRegistry) -> None:
    for field, value in (("any_tags", "a"), ("no_tags", [5]), ("metadata", {1: 1}), ("zone", "")):
        with pytest.raises(InvalidArgument) as caught:
            await registry.discover_services("api", **{field: value})
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("default_ttl", {"default_ttl": 0}),
        ("strategy", {"load_balancing_strategy": "best"}),
        ("health_check_interval", {"health_check_interval": 0}),
        ("health_check_timeout", {"health_check_timeout": -1}),
        ("health_check_rise", {"health_check_rise": 0}),
        ("health_check_fall", {"health_check_fall": 1.5}),
        ("panic_threshold", {"panic_threshold": 2}),
        ("allowed_health_hosts", {"allowed_health_hosts": "example.org"}),
        ("request_timeout", {"request_timeout": 0}),
        ("namespace", {"namespace": "a b"}),
    ],
)
def test_a_bad_setting_names_the_field(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ServiceRegistry(NOWHERE, config=ServiceRegistryConfig(), **arguments)
    assert caught.value.field == field


def test_arguments_win_over_the_configuration() -> None:
    config = ServiceRegistryConfig(default_ttl=120, health_check_interval=9)
    registry = ServiceRegistry(NOWHERE, config=config, default_ttl=7)
    assert (registry._ttl, registry._health.interval) == (7.0, 9.0)


def test_an_instance_is_a_value() -> None:
    instance = ServiceInstance("i", "api", "1", "::1", 80, tags=("a",), metadata={"k": [1]})
    assert instance == ServiceInstance("i", "api", "1", "::1", 80, tags=("a",), metadata={"k": [1]})
    assert hash(instance)
    assert instance
    assert (instance.address, instance.url, instance.status) == ("[::1]:80", "http://[::1]:80", "healthy")
    assert pickle.loads(pickle.dumps(instance)) == instance
    with pytest.raises(AttributeError):
        instance.port = 81  # type: ignore[misc] - that is what is refused


@given(
    tags=st.lists(st.text(min_size=1)).map(tuple),
    metadata=st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)
    ),
    zone=st.none() | st.text(min_size=1),
    healthy=st.booleans(),
)
def test_a_record_survives_the_way_to_the_server_and_back(
    tags: tuple[str, ...], metadata: dict[str, Any], zone: str | None, healthy: bool
) -> None:
    instance = ServiceInstance(
        "i", "api", "1", "h", 80, tags=tags, metadata=metadata, zone=zone, healthy=healthy, epoch=3
    )
    assert ServiceInstance.from_record(instance.to_record(), healthy, 3) == instance


def test_a_field_of_a_later_version_is_left_out() -> None:
    record = ServiceInstance("i", "api", "1", "h", 80).to_record()[:-1] + ',"colour":"red"}'
    assert ServiceInstance.from_record(record, True, 0).id == "i"


def test_every_strategy_of_the_settings_is_known_to_the_extension() -> None:
    assert [strategy.value for strategy in LoadBalancingStrategy] == list(_native.STRATEGIES)
    for strategy in LoadBalancingStrategy:
        config = ServiceRegistryConfig(load_balancing_strategy=strategy)
        assert ServiceRegistry(NOWHERE, config=config)._directory.strategy == strategy.value
