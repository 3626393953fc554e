"""Places outside the database that keep checkpoints, so that a rollback of the whole database is found.

- `file:///var/lib/audit/checkpoints`: one JSON line per checkpoint, appended and synced;
- `https://…`: the note is posted (`text/plain`); `GET` with `?origin=<trail>` gives JSON lines back;
- any other address that fsspec knows, `s3://bucket/folder`: one object per checkpoint, never overwritten.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from dotmac.platform.connection.urls import mask_url
from dotmac.platform.errors import AnchorUnavailable, InvalidArgument, MissingExtra

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from dotmac.platform.audit_trail.integrity.notes import Checkpoint

__all__ = ["Anchor", "anchor_at", "anchors_at"]

_MOST_BYTES = 1 << 32  # of one place; notes are compared as they come, and not kept
_MOST_LINE = 1 << 21
_PIECE = 1 << 20
_SECONDS = 10.0
_READING_SECONDS = 600.0


class Anchor(Protocol):
    """A place for checkpoints. `place` names it without its secrets."""

    @property
    def place(self) -> str: ...

    async def put(self, checkpoint: Checkpoint, note: str) -> None:
        """Keep a signed note; again the same is no fault."""

    def notes(self, trail: str) -> AsyncIterator[str]:
        """Every note of that trail's logs that is kept there."""


def anchors_at(addresses: str | None) -> list[Anchor]:
    """The places that a setting lists, separated by commas or spaces."""
    return [anchor_at(address) for address in (addresses or "").replace(",", " ").split()]


def anchor_at(address: str) -> Anchor:
    """The place of an address.

    Raises: InvalidArgument: there is no scheme, or the path is missing. MissingExtra: fsspec is missing.
    """
    parts = urlsplit(address)
    if parts.scheme == "file" and parts.path and not parts.netloc:
        return FileAnchor(Path(unquote(parts.path)))
    if parts.scheme in {"http", "https"} and parts.netloc:
        return HttpAnchor(address)
    if parts.scheme not in {"", "file", "http", "https"}:
        return ObjectAnchor(address)
    raise InvalidArgument("anchors", mask_url(address), "give file:///…, https://… or another fsspec address")


def _line(checkpoint: Checkpoint, note: str) -> str:
    return json.dumps({"origin": checkpoint.origin, "size": checkpoint.size, "note": note}) + "\n"


def _note_in(line: str, trail: str) -> str | None:
    """The note of a JSON line, where it is one of that trail's logs; of another line, the line.

    A line may be cut off, by a crash or on purpose: verification tells it, and goes on.
    """
    try:
        found = json.loads(line)
        origin, note = found["origin"], found["note"]
        ours = origin == trail or origin.startswith(f"{trail}/")
    except (ValueError, TypeError, KeyError, AttributeError):
        return line
    return str(note) if ours else None


