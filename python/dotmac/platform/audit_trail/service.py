"""What every part of the audit trail's service stands on: settings, life, the way to the database."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from dotmac.platform import _semconv
from dotmac.platform._closing import AsyncClosing
from dotmac.platform.audit_trail.arguments import check_count, check_seconds, check_threshold
from dotmac.platform.audit_trail.database import Settings, SpoolSettings, last_try, meaning
from dotmac.platform.audit_trail.spool import spool_path
from dotmac.platform.audit_trail.state import LoopState, Process
from dotmac.platform.audit_trail.tenancy import MISSING, warn_of_missing
from dotmac.platform.observability.tracing import span

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import asyncpg

    from dotmac.platform._native import AuditEncoder
    from dotmac.platform.audit_trail.anomaly import OnAnomaly
    from dotmac.platform.audit_trail.config import AuditTrailConfig
    from dotmac.platform.audit_trail.integrity.keys import SigningKey
    from dotmac.platform.audit_trail.personal_key import KeyService
    from dotmac.platform.audit_trail.redaction import RedactionRule
    from dotmac.platform.audit_trail.tenancy import Sight

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Service", "making"]

Answer = TypeVar("Answer")

# Users, addresses, tenants and actions that the detector remembers; about 500 bytes each.
_REMEMBERED = 16_384
# Forks between the first process and this one; asking the kernel for the process's id takes much longer.
_forks = 0


# Held while what a process has once is made; reentrant, since making it may ask for the other.
_making = threading.RLock()


def _forked() -> None:
    global _forks, _making  # noqa: PLW0603 (what a process knows of itself)
    _forks += 1
    _making = threading.RLock()  # the parent's may have been held by a thread that is not here


def making() -> threading.RLock:
    """The lock for what a process has once."""
    return _making


os.register_at_fork(after_in_child=_forked)
# What a forked child inherits of its parent: kept, so that nothing of it is closed or finalised there.
_LEFT_TO_THE_PARENT: list[object] = []


class Service(AsyncClosing):
    """Settings, life and connections of an `AuditAggregator`, which tells what the arguments mean."""

    def __init__(
        self,
        postgres_url: str | None = None,
        redis_url: str | None = None,
        *,
        config: AuditTrailConfig | None = None,
        timeout: float | None = None,
        max_pending: int | None = None,
        statement_cache_size: int | None = None,
        anomaly_detection: bool | None = None,
        anomaly_threshold: float | None = None,
        on_anomaly: OnAnomaly | None = None,
        signing_key: SigningKey | str | bytes | None = None,
        sealing: bool | None = None,
        redaction: Sequence[RedactionRule] | None = None,
        personal_key: bytes | str | KeyService | None = None,
        decrypt_personal: bool = False,
    ) -> None:
        from dotmac.platform.connection.urls import parse_redis_url, postgres_dsn

        check_seconds("timeout", timeout)
        check_count("max_pending", max_pending, 1)
        check_count("statement_cache_size", statement_cache_size, 0)
        check_threshold("anomaly_threshold", anomaly_threshold)
        if postgres_url is not None and not _is_embedded(postgres_url):
            postgres_dsn(postgres_url)
        if redis_url is not None and not _is_embedded(redis_url):
            parse_redis_url(redis_url)
        self._postgres_url = postgres_url
        self.redis_url = redis_url
        self._config = config
        self._timeout = timeout
        self._max_pending = max_pending
        self._statement_cache_size = statement_cache_size
        self._anomaly_detection = anomaly_detection
        self._anomaly_threshold = anomaly_threshold
        self._on_anomaly = on_anomaly
        self._signing_key = signing_key
        self._sealing = sealing
        self._redaction = None if redaction is None else tuple(redaction)
        self._personal_key = personal_key
        self._decrypt_personal = decrypt_personal
        self._process: Process | None = None

    # --- life

    async def aclose(self) -> None:
        """Store what is on its way, then close all connections of this process.

        A caller that is cancelled does not end it: the next call waits for the same end. All is closed, in
        other loops too, before the first error is raised.
        """
        process = self._here()
        with process.lock:
            for loop, made in process.loops.items():
                if loop.is_running():
                    process.closing[asyncio.run_coroutine_threadsafe(_close(made), loop)] = loop
            process.loops.clear()
            process.logging.clear()
            begun = [one for one, loop in process.closing.items() if one.done() or loop.is_running()]
        if not begun:
            return
        ends = [asyncio.wrap_future(one) for one in begun]
        await asyncio.wait(ends)  # which cancels none of them where this caller is
        with process.lock:
            for one in begun:
                process.closing.pop(one, None)
        for error in [None if end.cancelled() else end.exception() for end in ends]:
            if error is not None:
                raise error

    def _here(self) -> Process:
        process = self._process
        if process is None or process.forks != _forks:
            with making():
                process = self._process  # another thread may have made it meanwhile
                if process is None or process.forks != _forks:
                    if process is not None:
                        _LEFT_TO_THE_PARENT.append(process)
                    process = self._process = Process(self.make_encoder(), self.threshold(), _forks)
        return process

    def make_encoder(self) -> AuditEncoder:
        """What makes events with this aggregator's settings; its detector, if any, knows nothing so far."""
        from dotmac.platform.audit_trail.entry import make_encoder

        section, scored = self._section(), self._anomaly_detection
        if scored is None:
            scored = section.anomaly_detection_enabled
        return make_encoder(
            hashed=section.integrity_enabled,
            capacity=_REMEMBERED if scored else 0,
            seed=int.from_bytes(os.urandom(8)),
        )

    async def _state(self) -> LoopState:
        process, loop = self._here(), asyncio.get_running_loop()
        with process.lock:
            made = process.loops.get(loop)
            if made is None or (made.done() and (made.cancelled() or made.exception() is not None)):
                process.forget_closed_loops()
                made = process.loops[loop] = loop.create_task(self._start_state(), name="dotmac-audit-start")
        if made.done():
            return made.result()
        # Shielded: a caller that is cancelled must not take the start away from the others.
        return await asyncio.shield(made)

    async def _start_state(self) -> LoopState:
        state = LoopState(await self._settings(), self._on_anomaly)
        await state.start()
        return state

    async def _read(
        self,
        work: Callable[[Connection], Awaitable[Answer]],
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        snapshot: bool = False,
    ) -> Answer:
        """Read, for that tenant where tenants are kept apart; see `Database.read`.

        Warns (`TenantMissing`) where nothing can be seen because no tenant is named; an empty one says that
        the work is not about events.
        """
        state = await self._state()
        with span(_semconv.SPAN_AUDIT_QUERY, {_semconv.DB_SYSTEM: "postgresql"}):
            answer = await state.database.read(
                work, timeout or self._seconds(), tenant=tenant, snapshot=snapshot
            )
        if tenant is None and await self._why_nothing(None) is not None:
            warn_of_missing()
        return answer

    async def _sight(self) -> Sight:
        """What the database shows to our role."""
        database = (await self._state()).database

        async def look(_: Connection) -> None:
            """What is to be seen is looked up before any piece of reading."""

        await self._read(look, tenant="")
        assert database.sight is not None
        return database.sight

    async def _why_nothing(self, tenant: str | None) -> str | None:
        """Why what was read for that tenant is empty, if row-level security is why."""
        sight = (await self._state()).database.sight
        return MISSING if sight is not None and sight.is_blind(tenant) else None

    async def _once(self, work: Awaitable[Answer]) -> Answer:
        from sqlalchemy.exc import DBAPIError

        with last_try("the audit database does not answer"):
            try:
                async with asyncio.timeout(10 * self._seconds()):
                    return await work
            except DBAPIError as error:
                cause = error.orig.__cause__ if error.orig is not None else None
                if cause is None:
                    raise meaning(error) from error
                raise cause from None

    # --- settings

    def _section(self) -> AuditTrailConfig:
        if self._config is not None:
            return self._config
        from dotmac.platform.core.unified_config import get_config

        return get_config().audit_trail

    def _seconds(self) -> float:
        return self._section().timeout if self._timeout is None else self._timeout

    def threshold(self) -> float:
        """Score from which an event is an anomaly."""
        return self._anomaly_threshold or self._section().anomaly_threshold

    async def _settings(self) -> Settings:
        from dotmac.platform.connection.embedded import aresolve_database
        from dotmac.platform.connection.urls import postgres_dsn

        section = self._section()
        url = self._postgres_url or _plain(section.postgres_url)
        if url is None:
            from dotmac.platform.core.unified_config import get_config

            known = get_config()
            url = _plain(known.audit_trail.postgres_url) or known.get_database_url()
        cache, pending = self._statement_cache_size, self._max_pending
        return Settings(
            dsn=postgres_dsn(await aresolve_database(url)),
            timeout=self._seconds(),
            connect_timeout=section.connect_timeout,
            statement_cache_size=section.statement_cache_size if cache is None else cache,
            batch_size=section.batch_size,
            batch_wait=section.batch_wait_ms / 1000,
            max_pending=section.max_pending if pending is None else pending,
            pool_min_size=section.pool_min_size,
            pool_max_size=section.pool_max_size,
            migrate_on_first_use=_is_embedded(url),
            integrity=section.integrity_enabled,
            spool=SpoolSettings(
                path=spool_path(section.spool_path, url),
                max_events=section.spool_max_events,
                max_bytes=section.spool_max_mb << 20,
            ),
        )


async def _close(made: asyncio.Future[LoopState]) -> None:
    """Close what was made for this loop; nothing, where its start has failed."""
    await asyncio.wait([made])
    if not made.cancelled() and made.exception() is None:
        await made.result().aclose()


def _is_embedded(url: object) -> bool:
    return isinstance(url, str) and url.startswith("embedded://")


def _plain(url: Any) -> str | None:
    """The text of a setting that may be a secret."""
    if url is None:
        return None
    reveal = getattr(url, "get_secret_value", None)
    return str(reveal() if reveal is not None else url)
