"""Sealing in the background: segments into logs every second, checkpoints on their schedule.

Any number of processes may run it. A lock in the database lets one of them work at a time, whichever asks
first, so nothing has to be taken over when one of them dies.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from dotmac.platform import _semconv
from dotmac.platform.audit_trail.database import backoff, is_transient, meaning, told
from dotmac.platform.audit_trail.integrity.checkpoints import Sender, Signed, Signer
from dotmac.platform.audit_trail.integrity.log import seal
from dotmac.platform.observability import metrics
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    import asyncpg

    from dotmac.platform.audit_trail.database import Database
    from dotmac.platform.audit_trail.integrity.anchors import Anchor
    from dotmac.platform.audit_trail.integrity.keys import SigningKey
    from dotmac.platform.errors import DotmacError

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["SealOptions", "SealResult", "Sealer"]

_log = get_logger(__name__)

_PAUSE = 1.0
_PASS_SECONDS = 60.0
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class SealOptions:
    """How logs are sealed.

    Attributes: key: signs checkpoints; None signs none. interval: seconds between two of a log. origin: the
        trail's name; None for the one it has. anchors: where checkpoints go.
    """

    key: SigningKey | None
    interval: float
    origin: str | None
    anchors: tuple[Anchor, ...]


@dataclass(slots=True)
class SealResult:
    """What one pass did.

    Attributes: segments: appended to logs. checkpoints: signed. errors: logs that were not signed because
        they do not go on from their last checkpoint, and places that took no checkpoints.
    """

    segments: int = 0
    checkpoints: list[Signed] = field(default_factory=list)
    errors: list[DotmacError] = field(default_factory=list)


class Sealer:
    """Seals, signs and anchors; belongs to one event loop."""

    def __init__(self, database: Database, options: SealOptions) -> None:
        self._database = database
        self._options = options
        self._signer = Signer(options.key, options.origin) if options.key is not None else None
        self._sender = Sender(options.anchors)
        self._line = 0
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._told: set[str] = set()

    def start(self) -> None:
        """Work in the background until `aclose`."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="dotmac-audit-sealer")

    async def aclose(self) -> None:
        """Stop; what is not sealed yet is for another process, or the next time."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _run(self) -> None:
        failures = 0
        while True:
            pause = _PAUSE
            try:
                async with asyncio.timeout(_PASS_SECONDS):
                    done = await self.run_once(timedelta(seconds=self._options.interval))
                failures = 0
                for error in done.errors:
                    self._tell(error)
            except Exception as error:  # noqa: BLE001 (told; the trail is stored all the same)
                self._drop()
                failures += 1
                refused = not (isinstance(error, TimeoutError) or is_transient(error))
                self._tell(meaning(error) if refused else error)
                # What a person has to put right is not asked for every second.
                pause = _LONGEST_PAUSE if refused else backoff(failures)
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 (spread, not secrecy)

    def _tell(self, error: BaseException) -> None:
        """Log it, each only once, so that a lasting fault does not fill the log."""
        metrics.counter(_semconv.AUDIT_SEAL_FAILURES).add(1, {_semconv.ERROR_TYPE: type(error).__qualname__})
        text = told(error)
        if text in self._told:
            return
        if len(self._told) >= 1_000:  # noqa: PLR2004 (a bound on memory)
            self._told.clear()
        self._told.add(text)
        _log.error("audit trail not sealed", error=text)

    async def run_once(self, interval: timedelta) -> SealResult:
        """Seal all that has settled, sign the logs that were not signed within `interval`, anchor.

        Raises: whatever the database or the key's callable raised; nothing is half done.
        """
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._database.connect()
            self._line = 0
        connection, durably = self._connection, self._database.lazy_commits
        result = SealResult()
        while True:
            sealed = await seal(connection, self._line, durably=durably)
            if sealed is None:
                break
            result.segments += sealed.segments
            self._line = sealed.line
            if not sealed.more:
                break
        if self._signer is not None:
            result.checkpoints, broken = await self._signer.sign_due(connection, interval, durably=durably)
            result.errors += broken
            result.errors += await self._sender.send(connection, result.checkpoints)
        metrics.counter(_semconv.AUDIT_SEGMENTS_SEALED).add(result.segments)
        metrics.counter(_semconv.AUDIT_CHECKPOINTS).add(len(result.checkpoints))
        return result
