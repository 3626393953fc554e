"""What users get wrong, and servers that are away.

Promises: a name, a length of time, an address or a client that can't be used is refused by an error that
names the argument, shows the value and says what would be right; wrong passwords and servers that are away
at the start, while a lock is asked for, held or given back, raise a typed error within the time that was set,
never hang, and never show a password.
"""

from __future__ import annotations

import asyncio
import decimal
import fractions
import math
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.errors import (
    AuthenticationFailed,
    DotmacError,
    EngineClosed,
    InvalidArgument,
    LockLost,
    LockTimeout,
    ServerUnavailable,
    UnreadableClient,
)
from support.locks import manager_at

if TYPE_CHECKING:
    from collections.abc import Iterator

NOWHERE = "redis://127.0.0.1:1/0"
NAMES: list[Any] = [
    "",
    None,
    7,
    1.5,
    b"bytes",
    ["a"],
    object(),
    "x" * 10_000_000,
    "x" * 1025,
    "é" * 513,
    "nul\0inside",
    "\ud800lone surrogate",
    "\udcff",
]
TIMES: list[Any] = [
    -1,
    0,
    -0.0,
    0.05,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    "10",
    b"10",
    10**400,
    10**5000,
    31 * 86_400,
    fractions.Fraction(10**400),
    decimal.Decimal(1),
    1j,
    [1],
    object(),
]


def shown(value: object) -> str:
    try:
        return repr(value).partition(" at 0x")[0][:40]  # the same name in every process
    except ValueError:
        return "an integer that is too long to show"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


@pytest.fixture
def unused(unique: str) -> DistributedLockManager:
    return manager_at(NOWHERE, unique)


@pytest.mark.parametrize("name", NAMES, ids=shown)
def test_names(unused: DistributedLockManager, name: Any) -> None:
    for make in (
        lambda: unused.acquire_lock(name),
        lambda: DistributedLock(NOWHERE, name),
        lambda: unused.acquire_lock("a", owner=name) if name is not None else unused.acquire_lock(name),
    ):
        with pytest.raises(
            InvalidArgument, match="it must be a string of 1 to 1024 bytes in UTF-8"
        ) as caught:
            make()
        assert caught.value.field in ("name", "owner")
        assert caught.value.value is name
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("seconds", TIMES, ids=shown)
async def test_times(unused: DistributedLockManager, seconds: Any) -> None:
    makes = [
        lambda: unused.acquire_lock("a", timeout=seconds),
        lambda: unused.with_lock("a", timeout=seconds),
        lambda: DistributedLock(NOWHERE, "a", timeout=seconds),
        lambda: manager_at(NOWHERE, "n", default_timeout=seconds),
        lambda: manager_at(NOWHERE, "n", request_timeout=seconds),
    ]
    for make in makes:
        with pytest.raises(
            InvalidArgument, match=r"timeout: .* it must be a number of seconds from 0.1 to"
        ) as caught:
            make()
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, True, "1", 10**400, [1]], ids=shown)
async def test_patience(unused: DistributedLockManager, seconds: Any) -> None:
    lock = unused.acquire_lock("a")
    for make in (
        lambda: unused.acquire_lock("a", blocking_timeout=seconds),
        lambda: unused.with_lock("a", blocking_timeout=seconds),
        lambda: manager_at(NOWHERE, "n", blocking_timeout=seconds),
        lambda: lock.acquire_sync(blocking_timeout=seconds),
    ):
        with pytest.raises(
            InvalidArgument, match="blocking_timeout: .* it must be a finite number of seconds"
        ):
            make()
    with pytest.raises(InvalidArgument, match="blocking_timeout"):
        await lock.acquire(blocking_timeout=seconds)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://localhost",
        "postgresql://localhost/x",
        "mongodb://localhost",
        "redis:/localhost",
        "redis://host:port/0",
        "redis://host:99999/0",
        "redis://host/db",
        "redis://host/0?unknown=1",
        "redis://h ost/0",
        "rediss://host/0?tls_key=x",
        "unix://",
        "redis://host/0?request_timeout=0",
        "redis://host/0?request_timeout=nan",
    ],
)
def test_addresses(unique: str, url: str) -> None:
    for make in (lambda: manager_at(url, unique), lambda: DistributedLock(url, "a")):
        with pytest.raises(InvalidArgument, match="redis_url") as caught:
            make()
        assert caught.value.allowed


def test_passwords_are_not_shown(unique: str) -> None:
    for url in ("redsi://u:geheim@host/0", "redis://u:geheim@host:x/0", "redis://host/0?password=geheim&x=1"):
        with pytest.raises(InvalidArgument) as caught:
            manager_at(url, unique)
        assert "geheim" not in str(caught.value)
    assert "geheim" not in repr(manager_at("redis://u:geheim@127.0.0.1:1/0", unique))


@pytest.mark.parametrize("client", [7, object(), [], {"host": "x"}, socket.socket], ids=shown)
def test_clients(client: object) -> None:
    with pytest.raises(UnreadableClient, match="pass a redis-py or valkey-py client .* redis_url= instead"):
        DistributedLock(client, "a")


def test_namespaces_and_choices(unused: DistributedLockManager) -> None:
    for namespace in ("", "a b", "a{b}", "a:b", "é", "x" * 129, 7, b"a"):
        with pytest.raises(InvalidArgument, match="namespace"):
            DistributedLock(NOWHERE, "a", namespace=namespace)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match='"cancel" or "flag"'):
        unused.acquire_lock("a", on_lost="explode")  # type: ignore[arg-type]


# ---- servers that are away


