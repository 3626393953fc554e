"""The parts of the audit trail at work on one trail.

Promises:
- after months were archived and dropped, a subject was erased, and the logs were sealed, everything verifies,
  and what was dropped is counted;
- an erased subject's event still has a proof, which checks without the database;
- a month of the archive and the table answer one query, in its order, and an export of the table has the
  rest;
- a report over all of it says that the log verifies, and names the erasure;
- `audit_context` names the tenant of a query where tenants are kept apart.
"""

from __future__ import annotations

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta

import pytest

from dotmac.platform.audit_trail import AuditAggregator, audit_context
from dotmac.platform.audit_trail.config import AuditTrailConfig
from dotmac.platform.audit_trail.integrity import SigningKey, check_proof
from dotmac.platform.audit_trail.tenancy import TenantMissing
from support.roles import made_roles

KEY = SigningKey.generate()
PERSONAL = base64.b64encode(bytes(range(32))).decode()
OLD, YOUNG = datetime(2023, 1, 5, tzinfo=UTC), datetime(2023, 2, 5, tzinfo=UTC)


@pytest.fixture
async def audit(postgres_database, tmp_path):
    config = AuditTrailConfig(origin="example.com/audit", archive_url=(tmp_path / "archive").as_uri())
    async with AuditAggregator(
        postgres_database, config=config, timeout=20, signing_key=KEY, personal_key=PERSONAL,
        decrypt_personal=True, sealing=False,
    ) as aggregator:  # fmt: skip
        await aggregator.migrate()
        for moment in (OLD, YOUNG):
            await asyncio.gather(
                *(
                    aggregator.log_event(
                        "DATA_ACCESS", "record.read", user_id=f"u{place % 3}",
                        tenant_id=("acme", "globex")[place % 2],
                        personal={"email": f"{place}@example.com"} if place % 5 == 0 else None,
                        subject_id=f"s{place}" if place % 5 == 0 else None,
                        occurred_at=moment + timedelta(hours=place),
                    )
                    for place in range(30)
                )
            )  # fmt: skip
        yield aggregator


async def sealed(audit):
    """Seals and signs all that is there; a transaction that is open elsewhere holds it up for a moment."""
    for _ in range(200):
        done = await audit.checkpoint()
        assert not done.errors
        if (await audit.verify_integrity()).unsealed == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("there is always something left to seal")


async def test_all_of_it_verifies(audit, tmp_path):
    await sealed(audit)
    erased = await audit.erase_subject("s10", reason="asked for", by="officer", tenant_id="acme")
    end = (OLD.replace(day=1) + timedelta(days=32)).replace(day=1)
    (gone,) = await audit.apply_retention((datetime.now(UTC) - end).days)
    assert (gone.outcome, gone.events) == ("dropped", 30)
    await sealed(audit)
    report = await audit.verify_integrity()
    assert report.ok, report.findings
    assert [one.kind.value for one in report.notices] == ["events_dropped"]
    assert report.dropped == 30
    assert report.events >= 32  # the younger month, the certificate, the drop

    (event,) = await audit.query_events(subject_id="s10", categories="DATA_ACCESS")
    assert event.personal == "erased"
    proof = await audit.prove(event.id)
    assert check_proof(json.loads(json.dumps(proof)), keys=[KEY.public_key])
    certificate = (await audit.query_events(actions="subject.erased"))[0]
    assert certificate.id == erased.certificate

    both = await audit.query_events(include_archive=True, actions="record.read", order="asc")
    assert [event.occurred_at for event in both] == sorted(event.occurred_at for event in both)
    assert len(both) == 60
    summary = await audit.export_events(tmp_path / "rest.ndjson", actions="record.read")
    assert summary.rows == 30

    told = await audit.generate_compliance_report(YOUNG.date(), datetime.now(UTC).date(), "gdpr", verify=True)
    text = told.to_json()
    assert "s10" in text
    assert told.completeness["verification"]["result"] == "ok"


async def test_a_context_names_the_tenant_of_queries(audit, postgres_database, unique):
    await audit.enable_tenants()
    async with made_roles(postgres_database, unique) as (address,):
        await audit.grant_role("reader", unique)
        async with AuditAggregator(address) as reader:
            with pytest.warns(TenantMissing):
                assert await reader.query_events() == []
            with audit_context(tenant_id="acme"):
                page = await reader.query_events(actions="record.read")
            assert len(page) == 30
            assert {event.tenant_id for event in page} == {"acme"}
