"""The audit tables from version to version.

Promises: every revision runs on an empty database and, with events in it, loses none; running again changes
nothing; HEAD is alembic's head; the printed SQL makes the same tables as the migration; a role that may only
insert and select can log events of any month and neither change nor delete them.
- from the first version with events in it: none is lost or changed, also where several processes upgrade at
  once, where an upgrade is killed in the middle, and where somebody reads all the while;
- a process of the first version goes on logging on the tables of this one;
- a large table gets its indexes afterwards, while writers go on; an interrupted build is finished;
  an index that is replaced serves until then;
- nothing is written into the server's log for each piece of a large import, and vacuum, which partitions of
  old tables and new ones ask for, summarises what came;
- a month that is on its way out, by a retention that was interrupted, does not stand in an upgrade's way;
- roles and row-level security are applied to tables of later versions.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from datetime import UTC, datetime
from urllib.parse import urlsplit

import asyncpg
import pytest
from alembic.script import ScriptDirectory

from dotmac.platform.audit_trail import AuditAggregator, schema
from dotmac.platform.connection.embedded import EmbeddedPostgres
from support.look_through import look_through
from support.roles import address_of, made_roles

COLUMNS = """
    SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns
    WHERE table_schema = 'public' AND table_name IN ('audit_events', 'audit_imports', 'audit_segments',
        'audit_rollup', 'audit_writers', 'audit_writer_ends') ORDER BY 1, 2
"""
INDEXES = "SELECT indexdef FROM pg_indexes WHERE tablename = 'audit_events' ORDER BY 1"
TRIGGERS = "SELECT tgname, tgtype FROM pg_trigger WHERE tgrelid = 'audit_events'::regclass ORDER BY 1"


async def shape(url):
    connection = await asyncpg.connect(url)
    try:
        return [[tuple(row) for row in await connection.fetch(sql)] for sql in (COLUMNS, INDEXES, TRIGGERS)]
    finally:
        await connection.close()


def test_head_is_the_newest_revision():
    assert ScriptDirectory.from_config(schema._config()).get_heads() == [schema.HEAD]


async def test_from_nothing_and_again_with_events(postgres_database):
    async with AuditAggregator(postgres_database) as audit:
        assert (await audit.migrate()).current is None
        event_id = await audit.log_event("SECURITY", "x", metadata={"a": 1})
        before = await shape(postgres_database)
        assert (await audit.migrate()).up_to_date
        assert await shape(postgres_database) == before
        event = await audit.get_event(event_id)
        assert event is not None
        assert event.metadata == {"a": 1}


async def test_an_older_trail_keeps_its_events_rights_and_counts(postgres_database, unique):
    """From the first version of the tables, with events and a role that logs, to the newest."""
    connection = await asyncpg.connect(postgres_database)
    try:
        sql = schema.printable_sql()
        first = sql[: sql.index("-- Running upgrade 0001 -> 0002")]
        await connection.execute(first + "COMMIT;")
        await connection.execute(
            "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, tenant_id) "
            "SELECT now() - (number % 3) * interval '1 day', gen_random_uuid(), 'security', 'x', 'info', "
            "'success', CASE WHEN number % 2 = 0 THEN 'a' END FROM generate_series(1, 100) AS number "
            "WHERE date_trunc('month', now() - (number % 3) * interval '1 day') >= date_trunc('month', now())"
        )
        before = await connection.fetch("SELECT id, occurred_at FROM audit_events ORDER BY id")
        await connection.execute(f"CREATE ROLE {unique}; GRANT INSERT ON audit_events TO {unique}")
        async with AuditAggregator(postgres_database) as audit:
            assert (await audit.migrate()).current == "0001"
            await audit.log_event("SECURITY", "new", tenant_id="a")
        assert (
            await connection.fetch("SELECT id, occurred_at FROM audit_events WHERE action = 'x' ORDER BY id")
            == before
        )
        for table in ("audit_segments", "audit_rollup", "audit_writers", "audit_writer_ends"):
            assert await connection.fetchval("SELECT has_table_privilege($1, $2, 'INSERT')", unique, table)
            assert not await connection.fetchval(
                "SELECT has_table_privilege($1, $2, 'UPDATE')", unique, table
            )
        await look_through(postgres_database)
    finally:
        await connection.execute(f"DROP OWNED BY {unique}; DROP ROLE {unique}")
        await connection.close()


async def test_the_printed_sql_makes_the_same_tables(postgres_database, migrated_shape):
    connection = await asyncpg.connect(postgres_database)
    try:
        await connection.execute(schema.printable_sql())
    finally:
        await connection.close()
    assert await shape(postgres_database) == migrated_shape
    async with AuditAggregator(postgres_database) as audit:
        assert (await audit.schema_status()).up_to_date
        await audit.log_event("SECURITY", "x")


@pytest.fixture
async def migrated_shape(postgres_url):
    async with AuditAggregator(postgres_url) as audit:
        await audit.migrate()
    return await shape(postgres_url)


async def test_a_role_with_few_rights_is_enough_for_logging(postgres_database, unique):
    owner = await asyncpg.connect(postgres_database)
    try:
        async with AuditAggregator(postgres_database) as audit:
            await audit.migrate()
        await owner.execute(f"CREATE ROLE {unique} LOGIN PASSWORD 'p'")
        await owner.execute(f"GRANT INSERT, SELECT ON audit_events TO {unique}")
        await owner.execute(f"GRANT SELECT ON {schema.VERSION_TABLE} TO {unique}")
        await owner.execute(
            "GRANT INSERT, SELECT ON audit_writers, audit_writer_ends, audit_segments, audit_rollup "
            f"TO {unique}"
        )
        parts = urlsplit(postgres_database)
        _, at, place = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{unique}:p{at or '@'}{place}").geturl()
        async with AuditAggregator(url) as audit:
            for year in (2001, 2015, datetime.now(UTC).year):
                await audit.log_event("SECURITY", "x", occurred_at=datetime(year, 1, 5, tzinfo=UTC))
            assert await audit.count_events() == 3
        poor = await asyncpg.connect(url)
        try:
            for statement in ("UPDATE audit_events SET action = 'y'", "DELETE FROM audit_events"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await poor.execute(statement)
        finally:
            await poor.close()
    finally:
        await owner.execute(f"DROP OWNED BY {unique}")
        await owner.execute(f"DROP ROLE {unique}")
        await owner.close()


OLD_COLUMNS = (
    "occurred_at", "id", "category", "action", "level", "outcome", "user_id", "tenant_id", "metadata",
)  # fmt: skip
ALL = """
    SELECT occurred_at, id, category, action, user_id, tenant_id, metadata::text
    FROM audit_events ORDER BY 1, 2
