"""Tenants kept apart by row-level security, with real roles and connections of their own.

Promises:
- a reader sees the events of the tenant that is named for its transaction, of no other, and without one none
  at all, and then the page, and a warning, say why; a pooled connection keeps no tenant for the next caller;
- a role that is bound to a tenant can't name another, by whatever it sets; it can't write for another;
- no role ends a writer that another began, or sees or moves the position of a tenant's import;
- readers can't touch partitions, old ones and those made later, also where rights on all tables were granted;
- nobody but the owner updates, deletes, truncates, switches triggers or policies off, or grants;
- counts are those of the events that a role sees, whoever it is, also where all tenants' are summed up;
- a writer logs for every tenant, into partitions, and reads nothing of what is in the events;
- an auditor sees all; functions with the owner's rights look names up in their own schema;
- what must not come out empty and look complete (exports, reports, a person's data, forwarding) asks for a
  tenant, and holds that one's events, whatever name a pooled session kept;
- a reader who would not be bound (superuser, BYPASSRLS, owner) is refused; rights are taken away again.
"""

from __future__ import annotations

import json
import warnings
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator, SyslogDestination, TenantMissing, audit_context
from dotmac.platform.errors import InvalidArgument, ServerRefused
from support.roles import address_of, made_roles

OLD = datetime(2015, 3, 4, tzinfo=UTC)


@pytest.fixture
async def owner(postgres_database):
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
        for tenant in ("acme", "globex", None):
            await audit.log_event("SECURITY", "x", tenant_id=tenant, user_id=f"user of {tenant}")
            await audit.log_event("SECURITY", "old", tenant_id=tenant, occurred_at=OLD)
        await audit.enable_tenants()
        yield audit


@pytest.fixture
async def connect(postgres_database):
    """Opens connections as a role."""
    opened = []

    async def connect(role, **settings):
        opened.append(await asyncpg.connect(address_of(postgres_database, role), **settings))
        return opened[-1]

    yield connect
    for one in opened:
        await one.close()


@pytest.fixture
async def role(postgres_database, unique):
    async with made_roles(postgres_database, unique):
        yield unique


@pytest.fixture
async def other(postgres_database, unique):
    async with made_roles(postgres_database, unique + "b"):
        yield unique + "b"


async def refused(connection, *statements):
    for statement in statements:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)


async def test_a_reader_sees_the_named_tenant_alone(owner, postgres_database, role):
    await owner.grant_role("reader", role)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        for tenant in ("acme", "globex"):
            page = await audit.query_events(tenant_id=tenant)
            assert {event.tenant_id for event in page} == {tenant}
            assert len(page) == 2
            assert page.note is None
            assert await audit.get_event(page[0].id, tenant_id=tenant) == page[0]
            assert await audit.get_event(page[0].id, tenant_id="nobody") is None
            assert await audit.count_events(tenant_id=tenant) == 2
            assert [event async for event in audit.iter_events(tenant_id=tenant, page_size=1)] == page
        assert await audit.query_events(tenant_id="nobody") == []


async def test_without_a_tenant_there_is_nothing_and_it_says_why(owner, postgres_database, role):
    await owner.grant_role("reader", role)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        assert len(await audit.query_events(tenant_id="acme")) == 2  # the pooled connection had a tenant
        with pytest.warns(TenantMissing, match="row-level security.*tenant_id"):
            page = await audit.query_events()
        assert page == []
        assert page.note is not None
        assert "tenant_id" in page.note
        with pytest.warns(TenantMissing):
            assert await audit.count_events() == 0
        report = await audit.generate_compliance_report(OLD, OLD + timedelta(days=1), tenant_id="acme")
        assert "acme" in report.to_json()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(await owner.query_events()) == 6  # whom row-level security does not bind


