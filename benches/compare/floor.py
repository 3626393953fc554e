"""The floor: what a lock costs in plain asyncio over one multiplexed connection and nothing else.

Commands of one turn of the loop go out in one write, answers come in their order, grants as RESP3 pushes on
the same connection. Fenced and first come, first served, but nothing is renewed, nobody is told of a loss, a
dead waiter is granted the lock, and no cycle is found: a measure, not a lock to use.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from typing import Self

import hiredis

# KEYS lock, fence, queue; ARGV owner, lease in milliseconds. The fencing token; 0 for a place in the queue.
ACQUIRE = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return redis.call('INCR', KEYS[2]) end
redis.call('RPUSH', KEYS[3], ARGV[1])
return 0"""
# The next in the queue holds it from here on, and is told.
RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local next = redis.call('LPOP', KEYS[3])
if not next then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], next, 'PX', ARGV[2])
redis.call('PUBLISH', next:match('^[^:]+'), next .. ' ' .. redis.call('INCR', KEYS[2]))
return 1"""


class Connection(asyncio.Protocol):
    """One connection for all tasks of a loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(notEnoughData=Ellipsis)
        self._asked: deque[asyncio.Future[object]] = deque()
        self._unsent: list[bytes] = []
        self.waiting: dict[bytes, asyncio.Future[int]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] - it is one
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        reader, asked = self._reader, self._asked
        reader.feed(data)
        while (reply := reader.gets()) is not Ellipsis:
            if type(reply) is hiredis.PushNotification:
                if reply[0] == b"message":
                    owner, fence = reply[2].split()
                    self.waiting.pop(owner).set_result(int(fence))
                continue
            future = asked.popleft()
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)

    def call(self, *command: str | bytes | int) -> asyncio.Future[object]:
        """Sends a command with the others of this turn; the future of its answer."""
        future = self._loop.create_future()
        self._asked.append(future)
        self.tell(*command)
        return future

    def tell(self, *command: str | bytes | int) -> None:
        """Sends a command whose answer is a push, as that of SUBSCRIBE is."""
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append(hiredis.pack_command(command))

    def _send(self) -> None:
        self.transport.write(b"".join(self._unsent))
        self._unsent.clear()


class Floor:
    """Locks over one connection of this loop."""

    async def start(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_connection(Connection, "127.0.0.1", port)
        self._inbox = f"floor-{os.getpid()}-{id(self):x}"
        call = self._connection.call
        await call("HELLO", "3")
        self._connection.tell("SUBSCRIBE", self._inbox)
        self.acquire = await call("SCRIPT", "LOAD", ACQUIRE)
        self.release = await call("SCRIPT", "LOAD", RELEASE)
        self._numbers = itertools.count(1)

    def lock(self, name: str, lease: float) -> FloorLock:
        """A lock to enter once."""
        owner = f"{self._inbox}:{next(self._numbers)}".encode()
        return FloorLock(self, self._connection, name, owner, int(lease * 1000))

    async def stop(self) -> None:
        self._connection.transport.close()


class FloorLock:
    """One holder or waiter."""

    __slots__ = ("_connection", "_floor", "_lease", "_name", "_owner", "fence")

    def __init__(self, floor: Floor, connection: Connection, name: str, owner: bytes, lease: int) -> None:
        self._floor, self._connection, self._name, self._owner = floor, connection, name, owner
        self._lease = lease

    async def __aenter__(self) -> Self:
        connection, name = self._connection, self._name
        # The grant may come in the same batch as the answer, so somebody has to be there for it already.
        granted = connection.waiting[self._owner] = asyncio.get_running_loop().create_future()
        fence = await connection.call(
            "EVALSHA", self._floor.acquire, 3, name, f"{name}:f", f"{name}:q", self._owner, self._lease
        )
        if fence:
            del connection.waiting[self._owner]
        else:
            fence = await granted
        self.fence = fence
        return self

    async def __aexit__(self, *_: object) -> None:
        name = self._name
        given_back = await self._connection.call(
            "EVALSHA", self._floor.release, 3, name, f"{name}:f", f"{name}:q", self._owner, self._lease
        )
        assert given_back == 1
