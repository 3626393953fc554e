"""Clients of redis-py and valkey-py.

Promises: address, database, login, timeouts and TLS files of a client are read, whatever made it
(constructor, URL, pool, `Sentinel.master_for`, clusters; synchronous or asyncio); a client that can't be read
faithfully is refused with `UnreadableClient`.
"""

from __future__ import annotations

import ssl
import sys

import pytest
import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.sentinel
import valkey
import valkey.asyncio
import valkey.asyncio.cluster
import valkey.asyncio.sentinel
import valkey.sentinel
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


@pytest.mark.parametrize(
    "kind", [redis.asyncio.cluster.RedisCluster, valkey.asyncio.cluster.ValkeyCluster], ids=str
)
def test_nodes_of_a_cluster_are_read(kind) -> None:
    node = sys.modules[kind.__module__].ClusterNode
    nodes = [node("b", 7), node("a", 8)]
    plain = kind(startup_nodes=nodes, username="u", password="p", socket_timeout=2, socket_connect_timeout=3)
    shared = {"username": "u", "password": "p", "request_timeout": 2.0, "connect_timeout": 3.0}
    assert target_from_client(plain) == RedisTarget(
        host="",
        port=0,
        cluster=(RedisTarget(host="a", port=8, **shared), RedisTarget(host="b", port=7, **shared)),
        **shared,
    )
    secured = target_from_client(kind(host="h", ssl=True, ssl_ca_certs="/ca", socket_connect_timeout=5))
    assert (secured.kind, secured.tls_ca, secured.cluster[0].kind) == ("tls", "/ca", "tls")
    remapped = kind(host="h", address_remap=lambda address: address)
    with pytest.raises(UnreadableClient, match="address_remap"):
        target_from_client(remapped)
    with pytest.raises(UnreadableClient, match="ssl_ciphers"):
        target_from_client(kind(host="h", ssl=True, ssl_ciphers="x"))


SENTINELS = [redis.sentinel, redis.asyncio.sentinel, valkey.sentinel, valkey.asyncio.sentinel]


@pytest.mark.parametrize("module", SENTINELS, ids=lambda module: module.__name__)
def test_sentinels_and_service_are_read(module) -> None:
    places = [("b", 26_379), ("a", 7)]
    plain = module.Sentinel(places, socket_timeout=2, sentinel_kwargs={"username": "w", "password": "s"})
    target = RedisTarget(
        host="",
        port=0,
        db=3,
        username="u",
        password="p",
        request_timeout=2.0,
        service="m",
        sentinels=tuple(
            RedisTarget(host=host, port=port, username="w", password="s") for host, port in sorted(places)
        ),
    )
    client = plain.master_for("m", db=3, username="u", password="p")
    assert target_from_client(client) == target
    assert target_from_client(client.connection_pool) == target
    secured = module.Sentinel(
        places, sentinel_kwargs={"ssl": True, "ssl_ca_certs": "/s"}, ssl=True, ssl_ca_certs="/ca"
    )
    target = target_from_client(secured.master_for("m"))
    assert (target.kind, target.tls_ca) == ("tls", "/ca")
    assert {(one.kind, one.tls_ca) for one in target.sentinels} == {("tls", "/s")}
    for unreadable, why in (
        (plain.slave_for("m"), "replicas"),
        (module.Sentinel(places, min_other_sentinels=1).master_for("m"), "min_other_sentinels"),
        (module.Sentinel([]).master_for("m"), "no sentinels"),
        (module.Sentinel(places, sentinel_kwargs={"ssl": True, "ssl_ciphers": "x"}).master_for("m"), "cip"),
    ):
        with pytest.raises(UnreadableClient, match=why):
            target_from_client(unreadable)


@pytest.mark.parametrize("module", SENTINELS[:2], ids=lambda module: module.__name__)
def test_a_replaced_address_is_not_left_out(module) -> None:
    client = module.Sentinel([("h", 1)], force_master_ip="10.0.0.1").master_for("m")
    with pytest.raises(UnreadableClient, match="force_master_ip"):
        target_from_client(client)


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
