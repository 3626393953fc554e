"""Clients of redis-py and valkey-py.

Promises: address, database, login, timeouts and TLS files of a client are read, whatever made it
(constructor, URL, pool; synchronous or asyncio); a client that can't be read
faithfully is refused with `UnreadableClient`.
"""

from __future__ import annotations

import ssl

import pytest
import redis
import redis.asyncio
import valkey
import valkey.asyncio
from redis.asyncio.sentinel import Sentinel
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from dotmac.platform.connection.clients import target_from_client
from dotmac.platform.connection.urls import RedisTarget
from dotmac.platform.errors import UnreadableClient

MODULES = [redis, redis.asyncio, valkey, valkey.asyncio]


def main_class(module):
    return getattr(module, "Redis", None) or module.Valkey


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_constructor_url_pool_socket_and_tls(module) -> None:
    client = main_class(module)
    assert target_from_client(
        client(host="h", port=7, db=3, username="u", password="p", socket_timeout=2)
    ) == (RedisTarget("tcp", "h", 7, "", 3, "u", "p", request_timeout=2.0))
    scheme = "valkey" if "valkey" in module.__name__ else "redis"
    assert target_from_client(client.from_url(f"{scheme}://u:p@h:8/2")) == (
        RedisTarget("tcp", "h", 8, "", 2, "u", "p")
    )
    pool = module.ConnectionPool.from_url(f"{scheme}://h:9/1")
    assert target_from_client(pool) == RedisTarget("tcp", "h", 9, "", 1)
    assert target_from_client(client(connection_pool=pool)) == RedisTarget("tcp", "h", 9, "", 1)
    assert target_from_client(client(unix_socket_path="/run/x.sock", db=4)) == (
        RedisTarget("unix", "", 0, "/run/x.sock", 4)
    )
    tls = client(host="h", ssl=True, ssl_ca_certs="/ca", ssl_certfile="/c", ssl_keyfile="/k")
    assert target_from_client(tls) == RedisTarget("tls", "h", tls_ca="/ca", tls_cert="/c", tls_key="/k")
    assert target_from_client(client(ssl=True, ssl_cert_reqs="none")).tls_insecure


def test_fixed_credentials_are_read_and_changing_ones_refused() -> None:
    class Rotating(CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            return "u", "changes-every-hour"

    fixed = redis.Redis(credential_provider=UsernamePasswordCredentialProvider("u", "p"))
    assert (target_from_client(fixed).username, target_from_client(fixed).password) == ("u", "p")
    with pytest.raises(UnreadableClient, match="Rotating"):
        target_from_client(redis.Redis(credential_provider=Rotating()))


def test_what_cannot_be_read_is_refused() -> None:
    for thing in (None, object(), "redis://h", 7):
        with pytest.raises(UnreadableClient, match="redis_url="):
            target_from_client(thing)
    with pytest.raises(UnreadableClient, match="Sentinel"):
        target_from_client(Sentinel([("h", 1)]).master_for("m"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ssl_ca_data", "-----BEGIN"),
        ("ssl_min_version", ssl.TLSVersion.TLSv1_3),
        ("ssl_ciphers", "ECDHE+AESGCM"),
        ("ssl_include_verify_flags", [ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN]),
        ("ssl_validate_ocsp", True),
        ("ssl_validate_ocsp_stapled", True),
    ],
)
def test_what_strengthens_tls_is_not_left_out(name: str, value: object) -> None:
    with pytest.raises(UnreadableClient, match=name):
        target_from_client(redis.Redis(ssl=True, **{name: value}))
