"""`dotmac doctor` and a server that fails while it is asked.

Promises: a PostgreSQL that falls silent after the last answer is a failed check with a remedy, no traceback,
within the time limit.
"""

from __future__ import annotations

import time

import pytest

from dotmac.platform.cli import doctor
from dotmac.platform.connection.embedded import EmbeddedPostgres
from dotmac.platform.core.unified_config import PlatformConfig


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
