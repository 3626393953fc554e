"""The pytest plugin that users get.

Promises: its fixtures hand out real servers; each session and, where asked for, each test has a database of
its own; `platform_env` makes `get_config` speak of these servers; `TEST_REDIS_URL` and `TEST_DATABASE_URL`
win over servers of the plugin's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import asyncpg
import redis.asyncio

from dotmac.platform.core.unified_config import get_config

if TYPE_CHECKING:
    from pathlib import Path


async def test_servers_are_real_and_databases_ones_own(
    clean_valkey: str, postgres_url: str, postgres_database: str, unique: str
) -> None:
    async with redis.asyncio.from_url(clean_valkey) as client:
        assert await client.dbsize() == 0
        await client.set(unique, 1)
    names = set()
    for url in (postgres_url, postgres_database):
        connection = await asyncpg.connect(url)
        names.add(await connection.fetchval("SELECT current_database()"))
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE tablename = $1", unique) == 0
        await connection.close()
    assert len(names) == 2
    assert all(name.startswith("dotmac_test_") for name in names)


def test_the_configuration_speaks_of_them(
    platform_env: dict[str, str], valkey_url: str, postgres_url: str
) -> None:
    config = get_config()
    assert (config.get_redis_url(), config.get_database_url()) == (valkey_url, postgres_url)
    assert platform_env["REDIS_URL"] == os.environ["REDIS_URL"] == valkey_url


USERS_TEST = """
import os
import redis



def test_given_servers_are_used(valkey_url, postgres_url):
    assert valkey_url == os.environ["TEST_REDIS_URL"]
    assert os.environ["TEST_DATABASE_URL"].split("?")[1] in postgres_url
    with redis.Redis.from_url(valkey_url) as client:
        assert client.ping()
"""


def test_given_servers_win(valkey_url: str, postgres_url: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["dotmac.platform.testing.plugin"]\n')
    (tmp_path / "test_users.py").write_text(USERS_TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "TEST_REDIS_URL": valkey_url, "TEST_DATABASE_URL": postgres_url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