"""
WAITING = """
    SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()
"""


def old_rows(count, months=(1, 2, 3)):
    return [
        (
            datetime(2024, months[place % len(months)], 3, place % 24, tzinfo=UTC),
            uuid.uuid4(), "security", f"old.{place % 5}", "info", "success", f"u{place % 7}",
            (None, "acme", "globex")[place % 3], f'{{"place": {place}}}',
        )
        for place in range(count)
    ]  # fmt: skip


async def migrate_to(url, revision):
    """The tables as they were at a version."""
    from alembic import command
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url))

    def run(connection):
        config = schema._config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


@pytest.fixture
async def old_tables(postgres_database):
    """Tables of the first version with events in it, and these."""
    await migrate_to(postgres_database, "0001")
    connection = await asyncpg.connect(postgres_database)
    try:
        rows = old_rows(600)
        for month in (1, 2, 3):
            await connection.execute(
                "SELECT audit_ensure_partition($1)", datetime(2024, month, 1, tzinfo=UTC)
            )
        await connection.copy_records_to_table("audit_events", records=rows, columns=OLD_COLUMNS)
        yield connection, await connection.fetch(ALL)
    finally:
        await connection.close()


def upgrade_process(url):
    code = "from dotmac.platform.cli.main import run; run()"
    return asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "db", "upgrade", "--url", url,
        env={**os.environ, "ENVIRONMENT": "test"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_every_event_survives_the_way_from_the_first_version(old_tables, postgres_database):
    connection, before = old_tables
    async with AuditAggregator(postgres_database) as audit:
        status = await audit.migrate()
        assert (status.current, status.wanted) == ("0001", schema.HEAD)
        assert await connection.fetch(ALL) == before
        assert await audit.count_events(tenant_id="acme", text="old") == 200
        assert await audit.count_events(end_time=datetime(2024, 12, 1, tzinfo=UTC)) == 600
        assert (await audit.query_events(limit=1, order="asc"))[0].id == before[0]["id"]


async def test_several_processes_upgrade_at_once(old_tables, postgres_database):
    connection, before = old_tables
    processes = [await upgrade_process(postgres_database) for _ in range(4)]
    answers = await asyncio.gather(*(one.communicate() for one in processes))
    assert [one.returncode for one in processes] == [0] * 4, answers
    assert sum(b"upgraded from 0001" in out for out, _ in answers) == 1
    assert await connection.fetch(ALL) == before


async def test_an_upgrade_killed_in_the_middle_leaves_the_old_version(old_tables, postgres_database):
    connection, before = old_tables
    looker = await asyncpg.connect(postgres_database)  # a transaction sees the same activity all along
    for kill_process in (True, False):
        async with connection.transaction():
            await connection.execute("LOCK TABLE audit_imports IN ACCESS SHARE MODE")
            await connection.execute("LOCK TABLE audit_events IN ACCESS SHARE MODE")
            process = await upgrade_process(postgres_database)
            while (found := await looker.fetchval(WAITING)) is None:  # at the first table that it changes
                await asyncio.sleep(0.05)
            if kill_process:
                process.send_signal(signal.SIGKILL)
            else:
                await connection.execute("SELECT pg_terminate_backend($1)", found)
            await process.communicate()
            assert process.returncode != 0
        assert await connection.fetchval(f"SELECT max(version_num) FROM {schema.VERSION_TABLE}") == "0001"
    await looker.close()
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
        assert (await audit.schema_status()).up_to_date
    assert await connection.fetch(ALL) == before


async def test_an_upgrade_waits_for_readers_without_holding_writers_up(old_tables, postgres_database):
    connection, before = old_tables
    writer = await asyncpg.connect(postgres_database)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.fetch(ALL)
        async with AuditAggregator(postgres_database) as audit:
            upgrading = asyncio.create_task(audit.migrate())
            slowest = 0.0
            until = asyncio.get_running_loop().time() + 5
            while asyncio.get_running_loop().time() < until:
                began = asyncio.get_running_loop().time()
                await writer.copy_records_to_table("audit_events", records=old_rows(1), columns=OLD_COLUMNS)
                slowest = max(slowest, asyncio.get_running_loop().time() - began)
                await asyncio.sleep(0.05)
            assert slowest < 4.5
            await transaction.commit()
            await upgrading
            assert (await audit.schema_status()).up_to_date
    finally:
        await writer.close()
    assert len(await connection.fetch(ALL)) > len(before)


async def test_a_process_of_the_first_version_goes_on(old_tables, postgres_database):
    connection, before = old_tables
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
    rows = old_rows(40, months=(1, 5))
    await connection.execute("SELECT audit_ensure_partition($1)", datetime(2024, 5, 1, tzinfo=UTC))
    await connection.copy_records_to_table("audit_events", records=rows, columns=OLD_COLUMNS)
    names = ", ".join(OLD_COLUMNS)
    again = await connection.fetch(
        f"INSERT INTO audit_events ({names}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) "
        "ON CONFLICT (occurred_at, id) DO NOTHING RETURNING id",
        *rows[0],
    )
    assert again == []
    assert len(await connection.fetch(ALL)) == len(before) + 40


LARGE = """
    INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, resource_id, metadata)
    SELECT '2024-02-01Z'::timestamptz + place * interval '1 second', gen_random_uuid(), 'security', 'x',
        'info', 'success', place % 1000, jsonb_build_object('pad', repeat(md5(place::text), 30))
    FROM generate_series(1, 80000) AS place
