"""Copied events are handed over in order, with one piece ahead at most, and no thread outlives the copy.

The connection is a stand-in that hands out pieces as asyncpg does: the next once the last was taken.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from dotmac.platform.audit_trail.integrity.events import copy_events

LARGE = 1 << 18


def piece_of(number: int, size: int) -> bytes:
    return b"%d." % number + bytes(size)


class Server:
    def __init__(self, count: int, size: int = LARGE) -> None:
        self.count, self.size = count, size
        self.handed_out = 0

    async def copy_from_query(
        self,
        query: str,
        *values: Any,
        output: Any,
        format: str,  # noqa: A002 (asyncpg's)
        timeout: float,
    ) -> None:
        assert query.endswith("WHERE true")
        assert (values, format) == ((), "binary")
        assert timeout > 86_400
        for number in range(self.count):
            self.handed_out += 1
            await output(piece_of(number, self.size))


def copy(server: Server, feed: Any) -> asyncio.Task[None]:
    return asyncio.ensure_future(copy_events(cast("Any", server), "true", feed))


async def test_every_piece_is_fed_in_order_and_before_the_end() -> None:
    fed: list[bytes] = []
    for count in (0, 1, 2, 50):
        for size in (0, LARGE // 3, LARGE):
            fed.clear()
            await copy(Server(count, size), fed.append)
            assert b"".join(fed) == b"".join(piece_of(number, size) for number in range(count))
            assert len(fed) <= count * (size + 10) // LARGE + 1


async def test_no_more_than_one_piece_is_taken_while_another_is_fed() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def feed(_: bytes) -> None:
        begun.set()
        assert go_on.wait(30)

    server = Server(10)
    copying = copy(server, feed)
    await asyncio.to_thread(begun.wait, 30)
    for _ in range(20):
        await asyncio.sleep(0)
    assert server.handed_out == 2
    go_on.set()
    await copying
    assert server.handed_out == 10


@pytest.mark.parametrize("bad", [0, 1, 4])
async def test_what_is_refused_ends_the_copy(bad: int) -> None:
    def feed(piece: bytes) -> None:
        if piece.startswith(b"%d." % bad):
            raise ValueError("no copy")

    server = Server(5)
    with pytest.raises(ValueError, match="no copy"):
        await copy(server, feed)
    assert server.handed_out <= bad + 2


@pytest.mark.parametrize("server", [Server(5), Server(1, 10)])  # in the middle, and the last piece
@pytest.mark.parametrize("refused", [False, True])
async def test_who_cancels_waits_for_the_piece_that_is_being_fed(refused: bool, server: Server) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def feed(_: bytes) -> None:
        begun.set()
        assert go_on.wait(30)
        ended.set()
        if refused:
            raise ValueError("no copy")

    copying = copy(server, feed)
    await asyncio.to_thread(begun.wait, 30)
    copying.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not copying.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert ended.is_set()