async def test_a_reader_verifies_the_named_tenant(owner, postgres_database, role):
    await owner.grant_role("reader", role)
    admin = await asyncpg.connect(postgres_database)
    try:
        async with AuditAggregator(address_of(postgres_database, role)) as audit:
            with pytest.raises(InvalidArgument, match="row-level security.*tenant_id"):
                await audit.verify_integrity()
            with pytest.raises(InvalidArgument, match="row-level security"):
                await audit.verify_integrity(tenant_id="")
            with audit_context(tenant_id="globex"):
                report = await audit.verify_integrity()
            assert (report.tenant_id, report.events, report.problems) == ("globex", 2, [])
            # Others' segments are hidden, and not missed.
            report = await audit.verify_integrity(tenant_id="acme")
            assert (report.events, report.segments, report.problems) == (2, 2, [])
            await admin.execute("SET session_replication_role = replica")
            await admin.execute("DELETE FROM audit_events WHERE tenant_id = 'acme' AND action = 'x'")
            assert not (await audit.verify_integrity(tenant_id="acme")).ok
            assert (await audit.verify_integrity(tenant_id="globex")).ok
            told = await audit.generate_compliance_report(
                OLD, datetime.now(UTC), tenant_id="acme", verify=True
            )
            assert told.completeness["verification"]["result"] != "ok"
    finally:
        await admin.close()


async def test_a_bound_role_verifies_its_tenant(owner, postgres_database, role):
    await owner.grant_role("member", role, tenant_id="globex")
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        report = await audit.verify_integrity()
        assert (report.tenant_id, report.events, report.problems) == ("globex", 2, [])
        with pytest.raises(InvalidArgument, match="'globex'"):
            await audit.verify_integrity(tenant_id="acme")
    await owner.revoke_role("member", role)
    await owner.grant_role("auditor", role)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        report = await audit.verify_integrity()
        assert (report.events, report.problems) == (6, [])


async def test_a_follower_sees_its_tenant_alone(owner, postgres_database, role):
    await owner.grant_role("reader", role)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        seen = []
        async for event in audit.tail(since_start=True, tenant_id="globex", poll=0.01):
            seen.append(event.tenant_id)
            if len(seen) == 2:
                break
        assert seen == ["globex", "globex"]


async def test_a_pooler_in_transaction_mode_keeps_no_tenant(owner, postgres_database, role, connect):
    await owner.grant_role("reader", role)
    session = await connect(role, statement_cache_size=0)
    async with session.transaction():
        await session.execute("SELECT set_config('app.tenant_id', 'acme', true)")
        assert await session.fetchval("SELECT count(*) FROM audit_events") == 2
    assert await session.fetchval("SELECT count(*) FROM audit_events") == 0
    # Somebody's setting for the whole session must not show through our transaction.
    async with AuditAggregator(address_of(postgres_database, role), statement_cache_size=0) as audit:
        state = await audit._state()
        async with state.database.reading() as leaky:
            await leaky.execute("SET app.tenant_id = 'acme'")
        with pytest.warns(TenantMissing):
            assert await audit.count_events() == 0


async def test_an_export_holds_the_named_tenant_whatever_the_session_kept(
    owner, postgres_database, role, tmp_path
):
    await owner.grant_role("reader", role)
    path = tmp_path / "e.ndjson"

    def tenants():
        return [json.loads(line)["tenant_id"] for line in path.read_text().splitlines()]

    async with AuditAggregator(address_of(postgres_database, role), statement_cache_size=0) as audit:
        state = await audit._state()
        for kept in ("", "globex"):
            async with state.database.reading() as leaky:
                await leaky.execute("SELECT set_config('app.tenant_id', $1, false)", kept)
            assert (await audit.export_events(path, tenant_id="acme")).rows == 2
            assert tenants() == ["acme", "acme"]
            with audit_context(tenant_id="acme"):
                assert (await audit.export_events(path)).rows == 2
            assert tenants() == ["acme", "acme"]
            for filters in ({}, {"tenant_id": ["acme", "globex"]}):
                with pytest.raises(InvalidArgument, match="row-level security.*tenant_id"):
                    await audit.export_events(tmp_path / "none.ndjson", **filters)
        assert [one.name for one in tmp_path.iterdir()] == ["e.ndjson"]


async def test_an_interrupted_export_does_not_go_on_with_another_tenant(
    owner, postgres_database, role, tmp_path, monkeypatch
):
    monkeypatch.setattr("dotmac.platform.audit_trail.exports.source.ROWS_PER_STATEMENT", 1)
    await owner.grant_role("reader", role)
    path = tmp_path / "e.ndjson"

    def stop(progress):
        if progress.rows == 2:
            raise RuntimeError("stop")

    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        with audit_context(tenant_id="acme"), pytest.raises(RuntimeError):
            await audit.export_events(path, progress=stop)
        with audit_context(tenant_id="globex"):
            made = await audit.export_events(path)
        assert (made.rows, made.resumed_rows) == (2, 0)
        assert "acme" not in path.read_text()


