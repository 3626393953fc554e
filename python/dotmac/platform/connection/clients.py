"""Read where a client of redis-py or valkey-py connects to, so that the engine can connect there itself."""

from __future__ import annotations

import ssl
from typing import Any

from dotmac.platform.connection.urls import DEFAULT_TIMEOUT, RedisTarget
from dotmac.platform.errors import UnreadableClient

__all__ = ["target_from_client"]

_REMEDY = (
    "pass a redis-py or valkey-py client of one server, of a cluster or by Sentinel.master_for, "
    "or redis_url= instead"
)
# What these say can't be expressed by a RedisTarget; leaving them out would weaken or break the connection.
_INEXPRESSIBLE = (
    "ssl_ca_path",
    "ssl_ca_data",
    "ssl_password",
    "ssl_context",
    "ssl_min_version",
    "ssl_ciphers",
    "ssl_include_verify_flags",
    "ssl_exclude_verify_flags",
    "ssl_validate_ocsp",
    "ssl_validate_ocsp_stapled",
    "ssl_ocsp_context",
    "ssl_ocsp_expected_cert",
)


def target_from_client(client: object) -> RedisTarget:
    """Where a client connects to.

    Args:
        client: a `Redis`, `Valkey` or `ConnectionPool` object of redis-py or valkey-py, synchronous or
            asyncio, over TCP, TLS or a Unix socket, or one that `Sentinel.master_for` made: then its
            sentinels and its service are read; or a `RedisCluster` or `ValkeyCluster`, of which the nodes are
            read. It is only read, never used or closed.

    Raises: UnreadableClient: the client is of another kind, or reads from replicas of sentinels.
    """
    if hasattr(client, "nodes_manager"):
        return _of_cluster(client, client.nodes_manager)
    pool: Any = client if hasattr(client, "connection_kwargs") else getattr(client, "connection_pool", None)
    settings = getattr(pool, "connection_kwargs", None)
    made_by = getattr(pool, "connection_class", None)
    if not isinstance(settings, dict) or not isinstance(made_by, type):
        raise _unreadable(client, "its connection parameters can't be read")
    _check_family(client, made_by)
    common = _common(client, settings)
    kinds = {base.__name__ for base in made_by.__mro__}
    if "UnixDomainSocketConnection" in kinds:
        path = settings.get("path")
        if not path:
            raise _unreadable(client, "it names no socket")
        return RedisTarget(kind="unix", host="", port=0, path=str(path), **common)
    address: dict[str, Any] = (
        _by_sentinel(client, pool)
        if hasattr(pool, "sentinel_manager")
        else {"host": str(settings.get("host") or "localhost"), "port": int(settings.get("port") or 6379)}
    )
    if "SSLConnection" not in kinds:
        return RedisTarget(kind="tcp", **address, **common)
    return RedisTarget(kind="tls", **address, **common, **_tls(client, settings))


def _check_family(client: object, made_by: type) -> None:
    family = {base.__module__.partition(".")[0] for base in made_by.__mro__}
    if not family & {"redis", "valkey"} or "fakeredis" in family:
        raise _unreadable(client, "it does not connect to a real server by redis-py or valkey-py")


def _common(client: object, settings: dict[str, Any]) -> dict[str, Any]:
    username, password = _credentials(client, settings)
    return {
        "db": int(settings.get("db") or 0),
        "username": username,
        "password": password,
        "connect_timeout": float(settings.get("socket_connect_timeout") or DEFAULT_TIMEOUT),
        "request_timeout": float(settings.get("socket_timeout") or DEFAULT_TIMEOUT),
    }


def _tls(client: object, settings: dict[str, Any]) -> dict[str, Any]:
    for name in _INEXPRESSIBLE:
        if settings.get(name):
            raise _unreadable(client, f"its {name} can't be taken over")
    checks = settings.get("ssl_cert_reqs", "required")
    return {
        "tls_ca": settings.get("ssl_ca_certs"),
        "tls_cert": settings.get("ssl_certfile"),
        "tls_key": settings.get("ssl_keyfile"),
        "tls_insecure": checks is None or checks in ("none", ssl.CERT_NONE),
    }


def _of_cluster(client: object, manager: Any) -> RedisTarget:
    settings = getattr(manager, "connection_kwargs", None)
    if not isinstance(settings, dict):
        raise _unreadable(client, "its connection parameters can't be read")
    _check_family(client, type(client))
    # Without it the engine would take addresses that the client replaces.
    if getattr(manager, "address_remap", None):
        raise _unreadable(client, "its address_remap can't be taken over")
    made_by = settings.get("connection_class")
    kinds = {base.__name__ for base in made_by.__mro__} if isinstance(made_by, type) else set()
    fields = _common(client, settings)
    if settings.get("ssl") or "SSLConnection" in kinds:
        fields |= {"kind": "tls", **_tls(client, settings)}
    # The manager adds those that it finds; two of its clients are still to share one engine.
    places = {(str(node.host), int(node.port)) for node in manager.startup_nodes.values()}
    if not places:
        raise _unreadable(client, "it names no nodes")
    nodes = tuple(RedisTarget(host=host, port=port, **fields) for host, port in sorted(places))
    return RedisTarget(host="", port=0, cluster=nodes, **fields)


def _by_sentinel(client: object, pool: Any) -> dict[str, Any]:
    manager = pool.sentinel_manager
    if not pool.is_master:
        raise _unreadable(client, "it reads from replicas; make it by master_for")
    # Without these the engine would take addresses that the client refuses or replaces.
    for name in ("min_other_sentinels", "_force_master_ip"):
        if getattr(manager, name, None):
            raise _unreadable(client, f"the {name.strip('_')} of its Sentinel can't be taken over")
    # The manager changes their order as it goes; two of its clients are still to share one engine.
    sentinels = tuple(sorted(map(target_from_client, manager.sentinels), key=lambda one: one.place))
    if not sentinels:
        raise _unreadable(client, "its Sentinel names no sentinels")
    return {"host": "", "port": 0, "service": str(pool.service_name), "sentinels": sentinels}


def _credentials(client: object, settings: dict[str, Any]) -> tuple[str | None, str | None]:
    provider = settings.get("credential_provider")
    if provider is None:
        return settings.get("username") or None, settings.get("password") or None
    # Any other provider may hand out passwords that expire, which a single reading would freeze.
    if type(provider).__name__ != "UsernamePasswordCredentialProvider":
        raise _unreadable(client, f"its credentials come from {type(provider).__name__}")
    return provider.username or None, provider.password or None


def _unreadable(client: object, why: str) -> UnreadableClient:
    kind = type(client)
    return UnreadableClient(
        f"redis_client: a {kind.__module__}.{kind.__qualname__} can't be used: {why}; {_REMEDY}"
    )
