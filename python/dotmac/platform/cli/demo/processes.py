"""Other processes: web servers on sockets opened here, and workers that talk in lines of JSON."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

__all__ = ["Server", "Worker", "serve", "until", "worker"]

_STOP_LIMIT = 15.0
_ANSWER_LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A web server in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End it as a power cut would."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end, and wait until it has. Returns its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_LIMIT)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.wait()


@contextmanager
def serve(app: str, log: Path, env: Mapping[str, str], directory: Path | None = None) -> Iterator[Server]:
    """Run an ASGI application by uvicorn on a free port of 127.0.0.1.

    The socket listens before the process starts: no other program can take the port in between, and early
    requests wait instead of failing.

    Args:
        app: `module:attribute`.
        log: file for what the process writes.
        env: its environment; `PORT` is added.
        directory: where the module is looked for; None for the installed packages.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener, log.open("wb") as output:
        port = int(listener.getsockname()[1])
        command = [sys.executable, "-m", "uvicorn", app, "--fd", str(listener.fileno()), "--no-access-log"]
        if directory is not None:
            command += ["--app-dir", str(directory)]
        process = subprocess.Popen(  # noqa: S603 - this interpreter, with arguments of ours
            command,
            env={**env, "HOST": "127.0.0.1", "PORT": str(port)},
            pass_fds=(listener.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, log)
    try:
        yield server
    finally:
        server.stop()


class Worker:
    """A process that takes and gives JSON, a line each."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process, self._name = process, name

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def tell(self, message: Any) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def answer(self) -> Any:
        """The next line that it writes."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), _ANSWER_LIMIT)
        if not line:
            raise RuntimeError(f"{self._name} (process {self.pid}) ended with {await self._process.wait()}")
        return json.loads(line)


@asynccontextmanager
async def worker(module: str, env: Mapping[str, str]) -> AsyncIterator[Worker]:
    """Run a module as a worker; it ends when its input does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        env=dict(env),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        yield Worker(process, module)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _STOP_LIMIT)
        except TimeoutError:
            process.kill()
            await process.wait()


async def until(condition: Callable[[], Any], what: str, seconds: float = 60.0, step: float = 0.01) -> float:
    """Wait until a condition holds. Returns the seconds waited.

    Raises: TimeoutError: it did not come true.
    """
    started = time.monotonic()
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        waited = time.monotonic() - started
        if found:
            return waited
        if waited > seconds:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        await asyncio.sleep(step)