async def test_what_would_look_complete_asks_for_a_tenant(owner, postgres_database, role, other, tmp_path):
    await owner.log_event("SECURITY", "x", tenant_id="globex", user_id="ada")
    await owner.grant_role("reader", role)
    day = timedelta(days=1)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        syslog = SyslogDestination("syslog+udp://127.0.0.1:9")
        for work in (
            audit.generate_compliance_report(OLD, OLD + day),
            audit.export_subject_access("ada", tmp_path / "ada.json"),
            audit.forward_events(syslog, once=True),
        ):
            with pytest.raises(InvalidArgument, match="row-level security.*tenant_id"):
                await work
        with audit_context(tenant_id="globex"):
            report = await audit.generate_compliance_report(OLD, OLD + day)
        assert '"globex"' in report.to_json()
    await owner.grant_role("reader", other, tenant_id="globex")
    async with AuditAggregator(address_of(postgres_database, other)) as audit:
        assert (await audit.export_events(tmp_path / "bound.csv")).rows == 3
        assert [one["tenant_id"] async for one in audit.subject_access("ada")] == ["globex"]


async def test_a_bound_role_can_name_no_other_tenant(owner, postgres_database, role, connect):
    await owner.grant_role("reader", role, tenant_id="globex")
    tenant = await connect(role)
    assert await tenant.fetchval("SELECT count(*) FROM audit_events") == 0
    for name, seen in (("acme", 0), ("globex", 2), ("' OR true --", 0)):
        await tenant.execute("SELECT set_config('app.tenant_id', $1, false)", name)
        assert await tenant.fetchval("SELECT count(*) FROM audit_events") == seen
    await refused(
        tenant,
        "SET SESSION AUTHORIZATION postgres",
        "SET ROLE postgres",
        "SET row_security = off; SELECT * FROM audit_events",
    )
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        assert len(await audit.query_events()) == 2  # it need not be named
        assert await audit.query_events(tenant_id="acme") == []


async def test_a_member_can_not_write_for_another_tenant(owner, postgres_database, role, connect):
    await owner.grant_role("member", role, tenant_id="globex")
    tenant = await connect(role)
    insert = (
        "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, tenant_id) "
        "VALUES (now(), gen_random_uuid(), 'security', 'forged', 'info', 'success', $1)"
    )
    for named in ("acme", "globex"):
        await tenant.execute("SELECT set_config('app.tenant_id', $1, false)", named)
        for written in ("acme", None):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                await tenant.execute(insert, written)
    await tenant.execute(insert, "globex")
    assert await owner.count_events(actions="forged") == 1


async def test_a_member_ends_no_other_writer_and_moves_no_other_import(
    owner, postgres_database, role, other, connect
):
    await owner.grant_role("member", role, tenant_id="globex")
    await owner.grant_role("member", other, tenant_id="acme")
    async with AuditAggregator(address_of(postgres_database, other)) as audit:
        await audit.log_event("SECURITY", "x", tenant_id="acme")
        mallory, victim = await connect(role), await connect(other)
        begun = await mallory.fetchval("SELECT id FROM audit_writers WHERE owner_role = $1", other)
        end = "INSERT INTO audit_writer_ends (writer, segments) VALUES ($1, 99)"
        for foreign in (begun, await owner_writer(mallory, postgres_database)):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                await mallory.execute(end, foreign)
        await refused(
            mallory,
            "UPDATE audit_writers SET owner_role = current_user",
            "UPDATE audit_writer_ends SET segments = 99",
            f"INSERT INTO audit_writers (id, owner_role) VALUES (gen_random_uuid(), '{other}')",
        )
    # Its own process ended it, with the right number.
    assert await victim.fetchval("SELECT segments FROM audit_writer_ends WHERE writer = $1", begun) == 1
    place = "INSERT INTO audit_imports (source, position, line) VALUES ($1, 7, 7)"
    await victim.execute(place, "acme.log")
    await mallory.execute(place, "globex.log")
    assert await mallory.fetchval("SELECT array_agg(source) FROM audit_imports") == ["globex.log"]
    assert await mallory.execute("UPDATE audit_imports SET position = 0") == "UPDATE 1"
    await refused(
        mallory,
        "INSERT INTO audit_imports (source, position, line) VALUES ('acme.log', 0, 0) "
        "ON CONFLICT (source) DO UPDATE SET position = 0",
        f"UPDATE audit_imports SET owner_role = '{other}'",
    )
    assert await victim.fetchval("SELECT position FROM audit_imports") == 7
    await owner.revoke_role("member", other)
    await owner.grant_role("writer", other)
    assert await victim.fetchval("SELECT count(*) FROM audit_imports") == 2  # writers are of all tenants
    await owner.disable_tenants()
    assert await mallory.fetchval("SELECT count(*) FROM audit_imports") == 2


