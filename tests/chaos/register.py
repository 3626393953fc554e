"""The system that locks protect: takes writes by fencing token, and refuses a token lower than one that it
has seen.

One JSON object per line in both directions, over a Unix socket. Modes: a "write" needs a token as high as
every one before it, a "read" one as high as every write's; "any" is only noted, for what several hold at
once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from itertools import count
from pathlib import Path
from typing import Any

from chaos.history import Recorder


class Register:
    """The values' guards."""

    def __init__(self, recorder: Recorder) -> None:
        self._record = recorder
        self._highest: dict[str, int] = defaultdict(int)
        self._highest_writer: dict[str, int] = defaultdict(int)

    def write(self, lock: str, mode: str, fence: int) -> bool:
        """True if the write is let in."""
        seen = (self._highest if mode == "write" else self._highest_writer)[lock]
        accepted = mode == "any" or fence >= seen
        if accepted:
            self._highest[lock] = max(self._highest[lock], fence)
            if mode == "write":
                self._highest_writer[lock] = max(self._highest_writer[lock], fence)
        self._record("write", lock=lock, mode=mode, fence=fence, accepted=accepted)
        return accepted

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, until it goes or is killed."""
        try:
            while line := await reader.readline():
                ask = json.loads(line)
                accepted = self.write(ask["lock"], ask["mode"], ask["fence"])
                writer.write(json.dumps({"number": ask["number"], "accepted": accepted}).encode() + b"\n")
                await writer.drain()
        except ConnectionError:
            pass  # a killed worker
        finally:
            writer.close()


class Client:
    """A worker's connection to the register; several tasks use it at once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._numbers = count()
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(self._path)
        self._reading = asyncio.create_task(self._read(reader))

    async def write(self, lock: str, mode: str, fence: int) -> bool:
        """Whether the register took it."""
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(ask(number, lock, mode, fence))
            return await answer
        finally:
            del self._answers[number]

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()
        if self._reading is not None:
            await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            said = json.loads(line)
            future = self._answers.get(said["number"])
            if future is not None and not future.done():
                future.set_result(said["accepted"])


def ask(number: int, lock: str, mode: str, fence: int) -> bytes:
    """A request as it goes over the wire."""
    request: dict[str, Any] = {"number": number, "lock": lock, "mode": mode, "fence": fence}
    return json.dumps(request).encode() + b"\n"


async def main(path: str, log: str) -> None:
    """Serves until the standard input ends."""
    register = Register(Recorder(Path(log)))
    async with await asyncio.start_unix_server(register.serve, path):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
