"""Servers that take forwarded events, and fail when they are told to."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl


class _Server:
    """Listens at one port, which it keeps when it is stopped and started again."""

    def __init__(self):
        self.port = 0
        self._server = None
        self._writers = set()

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        await self.stop()

    async def start(self, **options):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, **options)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self):
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.01)


class SyslogServer(_Server):
    """A syslog server over TCP, TLS or UDP that keeps the messages it has taken.

    Attributes: messages: taken so far. cut_after: after so many messages of a connection, it is cut.
    """

    def __init__(self, kind="tcp", context: ssl.SSLContext | None = None):
        super().__init__()
        self.kind = kind
        self._context = context
        self.messages = []
        self.cut_after = None
        self.cuts = 0

    async def start(self):
        if self.kind == "udp":
            server, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Datagrams(self.messages), local_addr=("127.0.0.1", self.port)
            )
            self._server = server
            self.port = server.get_extra_info("sockname")[1]
            return
        await super().start(ssl=self._context, limit=1 << 22)

    @property
    def url(self):
        return f"syslog+{self.kind}://{'localhost' if self.kind == 'tls' else '127.0.0.1'}:{self.port}"

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        taken = 0
        try:
            while True:
                # RFC 6587, section 3.4.1: MSG-LEN SP SYSLOG-MSG
                size = int(await reader.readuntil(b" "))
                message = await reader.readexactly(size)
                if self.cut_after is not None and taken >= self.cut_after:
                    self.cuts += 1
                    return
                self.messages.append(message)
                taken += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, messages):
        self._messages = messages

    def datagram_received(self, data, _address):
        self._messages.append(data)


class WebhookServer(_Server):
    """An HTTP server that keeps the requests it answered with 2xx.

    Attributes:
        taken: headers and bodies of those.
        tried: the same of all.
        answers: what comes next: a status, a status with headers, "hang", "cut" (before an answer) or
            "lost" (taken, and then cut); then 200 for ever.
        choose: called with the events; what it returns goes before `answers`.
    """

    def __init__(self):
        super().__init__()
        self.taken = []
        self.tried = []
        self.answers = []
        self.choose = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/audit"

    @property
    def ids(self):
        return [event["id"] for _, body in self.taken for event in json.loads(body)["events"]]

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:] if line)
                }
                body = await reader.readexactly(int(headers["content-length"]))
                self.tried.append((headers, body))
                answer = self.choose(json.loads(body)["events"]) if self.choose else None
                if answer is None:
                    answer = self.answers.pop(0) if self.answers else 200
                if answer == "hang":
                    await asyncio.sleep(60)
                if answer in (200, "lost"):
                    self.taken.append((headers, body))
                if answer in ("cut", "lost"):
                    return
                status, more = answer if isinstance(answer, tuple) else (answer, {})
                lines = "".join(f"{name}: {value}\r\n" for name, value in more.items())
                writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: 2\r\n{lines}\r\nok".encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()
