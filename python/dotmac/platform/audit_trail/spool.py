"""Events of `log_event(wait=False)`: kept on the local disk, stored in the database behind the caller's back.

Each event loop has a file of its own, so that the order of its events is kept: they are stored block by
block, in the order in which they came. Their ids make that exactly once, whoever stores them: a block whose
fate is unknown, or one that another process stored before it was killed, is looked up first. Files of
processes that have ended are found at the first event and every minute, and drained in the same way.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from dotmac.platform._native import AuditEntry
from dotmac.platform.audit_trail.database import backoff
from dotmac.platform.audit_trail.spool_file import SpoolFile, others
from dotmac.platform.errors import (
    AuditUnavailable,
    DotmacError,
    EngineClosed,
    InvalidEvent,
    SpoolFailed,
    SpoolFull,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dotmac.platform.audit_trail.database import Settings
    from dotmac.platform.audit_trail.spool_file import Spooled
    from dotmac.platform.audit_trail.writer import Writer

__all__ = ["Spool", "spool_path"]

Answer = TypeVar("Answer")

BLOCK_EVENTS = 2_000
BLOCK_BYTES = 4 << 20
LOOK_EVERY = 60.0
TOLD_EVERY = 5.0
_logger = logging.getLogger(__name__)
# The spools of this process, and those that a child has from its parent: for those of loops that have ended.
_living: weakref.WeakSet[Spool] = weakref.WeakSet()


def spool_path(folder: Path | None, url: str) -> Path:
    """Where the events for one database wait: those for another must not get into it."""
    from dotmac.platform.connection.embedded import state_directory

    parts = urlsplit(url)
    place = f"{parts.scheme.partition('+')[0]}|{parts.netloc.rpartition('@')[2]}|{parts.path}|{parts.query}"
    base = folder if folder is not None else state_directory() / "audit-spool"
    return base / hashlib.sha256(place.encode()).hexdigest()[:16]


class Spool:
    """The spool of one event loop.

    Args:
        settings: where it is, its bounds, and within how many seconds an event is in it or its caller has
            an error.
        writer: stores what was spooled.
    """

    def __init__(self, settings: Settings, writer: Writer) -> None:
        self._settings = settings.spool
        self._timeout = settings.timeout
        self._hashed = settings.integrity
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._thread: ThreadPoolExecutor | None = None
        self._file: SpoolFile | None = None
        self._coming: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self._pid = os.getpid()
        self.events = 0
        self.bytes = 0
        _living.add(self)

    async def put(self, entry: AuditEntry) -> None:
        """Keep an event; it is on the disk when this returns, and stored as soon as the database takes it.

        Raises: SpoolFull: no room within the timeout, or the disk is full. SpoolFailed.
        """
        self._check_open()
        self.look()
        row = entry.row()
        if self.events >= self._settings.max_events or self.bytes + len(row) > self._settings.max_bytes:
            await self._wait_for_room(len(row))
            self._check_open()
        self.events += 1
        self.bytes += len(row)
        kept: asyncio.Future[None] = self._loop.create_future()
        self._coming.append((row, kept))
        if self._flushing is None:
            self._flushing = self._loop.create_task(self._flush(), name="dotmac-audit-spool")
        await asyncio.shield(kept)  # whoever is cancelled now does not know whether it was kept

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the audit spool of this event loop was closed while an event was on its way")

    async def _wait_for_room(self, size: int) -> None:
        limits = self._settings
        try:
            async with asyncio.timeout(self._timeout):
                while not self._closed and (
                    self.events >= limits.max_events or (self.events and self.bytes + size > limits.max_bytes)
                ):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise SpoolFull(
                f"{self.events} events wait in the spool {limits.path} already ({self.bytes >> 20} MiB; at "
                f"most {limits.max_events} and {limits.max_bytes >> 20} MiB may), and too few were stored "
                f"within {self._timeout:g} s; this one was not kept"
            ) from None

    async def _flush(self) -> None:
        """Keep what came, in groups: one wait for the disk for each."""
        try:
            while self._coming:
                coming, self._coming = self._coming, []
                rows = [row for row, _ in coming]
                error: Exception | None = None
                try:
                    await self._in_thread(self._append, rows)
                except Exception as failed:  # noqa: BLE001 (told to whom it concerns)
                    error = self._meaning(failed)
                    self._left(rows)
                except BaseException:
                    for _, kept in coming:  # the loop is being stopped: nobody may wait for ever
                        kept.cancel()
                    raise
                for _, kept in coming:
                    if kept.done():
                        continue
                    if error is None:
                        kept.set_result(None)
                    else:
                        kept.set_exception(error)
                if error is None and self._draining is None:
                    self._draining = self._loop.create_task(self._drain_own(), name="dotmac-audit-drain")
        finally:
            self._flushing = None

    def _append(self, rows: list[bytes]) -> None:
        if self._file is None:
            self._file = SpoolFile.new(self._settings.path)
        self._file.append(rows)

    def _left(self, rows: list[bytes]) -> None:
        self.events -= len(rows)
        self.bytes -= sum(map(len, rows))
        self._changed.set()

    def _meaning(self, error: Exception) -> DotmacError:
        if isinstance(error, DotmacError):
            return error
        made = SpoolFailed(f"the spool {self._settings.path} can't be used: {type(error).__name__}: {error}")
        made.__cause__ = error
        return made

    async def _in_thread(self, work: Callable[..., Answer], *arguments: Any) -> Answer:
        return await asyncio.wrap_future(self._submit(work, *arguments))

    def _submit(self, work: Callable[..., Answer], *arguments: Any) -> Future[Answer]:
        thread = self._thread
        if thread is None:
            thread = self._thread = ThreadPoolExecutor(1, thread_name_prefix="dotmac-audit-spool")
        try:
            return thread.submit(work, *arguments)
        except RuntimeError:
            # No thread could be started, but the work is in its queue: it is not to be done later.
            self._thread = None
            thread.shutdown(wait=False, cancel_futures=True)
            raise

    # --- draining

    async def _drain_own(self) -> None:
        attempt = 0
        try:
            while self._file is not None and self.events > len(self._coming):
                progress = _Progress(self._file.path, self._loop)
                try:
                    if not await self._drain(self._file, self._left, progress):
                        break
                    attempt = 0
                except Exception as error:  # noqa: BLE001 (told, and tried again: nothing else drains the file)
                    progress.away(error, self.events)
                    await asyncio.sleep(backoff(attempt))
                    attempt += 1
        finally:
            self._draining = None

    async def _drain(
        self, file: SpoolFile, stored: Callable[[list[bytes]], None], progress: _Progress
    ) -> bool:
        """Store what is in the file, however long the database is away; returns whether there was any."""
        while block := await self._in_thread(file.first, BLOCK_EVENTS, BLOCK_BYTES):
            await self._store(file, block, progress)
            stored([event.row for event in block])
            progress.stored(len(block), await self._in_thread(file.count))
        return progress.events > 0

    async def _store(self, file: SpoolFile, block: list[Spooled], progress: _Progress) -> None:
        attempt = 0
        while True:
            try:
                entries = [AuditEntry.from_row(event.row, hashed=self._hashed) for event in block]
                await self._writer.put_block(entries, own_ids=True)
            except (InvalidEvent, ValueError) as error:
                if len(block) > 1:
                    for event in block:
                        await self._store(file, [event], progress)
                    return
                _logger.error(  # noqa: TRY400 (the trace says nothing more)
                    "event %d of the audit spool %s is put aside in its table `refused`: %s",
                    block[0].number,
                    file.path,
                    error,
                )
                await self._in_thread(file.refuse, block[0], str(error))
                return
            except DotmacError as error:
                progress.away(error, await self._in_thread(file.count))
                await asyncio.sleep(backoff(attempt))
                attempt += 1
            else:
                await self._in_thread(file.remove, block[-1].number)
                return

    # --- what processes that have ended left behind

    def look(self) -> None:
        """Look for files of processes that have ended, now and every minute; called at every event."""
        if self._looking is None and not self._closed:
            self._looking = self._loop.create_task(self._look(), name="dotmac-audit-orphans")

    async def _look(self) -> None:
        while True:
            try:
                _let_ended_go()
                # Most have none: that is seen without a thread.
                left = self._settings.path.is_dir()
                for path in await self._in_thread(others, self._settings.path) if left else []:
                    try:
                        await self._adopt(path)
                    except Exception as error:  # noqa: BLE001 (told; the others are not to wait for this one)
                        _logger.warning("%s; it is tried again at the next look", self._meaning(error))
            except Exception as error:  # noqa: BLE001 (told; the next look is in a minute)
                _logger.warning("%s", self._meaning(error))
            await asyncio.sleep(LOOK_EVERY)

    async def _adopt(self, path: Path) -> None:
        adopting = self._submit(SpoolFile.adopt, path)
        try:
            file = await asyncio.wrap_future(adopting)
        except asyncio.CancelledError:
            adopting.add_done_callback(_let_go)  # in its thread, which goes on
            raise
        if file is None:
            return
        try:
            await self._drain(file, lambda _: None, _Progress(path, self._loop))
        finally:
            await self._in_thread(file.close)

    # --- the end

    def let_go_if_ended(self) -> None:
        """Let go of the file of a loop that ended without `aclose()`: the next look adopts it. Any thread."""
        if self._thread is None or self._pid != os.getpid() or not self._loop.is_closed():
            return
        with suppress(RuntimeError):  # no thread to be had, or closed already; the next look tries again
            self._thread.submit(self._let_go)

    def _let_go(self) -> None:
        """In the file's own thread, after what it does still."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
        except SpoolFailed as error:
            _logger.warning("%s", error)

    async def aclose(self) -> None:
        """Store what waits, for as long as the timeout; what is left is stored by the next process."""
        self._closed = True
        self._changed.set()  # who waits for room is not to wait on
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        if self._flushing is not None:
            await asyncio.wait([self._flushing])
        file, left = self._file, 0
        if file is not None:
            try:
                if self._draining is None:  # a loop that ends has cancelled it
                    self._draining = self._loop.create_task(self._drain_own(), name="dotmac-audit-drain")
                await asyncio.wait([self._draining], timeout=self._timeout)
                if self._draining is not None:
                    self._draining.cancel()
                    await asyncio.wait([self._draining])
                left = await self._in_thread(file.count)
                self._file = None
                await self._in_thread(file.close)
            except Exception as error:  # noqa: BLE001 (told; what follows is closed all the same)
                _logger.error("%s; the next process stores what is in it", self._meaning(error))  # noqa: TRY400
        if file is not None and left:
            _logger.warning(
                "%d events wait in the audit spool %s: the next process that logs events stores them",
                left,
                file.path,
            )
        if self._thread is not None:
            self._thread.shutdown(wait=False)


