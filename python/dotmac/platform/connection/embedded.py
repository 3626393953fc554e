"""`embedded://`: one Valkey and one PostgreSQL that all processes of the user share, for development.

The servers live in the user's state directory: `DOTMAC_STATE_DIR`, else `$XDG_STATE_HOME/dotmac-platform`,
else `~/.local/state/dotmac-platform` (root: `/var/lib/dotmac-platform`, for PostgreSQL's own user must get
there). The first process that needs one starts it, the last one that ends stops it. Each user of the servers
keeps a file under `users/` locked; the system drops that lock however a process ends, so a killed one doesn't
count, and a forked child, which inherits the lock, does. A last user that ends in order stops the servers
itself; behind one that is killed, or a forked child, a small process cleans up that waits for those locks.
"""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import os
import secrets
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dotmac.platform.connection.servers import EmbeddedPostgres, EmbeddedServer, EmbeddedValkey
from dotmac.platform.connection.urls import EMBEDDED, mask_url
from dotmac.platform.errors import InvalidArgument, ServerUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "EmbeddedPostgres",
    "EmbeddedServer",
    "EmbeddedValkey",
    "aresolve_database",
    "aresolve_redis",
    "release",
    "resolve_database",
    "resolve_redis",
    "state_directory",
]

DATABASE = "dotmac"

_LOCK_TIMEOUT = 120.0


