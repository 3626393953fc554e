"""Every call of the integration guide, with its import paths and argument names, on real servers.

Promises: what the guide's chapters on the registry, the audit trail, locks and configuration show works as
written, and so do its three integration examples: a FastAPI application with `on_event`, its decorator order
and its string categories; two services that find each other; a background task under a lock; and its ways of
migration, where services are made without arguments and take the environment.
"""

from __future__ import annotations

import asyncio
import warnings
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import redis.asyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ENVIRONMENT = {
    "APP_NAME": "my-service",
    "APP_VERSION": "2.0.0",
    "ENVIRONMENT": "production",
    "DEBUG": "false",
    "SERVICE_REGISTRY_DEFAULT_TTL": "120",
    "SERVICE_REGISTRY_HEALTH_CHECK_INTERVAL": "60",
    "AUDIT_TRAIL_RETENTION_DAYS": "730",
    "AUDIT_TRAIL_ANOMALY_DETECTION_ENABLED": "true",
    "DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT": "15.0",
    "DISTRIBUTED_LOCKS_AUTO_RENEWAL_ENABLED": "true",
}


@pytest.fixture(scope="module")
def postgres(postgres_url: str) -> str:
    """The database as the guide writes its address, with the audit tables."""
    import threading

    from dotmac.platform.audit_trail import AuditAggregator

    async def migrate() -> None:
        async with AuditAggregator(postgres_url=postgres_url) as aggregator:
            await aggregator.migrate()

    thread = threading.Thread(target=lambda: asyncio.run(migrate()))
    thread.start()
    thread.join()
    return postgres_url.replace("postgresql://", "postgresql+asyncpg://", 1)


@pytest.fixture
def guide(
    monkeypatch: pytest.MonkeyPatch, valkey_url: str, postgres: str, unique: str, tmp_path
) -> Iterator[dict[str, str]]:
    """The guide's environment variables. Each test has namespaces of its own."""
    from dotmac.platform.core.unified_config import reload_config

    monkeypatch.chdir(tmp_path)  # no .env of anybody
    values = ENVIRONMENT | {
        "REDIS_URL": valkey_url,
        "DATABASE_URL": postgres,
        "DISTRIBUTED_LOCKS_NAMESPACE": unique,
        "SERVICE_REGISTRY_NAMESPACE": unique,
    }
    with monkeypatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        reload_config()
        yield values
    reload_config()