"""
INVALID = "SELECT count(*) FROM pg_index WHERE indrelid = 'audit_events'::regclass AND NOT indisvalid"


async def test_a_large_table_gets_its_indexes_while_writers_go_on(old_tables, postgres_database):
    connection, _ = old_tables
    await connection.execute(LARGE)
    await connection.execute("ALTER TABLE audit_events_2024_02 ALTER COLUMN metadata SET STORAGE PLAIN")
    await connection.execute(LARGE)
    await migrate_to(postgres_database, schema.HEAD)
    assert await connection.fetchval(INVALID) >= 2
    replaced = "SELECT to_regclass('audit_events_tx')::text"
    assert await connection.fetchval(replaced) == "audit_events_tx"
    async with AuditAggregator(postgres_database) as audit:
        blocker = await asyncpg.connect(postgres_database)
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("LOCK TABLE audit_events_2024_02 IN ROW EXCLUSIVE MODE")  # as a writer's
        build = asyncio.create_task(audit.build_indexes())
        await asyncio.sleep(0.5)
        build.cancel()  # interrupted while it waits for an old transaction
        await asyncio.gather(build, return_exceptions=True)
        await transaction.rollback()
        await blocker.close()
        build = asyncio.create_task(audit.build_indexes())
        slowest = 0.0
        while not build.done():
            began = asyncio.get_running_loop().time()
            await connection.copy_records_to_table("audit_events", records=old_rows(1), columns=OLD_COLUMNS)
            slowest = max(slowest, asyncio.get_running_loop().time() - began)
        assert any("2024_02" in name for name in await build)
        assert slowest < 2.0
        assert await connection.fetchval(INVALID) == 0
        assert await connection.fetchval(replaced) is None
        assert await audit.build_indexes() == []
        broken = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
        assert await connection.fetchval(broken) == 0
        plan = await connection.fetch(
            "EXPLAIN SELECT * FROM audit_events WHERE resource_id = '7' AND occurred_at < '2024-06-01Z'"
        )
        assert any("Index" in row[0] for row in plan)
        made = await audit.build_indexes(metadata=True)
        assert len(made) >= 3
        assert await connection.fetchval(INVALID) == 0
        await audit.log_event("SECURITY", "x", occurred_at=datetime(2020, 1, 1, tzinfo=UTC))
        assert await connection.fetchval(INVALID) == 0


PARTITIONS = """
    SELECT relname, coalesce(reloptions, '{}') AS terms FROM pg_class
    WHERE relname LIKE 'audit\\_events\\_____\\___' AND relkind = 'r'
