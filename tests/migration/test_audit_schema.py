"""The audit tables from version to version.

Promises: every revision runs on an empty database and, with events in it, loses none; running again changes
nothing; HEAD is alembic's head; the printed SQL makes the same tables as the migration; a role that may only
insert and select can log events of any month and neither change nor delete them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import urlsplit

import asyncpg
import pytest
from alembic.script import ScriptDirectory

from dotmac.platform.audit_trail import AuditAggregator, schema

COLUMNS = """
    SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns
    WHERE table_schema = 'public' AND table_name IN ('audit_events', 'audit_imports') ORDER BY 1, 2
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