async def test_away_at_the_start(unique: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}/0?request_timeout=0.5"
        async with manager_at(url, unique) as locks:
            lock = locks.acquire_lock("a")
            for call in (lock.acquire, lock.__aenter__, locks.list_locks):
                with within(3), pytest.raises(ServerUnavailable, match="check that it runs at") as caught:
                    await call()
                assert caught.value.retryable
                assert isinstance(caught.value, ConnectionError)
            with within(3), pytest.raises(ServerUnavailable):
                await asyncio.to_thread(lock.acquire_sync)
            with within(2), pytest.raises(ServerUnavailable):
                await lock.acquire(blocking=False)
            with within(2), pytest.raises((ServerUnavailable, LockTimeout)):
                async with locks.acquire_lock("a", blocking_timeout=0.2):
                    pytest.fail("held without a server")


async def test_a_server_that_never_answers(unique: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0?request_timeout=0.5&connect_timeout=0.3"
        async with manager_at(url, unique) as locks:
            with within(3), pytest.raises(ServerUnavailable, match="no connection within 300 ms"):
                await locks.acquire_lock("a").acquire()


async def test_something_else_listens_there(unique: str) -> None:
    async def web(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(web, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with manager_at(f"redis://127.0.0.1:{port}/0?request_timeout=0.5", unique) as locks:
        with within(3), pytest.raises(ServerUnavailable, match="not the Redis protocol"):
            await locks.acquire_lock("a").acquire()
    server.close()


async def test_away_while_asking_holding_and_giving_back(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(f"{own_valkey.url}?request_timeout=0.5", unique) as locks:
        lock, other = locks.acquire_lock("a", timeout=5), locks.acquire_lock("b", timeout=5)
        await lock.acquire()
        await other.acquire()
        own_valkey.kill()
        with within(3), pytest.raises(ServerUnavailable):
            await lock.release()
        with within(3), pytest.raises(ServerUnavailable):
            await asyncio.to_thread(other.extend_sync)
        with within(3), pytest.raises(ServerUnavailable):
            await locks.acquire_lock("c").acquire()
        with within(3), pytest.raises(ServerUnavailable):
            await asyncio.to_thread(other.release_sync)
        await asyncio.to_thread(own_valkey.start)
        async with asyncio.timeout(10):
            # Between two tries to connect up to two seconds pass, more than this request_timeout.
            while not locks.stats()["open"]:
                await asyncio.sleep(0.05)
            async with locks.acquire_lock("a"):
                pass


async def test_paused_while_asking_holding_and_giving_back(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(f"{own_valkey.url}?request_timeout=0.5&connect_timeout=0.5", unique) as locks:
        lock, other = locks.acquire_lock("a", timeout=30), locks.acquire_lock("b", timeout=30)
        await lock.acquire()
        await other.acquire()
        own_valkey.pause()
        try:
            with (
                within(3),
                pytest.raises(ServerUnavailable, match="no answer") as caught,
            ):
                await lock.release()
            assert "repeats the release" in caught.value.__notes__[0]
            with within(3), pytest.raises(ServerUnavailable):
                await other.extend(20)
            with within(3), pytest.raises(ServerUnavailable):
                await locks.acquire_lock("c").acquire()
            with within(3), pytest.raises(ServerUnavailable):
                await asyncio.to_thread(locks.list_locks_sync)
        finally:
            own_valkey.resume()
        async with asyncio.timeout(10):
            while not locks.stats()["open"]:
                await asyncio.sleep(0.05)
            async with locks.acquire_lock("a"):
                assert other.held
            await other.release()


async def test_a_body_whose_server_is_gone_at_its_end(own_valkey: EmbeddedValkey, unique: str) -> None:
    async with manager_at(f"{own_valkey.url}?request_timeout=0.5", unique) as locks:
        with within(4), pytest.raises((ServerUnavailable, LockLost)):
            async with locks.acquire_lock("a", timeout=5):
                own_valkey.kill()
        await asyncio.to_thread(own_valkey.start)
        while not locks.stats()["open"]:
            await asyncio.sleep(0.05)
        with within(4), pytest.raises(KeyError):  # the body's own error is not hidden by that
            async with locks.acquire_lock("a", timeout=5):
                own_valkey.kill()
                raise KeyError("mine")


async def test_closing_is_bounded_and_final(own_valkey: EmbeddedValkey, unique: str) -> None:
    locks = manager_at(f"{own_valkey.url}?request_timeout=0.5&connect_timeout=0.5", unique)
    held = locks.acquire_lock("a", timeout=30)
    await held.acquire()
    waiting = asyncio.create_task(locks.acquire_lock("a").acquire())
    await asyncio.sleep(0.05)
    own_valkey.pause()
    try:
        with within(8):
            await locks.aclose()
        with within(2), pytest.raises(EngineClosed):
            await waiting
    finally:
        own_valkey.resume()
    for call in (locks.acquire_lock("a").acquire, locks.list_locks, held.release):
        with within(2), pytest.raises((EngineClosed, DotmacError)):
            await call()


async def test_wrong_credentials_are_told_to_everybody_who_asks(unique: str) -> None:
    with EmbeddedValkey(args=("--requirepass", "right")) as server:
        url = server.url.replace("redis://", "redis://:wrong@")
        async with manager_at(f"{url}?request_timeout=5", unique) as locks:
            for _ in range(2):
                with within(5), pytest.raises(AuthenticationFailed, match="check user, password"):
                    await locks.acquire_lock("a").acquire()
            with within(5), pytest.raises(PermissionError):
                await asyncio.to_thread(locks.acquire_lock("a").acquire_sync)