"""
ON_REQUEST = "SELECT relname FROM pg_class WHERE relkind = 'i' AND 'autosummarize=on' = ANY (reloptions)"
WIDE = """
    INSERT INTO audit_events (occurred_at, id, category, action, level, outcome)
    SELECT '2024-02-01Z'::timestamptz + place * interval '1 second', gen_random_uuid(), 'security',
        repeat(md5(place::text), 40), 'info', 'success'
    FROM generate_series(1, 60000) AS place
"""


async def test_partitions_ask_for_vacuum_instead_of_summaries(old_tables, postgres_database):
    connection, _ = old_tables
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
        await audit.log_event("SECURITY", "x", occurred_at=datetime(2024, 7, 1, tzinfo=UTC))
    found = {row["relname"]: row["terms"] for row in await connection.fetch(PARTITIONS)}
    assert {"audit_events_2024_02", "audit_events_2024_07"} <= set(found)
    for terms in found.values():
        assert "autovacuum_vacuum_insert_threshold=10000" in terms
    assert await connection.fetch(ON_REQUEST) == []


async def test_a_month_on_its_way_out_does_not_stop_an_upgrade(old_tables, postgres_database):
    connection, _ = old_tables
    await migrate_to(postgres_database, "0007")
    reader = await asyncpg.connect(postgres_database)
    try:
        transaction = reader.transaction()
        await transaction.start()
        await reader.fetch("SELECT FROM audit_events LIMIT 1")
        detach = "ALTER TABLE audit_events DETACH PARTITION audit_events_2024_02 CONCURRENTLY"
        await connection.execute("SET statement_timeout = '1s'")
        with pytest.raises(asyncpg.QueryCanceledError):
            await connection.execute(detach)
        await connection.execute("RESET statement_timeout")
        await transaction.rollback()
        assert await connection.fetchval("SELECT count(*) FROM pg_inherits WHERE inhdetachpending") == 1
        async with AuditAggregator(postgres_database) as audit:
            assert (await audit.migrate()).current == "0007"
            await connection.execute(
                "ALTER TABLE audit_events DETACH PARTITION audit_events_2024_02 FINALIZE"
            )
            await audit.log_event("SECURITY", "x")
    finally:
        await reader.close()


async def test_the_servers_log_is_not_filled_by_a_large_import():
    with EmbeddedPostgres() as server:
        async with AuditAggregator(server.url) as audit:
            await audit.migrate()
        connection = await asyncpg.connect(server.url)
        try:
            await connection.execute("SELECT audit_ensure_partition('2024-02-01Z')")
            await connection.execute(WIDE)
            pages = await connection.fetchval("SELECT pg_relation_size('audit_events_2024_02') / 8192")
            assert pages > 2 * 256 * 16  # more pieces than the server takes requests for
            assert "summarization" not in server.log.read_text()
            await connection.execute("VACUUM audit_events_2024_02")
            left = "SELECT brin_summarize_new_values('audit_events_2024_02_segment_idx')"
            assert await connection.fetchval(left) == 0
        finally:
            await connection.close()


async def test_rights_reach_tables_of_later_versions(postgres_database, unique):
    async with AuditAggregator(postgres_database) as audit, made_roles(postgres_database, unique):
        await audit.migrate(tenants=True)
        await audit.grant_role("reader", unique)
        owner = await asyncpg.connect(postgres_database)
        reader = await asyncpg.connect(address_of(postgres_database, unique))
        try:
            # Of a later version by name; made here as one would make it.
            await owner.execute("CREATE TABLE IF NOT EXISTS audit_checkpoints (tenant_id text, size bigint)")
            await audit.apply_roles()
            assert await reader.fetchval("SELECT count(*) FROM audit_checkpoints") == 0
            secure = "SELECT relrowsecurity FROM pg_class WHERE relname = 'audit_checkpoints'"
            assert await owner.fetchval(secure)
        finally:
            await reader.close()
            await owner.close()


async def test_the_printed_sql_keeps_tenants_apart_where_asked(postgres_database):
    connection = await asyncpg.connect(postgres_database)
    try:
        await connection.execute(schema.printable_sql(tenants=True))
        assert await connection.fetchval("SELECT audit_isolated()")
    finally:
        await connection.close()
