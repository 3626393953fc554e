"""`dotmac doctor`: servers behind sentinels, clusters, and one that fails while it is asked.

Promises: a primary is found through its sentinels, and where they name none, that is a failed check; a node
of a cluster is asked, and an address of the wrong kind is a failed check that tells the right one; a
PostgreSQL that falls silent after the last answer is a failed check with a remedy, no traceback, within the
time limit.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.cli import doctor
from dotmac.platform.connection.embedded import EmbeddedPostgres
from dotmac.platform.core.unified_config import PlatformConfig
from dotmac.platform.testing.topologies import EmbeddedCluster

if TYPE_CHECKING:
    from dotmac.platform.testing.topologies import EmbeddedSentinels


def test_a_primary_behind_sentinels_is_asked(valkey_sentinels: EmbeddedSentinels) -> None:
    url = valkey_sentinels.url
    server, _ = doctor._redis(PlatformConfig(redis_url=url))
    assert (server.state, url in server.detail) == ("ok", True)
    (check,) = doctor._redis(PlatformConfig(redis_url=url.replace("mymaster", "other")))
    assert (check.name, check.state) == ("redis", "failed")


def test_a_node_of_a_cluster_is_asked(each_program: str | None) -> None:
    with EmbeddedCluster(program=each_program) as servers:
        server, _ = doctor._redis(PlatformConfig(redis_url=servers.url))
        assert (server.state, servers.url in server.detail) == ("ok", True)
        check, _ = doctor._redis(PlatformConfig(redis_url=servers.nodes[0].url))
        assert (check.state, "redis+cluster://" in check.remedy) == ("failed", True)
        for node in servers.nodes:
            node.kill()
        (check,) = doctor._redis(PlatformConfig(redis_url=servers.url))
        assert (check.name, check.state) == ("redis", "failed")


@pytest.fixture
def server():
    with EmbeddedPostgres(settings={"fsync": "off"}) as started:
        yield started
        started.resume()


async def test_a_server_that_falls_silent_is_a_failed_check(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = doctor._postgres_checks

    async def then_silence(connection, shown):
        found = await checks(connection, shown)
        server.pause()
        return found

    monkeypatch.setattr(doctor, "_postgres_checks", then_silence)
    monkeypatch.setattr(doctor, "_TIMEOUT", 1.0)
    before = time.monotonic()
    (check,) = await doctor._postgres(PlatformConfig(database={"url": server.url}))
    assert time.monotonic() - before < 20
    assert (check.name, check.state) == ("postgresql", "failed")
    assert "DATABASE_URL" in check.remedy
