"""Locks over TLS.

Promises: certificates are checked against the given authority and the name that was asked for; the client
shows its own where the server wants one, and asks for the server's name (SNI); sentinels and the primary that
they name are both reached over TLS; a certificate that does not fit, on either side, is told as such; a
server that stops reading fails its callers in time.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.connection.embedded import EmbeddedValkey
from dotmac.platform.errors import RequestTimeout, ServerUnavailable
from dotmac.platform.testing.topologies import EmbeddedSentinels
from support.locks import free_port, manager_at, until, works
from support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def context_of(certificates: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    return context


@pytest.fixture
def tls(valkey_url: str, certificates: Path) -> Iterator[Proxy]:
    with Proxy(valkey_url, context_of(certificates)) as between:
        yield between


async def test_tls(tls: Proxy, certificates: Path, unique: str) -> None:
    for options in (
        f"tls_ca={certificates}/ca.pem",
        f"ssl_ca_certs={certificates}/ca.pem",
        f"tls_ca={certificates}/ca.pem&tls_server_name=localhost",
        "tls_insecure=true",
    ):
        async with manager_at(f"{tls.url}?{options}", unique) as locks:
            await works(locks)
            tls.drop()
            await works(locks)
            many = [locks.acquire_lock(f"n{n}") for n in range(200)]
            assert await asyncio.gather(*(lock.acquire() for lock in many)) == [True] * 200
            await asyncio.gather(*(lock.release() for lock in many))


async def test_a_certificate_that_does_not_fit(tls: Proxy, certificates: Path, unique: str) -> None:
    for options in (
        f"tls_ca={certificates}/other.pem",
        f"tls_ca={certificates}/ca.pem&tls_server_name=elsewhere",
    ):
        async with manager_at(f"{tls.url}?{options}&request_timeout=1", unique) as locks:
            with pytest.raises(ServerUnavailable, match="certificate"):
                await locks.acquire_lock("a").acquire()


async def test_tls_to_a_server_that_reads_nothing_ends_in_time(tls: Proxy, unique: str) -> None:
    """More than the sockets' buffers hold is asked for, so that writing itself stands still."""
    async with manager_at(f"{tls.url}?tls_insecure=true&request_timeout=1", unique) as locks:
        held = locks.acquire_lock("a", timeout=1)
        await held.acquire()
        tls.stall()
        async with asyncio.timeout(15):
            many = [locks.acquire_lock(f"{n}" + "x" * 1000).acquire(blocking=False) for n in range(15_000)]
            results = await asyncio.gather(*many, return_exceptions=True)
            assert {type(result) for result in results} <= {RequestTimeout, ServerUnavailable}
            await held.lost
        tls.flow()
        tls.drop()
        await works(locks)


async def test_both_sides_show_certificates_and_the_name_is_asked_for(
    valkey_url: str, certificates: Path, unique: str
) -> None:
    context = context_of(certificates)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates / "ca.pem")
    asked: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    with Proxy(valkey_url, context) as between:
        url = f"{between.url}?tls_ca={certificates}/ca.pem&tls_server_name=localhost"
        own = f"&tls_cert={certificates}/client.pem&tls_key={certificates}/client.key"
        async with manager_at(url + own, unique) as locks:
            await works(locks)
        assert set(asked) == {"localhost"}
        async with manager_at(f"{url}&request_timeout=1", unique) as locks:
            with pytest.raises(ServerUnavailable):
                await locks.acquire_lock("a").acquire()


async def test_why_a_server_refuses_a_certificate_is_told(
    redis_program: str, certificates: Path, unique: str
) -> None:
    port = free_port()
    files = {"cert": "server.pem", "key": "server.key", "ca-cert": "ca.pem"}
    options = [
        part for name, file in files.items() for part in (f"--tls-{name}-file", f"{certificates}/{file}")
    ]
    with EmbeddedValkey(program=redis_program, args=("--tls-port", str(port), *options)):
        url = f"rediss://127.0.0.1:{port}?tls_ca={certificates}/ca.pem"
        own = f"&tls_cert={certificates}/client.pem&tls_key={certificates}/client.key"
        async with manager_at(url + own, unique) as locks:
            await works(locks)
        wrong = f"&tls_cert={certificates}/other.pem&tls_key={certificates}/other.key"
        for options, why in (("", "CertificateRequired"), (wrong, "UnknownCA|DecryptError")):
            async with manager_at(f"{url}{options}&request_timeout=1", unique) as locks:
                with pytest.raises(ServerUnavailable, match=why):
                    await locks.acquire_lock("a").acquire()


async def test_sentinels_and_their_primary_over_tls(valkey_url: str, certificates: Path, unique: str) -> None:
    with (
        EmbeddedSentinels(replicas=0, sentinels=1) as servers,
        Proxy(valkey_url, context_of(certificates)) as first,
        Proxy(valkey_url, context_of(certificates)) as second,
        Proxy(servers.sentinels[0].url, context_of(certificates)) as asked,
    ):
        sentinel = servers.client(servers.sentinels[0])
        sentinel.execute_command("SENTINEL", "MONITOR", "secret", "127.0.0.1", first.port, 1)
        url = f"rediss+sentinel://127.0.0.1:{asked.port}/secret"
        async with (
            manager_at(f"{url}?tls_ca={certificates}/ca.pem", unique) as locks,
            locks.acquire_lock("held") as lock,
        ):
            sentinel.execute_command("SENTINEL", "REMOVE", "secret")
            sentinel.execute_command("SENTINEL", "MONITOR", "secret", "127.0.0.1", second.port, 1)
            await until(lambda: locks.stats()["connections"] == 2)
            await works(locks)
            assert lock.held
        async with manager_at(f"{url}?tls_ca={certificates}/other.pem&request_timeout=1", unique) as locks:
            with pytest.raises(ServerUnavailable, match=f"127.0.0.1:{asked.port}: TLS: .*certificate"):
                await locks.acquire_lock("a").acquire()
