"""Where an export goes: a file, complete or not there at all; a stream; a URL that fsspec knows.

A file grows under the name `<name>.partial` and takes its own name when it is complete and on the disk.
Beside it, `<name>.partial.json` says how far it is good: after each statement of the export, what was
compressed is closed, the file synced, and then the note replaced. A run that finds both goes on behind the
note, once the digest of what lies before proves that it is the file that the note is about.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import io
import json
import os
import tempfile
import time
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar

from dotmac.platform.audit_trail.exports.compression import make_compressor
from dotmac.platform.audit_trail.exports.extras import extra
from dotmac.platform.errors import ExportFailed, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

__all__ = ["FileOutput", "Output", "StreamOutput", "UrlOutput", "in_thread"]

_BLOCK = 1 << 20
_VERSION = 1
_MAX_AGE = 86_400  # who exports the same each night wants today's events
Answer = TypeVar("Answer")


async def in_thread(work: Callable[..., Answer], *args: object, pool: Executor | None = None) -> Answer:
    """Run in a thread; cancelled, it waits for what has begun, so that nothing is written afterwards.

    Args: pool: whose thread it is; the event loop's own pool where there is none.
    """
    task = asyncio.get_running_loop().run_in_executor(pool, partial(copy_context().run, work, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise


class Output(Protocol):
    """A place that takes an export.

    Attributes: size: bytes written, as they lie there. keeps: can an interrupted export go on there?
    """

    size: int
    keeps: bool

    async def resume(self, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        """Open; the note of an earlier run of the same export, or None, and why not where there was one."""

    async def write(self, data: bytes) -> None:
        """Append."""

    async def checkpoint(self, note: dict[str, Any]) -> None:
        """All before is good: remember."""

    async def finish(self) -> str:
        """Make it complete. Returns: SHA-256 of all bytes."""

    async def abandon(self) -> None:
        """Stop; what can't be gone on with is removed."""


