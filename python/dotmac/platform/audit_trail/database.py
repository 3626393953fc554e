"""Connections to the audit database for one event loop, and what its errors mean."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from dotmac.platform.audit_trail import schema, tenancy
from dotmac.platform.errors import (
    AuditUnavailable,
    AuthenticationFailed,
    ConfigurationError,
    DotmacError,
    SchemaOutdated,
    ServerRefused,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    Connection = asyncpg.Connection[asyncpg.Record]
    Lent = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Pooled = Connection | Lent

__all__ = [
    "FAILURES",
    "Database",
    "Settings",
    "SpoolSettings",
    "backoff",
    "is_transient",
    "last_try",
    "lone",
    "meaning",
    "told",
]

Answer = TypeVar("Answer")

_logger = logging.getLogger(__name__)

# What asyncpg raises where the server refuses, or it or the way to it fails.
FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
_CLOSE_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 60.0  # whether tenants are kept apart may change while a service runs
_STOP_SECONDS = 2.0
_IS_LAZY = "SELECT current_setting('synchronous_commit') IN ('off', 'local')"
# Classes and codes of SQLSTATE that may pass by themselves: connection, resources, shutdown, crash,
# start-up, a cancelled statement, serialisation, deadlock, lock timeout, a standby not yet promoted.
_TRANSIENT_CLASSES = ("08", "53", "57", "40", "58")
_SHOW_ROWS = ("22", "23")  # classes whose details show data: data exception, integrity constraint violation
_TRANSIENT_CODES = ("55P03", "25006")


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """Where events of `log_event(wait=False)` wait; see `AuditTrailConfig`."""

    path: Path
    max_events: int
    max_bytes: int


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
    integrity: bool
    spool: SpoolSettings


def is_transient(error: BaseException) -> bool:
    """Can the same statement succeed later, on a new connection?"""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_CODES
    if isinstance(error, ssl.SSLCertVerificationError | asyncpg.exceptions.ClientConfigurationError):
        return False
    # InterfaceError: asyncpg found the connection closed under it.
    return isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError)


def told(error: BaseException) -> str:
    """The error in words for logs and callers: PostgreSQL's own without its detail, which may show a row
    (`Failing row contains (…)`).

    Such a detail is taken from the error, too, since tracebacks show what an error was raised from. The
    message itself may quote one value that could not be read.
    """
    name = type(error).__name__
    if not isinstance(error, asyncpg.PostgresError):
        return f"{name}: {error}"
    if (error.sqlstate or "").startswith(_SHOW_ROWS):
        error.detail = None
    constraint = f", constraint {error.constraint_name}" if error.constraint_name else ""
    hint = f". {error.hint}" if error.hint else ""
    text = error.args[0] if error.args else ""
    return f"{name}: {text} (SQLSTATE {error.sqlstate}{constraint}){hint}"


def meaning(error: BaseException) -> DotmacError:
    """The platform's error for one that will not pass by itself."""
    if isinstance(error, DotmacError):
        return error
    if isinstance(error, asyncpg.exceptions.ClientConfigurationError):
        return ConfigurationError(f"the audit database's address is wrong: {error}")
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return AuthenticationFailed(f"the audit database refused the login: {told(error)}")
    if isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError):
        return SchemaOutdated(
            f"the audit tables do not fit this version ({told(error)}): run `dotmac db upgrade`"
        )
    return ServerRefused(f"the audit database refused: {told(error)}")


@contextmanager
def last_try(what: str) -> Iterator[None]:
    """Around what is not tried again: its failures become the platform's errors; `what` tells of one that may
    pass by itself."""
    try:
        yield
    except DotmacError:
        raise
    except FAILURES as error:
        if is_transient(error):
            raise AuditUnavailable(f"{what}: {told(error)}") from error
        raise meaning(error) from error


def backoff(attempt: int) -> float:
    """Seconds to wait before try number `attempt` + 1, with full jitter (Brooker, "Exponential Backoff And
    Jitter", 2015), never 0.
    """
    ceiling: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt, 10))
    return ceiling * random.uniform(0.5, 1.0)  # noqa: S311 (spread, not secrecy)


@asynccontextmanager
async def lone(connecting: Awaitable[Connection]) -> AsyncIterator[Connection]:
    """A connection for one block of work, closed after it.

    Where the block fails it is dropped: closing would wait for a server that is silent.
    """
    connection = await connecting
    try:
        yield connection
        await connection.close(timeout=_CLOSE_SECONDS)
    except BaseException:
        connection.terminate()
        raise


