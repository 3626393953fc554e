"""Connections to the audit database for one event loop, and what its errors mean."""

from __future__ import annotations

import asyncio
import random
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from dotmac.platform.audit_trail import schema
from dotmac.platform.errors import (
    AuditUnavailable,
    AuthenticationFailed,
    ConfigurationError,
    DotmacError,
    SchemaOutdated,
    ServerRefused,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Connection = asyncpg.Connection[asyncpg.Record]
    Pooled = Connection | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

__all__ = ["Database", "Settings", "backoff", "is_transient", "meaning"]

Answer = TypeVar("Answer")

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
_CLOSE_SECONDS = 5.0
_IS_LAZY = "SELECT current_setting('synchronous_commit') IN ('off', 'local')"
# Classes and codes of SQLSTATE that may pass by themselves: connection, resources, shutdown, crash,
# start-up, a cancelled statement, serialisation, deadlock, lock timeout, a standby not yet promoted.
_TRANSIENT_CLASSES = ("08", "53", "57", "40", "58")
_TRANSIENT_CODES = ("55P03", "25006")


@dataclass(frozen=True, slots=True)
class Settings:
    """What one aggregator asks of its database; see `AuditTrailConfig` for the meaning of each."""

    dsn: str
    timeout: float
    connect_timeout: float
    statement_cache_size: int
    batch_size: int
    batch_wait: float
    max_pending: int
    pool_min_size: int
    pool_max_size: int
    migrate_on_first_use: bool


def is_transient(error: BaseException) -> bool:
    """Can the same statement succeed later, on a new connection?"""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_CODES
    if isinstance(error, ssl.SSLCertVerificationError | asyncpg.exceptions.ClientConfigurationError):
        return False
    # InterfaceError: asyncpg found the connection closed under it.
    return isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError)


def meaning(error: BaseException) -> DotmacError:
    """The platform's error for one that will not pass by itself."""
    if isinstance(error, DotmacError):
        return error
    if isinstance(error, asyncpg.exceptions.ClientConfigurationError):
        return ConfigurationError(f"the audit database's address is wrong: {error}")
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return AuthenticationFailed(f"the audit database refused the login: {error}")
    if isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError):
        return SchemaOutdated(f"the audit tables do not fit this version ({error}): run `dotmac db upgrade`")
    return ServerRefused(f"the audit database refused: {type(error).__name__}: {error}")


def backoff(attempt: int) -> float:
    """Seconds to wait before try number `attempt` + 1, with full jitter (Brooker, "Exponential Backoff And
    Jitter", 2015), never 0.
    """
    ceiling: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt, 10))
    return ceiling * random.uniform(0.5, 1.0)  # noqa: S311 (spread, not secrecy)


class Database:
    """Connects, checks the tables once, keeps a small pool for reading. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Does the database not wait for the disk at COMMIT unless a transaction asks it to?
        self.lazy_commits = False
        self._checked = False
        self._checking = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def connect(self) -> Connection:
        """A new connection to checked tables; the caller closes it."""
        connection = await self.open()
        try:
            await self._check_once(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def open(self) -> Connection:
        """A new connection to a database whose tables may be missing."""
        connection: Connection = await asyncpg.connect(**self._arguments())
        try:
            self.lazy_commits = await connection.fetchval(_IS_LAZY)
        except BaseException:
            connection.terminate()
            raise
        return connection

    def _arguments(self) -> dict[str, Any]:
        return {
            "dsn": self.settings.dsn,
            "timeout": min(self.settings.connect_timeout, self.settings.timeout),
            "statement_cache_size": self.settings.statement_cache_size,
        }

    async def _check_once(self, connection: Connection) -> None:
        if self._checked:
            return
        async with self._checking:
            if self._checked:
                return
            try:
                await schema.check(connection)
            except SchemaOutdated:
                if not self.settings.migrate_on_first_use:
                    raise
                await schema.upgrade(self.open)
            self._checked = True

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Pooled]:
        """A pooled connection; not for writing, which has connections of its own."""
        pool = self._pool or await self._open_pool()
        async with pool.acquire() as connection:
            try:
                yield connection
            except BaseException:
                # Given back after a cancelled query, it would be waited for, however long its server takes.
                connection.terminate()
                raise

    async def _open_pool(self) -> asyncpg.Pool[asyncpg.Record]:
        async with self._opening:
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    min_size=self.settings.pool_min_size,
                    max_size=self.settings.pool_max_size,
                    init=self._init,
                    **self._arguments(),
                )
            return self._pool

    async def _init(self, connection: Connection) -> None:
        try:
            await self._check_once(connection)
        except BaseException:
            connection.terminate()  # as in `reading`
            raise

    async def read(self, work: Callable[[Any], Awaitable[Answer]], timeout: float) -> Answer:
        """Run a repeatable piece of reading; a lost connection is tried again until `timeout` seconds passed.

        Raises: AuditUnavailable: no answer in time. SchemaOutdated, ServerRefused: it will not get better.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        attempt = 0
        while True:
            try:
                async with asyncio.timeout_at(deadline), self.reading() as connection:
                    return await work(connection)
            except (
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
                OSError,
            ) as error:
                if not is_transient(error):
                    raise meaning(error) from error
                pause = backoff(attempt)
                attempt += 1
                if loop.time() + pause >= deadline:
                    raise AuditUnavailable(
                        f"no answer from the audit database within {timeout:g} s: "
                        f"{type(error).__name__}: {error}"
                    ) from error
            await asyncio.sleep(pause)

    async def aclose(self) -> None:
        """Close the pool; a server that does not take part is left alone after a few seconds."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await pool.close()
        except TimeoutError:
            pool.terminate()