class _Lines:
    """Pieces of bytes into lines, as many and as long as are allowed."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._begun = b""
        self._bytes = 0

    def feed(self, piece: bytes) -> list[str]:
        """The lines that this piece completes; an empty one is the end.

        Raises: AnchorUnavailable: that is no list of checkpoints.
        """
        self._bytes += len(piece)
        *lines, begun = (self._begun + piece).split(b"\n")
        if self._bytes > _MOST_BYTES or max(map(len, (*lines, begun))) > _MOST_LINE:
            raise AnchorUnavailable(
                f"{self._place}: it gave more than {_MOST_BYTES} bytes, or a line of more than {_MOST_LINE}"
            )
        if not piece:
            lines, begun = [*lines, begun], b""
        self._begun = begun
        return [line.decode("utf-8", "replace") for line in lines if line.strip()]


async def bounded_notes(anchor: Anchor, trail: str) -> AsyncIterator[str]:
    """What `anchor.notes` gives, which may not take for ever. Raises: AnchorUnavailable."""
    notes = anchor.notes(trail)
    loop = asyncio.get_running_loop()
    left = _READING_SECONDS
    while True:
        began = loop.time()
        try:
            async with asyncio.timeout(left):
                note = await anext(notes, None)
        except TimeoutError:
            raise AnchorUnavailable(
                f"{anchor.place}: reading took more than {_READING_SECONDS:.0f} s"
            ) from None
        if note is None:
            return
        yield note
        left -= loop.time() - began


@dataclass(frozen=True, slots=True)
class FileAnchor:
    """Lines in a file; on a disk that the database's administrators can't write, or it proves nothing."""

    path: Path

    @property
    def place(self) -> str:
        return self.path.as_uri()

    async def put(self, checkpoint: Checkpoint, note: str) -> None:
        """Append a line, durably; writers in several processes wait for one another."""
        await asyncio.to_thread(self._append, _line(checkpoint, note).encode())

    def _append(self, line: bytes) -> None:
        try:
            with self.path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    line = b"\n" + line  # a process died in the middle of the line before
                if file.write(line) != len(line):
                    os.ftruncate(file.fileno(), end)  # the disk is full: no half line may stay
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301 (as write raises it)
                os.fsync(file.fileno())
        except OSError as error:
            raise AnchorUnavailable(f"{self.place}: {error}") from error

    async def notes(self, trail: str) -> AsyncIterator[str]:
        """The notes, line by line; a file that is not there yet has none."""
        try:
            file = await asyncio.to_thread(self.path.open, "rb")
        except FileNotFoundError:
            return
        except OSError as error:
            raise AnchorUnavailable(f"{self.place}: {error}") from error
        lines, piece = _Lines(self.place), b"."
        with file:
            while piece:
                try:
                    piece = await asyncio.to_thread(file.read, _PIECE)
                except OSError as error:
                    raise AnchorUnavailable(f"{self.place}: {error}") from error
                for line in lines.feed(piece):
                    note = _note_in(line, trail)
                    if note is not None:
                        yield note


@dataclass(frozen=True, slots=True)
class HttpAnchor:
    """An endpoint that takes notes by POST and gives JSON lines back by GET."""

    url: str

    @property
    def place(self) -> str:
        return mask_url(self.url)

    async def put(self, checkpoint: Checkpoint, note: str) -> None:  # noqa: ARG002 (the note says it)
        """Post the note; any answer of the 2xx class means that it is kept."""
        import httpx

        try:
            async with httpx.AsyncClient(timeout=_SECONDS) as client:
                answer = await client.post(
                    self.url,
                    content=note.encode(),
                    headers={"Content-Type": "text/plain; charset=utf-8"},
                )
                answer.raise_for_status()
        except httpx.HTTPError as error:
            raise _failed(self.place, error) from None

    async def notes(self, trail: str) -> AsyncIterator[str]:
        """What GET gives; 404 means that nothing is kept."""
        import httpx

        try:
            async with (
                httpx.AsyncClient(timeout=_SECONDS) as client,
                client.stream("GET", self.url, params={"origin": trail}) as answer,
            ):
                if answer.status_code == httpx.codes.NOT_FOUND:
                    return
                answer.raise_for_status()
                lines = _Lines(self.place)
                async for piece in answer.aiter_bytes(_PIECE):
                    for line in lines.feed(piece):
                        note = _note_in(line, trail)
                        if note is not None:
                            yield note
                for line in lines.feed(b""):
                    note = _note_in(line, trail)
                    if note is not None:
                        yield note
        except httpx.HTTPError as error:
            raise _failed(self.place, error) from None


def _failed(place: str, error: httpx.HTTPError) -> AnchorUnavailable:
    """Without the address that httpx puts into its texts, which may hold a password."""
    answer = getattr(error, "response", None)
    why = f"it answered {answer.status_code}" if answer is not None else f"{type(error).__name__}: {error}"
    return AnchorUnavailable(f"{place}: {why}")


class ObjectAnchor:
    """One object per checkpoint, `<folder>/<origin>/<size>-<digest>`, by way of fsspec."""

    def __init__(self, address: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise MissingExtra(
                "anchors at such addresses need fsspec: pip install 'dotmac-platform[integrity]'"
            ) from error
        self._place = mask_url(address)
        try:
            self._files, self._folder = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise InvalidArgument("anchors", self._place, f"fsspec can't open it: {error}") from None

    @property
    def place(self) -> str:
        return self._place

    async def put(self, checkpoint: Checkpoint, note: str) -> None:
        """Write the object; where it is there already, it is the same."""
        folder = f"{self._folder}/{quote(checkpoint.origin, safe='')}"
        # The root is in the name: whoever signs another history of the same size can't overwrite this one.
        path = f"{folder}/{checkpoint.size:020d}-{checkpoint.root.hex()[:16]}.note"
        await self._in_thread(self._write, folder, path, note.encode())

    def _write(self, folder: str, path: str, note: bytes) -> None:
        if self._files.exists(path):
            return
        self._files.makedirs(folder, exist_ok=True)
        self._files.pipe_file(path, note)

    async def notes(self, trail: str) -> AsyncIterator[str]:
        """Read each object."""
        for path in sorted(await self._in_thread(self._list, trail)):
            read = await self._in_thread(self._files.cat_file, path, 0, _MOST_LINE)
            yield read.decode("utf-8", "replace")

    def _list(self, trail: str) -> list[str]:
        self._files.invalidate_cache()
        try:
            folders = self._files.ls(self._folder, detail=False)
        except FileNotFoundError:
            return []
        found: list[str] = []
        for folder in folders:
            origin = unquote(folder.rstrip("/").rpartition("/")[2])
            if origin == trail or origin.startswith(f"{trail}/"):
                found += [path for path in self._files.ls(folder, detail=False) if path.endswith(".note")]
        return found

    async def _in_thread(self, work: Any, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(6 * _SECONDS):
                return await asyncio.to_thread(work, *arguments)
        except Exception as error:
            # What a file system raises depends on its maker: all of it means that the place failed.
            raise AnchorUnavailable(f"{self.place}: {error!r}") from error