class FileOutput:
    """A file of this machine.

    Args:
        path: its name when it is complete.
        compression: None, `gzip` or `zstd`.
        keeps: leave what is good for another run?
    """

    def __init__(self, path: Path, compression: str | None, *, keeps: bool) -> None:
        self.path = path
        self.keeps = keeps
        self.size = 0
        self._partial = path.with_name(path.name + ".partial")
        self._note = path.with_name(path.name + ".partial.json")
        self._compressor = make_compressor(compression)
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._good: int | None = None
        self._held: list[bytes] = []
        self._held_size = 0
        self._writing: asyncio.Future[None] | None = None

    async def resume(self, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        return await in_thread(self._told(self._open), wanted)

    async def write(self, data: bytes) -> None:
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size >= _BLOCK:
            await self._settle()
            # While a thread compresses and writes, the next rows arrive.
            self._writing = asyncio.ensure_future(in_thread(self._told(self._append), self._take()))

    async def checkpoint(self, note: dict[str, Any]) -> None:
        await self._settle()
        await in_thread(self._told(self._append), self._take())
        if self.keeps:
            await in_thread(self._told(self._remember), note)

    async def finish(self) -> str:
        await self._settle()
        await in_thread(self._told(self._append), self._take())
        return await in_thread(self._told(self._complete))

    async def abandon(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await asyncio.wait({writing})
            if not writing.cancelled():
                writing.exception()  # the caller has it already
        await in_thread(self._leave)

    async def _settle(self) -> None:
        writing = self._writing
        if writing is not None:
            await asyncio.shield(writing)
            self._writing = None

    def _take(self) -> bytes:
        data = b"".join(self._held)
        self._held, self._held_size = [], 0
        return data

    # --- in a thread

    def _told(self, work: Callable[..., Answer]) -> Callable[..., Answer]:
        def run(*args: object) -> Answer:
            try:
                return work(*args)
            except OSError as error:
                kept = f"; what is complete is kept in {self._partial}" if self._good else ""
                raise ExportFailed(
                    f"{self.path} can't be written: {error.strerror or error}{kept}"
                ) from error

        return run

    def _open(self, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        self._file = self._locked()
        note, why = self._read_note(wanted) if self.keeps else (None, None)
        self._digest = hashlib.sha256()
        if note is not None:
            left = note["size"]
            self._file.seek(0)
            while left and (data := self._file.read(min(left, _BLOCK))):
                self._digest.update(data)
                left -= len(data)
            if left or self._digest.hexdigest() != note["sha256"]:
                note, why = None, "the partial file is not the one that was left"
                self._digest = hashlib.sha256()
        self.size = note["size"] if note is not None else 0
        self._good = self.size if note is not None else None
        if note is None:
            self._note.unlink(missing_ok=True)
        self._file.truncate(self.size)
        self._file.seek(self.size)
        return note, why

    def _locked(self) -> BinaryIO:
        while True:
            file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Was it the same file still when we got it? Whoever had it may have completed it meanwhile.
                if os.fstat(file.fileno()).st_ino == self._partial.stat().st_ino:
                    return file
            except BlockingIOError:
                file.close()
                text = "another export is writing there: wait for it, or give another name"
                raise InvalidArgument("path", str(self.path), text) from None
            except FileNotFoundError:
                pass
            file.close()

    def _read_note(self, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        try:
            note = json.loads(self._note.read_bytes())
        except FileNotFoundError:
            return None, None
        except ValueError:
            return None, "the note beside the partial file can't be read"
        if not isinstance(note, dict) or note.get("version") != _VERSION or note.get("export") != wanted:
            return None, "the partial file is of another export: other filters, times, order or format"
        if not 0 <= time.time() - self._note.stat().st_mtime <= _MAX_AGE:
            return None, "the partial file is older than a day"
        return note, None

    def _append(self, data: bytes) -> None:
        self._put(self._compressor.write(data))

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def _sync(self) -> None:
        assert self._file is not None
        self._put(self._compressor.end())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _remember(self, note: dict[str, Any]) -> None:
        self._sync()
        whole = note | {"version": _VERSION, "size": self.size, "sha256": self._digest.hexdigest()}
        fresh = self._note.with_name(self._note.name + ".new")
        with fresh.open("w") as out:
            json.dump(whole, out)
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(self._note)
        self._good = self.size

    def _complete(self) -> str:
        assert self._file is not None
        self._sync()
        self._partial.replace(self.path)
        self._note.unlink(missing_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._file.close()
        self._file = None
        return self._digest.hexdigest()

    def _leave(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(OSError):  # the disk may be what failed; the reason is on its way to the caller
            if self.keeps and self._good:
                file.flush()
                file.truncate(self._good)
            else:
                self._partial.unlink(missing_ok=True)
                self._note.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()


class StreamOutput:
    """Something with `write`, which may be a coroutine, of text or of bytes; it is not closed.

    Args: stream: where to. compression: None, `gzip` or `zstd`; only for bytes.
    """

    keeps = False

    def __init__(self, stream: Any, compression: str | None) -> None:
        self._stream = stream
        self._text = isinstance(stream, io.TextIOBase) or getattr(stream, "encoding", None) is not None
        if self._text and compression is not None:
            raise InvalidArgument("compression", compression, "a stream of text can't be compressed")
        self._async = asyncio.iscoroutinefunction(stream.write)
        self._compressor = make_compressor(compression)
        self._digest = hashlib.sha256()
        self._held: list[bytes] = []
        self._held_size = 0
        self.size = 0

    @property
    def of_text(self) -> bool:
        """Does it take text?"""
        return self._text

    async def resume(self, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:  # noqa: ARG002 (as files are asked)
        return None, None

    async def write(self, data: bytes) -> None:
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size >= _BLOCK // 4:
            await self._flush(last=False)

    async def checkpoint(self, note: dict[str, Any]) -> None:
        """Nothing is remembered about a stream."""

    async def finish(self) -> str:
        await self._flush(last=True)
        flush = getattr(self._stream, "flush", None)
        if flush is not None:
            if asyncio.iscoroutinefunction(flush):
                await flush()
            else:
                await self._told(flush)
        return self._digest.hexdigest()

    async def abandon(self) -> None:
        """What is written is written."""

    async def _flush(self, *, last: bool) -> None:
        data = b"".join(self._held)
        self._held, self._held_size = [], 0
        out = await asyncio.to_thread(self._compressed, data, last)
        if not out:
            return
        given = out.decode() if self._text else out
        if self._async:
            await self._stream.write(given)
        else:
            answer = await self._told(self._stream.write, given)
            if asyncio.iscoroutine(answer):
                await answer
        self.size += len(out)

    def _compressed(self, data: bytes, last: bool) -> bytes:
        out = self._compressor.write(data)
        if last:
            out += self._compressor.end()
        self._digest.update(out)
        return out

    @staticmethod
    async def _told(work: Callable[..., Any], *args: object) -> Any:
        return await asyncio.to_thread(work, *args)


class UrlOutput(FileOutput):
    """A URL of fsspec: made in a file of this machine, then put there under another name and renamed.

    Args: url: such as `s3://bucket/name`. compression: None, `gzip` or `zstd`.
    """

    def __init__(self, url: str, compression: str | None) -> None:
        fsspec = extra("fsspec", f"the URL {url.partition('://')[0]}://…")
        try:
            self._files, self._target = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InvalidArgument("path", url, f"fsspec can't open it: {error}") from error
        self._folder = tempfile.TemporaryDirectory(prefix="dotmac-export-")
        super().__init__(Path(self._folder.name) / "export", compression, keeps=False)

    async def finish(self) -> str:
        digest = await super().finish()
        await in_thread(self._put_there)
        return digest

    async def abandon(self) -> None:
        await super().abandon()
        await in_thread(self._folder.cleanup)

    def _put_there(self) -> None:
        fresh = f"{self._target}.partial"
        try:
            parent = self._files._parent(self._target)  # noqa: SLF001 (fsspec's own documents name it)
            self._files.makedirs(parent, exist_ok=True)
            self._files.put_file(str(self.path), fresh)
            self._files.mv(fresh, self._target)
        except Exception as error:  # every file system has errors of its own
            with suppress(Exception):
                self._files.rm_file(fresh)
            raise ExportFailed(f"{self._target} can't be written: {error}") from error
        finally:
            self._folder.cleanup()