async def owner_writer(connection, url):
    return await connection.fetchval(
        "SELECT id FROM audit_writers WHERE owner_role = $1", urlsplit(url).username
    )


async def test_readers_have_no_right_on_partitions(owner, role, connect, postgres_database):
    admin = await asyncpg.connect(postgres_database)
    try:
        await admin.execute(f"ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {role}")
        await admin.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        await admin.execute(f"REVOKE ALL ON audit_events, audit_roles FROM {role}")
        await admin.execute(f"GRANT SELECT (action) ON audit_events_2015_03 TO {role}")
        await admin.execute("GRANT SELECT ON audit_events_2015_03 TO PUBLIC")
        await owner.grant_role("reader", role)
        await owner.log_event("SECURITY", "x", tenant_id="acme", occurred_at=datetime(2016, 1, 1, tzinfo=UTC))
        reader = await connect(role)
        leaves = await admin.fetch(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits "
            "WHERE inhparent = 'audit_events'::regclass"
        )
        assert "audit_events_2016_01" in {leaf["name"] for leaf in leaves}
        for leaf in leaves:
            await refused(
                reader,
                f"SELECT action FROM {leaf['name']}",
                f"SELECT count(*) FROM {leaf['name']}",
                f"INSERT INTO {leaf['name']} SELECT * FROM audit_events",
                f"DELETE FROM {leaf['name']}",
                f"COPY {leaf['name']} TO STDOUT",
            )
        stats = await reader.fetchval(
            "SELECT count(*) FROM pg_stats WHERE tablename LIKE 'audit\\_events%' AND attname = 'tenant_id'"
        )
        assert stats == 0
    finally:
        await admin.execute(f"ALTER DEFAULT PRIVILEGES REVOKE SELECT ON TABLES FROM {role}")
        await admin.close()


@pytest.mark.parametrize("kind", ["writer", "reader", "member", "auditor"])
async def test_no_role_changes_what_is_there(owner, kind, role, connect):
    await owner.grant_role(kind, role)
    connection = await connect(role)
    for table in ("audit_events", "audit_events_2015_03"):
        await refused(
            connection,
            f"UPDATE {table} SET action = 'y'",
            f"DELETE FROM {table}",
            f"TRUNCATE {table}",
            f"DROP TABLE {table}",
            f"ALTER TABLE {table} DISABLE TRIGGER ALL",
            f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
            f"CREATE POLICY mine ON {table} USING (true)",
        )
    await refused(
        connection,
        "SET session_replication_role = replica",
        "DROP POLICY audit_tenant_read ON audit_events",
        "SELECT audit_disable_tenants()",
        f"SELECT audit_grant('auditor', '{role}')",
        f"INSERT INTO audit_roles VALUES ('{role}', 'auditor')",
        "SELECT audit_apply_roles()",
        "CREATE OR REPLACE FUNCTION audit_refuse_change() RETURNS trigger LANGUAGE sql AS ''",
        "DELETE FROM audit_holds",
        "UPDATE audit_archives SET url = 'file:///tmp/forged'",
    )


async def test_a_writer_logs_for_all_and_reads_nothing(owner, postgres_database, role, connect):
    await owner.grant_role("writer", role)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        ids = [
            await audit.log_event("SECURITY", "written", tenant_id=tenant, occurred_at=moment)
            for tenant in ("acme", "globex", None)
            for moment in (OLD, datetime(2018, 5, 6, tzinfo=UTC), datetime.now(UTC))
        ]
        again = await audit.log_event("SECURITY", "written", tenant_id=None, id=ids[-1])
        assert again == ids[-1]
    assert await owner.count_events(actions="written") == 9
    writer = await connect(role)
    assert await writer.fetchval("SELECT count(id) FROM audit_events") == 0
    await refused(
        writer,
        "SELECT action FROM audit_events",
        "SELECT action FROM audit_events_2015_03",
        "SELECT * FROM audit_holds",
    )


