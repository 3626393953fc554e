"""The version of the audit tables: looked up, compared, brought up to date by alembic.

Revisions only ever add: a process works on tables of its own version or of a later one.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from dotmac.platform.errors import SchemaOutdated

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

__all__ = ["HEAD", "VERSION_TABLE", "SchemaStatus", "check", "printable_sql", "status", "upgrade"]

HEAD = "0008"
VERSION_TABLE = "dotmac_schema_version"
# Serialises upgrades of several processes; the number is arbitrary but ours.
_UPGRADE_LOCK = 4_843_917_210_475_300
_LOCK_TIMEOUT = "3s"
_TRIES = 10
_PAUSE = 0.5  # seconds

Connect = Callable[[], Awaitable["asyncpg.Connection[asyncpg.Record]"]]


@dataclass(frozen=True, slots=True)
class SchemaStatus:
    """What the database has and what this version wants; `current` is None where there are no tables."""

    current: str | None
    wanted: str

    @property
    def up_to_date(self) -> bool:
        """Can this version of the library work on these tables?"""
        return self.current is not None and self.current >= self.wanted


async def status(connection: asyncpg.Connection[asyncpg.Record]) -> SchemaStatus:
    """Look the version up."""
    try:
        current = await connection.fetchval(f"SELECT max(version_num) FROM {VERSION_TABLE}")  # noqa: S608 (constants and conditions of ours)
    except asyncpg.UndefinedTableError:
        current = None
    return SchemaStatus(current=current, wanted=HEAD)


async def check(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Refuse to work on missing or older tables.

    Raises: SchemaOutdated: the text holds the command to run.
    """
    found = await status(connection)
    if not found.up_to_date:
        have = f"of version {found.current}" if found.current else "missing"
        raise SchemaOutdated(
            f"the audit tables are {have}, version {found.wanted} is needed: run `dotmac db upgrade` "
            "(or `await aggregator.migrate()`) with a role that may create tables"
        )


async def upgrade(connect: Connect) -> SchemaStatus:
    """Bring the tables up to date in one transaction; several processes at once wait for one another.

    Args:
        connect: makes an asyncpg connection of a role that may create tables.
    Returns: the version found before, and the one there is now as `wanted`.
    Raises: sqlalchemy.exc.DBAPIError: among others where somebody else holds a table for half a minute.
    """
    from alembic import command
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)

    def run(connection: Connection) -> str | None:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
        # Whoever waits for a table holds up all who come later: give up, let them through, try again.
        connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"))
        before: str | None = None
        if connection.execute(text("SELECT to_regclass(:name)"), {"name": VERSION_TABLE}).scalar():
            before = connection.execute(text(f"SELECT max(version_num) FROM {VERSION_TABLE}")).scalar()  # noqa: S608 (constants and conditions of ours)
        if before is None or before < HEAD:
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        return before

    try:
        for attempt in range(_TRIES):
            try:
                async with engine.begin() as connection:
                    before = await connection.run_sync(run)
                break
            except DBAPIError as error:
                refused = error.orig is not None and error.orig.__cause__
                if attempt == _TRIES - 1 or not isinstance(refused, asyncpg.LockNotAvailableError):
                    raise
            await asyncio.sleep(_PAUSE)
    finally:
        await engine.dispose()
    return SchemaStatus(current=before, wanted=HEAD)


def printable_sql(*, tenants: bool = False) -> str:
    """All revisions as SQL, for those who run migrations with a tool of their own.

    Args: tenants: with row-level security switched on.
    """
    from alembic import command

    out = io.StringIO()
    command.upgrade(_config(out), "head", sql=True)
    last = "audit_enable_tenants" if tenants else "audit_apply_roles"
    return f"{out.getvalue()}\nSELECT {last}();\n"


def _config(out: io.StringIO | None = None) -> Config:
    from alembic.config import Config

    config = Config(output_buffer=out) if out is not None else Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config
