"""`dotmac doctor`: is everything here that the services need, and what to do where it isn't."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dotmac.platform.cli.output import show_json, show_table
from dotmac.platform.connection.embedded import resolve_database, resolve_redis
from dotmac.platform.connection.urls import mask_url, parse_redis_url, postgres_dsn
from dotmac.platform.errors import ConfigurationError, DotmacError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dotmac.platform.connection.urls import RedisTarget
    from dotmac.platform.core.unified_config import PlatformConfig

__all__ = ["doctor"]

_TIMEOUT = 5.0
_OLDEST_REDIS = (6, 2)
_OLDEST_CLUSTER = (7, 0)
_OLDEST_POSTGRES = 140_000
# Leases follow the server's clock alone, so a skew harms no lock; it makes timestamps hard to compare.
_SKEW_ALLOWED = 1.0

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check and, where it isn't well, the remedy."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False) -> None:
    """Check configuration, extension, servers, tables and clocks. Exit code 1 if something fails."""
    checks = list(_all_checks())
    if as_json:
        show_json([asdict(check) for check in checks])
    else:
        show_table(
            ("check", "state", "found", "remedy"),
            [(check.name, check.state, check.detail, check.remedy) for check in checks],
        )
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


def _all_checks() -> Iterator[Check]:
    yield _extension()
    from dotmac.platform.core.unified_config import get_config

    try:
        config = get_config()
    except ConfigurationError as error:
        for variable, shown, allowed in error.problems:
            yield Check("configuration", "failed", f"{variable} = {shown}", allowed)
        return
    yield Check("configuration", "ok", f"{config.get_service_name()} in {config.environment}")
    yield from _redis(config)
    yield from asyncio.run(_postgres(config))


def _extension() -> Check:
    remedy = "install the package anew: pip install --force-reinstall dotmac-platform"
    try:
        from dotmac.platform import _native
    except ImportError as error:
        return Check("extension", "failed", str(error), remedy)
    installed, built = version("dotmac-platform"), _native.__version__
    if installed != built:
        return Check("extension", "failed", f"extension {built} in package {installed}", remedy)
    return Check("extension", "ok", f"version {built}")


def _redis(config: PlatformConfig) -> Iterator[Check]:
    import redis

    try:
        target = parse_redis_url(resolve_redis(config.get_redis_url()))
    except DotmacError as error:
        yield Check("redis", "failed", str(error), "set REDIS_URL to a server that runs")
        return
    try:
        with _client(target) as client:
            # Of a cluster any one node is looked at.
            at = {"target_nodes": client.get_random_node()} if target.cluster else {}
            client.ping(**at)
            info: dict[str, Any] = client.info(**at)
            before = time.time()
            seconds, micros = client.time(**at)
            skew = seconds + micros / 1e6 - (before + time.time()) / 2
    except redis.AuthenticationError as error:
        yield Check("redis", "failed", f"{target}: {error}", "correct user and password in REDIS_URL")
        return
    except (redis.RedisError, redis.exceptions.RedisClusterException, OSError) as error:
        yield Check("redis", "failed", f"{target}: {error}", "start the server, or correct REDIS_URL")
        return
    kind, found = (
        ("valkey", info.get("valkey_version"))
        if "valkey_version" in info
        else ("redis", info["redis_version"])
    )
    detail = f"{kind} {found} at {target}"
    compatible = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    mode = info.get("server_mode") or info.get("redis_mode")  # as Valkey and as Redis call it
    oldest = _OLDEST_CLUSTER if target.cluster else _OLDEST_REDIS
    if compatible < oldest:
        yield Check("redis", "failed", detail, f"use Redis {oldest[0]}.{oldest[1]} or later, or Valkey")
    elif (mode == "cluster") != bool(target.cluster):
        remedy = "name a cluster by redis+cluster://host1,host2, a server by itself by redis://host:port/db"
        yield Check("redis", "failed", f"{detail} runs in mode {mode}", remedy)
    elif info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
        remedy = "set maxmemory-policy noeviction: an evicted key is a lost lock"
        yield Check("redis", "warning", f"{detail} evicts keys ({info['maxmemory_policy']})", remedy)
    else:
        yield Check("redis", "ok", detail)
    yield _clock("redis clock", skew)


def _client(target: RedisTarget) -> Any:
    import redis
    from redis.sentinel import Sentinel

    options = _options(target) | ({} if target.cluster else {"db": target.db})
    if target.kind == "unix":
        return redis.Redis(unix_socket_path=target.path, **options)
    if target.sentinels:
        places = [(one.host, one.port) for one in target.sentinels]
        # redis-py's class has no annotations
        sentinels = Sentinel(places, sentinel_kwargs=_options(target.sentinels[0]))  # type: ignore[no-untyped-call]
        return sentinels.master_for(target.service, **options)  # type: ignore[no-untyped-call]
    if target.cluster:
        node: Any = redis.cluster.ClusterNode  # redis-py's class has no annotations
        nodes = [node(one.host, one.port) for one in target.cluster]
        return redis.RedisCluster(startup_nodes=nodes, **options)
    return redis.Redis(host=target.host, port=target.port, **options)


def _options(target: RedisTarget) -> dict[str, Any]:
    """Login, timeouts and TLS as redis-py names them."""
    common: dict[str, Any] = {
        "username": target.username,
        "password": target.password,
        "socket_timeout": target.request_timeout,
        "socket_connect_timeout": target.connect_timeout,
    }
    if target.kind == "tls":
        common |= {
            "ssl": True,
            "ssl_ca_certs": target.tls_ca,
            "ssl_certfile": target.tls_cert,
            "ssl_keyfile": target.tls_key,
            "ssl_cert_reqs": "none" if target.tls_insecure else "required",
            "ssl_check_hostname": not target.tls_insecure and target.tls_server_name is None,
        }
    return common


async def _postgres(config: PlatformConfig) -> list[Check]:
    import asyncpg

    remedy = "start the server, or correct DATABASE_URL"
    try:
        url = await asyncio.to_thread(
            resolve_database, config.audit_trail.postgres_url or config.get_database_url()
        )
        connection = await asyncpg.connect(postgres_dsn(url), timeout=_TIMEOUT, command_timeout=_TIMEOUT)
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError) as error:
        return [Check("postgresql", "failed", str(error), "correct user and password in DATABASE_URL")]
    except (DotmacError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError) as error:
        return [Check("postgresql", "failed", str(error) or type(error).__name__, remedy)]
    try:
        try:
            return await _postgres_checks(connection, mask_url(url))
        finally:
            await connection.close(timeout=_TIMEOUT)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        return [Check("postgresql", "failed", str(error) or type(error).__name__, remedy)]


async def _postgres_checks(connection: Any, shown: str) -> list[Check]:
    from dotmac.platform.audit_trail import schema

    number = int(await connection.fetchval("SELECT current_setting('server_version_num')"))
    name = await connection.fetchval("SELECT current_setting('server_version')")
    before = time.time()
    server = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
    skew = server - (before + time.time()) / 2
    old = number < _OLDEST_POSTGRES
    status = await schema.status(connection)
    detail = f"version {status.current or 'none'}, {status.wanted} is needed"
    return [
        Check(
            "postgresql",
            "failed" if old else "ok",
            f"{name} at {shown}",
            "use PostgreSQL 14 or later" if old else "",
        ),
        Check("audit tables", "ok", detail)
        if status.up_to_date
        else Check("audit tables", "warning", detail, "run: dotmac db upgrade"),
        _clock("postgresql clock", skew),
    ]


def _clock(name: str, skew: float) -> Check:
    detail = f"{abs(skew) * 1000:.0f} ms {'ahead of' if skew > 0 else 'behind'} this machine"
    if abs(skew) <= _SKEW_ALLOWED:
        return Check(name, "ok", detail)
    return Check(name, "warning", detail, "synchronise both clocks, for instance by chrony")
