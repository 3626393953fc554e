"""A TCP proxy in a thread of its own that cuts, stalls, delays or encrypts the way to a server.

It runs beside the test's event loop, so that a test may block that loop and still have a network.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl
    from types import TracebackType
    from typing import Self

CHUNK = 64 * 1024


class Proxy:
    """Stands between a client and a server.

    Args:
        url: the server's address, `redis://host:port/…`.
        tls: context with which to speak TLS to the client; None for plain TCP.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        place = urlsplit(url)
        self._upstream = (place.hostname or "127.0.0.1", place.port or 6379)
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._flowing = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._marker: bytes | None = None
        self._deaf: set[asyncio.StreamWriter] = set()
        self._latency = 0.0
        self._halved: float | None = None
        self.cut = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        """Where the client connects to."""
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self.port}/0"

    def cut_reply_to(self, marker: bytes) -> None:
        """The next command that contains `marker` reaches the server; its answer is lost."""
        self.cut.clear()
        self._marker = marker

    def stall(self) -> None:
        """From here on nothing is read from either side."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def flow(self) -> None:
        """Ends a stall."""
        self._loop.call_soon_threadsafe(self._flowing.set)

    def delay(self, seconds: float) -> None:
        """From here on whatever passes, in either direction, takes this much longer; 0 ends it."""
        self._latency = seconds

    def halve_answer(self, pause: float) -> None:
        """The next bytes from the server arrive half at first, and the rest after `pause` seconds."""
        self._halved = pause

    def disarm(self) -> None:
        """What was to happen to the next answer and has not happened yet won't."""
        self._marker = self._halved = None

    def drop(self) -> None:
        """Closes every connection."""
        self._loop.call_soon_threadsafe(self._close_all)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._flowing.set()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._flowing.set()
        self._close_all()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=5)
            assert not late

    def _close_all(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, up_writer}
        there = asyncio.create_task(self._pump(reader, up_writer, writer))
        back = asyncio.create_task(self._pump(up_reader, writer))
        try:
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in (there, back):
                pump.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
            if writer in self._deaf:
                self._deaf.discard(writer)
                self.cut.set()
            for side in (writer, up_writer):
                self._open.discard(side)
                side.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client: asyncio.StreamWriter | None = None,
    ) -> None:
        """Bytes in one direction; `client` is the way back, for commands whose answers are to be lost."""
        with suppress(ConnectionError):
            while data := await reader.read(CHUNK):
                if self._latency:
                    await asyncio.sleep(self._latency)
                await self._flowing.wait()
                pause = self._halved if client is None and len(data) > 1 else None
                if pause is not None:
                    self._halved = None
                    writer.write(data[: len(data) // 2])
                    data = data[len(data) // 2 :]
                    await asyncio.sleep(pause)
                marker = self._marker if client is not None else None
                if client is not None and marker is not None and marker in data:
                    self._marker = None
                    # Nothing more reaches the client. The server reads to the end and closes.
                    self._deaf.add(client)
                    client.transport.abort()
                    writer.write(data)
                    writer.write_eof()
                    await asyncio.sleep(5)
                    return
                if writer not in self._deaf:
                    writer.write(data)
                    await writer.drain()
