"""Promises: rise and fall mean what they say; exactly one of the monitors checks an instance, and when one of
them leaves only its own instances move; forbidden addresses are recognised in every notation.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dotmac.platform.service_registry.health import assigned, judge
from dotmac.platform.service_registry.probe import Prober, forbidden


@pytest.mark.parametrize(
    ("healthy", "run", "expected"),
    [
        (True, -2, True),
        (True, -3, False),
        (True, 5, True),
        (False, 1, False),
        (False, 2, True),
        (False, -9, False),
    ],
)
def test_rise_and_fall(healthy: bool, run: int, expected: bool) -> None:
    assert judge(healthy, run, rise=2, fall=3) is expected


@given(st.lists(st.text(min_size=1), min_size=2, max_size=8, unique=True), st.lists(st.text(), max_size=50))
def test_only_the_instances_of_a_lost_monitor_move(monitors: list[str], instances: list[str]) -> None:
    gone, *left = monitors
    for instance in instances:
        before = assigned(monitors, instance)
        assert assigned(list(reversed(monitors)), instance) == before
        if before != gone:
            assert assigned(left, instance) == before


def test_monitors_share_evenly() -> None:
    monitors = [f"m{n}" for n in range(4)]
    loads = [0] * 4
    for n in range(4000):
        loads[monitors.index(assigned(monitors, f"api\0{n}"))] += 1
    assert min(loads) > 850


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "fe80::1%eth0",
        "fe80::1",
        "::ffff:169.254.169.254",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "fd00:ec2::254",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a9fe:a9fe",
        "::169.254.169.254",
        "2002:a9fe:a9fe::1",
        "2001:0:a9fe:a9fe::1",
        "2001:0:cb00:7109:0:0:5601:5601",
        "64:ff9b::100.100.100.200",
    ],
)
def test_addresses_that_are_never_asked(address: str) -> None:
    assert forbidden(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "::1",
        "10.0.0.7",
        "192.168.1.1",
        "203.0.113.9",
        "fd12::1",
        "64:ff9b::203.0.113.9",
        "2002:cb00:7109::1",
    ],
)
def test_addresses_that_may_be_asked(address: str) -> None:
    assert not forbidden(address)


async def test_a_link_local_address_is_refused_without_a_packet() -> None:
    from dotmac.platform.service_registry import ServiceInstance

    instance = ServiceInstance(
        "i", "api", "1", "169.254.169.254", 80, health_check_url="http://169.254.169.254/latest"
    )
    prober = Prober(timeout=0.5)
    assert await prober.probe(instance) == "169.254.169.254 may not be asked for health"
    await prober.aclose()
