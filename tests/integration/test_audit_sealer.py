"""The sealer when things go wrong.

Promises: a pass may be cancelled at any moment and leaves nothing half done; a server that is killed and
comes back costs a pause, and afterwards everything is sealed, signed and anchored, and verifies; what only a
person can put right is logged once and tried again now and then, and events are stored all the same; a loop
after another, and closing, take it along.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.config import AuditTrailConfig
from dotmac.platform.audit_trail.integrity import SigningKey, sealer
from dotmac.platform.errors import AuditUnavailable, ConfigurationError

KEY = SigningKey.generate()


async def until_sealed(audit, events):
    async with asyncio.timeout(60):
        while True:
            report = await audit.verify_integrity()
            assert report.problems == []
            assert report.events >= events
            if report.checkpoints and not report.unsealed:
                return report
            await asyncio.sleep(0.2)


async def test_a_pass_may_be_cancelled_at_any_moment(trail_url, tmp_path):
    chance = random.Random(11)
    config = AuditTrailConfig(postgres_url=trail_url, anchors=(tmp_path / "anchors").as_uri())
    async with AuditAggregator(config=config, signing_key=KEY, sealing=False) as audit:
        ended = 0
        for turn in range(60):
            await audit.log_event("SYSTEM", "x", tenant_id=str(turn % 3))
            task = asyncio.create_task(audit.checkpoint())
            await asyncio.sleep(chance.uniform(0, 0.08))
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
                ended += 1
        assert ended < 60
        await audit.checkpoint()
        report = await audit.verify_integrity()
        assert report.findings == []
        assert (report.log_entries, report.unsealed) == (60, 0)
        assert report.anchored > 0


@pytest.mark.slow
async def test_a_server_that_is_killed_costs_a_pause(migrated_server, tmp_path):
    config = AuditTrailConfig(
        postgres_url=migrated_server.url,
        checkpoint_interval=0.2,
        anchors=(tmp_path / "anchors").as_uri(),
        timeout=20,
    )
    async with AuditAggregator(config=config, signing_key=KEY) as audit:
        stop, stored = asyncio.Event(), []

        async def write():
            while not stop.is_set():
                with suppress(AuditUnavailable):
                    stored.append(await audit.log_event("SYSTEM", "x", tenant_id="a"))
                await asyncio.sleep(0.002)

        tasks = [asyncio.create_task(write()) for _ in range(5)]
        for _ in range(3):
            await asyncio.sleep(1.5)
            await asyncio.to_thread(migrated_server.kill)
            await asyncio.to_thread(migrated_server.restart)
        await asyncio.sleep(1.5)
        stop.set()
        await asyncio.gather(*tasks)
        report = await until_sealed(audit, len(stored))
        assert report.anchored > 0


async def test_a_fault_that_lasts_is_told_once_and_events_are_stored(trail_url, caplog, monkeypatch):
    monkeypatch.setattr(sealer, "_LONGEST_PAUSE", 0.05)
    refused = SigningKey(KEY.public_key, lambda _: bytes(64))
    config = AuditTrailConfig(postgres_url=trail_url, checkpoint_interval=0.01)
    async with AuditAggregator(config=config, signing_key=refused) as audit:
        for _ in range(5):
            await audit.log_event("SYSTEM", "x")
            await asyncio.sleep(0.3)
        told = [record for record in caplog.records if "audit trail not sealed" in record.getMessage()]
        assert len(told) == 1
        with pytest.raises(ConfigurationError, match="no Ed25519 signature"):
            await audit.checkpoint()
        assert await audit.count_events() == 5
    # Somebody else seals in the end.
    async with AuditAggregator(config=config, signing_key=KEY) as audit:
        assert (await until_sealed(audit, 5)).log_entries == 5


async def test_anchors_that_fail_get_the_checkpoints_later(trail_url, tmp_path):
    folder = tmp_path / "later"
    config = AuditTrailConfig(postgres_url=trail_url, anchors=(folder / "anchors").as_uri())
    async with AuditAggregator(config=config, signing_key=KEY, sealing=False) as audit:
        await audit.log_event("SYSTEM", "x", tenant_id="a")
        done = await audit.checkpoint()
        assert [error.code for error in done.errors] == ["audit.anchor"]
        assert len(done.checkpoints) == 1
        folder.mkdir()
        done = await audit.checkpoint()
        assert (done.errors, done.checkpoints) == ([], [])
        assert (await audit.verify_integrity()).anchored == 1


def test_loops_one_after_another_and_no_task_is_left(postgres_database):
    config = AuditTrailConfig(postgres_url=postgres_database, checkpoint_interval=0.01)
    audit = AuditAggregator(config=config, signing_key=KEY)

    async def work():
        await audit.log_event("SYSTEM", "x")
        await asyncio.sleep(0.1)

    asyncio.run(audit.migrate())
    for _ in range(3):
        asyncio.run(work())

    async def last():
        report = await until_sealed(audit, 3)
        await audit.aclose()
        assert len(asyncio.all_tasks()) == 1
        return report

    assert asyncio.run(last()).log_entries == 3

    async def connections():
        connection = await asyncpg.connect(postgres_database)
        found = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await connection.close()
        return found

    async def until_gone():
        async with asyncio.timeout(10):
            while await connections():
                await asyncio.sleep(0.05)

    asyncio.run(until_gone())