def state_directory() -> Path:
    """The directory in which the shared servers live."""
    if chosen := os.environ.get("DOTMAC_STATE_DIR"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "dotmac-platform"
    if os.geteuid() == 0:
        return Path("/var/lib/dotmac-platform")
    return Path.home() / ".local" / "state" / "dotmac-platform"


def resolve_redis(url: str) -> str:
    """The address behind `embedded://`, whose Valkey is started if need be; any other URL unchanged.

    Blocks for up to some seconds when it starts the server.

    Raises:
        MissingExtra: the extra `embedded` is not installed.
        ServerUnavailable: the server does not start.
        InvalidArgument: something stands behind `embedded://`.
    """
    if not _is_embedded("redis_url", url):
        return url
    with _shared.used() as directory:
        return _valkey(directory).start().url


def resolve_database(url: str) -> str:
    """The address behind `embedded://`, whose PostgreSQL is started if need be; any other URL unchanged.

    Blocks for up to some seconds when it starts the server. Raises as `resolve_redis`.
    """
    if not _is_embedded("postgres_url", url):
        return url
    with _shared.used() as directory:
        server = _postgres(directory)
        if not server.running() or directory not in _shared.checked:
            # Whoever started it may have been killed before it made the database.
            server.start().create_database(DATABASE)
            _shared.checked.add(directory)
        return server.url_of(DATABASE)


async def aresolve_redis(url: str) -> str:
    """`resolve_redis` in a thread, so that the event loop goes on."""
    return await asyncio.to_thread(resolve_redis, url) if _is_embedded("redis_url", url) else url


async def aresolve_database(url: str) -> str:
    """`resolve_database` in a thread, so that the event loop goes on."""
    return await asyncio.to_thread(resolve_database, url) if _is_embedded("postgres_url", url) else url


def release() -> None:
    """Give up the shared servers; they stop if nobody else uses them. Called by itself at exit."""
    _shared.release()


def _is_embedded(field: str, url: str) -> bool:
    if not isinstance(url, str) or not url.lower().startswith(EMBEDDED):
        return False
    if url[len(EMBEDDED) :].strip("/"):
        raise InvalidArgument(field, mask_url(url), f"{EMBEDDED} stands alone")
    return True


def _valkey(directory: Path) -> EmbeddedValkey:
    return EmbeddedValkey(directory / "valkey", port=0)


def _postgres(directory: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(directory / "postgres18")


class _Shared:
    """This process's use of the shared servers."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._uses: dict[Path, int] = {}
        self.checked: set[Path] = set()  # where this process has seen that the database exists

    @contextmanager
    def used(self) -> Iterator[Path]:
        """Register this process as a user; nobody starts or stops a server meanwhile."""
        directory = state_directory()
        with self._mutex, _exclusive(directory):
            if directory not in self._uses:
                if not self._uses:
                    # Before the engine's own exit handler in the order of registration, so after it at exit.
                    atexit.register(release)
                self._uses[directory] = _hold(directory)
                _start_watcher(directory)
            yield directory

    def release(self) -> None:
        with self._mutex:
            uses, self._uses, self.checked = self._uses, {}, set()
            for directory, handle in uses.items():
                if not directory.is_dir():
                    os.close(handle)
                    continue
                with _exclusive(directory):
                    os.close(handle)
                    if not _in_use(directory):
                        _stop_servers(directory)

    def forked(self) -> None:
        """In a child: register anew on first use. The inherited descriptors stay open on purpose: they keep
        the servers up for a child that goes on with an address that its parent resolved."""
        self._mutex = threading.Lock()
        self._uses, self.checked = {}, set()


_shared = _Shared()
os.register_at_fork(after_in_child=_shared.forked)


def _hold(directory: Path) -> int:
    """Lock a file that says "in use" until this process ends; its descriptor."""
    users = directory / "users"
    users.mkdir(mode=0o700, exist_ok=True)
    name = users / f"{os.getpid()}-{secrets.token_hex(4)}"
    handle = os.open(name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)  # nobody but the watcher may have it, and that gives it back at once
    return handle


def _stop_servers(directory: Path) -> None:
    for server in (_valkey(directory), _postgres(directory)):
        server.stop()


def _start_watcher(directory: Path) -> None:
    """Start the process that stops the servers where no user can, unless it runs: it holds a lock."""
    handle = os.open(directory / "watcher", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        # It inherits the lock and forks first, so that it is nobody's child and no group's signal meets it.
        code = (
            "import os, sys\nif os.fork(): os._exit(0)\nos.setsid()\n"
            f"from {__name__} import watch\nwatch(sys.argv[1], int(sys.argv[2]))"
        )
        with (directory / "watcher.log").open("ab") as log:
            done = subprocess.run(  # noqa: S603 - our own interpreter and code
                [sys.executable, "-c", code, str(directory), str(handle)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                pass_fds=(handle,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
                timeout=_LOCK_TIMEOUT,
            )
        if done.returncode:
            raise ServerUnavailable(
                f"the watcher of the embedded servers does not start by {sys.executable}: "
                f"see {directory / 'watcher.log'}"
            )
    finally:
        os.close(handle)


def watch(place: str, handle: int) -> None:
    """Wait until no process uses the servers of a directory, then stop them.

    Args:
        place: the directory.
        handle: descriptor of the lock that says "a watcher runs"; given up before others may look for it.
    """
    directory = Path(place)
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    try:
        while True:
            for name in (directory / "users").iterdir():
                _await_end(name)
            with _exclusive(directory, make=False):
                if not _in_use(directory):
                    _stop_servers(directory)
                    os.close(handle)
                    return
    except FileNotFoundError:  # somebody has removed the directory: nothing there tells of servers any more
        return


def _await_end(name: Path) -> None:
    """Wait until the user with that file has ended."""
    try:
        user = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # it has ended, and another one has tidied up
        return
    try:
        fcntl.flock(user, fcntl.LOCK_SH)
    finally:
        os.close(user)


def _in_use(directory: Path) -> bool:
    """Does a live process use the servers? Removes the files of those that have ended."""
    found = False
    for name in (directory / "users").iterdir():
        handle = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, as the watcher may be looking too
            name.unlink()
        except BlockingIOError:
            found = True
        finally:
            os.close(handle)
    return found


@contextmanager
def _exclusive(directory: Path, *, make: bool = True) -> Iterator[None]:
    """One process at a time; unless `make`, FileNotFoundError where the directory has gone."""
    if make:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(directory / "lock", (os.O_CREAT if make else 0) | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServerUnavailable(
                        f"another process has held {directory / 'lock'} for {_LOCK_TIMEOUT:.0f} s; "
                        "end it, or choose another directory by DOTMAC_STATE_DIR"
                    ) from None
                time.sleep(0.02)
        try:
            yield
        finally:
            # Unlocked by name, not by closing: a child forked meanwhile holds the descriptor too.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