async def test_a_writer_that_began_before_goes_on(owner, postgres_database, role):
    await owner.disable_tenants()
    await owner.grant_role("writer", role)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        for wanted in (1, 2, 3, 4):
            await audit.log_event("SECURITY", "before and after", tenant_id="acme")
            await (owner.enable_tenants() if wanted % 2 else owner.disable_tenants())
    assert await owner.count_events(actions="before and after") == 4


async def test_a_member_logs_through_the_parent(owner, postgres_database, role):
    await owner.grant_role("member", role)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        for tenant in ("acme", "globex"):
            event_id = await audit.log_event("SECURITY", "mine", tenant_id=tenant)
            assert (await audit.get_event(event_id, tenant_id=tenant)).tenant_id == tenant
        with pytest.raises(ServerRefused, match="tenant"):
            await audit.log_event("SECURITY", "of nobody")
    assert await owner.count_events(actions="mine") == 2


async def test_one_refused_event_does_not_take_others_along(owner, postgres_database, role):
    import asyncio

    await owner.grant_role("member", role, tenant_id="acme")
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        answers = await asyncio.gather(
            *(
                audit.log_event("SECURITY", "mixed", tenant_id="acme" if place % 4 else "globex")
                for place in range(40)
            ),
            return_exceptions=True,
        )
        assert [isinstance(one, ServerRefused) for one in answers] == [place % 4 == 0 for place in range(40)]
    assert await owner.count_events(actions="mixed") == 30
    assert await owner.count_events(actions="mixed", tenant_id="globex") == 0


async def test_an_auditor_sees_every_tenant(owner, postgres_database, role):
    await owner.grant_role("auditor", role)
    async with AuditAggregator(address_of(postgres_database, role)) as audit:
        page = await audit.query_events()
        assert {event.tenant_id for event in page} == {"acme", "globex", None}
        assert page.note is None


async def counts_as_the_events_say(audit):
    """The count by sums, which is also the count of events; so are the buckets of a histogram."""
    by = ("day", "category")
    assert await audit.histogram(by=by) == await audit.histogram(by=by, actions="*")
    counted = await audit.count_events()
    assert counted == await audit.count_events(actions="*")
    return counted


async def test_counts_are_of_what_a_role_sees(owner, postgres_database, role, other, connect):
    admin = await asyncpg.connect(postgres_database)
    try:
        for _ in range(2):  # summed up, and with more that is not
            await admin.execute("SELECT audit_compact_rollup()")
            await owner.log_event("SECURITY", "x", tenant_id="globex")
        assert await admin.fetchval("SELECT sum(events) FROM audit_rollup_totals") == 7
        assert await counts_as_the_events_say(owner) == 8
        await owner.grant_role("reader", role)
        async with AuditAggregator(address_of(postgres_database, role)) as audit:
            for tenant, there in (("acme", 2), ("globex", 4)):
                with audit_context(tenant_id=tenant):
                    assert await counts_as_the_events_say(audit) == there
            with pytest.warns(TenantMissing):
                assert await counts_as_the_events_say(audit) == 0
        reader = await connect(role)
        assert await reader.fetch("SELECT * FROM audit_rollup_totals") == []
        await reader.execute("CREATE TEMPORARY TABLE mine (day date)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await reader.execute(
                "CREATE TRIGGER mine AFTER DELETE ON mine REFERENCING OLD TABLE AS gone "
                "FOR EACH STATEMENT EXECUTE FUNCTION audit_total()"
            )
        await reader.execute("SET app.tenant_id = 'acme'")
        assert await reader.fetch("SELECT * FROM audit_rollup_totals") == []
        await owner.grant_role("reader", other, tenant_id="globex")
        async with AuditAggregator(address_of(postgres_database, other)) as audit:
            assert await counts_as_the_events_say(audit) == 4
        await owner.revoke_role("reader", role)
        assert await reader.fetch("SELECT * FROM audit_rollup_totals") == []
        await owner.grant_role("auditor", role)
        async with AuditAggregator(address_of(postgres_database, role)) as audit:
            assert await counts_as_the_events_say(audit) == 8
        # Who is bound to a tenant and inherits an auditor's rights stays bound.
        await admin.execute(f"GRANT {role} TO {other}")
        bound = await connect(other)
        assert await bound.fetch("SELECT * FROM audit_rollup_totals") == []
        await admin.execute(f"REVOKE {role} FROM {other}")
        await owner.disable_tenants()
        async with AuditAggregator(address_of(postgres_database, other)) as audit:
            assert await counts_as_the_events_say(audit) == 8
        await admin.execute("TRUNCATE audit_rollup")
        assert await admin.fetch("SELECT * FROM audit_rollup_totals") == []
    finally:
        await admin.close()


