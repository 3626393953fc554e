"""One file of events on their way: SQLite, written by one process, drained by whoever holds its lock.

A commit returns once the disk has it (WAL, synchronous = FULL), so what `append` took survives the end of
the process and of the machine. The lock is a POSIX record lock: it ends with the process, and a forked child
does not inherit it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from dotmac.platform.errors import SpoolFailed, SpoolFull

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SpoolFile", "Spooled", "others"]

_SUFFIX = ".sqlite"
_LOCK = ".lock"
_TABLE = """
    CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY AUTOINCREMENT, row BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS refused (number INTEGER PRIMARY KEY, row BLOB NOT NULL, why TEXT NOT NULL);
"""
# Files of this process, which its record locks would not keep it from: by process, since a child has none.
_OURS: dict[int, set[str]] = {}
_ours_guard = threading.Lock()


def _forked() -> None:
    global _ours_guard  # noqa: PLW0603 (the parent's may have been held by a thread that is not here)
    _ours_guard = threading.Lock()


os.register_at_fork(after_in_child=_forked)


class Spooled(NamedTuple):
    """An event in the file."""

    number: int
    row: bytes


class SpoolFile:
    """A file that this process has locked. Not for two threads at once.

    Raises: SpoolFull: the disk is full; nothing of the call was kept. SpoolFailed: anything else about it.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        try:
            # Autocommit: transactions begin and end where they are written here.
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            path.chmod(0o600)  # before anything is in it
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_TABLE)
        except (sqlite3.Error, OSError) as error:
            self._unlock()
            raise _meaning(path, error) from error

    @classmethod
    def new(cls, folder: Path) -> Self:
        """A new file in the folder, which is made where it is missing."""
        path = folder / f"{os.getpid()}-{os.urandom(6).hex()}{_SUFFIX}"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = _take_lock(path)
        except OSError as error:
            raise _meaning(path, error) from error
        if lock is None:
            raise SpoolFailed(f"the spool {path} is in use by another process")
        return cls(path, lock)

    @classmethod
    def adopt(cls, path: Path) -> Self | None:
        """The file of a process that has ended; None where its process lives, or it is gone meanwhile."""
        try:
            lock = _take_lock(path)
        except OSError as error:
            raise _meaning(path, error) from error
        if lock is None:
            return None
        if not path.exists():
            path.with_suffix(_LOCK).unlink(missing_ok=True)
            _give_lock_back(path, lock)
            return None
        return cls(path, lock)

    def append(self, rows: Sequence[bytes]) -> None:
        """Keep these events; they are on the disk when this returns."""
        try:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT INTO events (row) VALUES (?)", [(row,) for row in rows])
            self._database.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self._roll_back()
            raise _meaning(self.path, error) from error

    def first(self, most: int, most_bytes: int) -> list[Spooled]:
        """The oldest events: so many at most, and so many bytes, but one at least."""
        found: list[Spooled] = []
        size = 0
        try:
            cursor = self._database.execute("SELECT number, row FROM events ORDER BY number LIMIT ?", (most,))
            for number, row in cursor:
                size += len(row)
                if found and size > most_bytes:
                    break
                found.append(Spooled(number, row))
            cursor.close()
        except sqlite3.Error as error:
            raise _meaning(self.path, error) from error
        return found

    def count(self) -> int:
        """Events that wait."""
        try:
            return int(self._database.execute("SELECT count(*) FROM events").fetchone()[0])
        except sqlite3.Error as error:
            raise _meaning(self.path, error) from error

    def remove(self, last: int) -> None:
        """Forget the events up to this number: they are stored."""
        try:
            self._database.execute("DELETE FROM events WHERE number <= ?", (last,))
        except sqlite3.Error as error:
            raise _meaning(self.path, error) from error

    def refuse(self, event: Spooled, why: str) -> None:
        """Put aside an event that the database does not take."""
        try:
            self._database.execute("BEGIN")
            self._database.execute("INSERT OR IGNORE INTO refused VALUES (?, ?, ?)", (*event, why))
            self._database.execute("DELETE FROM events WHERE number = ?", (event.number,))
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise _meaning(self.path, error) from error

    def _roll_back(self) -> None:
        if self._database.in_transaction:
            self._database.rollback()

    def close(self) -> None:
        """Let go of the file; it is removed where nothing is left in it."""
        try:
            empty = self._database.execute(
                "SELECT NOT EXISTS (SELECT 1 FROM events) AND NOT EXISTS (SELECT 1 FROM refused)"
            ).fetchone()[0]
            self._database.close()
            if empty:
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)
                self.path.with_suffix(_LOCK).unlink(missing_ok=True)
        except (sqlite3.Error, OSError) as error:
            raise _meaning(self.path, error) from error
        finally:
            self._unlock()

    def _unlock(self) -> None:
        _give_lock_back(self.path, self._lock)


def others(folder: Path) -> list[Path]:
    """Files in the folder that are not this process's, the oldest first.

    Raises: SpoolFailed: the folder can't be read.
    """
    ours = _OURS.get(os.getpid(), set())
    try:
        found = [path for path in folder.glob(f"*{_SUFFIX}") if path.name not in ours]
        return sorted(found, key=lambda path: (path.stat().st_ctime_ns, path.name))
    except FileNotFoundError:
        return []  # a folder or a file that went meanwhile: the next look sees the rest
    except OSError as error:
        raise _meaning(folder, error) from error


def _take_lock(path: Path) -> int | None:
    """The lock of a file, or None where another process has it."""
    with _ours_guard:
        ours = _OURS.setdefault(os.getpid(), set())
        if path.name in ours:
            return None  # opening and closing it once more would end the lock of this process
        lock = path.with_suffix(_LOCK)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed it between the two lines above.
            taken = os.fstat(handle).st_ino == lock.stat().st_ino
        except (BlockingIOError, PermissionError, FileNotFoundError):
            taken = False
        except BaseException:
            os.close(handle)
            raise
        if not taken:
            os.close(handle)
            return None
        ours.add(path.name)
        return handle


def _give_lock_back(path: Path, handle: int) -> None:
    with _ours_guard:
        os.close(handle)
        _OURS.get(os.getpid(), set()).discard(path.name)


def _meaning(path: Path, error: Exception) -> SpoolFailed:
    # SQLITE_IOERR too: a write beyond the file size limit is one.
    full = isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname.startswith(
        ("SQLITE_FULL", "SQLITE_IOERR_WRITE")
    )
    if full:
        return SpoolFull(f"the disk of the spool {path} is full ({error}); nothing was kept of this call")
    return SpoolFailed(f"the spool {path} can't be used: {type(error).__name__}: {error}")