def _let_ended_go() -> None:
    for spool in list(_living):
        spool.let_go_if_ended()


def _let_go(adopting: Future[SpoolFile | None]) -> None:
    """Close a file that was adopted for nobody."""
    if adopting.cancelled() or adopting.exception() is not None:
        return
    file = adopting.result()
    if file is not None:
        with suppress(SpoolFailed):
            file.close()


class _Progress:
    """Tells the log how the draining of a file goes, but not all the time."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._path = path
        self._loop = loop
        self._told = loop.time()
        self._away = False
        self.events = 0

    def stored(self, events: int, left: int) -> None:
        """So many more are stored."""
        self.events += events
        if left and self._loop.time() - self._told < TOLD_EVERY:
            return
        if left or self._away:
            self._told = self._loop.time()
            _logger.info("audit spool %s: %d events stored, %d to go", self._path, self.events, left)
        if not left:
            self._away = False

    def away(self, error: Exception, left: int) -> None:
        """A try failed."""
        if self._away and self._loop.time() - self._told < TOLD_EVERY:
            return
        self._away, self._told = True, self._loop.time()
        level = logging.WARNING if isinstance(error, AuditUnavailable) else logging.ERROR
        _logger.log(level, "audit spool %s: %d events wait for the database: %s", self._path, left, error)
