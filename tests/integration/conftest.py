"""Fixtures of the integration tests."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from dotmac.platform.audit_trail import AuditAggregator


@pytest.fixture(scope="session")
def run_apart():
    """Runs a coroutine in a thread and a loop of its own: a fixture may be asked for while a loop runs."""

    def run(work):
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(asyncio.run, work).result()

    return run


@pytest.fixture(scope="session")
def migrated_url(postgres_url, run_apart):
    """A database with the audit tables, shared by the session: give names of your own (`unique`)."""

    async def migrate():
        async with AuditAggregator(postgres_url) as audit:
            await audit.migrate()

    run_apart(migrate())
    return postgres_url
