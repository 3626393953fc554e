"""pytest fixtures with real servers.

Servers start once per session, on first use, from the extra `embedded`; where `TEST_REDIS_URL` or
`TEST_DATABASE_URL` is set, that server is used instead. Each session gets a PostgreSQL database of its own,
dropped at its end. Data of one test are seen by the next: give names of your own (`unique`) or take
`clean_valkey`. Sentinels and clusters start anew for each test that asks for them.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pytest

from dotmac.platform.connection.embedded import EmbeddedPostgres, EmbeddedValkey
from dotmac.platform.connection.urls import postgres_dsn

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from dotmac.platform.testing.topologies import EmbeddedCluster, EmbeddedSentinels

__all__ = [
    "clean_valkey",
    "platform_env",
    "postgres_database",
    "postgres_server",
    "postgres_url",
    "unique",
    "valkey_cluster",
    "valkey_sentinels",
    "valkey_server",
    "valkey_url",
]


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[EmbeddedValkey]:
    """A Valkey of this session, with `pause`, `kill` and `restart`. Whoever breaks it mends it."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture(scope="session")
def valkey_url(request: pytest.FixtureRequest) -> str:
    """Address of a Redis or Valkey: `TEST_REDIS_URL`, else this session's own server."""
    if given := os.environ.get("TEST_REDIS_URL"):
        return given
    server: EmbeddedValkey = request.getfixturevalue("valkey_server")
    return server.url


@pytest.fixture
def clean_valkey(valkey_url: str) -> str:
    """`valkey_url` with its database emptied before the test."""
    import redis

    with redis.Redis.from_url(valkey_url) as client:
        client.flushdb()
    return valkey_url


@pytest.fixture
def valkey_sentinels() -> Iterator[EmbeddedSentinels]:
    """A primary with one replica and three sentinels, of this test alone; with `failover`."""
    from dotmac.platform.testing.topologies import EmbeddedSentinels

    with EmbeddedSentinels() as servers:
        yield servers


@pytest.fixture
def valkey_cluster() -> Iterator[EmbeddedCluster]:
    """Three primaries, each with a replica, of this test alone; with `migrate_slot` and `failover`."""
    from dotmac.platform.testing.topologies import EmbeddedCluster

    with EmbeddedCluster(replicas=1) as servers:
        yield servers


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL of this session, with `pause`, `kill` and `restart`. Whoever breaks it mends it."""
    # Crashes of the server alone, which tests cause, lose nothing without fsync; only those of a machine do
    with EmbeddedPostgres(settings={"fsync": "off"}) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of an empty database of this session, on `TEST_DATABASE_URL` or on its own server."""
    yield from _database(_postgres_admin(request))


@pytest.fixture
def postgres_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of an empty database of this test alone."""
    yield from _database(_postgres_admin(request))


@pytest.fixture
def platform_env(
    monkeypatch: pytest.MonkeyPatch, valkey_url: str, postgres_url: str
) -> Iterator[dict[str, str]]:
    """Environment variables of a service on the session's servers, and a configuration read from them."""
    from dotmac.platform.core.unified_config import reload_config

    values = {
        "APP_NAME": "tests",
        "ENVIRONMENT": "test",
        "REDIS_URL": valkey_url,
        "DATABASE_URL": postgres_url,
    }
    with monkeypatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        reload_config()
        yield values
    reload_config()


@pytest.fixture
def unique() -> str:
    """A name that nobody else uses."""
    return f"t{secrets.token_hex(6)}"


def _postgres_admin(request: pytest.FixtureRequest) -> str:
    if given := os.environ.get("TEST_DATABASE_URL"):
        return postgres_dsn(given)
    server: EmbeddedPostgres = request.getfixturevalue("postgres_server")
    return server.url


def _database(admin: str) -> Iterator[str]:
    name = f"dotmac_test_{secrets.token_hex(6)}"
    _run(_execute(admin, f'CREATE DATABASE "{name}"'))
    yield urlunsplit(urlsplit(admin)._replace(path=f"/{name}"))
    _run(_execute(admin, f'DROP DATABASE "{name}" WITH (FORCE)'))


async def _execute(dsn: str, statement: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        await connection.execute(statement, timeout=60)
    finally:
        await connection.close(timeout=10)


def _run(work: Coroutine[None, None, None]) -> None:
    """In a thread of its own: fixtures may be set up while the test's event loop runs."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
