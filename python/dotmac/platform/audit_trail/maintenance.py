"""A connection of its own for work on the tables themselves, which waits for no lock for long.

A statement that waits for a lock on a table holds up everybody who comes after it. So each waits for two
seconds at most, then lets the others go first and tries again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from dotmac.platform.audit_trail.database import (
    Database,
    backoff,
    last_try,
    lone,
    told,
)
from dotmac.platform.audit_trail.service import Service
from dotmac.platform.errors import AuditUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["LOCK_TIMEOUT", "Maintenance", "patiently", "take_turn"]

Answer = TypeVar("Answer")

LOCK_TIMEOUT = "2s"
TRIES = 15
_TURN_SECONDS = 0.2


class Maintenance(Service):
    """The part of `AuditAggregator` that the owner's work stands on."""

    if TYPE_CHECKING:
        # What is done to the trail is told in the trail.
        log_event: Callable[..., Awaitable[UUID]]

    async def _maintain(self, work: Callable[[Connection], Awaitable[Answer]]) -> Answer:
        """Run `work` on a direct connection, which it may keep for as long as it needs.

        Raises: AuditUnavailable: the database went away, or locks of others did not. SchemaOutdated,
            ServerRefused.
        """
        database = Database(await self._settings())
        with last_try("the audit database is away or busy"):
            async with lone(database.connect()) as connection:
                await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
                return await work(connection)


async def patiently(step: Callable[[], Awaitable[Answer]], tries: int = TRIES) -> Answer:
    """Run a step that may be refused a lock, again and again, letting others through in between.

    Args: step: repeatable, as it leaves nothing behind where it fails. tries: at most.
    Raises: AuditUnavailable: refused each time.
    """
    import asyncpg

    refused: tuple[type[Any], ...] = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
    for attempt in range(tries):
        try:
            return await step()
        except refused as error:
            if attempt == tries - 1:
                raise AuditUnavailable(
                    f"others hold a lock that is needed, also after {tries} tries of {LOCK_TIMEOUT} each: "
                    f"{told(error)}. Long transactions on the audit tables are what to look for"
                ) from error
            await asyncio.sleep(backoff(attempt))
    raise AssertionError


async def take_turn(connection: Connection, lock: int, seconds: float) -> None:
    """Wait until no other process does this work; its end, or the connection's, lets the next one in.

    Asked for again and again, not waited for in the database: a statement that waits there has a snapshot,
    and CREATE INDEX CONCURRENTLY of the one that is at work would wait for that.

    Raises: AuditUnavailable: another one is at work for longer than that.
    """
    end = asyncio.get_running_loop().time() + seconds
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", lock):
        if asyncio.get_running_loop().time() > end:
            raise AuditUnavailable(
                f"another process has been doing this for {seconds:g} s; it goes on meanwhile"
            )
        await asyncio.sleep(_TURN_SECONDS)
