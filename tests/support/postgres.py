"""A proxy that breaks the way to a PostgreSQL server."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import parse_qs, urlsplit


class PostgresProxy:
    """A TCP proxy to a PostgreSQL server.

    Args:
        url: the server's address, over TCP or a Unix socket.
        chance: cuts each connection after a random number of bytes, while `cutting`; None for never.
    """

    def __init__(self, url, chance=None):
        parts = urlsplit(url)
        self._query = parse_qs(parts.query)
        self._parts = parts
        self._chance = chance
        self.cutting = chance is not None
        self.cuts = 0
        self.lost = 0
        self.on_lost = None
        self._answer = None
        self._tasks = set()

    def lose_answer(self, mark):
        """The next answer that contains `mark` is lost, and its connection with it."""
        self._answer = mark

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        login = self._parts.netloc.rpartition("@")[0]
        self.url = f"postgresql://{login}@127.0.0.1:{port}{self._parts.path}?sslmode=disable"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self):
        if host := self._query.get("host"):
            port = self._query.get("port", [str(self._parts.port or 5432)])[0]
            return await asyncio.open_unix_connection(f"{host[0]}/.s.PGSQL.{port}")
        return await asyncio.open_connection(self._parts.hostname, self._parts.port)

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        behind_writer = None
        try:
            behind_reader, behind_writer = await self._open()
            budget = self._chance.randrange(2_000, 120_000) if self.cutting else None
            await asyncio.wait(
                [
                    asyncio.create_task(self._pump(reader, behind_writer, budget)),
                    asyncio.create_task(self._pump(behind_reader, writer, None, answers=True)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for one in (writer, behind_writer):
                if one is not None:
                    one.transport.abort()
            self._tasks.discard(asyncio.current_task())

    async def _pump(self, reader, writer, budget, *, answers=False):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                if answers and self._answer is not None and self._answer in data:
                    self._answer = None
                    if self.on_lost is not None:
                        await self.on_lost()
                    self.lost += 1
                    return
                if budget is not None:
                    budget -= len(data)
                    if budget < 0:
                        self.cuts += 1
                        return
                writer.write(data)
                await writer.drain()


class TransactionPooler:
    """A pooler in transaction mode, as pgbouncer: each transaction of a client meets another server process.

    Args:
        url: the server's address; it must trust its clients.
        servers: connections to the server for each client.
    """

    def __init__(self, url, servers=3):
        self._proxy = PostgresProxy(url)
        self._servers = servers
        self._tasks = set()
        self.switches = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        parts = self._proxy._parts
        login = parts.netloc.rpartition("@")[0]
        self.url = f"postgresql://{login}@127.0.0.1:{port}{parts.path}?sslmode=disable"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        behind = []
        pumps = []
        try:
            size = await reader.readexactly(4)
            hello = size + await reader.readexactly(int.from_bytes(size) - 4)
            for _ in range(self._servers):
                behind.append(await self._proxy._open())
                behind[-1][1].write(hello)
            for number, (server, _) in enumerate(behind):
                kind = b""
                while kind != b"Z":
                    kind, message = await self._message(server)
                    if number == 0:
                        writer.write(message)
            turn = [0]
            pumps = [
                asyncio.create_task(self._pump(number, server, writer, turn))
                for number, (server, _) in enumerate(behind)
            ]
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while True:
                    _, message = await self._message(reader)
                    behind[turn[0]][1].write(message)
        finally:
            for pump in pumps:
                pump.cancel()
            for _, one in [*behind, (None, writer)]:
                one.transport.abort()
            self._tasks.discard(asyncio.current_task())

    async def _pump(self, number, server, writer, turn):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, message = await self._message(server)
                if kind == b"Z" and message[5:6] == b"I" and turn[0] == number:
                    turn[0] = (number + 1) % self._servers
                    self.switches += 1
                writer.write(message)

    @staticmethod
    async def _message(reader):
        head = await reader.readexactly(5)
        return head[:1], head + await reader.readexactly(int.from_bytes(head[1:]) - 4)
