"""Personal data where row-level security keeps tenants apart, with real roles.

Promises: a writer of many tenants seals for all of them; a member of one tenant seals and opens what is its
tenant's, and sees no key of another; a reader opens its tenant's data with the key-encryption key; none of
these may erase, change or delete keys; the owner erases, and then they see that it is erased.
"""

from __future__ import annotations

import base64

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator, PersonalState, audit_context
from dotmac.platform.errors import ServerRefused
from support.roles import address_of, made_roles

KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
async def owner(postgres_database):
    async with AuditAggregator(postgres_database, personal_key=KEY) as audit:
        await audit.migrate()
        await audit.enable_tenants()
        yield audit


@pytest.mark.parametrize("kind", ["writer", "member", "reader"])
async def test_roles(owner, postgres_database, unique, kind):
    async with made_roles(postgres_database, unique):
        await owner.grant_role(kind, unique)
        url = address_of(postgres_database, unique)
        async with AuditAggregator(url, personal_key=KEY, decrypt_personal=True) as audit:
            by = owner if kind == "reader" else audit
            for tenant in ("acme", "globex", "acme"):
                with audit_context(tenant_id=tenant, user_id="ada"):
                    await by.log_event("DATA_CHANGE", "x", personal={"of": tenant})
            connection = await asyncpg.connect(postgres_database)
            assert await connection.fetchval("SELECT count(*) FROM audit_subject_keys") == 2
            await connection.close()
            if kind != "writer":
                for tenant, count in (("acme", 2), ("globex", 1)):
                    page = await audit.query_events(tenant_id=tenant)
                    assert [event.personal for event in page] == [{"of": tenant}] * count
                mine = await asyncpg.connect(url)
                assert await mine.fetchval("SELECT count(*) FROM audit_subject_keys") == 0
                await mine.execute("SET app.tenant_id = 'acme'")
                assert await mine.fetchval("SELECT min(tenant_id) FROM audit_subject_keys") == "acme"
                await mine.close()
            with pytest.raises(ServerRefused, match="permission denied"):
                await audit.erase_subject("ada", reason="x", by="ada", tenant_id="acme")
        poor = await asyncpg.connect(url)
        for statement in ("UPDATE audit_subject_keys SET kek = 'x'", "DELETE FROM audit_subject_keys"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await poor.execute(statement)
        await poor.close()
        assert (await owner.erase_subject("ada", reason="x", by="dpo", tenant_id="acme")).events == 2
        if kind != "writer":
            async with AuditAggregator(url, personal_key=KEY, decrypt_personal=True) as audit:
                page = await audit.query_events(tenant_id="acme", actions="x")
                assert {event.personal for event in page} == {PersonalState.ERASED}
                assert (await audit.query_events(tenant_id="globex"))[0].personal == {"of": "globex"}