class Reader(asyncpg.Connection):
    """A pooled connection, which is given back as it is: reading leaves no setting, lock or cursor behind.

    An open transaction is rolled back all the same.
    """

    __slots__ = ()

    def get_reset_query(self) -> str:
        """Nothing: one answer less to wait for."""
        return ""


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
        self.sight: tenancy.Sight | None = None  # since the first reading
        self._look_again = 0.0
        self._leaving: set[asyncio.Task[None]] = set()

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
        connection = await pool.acquire()
        try:
            yield connection
        except BaseException:
            # asyncpg has asked the server to stop the query; the caller does not wait for it to obey.
            leaving = asyncio.get_running_loop().create_task(self._give_back(pool, connection))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            raise
        await pool.release(connection)

    @staticmethod
    async def _give_back(pool: asyncpg.Pool[asyncpg.Record], connection: Lent) -> None:
        """Return a connection whose query broke off; one whose server stays silent is dropped."""
        try:
            async with asyncio.timeout(2 * _STOP_SECONDS):
                await pool.release(connection, timeout=_STOP_SECONDS)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            with suppress(asyncpg.InterfaceError):  # the pool has dropped it already
                connection.terminate()

    async def _open_pool(self) -> asyncpg.Pool[asyncpg.Record]:
        async with self._opening:
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    min_size=self.settings.pool_min_size,
                    max_size=self.settings.pool_max_size,
                    init=self._init,
                    connection_class=Reader,
                    **self._arguments(),
                )
            return self._pool

    async def _init(self, connection: Connection) -> None:
        try:
            await self._check_once(connection)
        except BaseException:
            connection.terminate()  # as in `reading`
            raise

    async def look(self, connection: Pooled) -> tenancy.Sight:
        """What our role sees; asked again from time to time."""
        now = asyncio.get_running_loop().time()
        if self.sight is None or self._look_again <= now:
            self.sight = await tenancy.sight_of(connection)
            self._look_again = now + _LOOK_AGAIN_SECONDS
        return self.sight

    async def _work(
        self,
        connection: Pooled,
        work: Callable[[Any], Awaitable[Answer]],
        tenant: str | None,
        snapshot: bool,
    ) -> Answer:
        named = (await self.look(connection)).setting(tenant)
        if named is not None:
            return await tenancy.in_transaction(connection, work, named, partitions=snapshot)
        if snapshot:
            return await tenancy.in_transaction(connection, work, None, partitions=True)
        return await work(connection)

    async def read(
        self,
        work: Callable[[Any], Awaitable[Answer]],
        timeout: float,
        *,
        tenant: str | None = None,
        snapshot: bool = False,
    ) -> Answer:
        """Run a repeatable piece of reading; a lost connection is tried again until `timeout` seconds passed.

        Args:
            work: given a connection; inside a transaction where one is needed.
            timeout: seconds.
            tenant: whose events it may see where row-level security applies; None for nobody's.
            snapshot: in one transaction whose statements all see the same, partitions included.

        Raises: AuditUnavailable: no answer in time. SchemaOutdated, ServerRefused: it will not get better.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        attempt = 0
        while True:
            try:
                async with asyncio.timeout_at(deadline), self.reading() as connection:
                    return await self._work(connection, work, tenant, snapshot)
            except FAILURES as error:
                if not is_transient(error):
                    raise meaning(error) from error
                pause = backoff(attempt)
                attempt += 1
                if loop.time() + pause >= deadline:
                    raise AuditUnavailable(
                        f"no answer from the audit database within {timeout:g} s: " + told(error)
                    ) from error
            await asyncio.sleep(pause)

    async def compact(self) -> None:
        """Sum up the counts per day; what is left undone is done the next time."""

        async def work(connection: Connection) -> None:
            await connection.execute("SELECT audit_compact_rollup()")

        try:
            await self.read(work, self.settings.timeout)
        except (DotmacError, TimeoutError) as error:
            _logger.warning("the audit trail's counts per day were not summed up: %s", error)

    async def aclose(self) -> None:
        """Close the pool; a server that does not take part is left alone after a few seconds."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        if self._leaving:
            await asyncio.wait(self._leaving)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await pool.close()
        except TimeoutError:
            pool.terminate()
