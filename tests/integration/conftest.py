"""Fixtures of the integration tests."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.connection.embedded import EmbeddedPostgres


@pytest.fixture(scope="session")
def run_apart():
    """Runs a coroutine in a thread and a loop of its own: a fixture may be asked for while a loop runs."""

    def run(work):
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(asyncio.run, work).result()

    return run


async def _migrate(url):
    async with AuditAggregator(url) as audit:
        await audit.migrate()


@pytest.fixture(scope="session")
def migrated_url(postgres_url, run_apart):
    """A database with the audit tables, shared by the session: give names of your own (`unique`)."""
    run_apart(_migrate(postgres_url))
    return postgres_url


@pytest.fixture(scope="module")
def migrated_server(run_apart):
    """A server with the audit tables for one file, which may stop and kill it; fsync as in production."""
    with EmbeddedPostgres() as postgres:
        run_apart(_migrate(postgres.url))
        yield postgres


@pytest.fixture
async def trail_url(postgres_database):
    """A trail of its own: what is found in one must not come from another test."""
    await _migrate(postgres_database)
    return postgres_database


@pytest.fixture
async def connection(trail_url):
    """To that trail."""
    connection = await asyncpg.connect(trail_url)
    yield connection
    await connection.close()