@pytest.fixture
async def web() -> AsyncIterator[int]:
    """A service that is healthy; its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"ok": true}'
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "localhost", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


# ---- the three services


async def test_service_registry(guide: dict[str, str], web: int) -> None:
    from dotmac.platform.service_registry import ServiceRegistry
    from dotmac.platform.service_registry.config import ServiceRegistryConfig

    config = ServiceRegistryConfig(
        redis_url=guide["REDIS_URL"],
        default_ttl=60,
        health_check_interval=30,
        load_balancing_strategy="round_robin",
    )
    assert config.default_ttl == 60
    registry = ServiceRegistry(redis_url=guide["REDIS_URL"])
    await registry.register_service(
        name="user-service",
        version="1.0.0",
        host="localhost",
        port=web,
        tags=["user", "auth"],
        health_check_url=f"http://localhost:{web}/health",
    )
    services = await registry.discover_services("user-service")
    assert [(one.name, one.version, one.host, one.port, set(one.tags)) for one in services] == [
        ("user-service", "1.0.0", "localhost", web, {"user", "auth"})
    ]
    service = await registry.get_service("user-service")
    assert service is not None
    assert (service.host, service.port) == ("localhost", web)
    await registry.start_health_monitoring()
    assert await registry.get_service("nobody") is None
    await registry.aclose()

    async with ServiceRegistry(
        config=config.model_copy(update={"namespace": guide["SERVICE_REGISTRY_NAMESPACE"]})
    ) as two:
        assert await two.discover_services("user-service") == [], "the first one has left"


async def test_audit_trail(guide: dict[str, str], unique: str) -> None:
    from dotmac.platform.audit_trail import AuditAggregator, AuditCategory, AuditLevel
    from dotmac.platform.audit_trail.config import AuditTrailConfig

    config = AuditTrailConfig(
        postgres_url=guide["DATABASE_URL"],
        redis_url=guide["REDIS_URL"],
        retention_days=365,
        anomaly_detection_enabled=True,
    )
    assert config.retention_days == 365
    aggregator = AuditAggregator(postgres_url=guide["DATABASE_URL"], redis_url=guide["REDIS_URL"])
    event_id = await aggregator.log_event(
        category=AuditCategory.AUTHENTICATION,
        action="user.login",
        level=AuditLevel.INFO,
        user_id=unique,
        tenant_id="tenant456",
        metadata={"ip_address": "192.168.1.1", "user_agent": "..."},
    )
    events = await aggregator.query_events(
        start_time=datetime.now() - timedelta(days=7),  # noqa: DTZ005 - as the guide writes it
        categories=[AuditCategory.AUTHENTICATION],
        user_id=unique,
    )
    (event,) = events
    assert event.id == event_id
    assert (event.action, event.tenant_id, event.metadata["user_agent"]) == ("user.login", "tenant456", "...")
    report = await aggregator.generate_compliance_report(
        start_date=date.today() - timedelta(days=30),  # noqa: DTZ011 - as the guide writes it
        end_date=date.today(),  # noqa: DTZ011
        report_type="access_log",
    )
    assert unique in report.to_json()
    await aggregator.aclose()
    async with AuditAggregator(config=config) as configured:
        assert (await configured.get_event(event_id)).user_id == unique


async def test_distributed_locks(guide: dict[str, str]) -> None:
    from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
    from dotmac.platform.distributed_locks.config import DistributedLockConfig

    config = DistributedLockConfig(
        redis_url=guide["REDIS_URL"],
        default_timeout=10.0,
        auto_renewal_enabled=True,
        deadlock_detection_enabled=True,
    )
    lock_manager = DistributedLockManager(redis_url=guide["REDIS_URL"])

    async def names() -> list[str]:
        return sorted(info.name for info in await lock_manager.list_locks())

    async with lock_manager.acquire_lock("resource:123", timeout=30.0) as lock:
        assert lock.held
        assert lock.timeout == 30.0
        assert await names() == ["resource:123"]

    @lock_manager.with_lock("user:{user_id}", timeout=10.0)
    async def update_user_profile(user_id: str, data: dict[str, int]) -> tuple[list[str], dict[str, int]]:
        return await names(), data

    assert await update_user_profile("7", {"a": 1}) == (["user:7"], {"a": 1})
    assert await update_user_profile(user_id="8", data={}) == (["user:8"], {})

    redis_client = redis.asyncio.Redis.from_url(guide["REDIS_URL"])
    lock = DistributedLock(redis_client, "payment:processing", timeout=60.0)
    acquired = await lock.acquire()
    assert acquired is True
    try:
        assert lock.fencing_token > 0
    finally:
        await lock.release()
    assert not lock.held
    await redis_client.aclose()
    await lock_manager.aclose()

    async with DistributedLockManager(config=config) as configured:
        assert configured.acquire_lock("a").timeout == 10.0
    async with DistributedLockManager() as of_the_environment:
        assert of_the_environment.acquire_lock("a").timeout == 15.0
        async with of_the_environment.acquire_lock("critical:resource"):
            pass


# ---- configuration


def test_unified_configuration(guide: dict[str, str]) -> None:
    from dotmac.platform.core.unified_config import PlatformConfig, get_config

    config = get_config()
    assert isinstance(config, PlatformConfig)
    assert config.auth is not None
    assert config.database is not None
    assert config.service_registry.default_ttl == 120
    assert config.service_registry.health_check_interval == 60
    assert config.audit_trail.retention_days == 730
    assert config.audit_trail.anomaly_detection_enabled is True
    assert config.distributed_locks.default_timeout == 15.0
    assert config.distributed_locks.auto_renewal_enabled is True
    assert config.is_production()
    assert config.get_redis_url() == guide["REDIS_URL"]
    assert config.get_database_url() == guide["DATABASE_URL"]
    assert config.get_service_name() == "my-service"
    assert config.app_version == "2.0.0"
    assert config.debug is False


# ---- the integration examples


@dataclass
class CurrentUser:
    id: str


async def test_fastapi_application(guide: dict[str, str], unique: str, web: int) -> None:
    from fastapi import FastAPI

    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.core.unified_config import get_config
    from dotmac.platform.distributed_locks import DistributedLockManager
    from dotmac.platform.service_registry import ServiceRegistry

    app = FastAPI()
    config = get_config()
    registry = ServiceRegistry(redis_url=config.get_redis_url())
    audit = AuditAggregator(postgres_url=config.get_database_url(), redis_url=config.get_redis_url())
    locks = DistributedLockManager(redis_url=config.get_redis_url())
    current_user = CurrentUser(unique)
    held: list[str] = []

    async def look() -> None:
        held.extend(info.name for info in await locks.list_locks())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # FastAPI's, about on_event

        @app.on_event("startup")
        async def startup() -> None:
            await registry.register_service(
                name="my-api",
                version=config.app_version,
                host="localhost",
                port=web,
                health_check_url=f"http://localhost:{web}/health",
            )
            await registry.start_health_monitoring()

    @app.get("/users/{user_id}")
    async def get_user(user_id: str) -> dict[str, str]:
        await audit.log_event(
            category="DATA_ACCESS",
            action="user.read",
            user_id=current_user.id,
            metadata={"accessed_user": user_id},
        )
        async with locks.acquire_lock(f"user:{user_id}"):
            await look()
            return {"id": user_id}

    @app.put("/users/{user_id}")
    @locks.with_lock("user:{user_id}", timeout=30.0)
    async def update_user(user_id: str, data: dict[str, Any]) -> dict[str, Any]:
        await audit.log_event(
            category="DATA_CHANGE",
            action="user.update",
            user_id=current_user.id,
            metadata={"target_user": user_id, "changes": list(data.keys())},
        )
        await look()
        return {"id": user_id, **data}

    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://test"
        ) as client:
            read = await client.get("/users/7")
            assert (read.status_code, read.json()) == (200, {"id": "7"})
            written = await client.put("/users/8", json={"name": "x"})
            assert (written.status_code, written.json()) == (200, {"id": "8", "name": "x"})
            assert (await client.put("/users/8")).status_code == 422, "the body is still asked for"
            paths = (await client.get("/openapi.json")).json()["paths"]["/users/{user_id}"]
            assert [parameter["name"] for parameter in paths["put"]["parameters"]] == ["user_id"]
            assert "requestBody" in paths["put"]
        assert held == ["user:7", "user:8"]
        (instance,) = await registry.discover_services("my-api")
        assert (instance.version, instance.port) == ("2.0.0", web)
        events = await audit.query_events(user_id=unique)
        assert {event.action: event.metadata for event in events} == {
            "user.read": {"accessed_user": "7"},
            "user.update": {"target_user": "8", "changes": ["name"]},
        }
    for service in (registry, audit, locks):
        await service.aclose()


async def test_two_services(guide: dict[str, str], web: int) -> None:
    from dotmac.platform.service_registry import ServiceRegistry

    async with ServiceRegistry() as consumer, ServiceRegistry() as registry:
        await consumer.register_service(
            name="service-b", version="1.0.0", host="localhost", port=web, tags=["data", "processing"]
        )
        service_b = await registry.get_service("service-b")
        assert service_b
        async with httpx.AsyncClient() as client:
            response = await client.get(f"http://{service_b.host}:{service_b.port}/api/data")
        assert response.json() == {"ok": True}


async def test_background_task(guide: dict[str, str], unique: str) -> None:
    """The task's function itself; a real Celery worker runs one among the examples."""
    from celery import Celery

    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.distributed_locks import DistributedLockManager

    app = Celery("tasks")
    locks = DistributedLockManager()
    audit = AuditAggregator()

    @app.task
    @locks.with_lock("report:generation", timeout=300.0)
    async def generate_monthly_report() -> list[str]:
        await audit.log_event(
            category="SYSTEM_TASK",
            action="report.generate",
            user_id=unique,
            metadata={"report_type": "monthly"},
        )
        return [info.name for info in await locks.list_locks()]

    assert await generate_monthly_report() == ["report:generation"]
    assert len(await audit.query_events(user_id=unique)) == 1
    await locks.aclose()
    await audit.aclose()


async def test_migration(guide: dict[str, str], unique: str) -> None:
    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.core.unified_config import get_config
    from dotmac.platform.distributed_locks import DistributedLockManager
    from dotmac.platform.service_registry import ServiceRegistry

    config = get_config()
    assert (config.get_database_url(), config.get_redis_url()) == (guide["DATABASE_URL"], guide["REDIS_URL"])
    registry = ServiceRegistry()
    await registry.register_service(name="your-service", version="1.0.0", host="localhost", port=8000)
    audit = AuditAggregator()
    await audit.log_event(category="AUTHENTICATION", action="user.login", user_id=unique)
    locks = DistributedLockManager()
    async with locks.acquire_lock("critical:resource"):
        assert await registry.get_service("your-service") is not None
        assert len(await audit.query_events(user_id=unique)) == 1
    for service in (registry, audit, locks):
        await service.aclose()


async def test_observability(guide: dict[str, str]) -> None:
    from dotmac.platform.observability.unified_logging import get_logger

    logger = get_logger(__name__)
    logger.info("works", answer=42)