async def test_who_would_not_be_bound_is_refused(owner, postgres_database, role, other):
    admin = await asyncpg.connect(postgres_database)
    try:
        await admin.execute(f"ALTER ROLE {role} BYPASSRLS")
        with pytest.raises(ServerRefused, match="BYPASSRLS"):
            await owner.grant_role("reader", role)
        await owner.grant_role("auditor", role)
        await owner.grant_role("reader", other)
        await owner.disable_tenants()
        await admin.execute(f"ALTER ROLE {other} SUPERUSER")
        with pytest.raises(ServerRefused, match="superuser"):
            await owner.enable_tenants()
        assert not await owner.tenants_are_kept_apart()
    finally:
        await admin.close()


async def test_rights_are_listed_changed_and_taken_away(owner, role, connect):
    await owner.grant_role("reader", role, tenant_id="acme")
    await owner.grant_role("reader", role, tenant_id="globex")
    await owner.grant_role("reader", role, tenant_id="globex")
    assert [(one.kind, one.tenant_id) for one in await owner.list_roles() if one.role == role] == [
        ("reader", "globex")
    ]
    for kind in ("writer", "auditor", "member"):
        with pytest.raises(ServerRefused, match="does not go with"):
            await owner.grant_role(kind, role)
    reader = await connect(role)
    await reader.execute("SET app.tenant_id = 'globex'")
    assert await reader.fetchval("SELECT count(*) FROM audit_events") == 2
    assert await owner.revoke_role("reader", role)
    assert not await owner.revoke_role("reader", role)
    await refused(reader, "SELECT * FROM audit_events")
    await owner.grant_role("writer", role)
    await owner.grant_role("reader", role)
    assert await owner.revoke_role("writer", role)
    assert await reader.fetchval("SELECT count(*) FROM audit_events") == 2
    await refused(reader, "INSERT INTO audit_events_2015_03 SELECT * FROM audit_events")


async def test_rights_by_membership_count(owner, postgres_database, role, other, connect):
    admin = await asyncpg.connect(postgres_database)
    try:
        await owner.grant_role("auditor", role)
        await admin.execute(f"GRANT {role} TO {other}")
    finally:
        await admin.close()
    async with AuditAggregator(address_of(postgres_database, other)) as audit:
        assert len(await audit.query_events()) == 6


async def test_functions_look_names_up_at_home(owner, postgres_database, role):
    admin = await asyncpg.connect(postgres_database)
    try:
        unsafe = await admin.fetch(
            "SELECT oid::regprocedure::text AS name FROM pg_proc WHERE pronamespace = 'public'::regnamespace "
            "AND prosecdef AND NOT coalesce(proconfig::text LIKE '%search_path=public, pg_temp%', false)"
        )
        assert unsafe == []
        assert (
            await admin.fetchval("SELECT count(*) FROM pg_proc WHERE prosecdef AND proname LIKE 'audit%'") > 0
        )
    finally:
        await admin.close()
    await owner.grant_role("writer", role)
    mallory = await asyncpg.connect(address_of(postgres_database, role))
    try:
        await mallory.execute(
            "CREATE TEMP TABLE audit_events (id int); SET search_path = pg_temp, public;"
            "SELECT public.audit_ensure_partition('2011-01-01Z')"
        )
    finally:
        await mallory.close()
    assert await owner.count_events() == 6


async def test_wrong_arguments_name_what_is_right(owner):
    with pytest.raises(InvalidArgument, match="writer, reader, member, auditor"):
        await owner.grant_role("god", "x")
    with pytest.raises(InvalidArgument, match="bound to a tenant"):
        await owner.grant_role("writer", "x", tenant_id="acme")
    with pytest.raises(ServerRefused, match="does not exist"):
        await owner.grant_role("writer", 'no "such" role')
