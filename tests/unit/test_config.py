"""Configuration.

Promises: the guide's variables set the guide's fields; arguments win over the environment, it over `.env`,
that over secret files; `explain` names where each value came from; all wrong settings are reported
together, each with its variable and what is allowed; no secret is ever shown; in production addresses must
be set; the reference page lists every variable with its default; `reload_config` swaps, and keeps the old
configuration when the new one is wrong.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from dotmac.platform.audit_trail.config import AuditTrailConfig
from dotmac.platform.auth.config import AuthConfig
from dotmac.platform.connection.config import DatabaseConfig
from dotmac.platform.core import unified_config
from dotmac.platform.core.unified_config import PlatformConfig, get_config, reload_config
from dotmac.platform.distributed_locks import DistributedLockManager
from dotmac.platform.distributed_locks.config import DistributedLockConfig
from dotmac.platform.errors import ConfigurationError, InvalidArgument
from dotmac.platform.service_registry import ServiceRegistry
from dotmac.platform.service_registry.config import ServiceRegistryConfig

GUIDE = {
    "APP_NAME": "my-service",
    "APP_VERSION": "2.0.0",
    "ENVIRONMENT": "production",
    "DEBUG": "false",
    "DATABASE_URL": "postgresql+asyncpg://user:pass@localhost:5432/mydb",
    "REDIS_URL": "redis://localhost:6379/0",
    "SERVICE_REGISTRY_DEFAULT_TTL": "120",
    "SERVICE_REGISTRY_HEALTH_CHECK_INTERVAL": "60",
    "AUDIT_TRAIL_RETENTION_DAYS": "730",
    "AUDIT_TRAIL_ANOMALY_DETECTION_ENABLED": "true",
    "DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT": "15.0",
    "DISTRIBUTED_LOCKS_AUTO_RENEWAL_ENABLED": "true",
}
KEY = "k" * 32


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No variable of the machine reaches the tests; nor do theirs reach others."""
    ours = (
        "SERVICE_REGISTRY_",
        "AUDIT_TRAIL_",
        "DISTRIBUTED_LOCKS_",
        "AUTH_",
        "DATABASE_",
        "DOTMAC_",
        "APP_",
    )
    for name in os.environ:
        if name.startswith(ours) or name in ("DEBUG", "ENVIRONMENT", "REDIS_URL"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOTMAC_SECRETS_DIR", str(tmp_path / "secrets"))
    before = unified_config._current._config
    yield
    unified_config._current._config = before


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_the_guides_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, GUIDE)
    config = reload_config()
    assert config is get_config()
    assert (config.app_name, config.get_service_name(), config.app_version) == (
        "my-service",
        "my-service",
        "2.0.0",
    )
    assert config.is_production()
    assert config.debug is False
    assert config.get_database_url() == config.database.url == GUIDE["DATABASE_URL"]
    assert config.get_redis_url() == GUIDE["REDIS_URL"]
    assert (config.service_registry.default_ttl, config.service_registry.health_check_interval) == (120, 60)
    assert config.audit_trail.retention_days == 730
    assert config.audit_trail.anomaly_detection_enabled
    assert config.distributed_locks.default_timeout == 15.0
    assert config.distributed_locks.auto_renewal_enabled
    # Sections without addresses of their own have the platform's.
    assert config.audit_trail.postgres_url == GUIDE["DATABASE_URL"]
    for section in (config.service_registry, config.audit_trail, config.distributed_locks):
        assert section.redis_url == GUIDE["REDIS_URL"]
    assert config.explain("audit_trail.postgres_url").origin == "environment DATABASE_URL"


def test_the_guides_sections_by_hand() -> None:
    registry = ServiceRegistryConfig(
        redis_url="redis://localhost:6379/0",
        default_ttl=60,
        health_check_interval=30,
        load_balancing_strategy="round_robin",
    )
    assert (registry.default_ttl, registry.load_balancing_strategy) == (60, "round_robin")
    audit = AuditTrailConfig(
        postgres_url="postgresql+asyncpg://user:pass@localhost:5432/dotmac",
        redis_url="redis://localhost:6379/0",
        retention_days=365,
        anomaly_detection_enabled=True,
    )
    assert audit.retention_days == 365
    assert "pass@" not in repr(audit) + str(audit)
    locks = DistributedLockConfig(
        redis_url="redis://localhost:6379/0",
        default_timeout=10.0,
        auto_renewal_enabled=True,
        deadlock_detection_enabled=True,
    )
    assert locks.default_timeout == 10.0
    with pytest.raises(ValidationError, match="frozen"):
        locks.default_timeout = 1.0


@pytest.mark.parametrize(
    ("section", "bad"),
    [
        (DistributedLockConfig, {"default_timeout": -1}),
        (DistributedLockConfig, {"default_timeout": float("nan")}),
        (DistributedLockConfig, {"request_timeout": 0}),
        (DistributedLockConfig, {"namespace": "{x}"}),
        (DistributedLockConfig, {"on_lost": "panic"}),
        (DistributedLockConfig, {"colour": "red"}),
        (ServiceRegistryConfig, {"load_balancing_strategy": "best"}),
        (ServiceRegistryConfig, {"health_check_rise": 0}),
        (AuditTrailConfig, {"retention_days": 0}),
        (AuditTrailConfig, {"pool_min_size": 5, "pool_max_size": 4}),
        (DatabaseConfig, {"pool_min_size": 5, "pool_max_size": 4}),
        (AuthConfig, {"jwt_secret": "hunter2"}),
        (AuditTrailConfig, {"postgres_url": "mysql://u:hunter2@h/d"}),
        (DistributedLockConfig, {"redis_url": "http://u:hunter2@h"}),
    ],
)
def test_bad_sections_are_refused_and_show_no_secret(section, bad) -> None:
    with pytest.raises(ValidationError) as caught:
        section(**bad)
    assert "hunter2" not in str(caught.value)


def test_order_and_origin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "# comment\n\nAPP_VERSION=1-dotenv\nexport APP_NAME='from dotenv'\nAUTH_JWT_SECRET_FILE=key.txt\n"
    )
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "redis_url").write_text("redis://:secret@host/1\n")
    (tmp_path / "secrets" / "APP_VERSION").write_text("2-secret")
    (tmp_path / "key.txt").write_text(KEY + "\n")
    set_all(monkeypatch, {"APP_NAME": "from environment", "ENVIRONMENT": "", "DATABASE_POOL_MAX_SIZE": "3"})
    config = PlatformConfig(database={"url": "postgresql://h/d"}, debug=True)
    shown = {one.variable: (one.value, one.origin) for one in config.explain_all()}
    assert shown["APP_NAME"] == ("from environment", "environment APP_NAME")
    assert shown["APP_VERSION"] == ("1-dotenv", ".env:3")
    assert shown["REDIS_URL"] == ("redis://:***@host/1", f"secret file {tmp_path}/secrets/redis_url")
    assert shown["AUTH_JWT_SECRET"] == ("***", "file key.txt (.env:5)")
    assert config.auth.jwt_secret == SecretStr(KEY)
    assert shown["DEBUG"] == ("True", "argument")
    assert shown["DATABASE_URL"] == ("postgresql://h/d", "argument")
    assert shown["DATABASE_POOL_MAX_SIZE"] == ("3", "environment DATABASE_POOL_MAX_SIZE")
    assert shown["ENVIRONMENT"] == ("development", "default")
    assert shown["DISTRIBUTED_LOCKS_REDIS_URL"][1] == f"secret file {tmp_path}/secrets/redis_url"
    assert config.explain("app_name") == config.explain("APP_NAME")
    assert "secret@" not in repr(config) + str(config)
    with pytest.raises(InvalidArgument, match=r"service_registry\.default_ttl"):
        config.explain("service_registry.default_tll")


def test_a_given_section_wins_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT": "15", "REDIS_URL": "redis://a"})
    config = PlatformConfig(distributed_locks=DistributedLockConfig(namespace="mine"))
    assert (config.distributed_locks.namespace, config.distributed_locks.default_timeout) == ("mine", 10.0)
    assert config.explain("DISTRIBUTED_LOCKS_NAMESPACE").origin == "argument"
    assert config.explain("DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT").origin == "default"


def test_every_wrong_setting_is_reported_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = {
        "ENVIRONMENT": "prodcution",
        "DEBUG": "perhaps",
        "REDIS_URL": "http://u:hunter2@h",
        "DATABASE_URL": "mysql://u:hunter2@h",
        "AUTH_JWT_SECRET": "hunter2",
        "SERVICE_REGISTRY_DEFAULT_TTL": "nan",
        "AUDIT_TRAIL_RETENTION_DAYS": "many",
        "AUDIT_TRAIL_RETENTION_DAY": "hunter2",
        "DISTRIBUTED_LOCKS_ON_LOST": "panic",
        "APP_NAME_FILE": str(tmp_path / "missing"),
        "APP_VERSION": "1",
        "APP_VERSION_FILE": str(tmp_path / "missing"),
    }
    set_all(monkeypatch, bad | {"SERVICE_REGISTRY_PORT_80_TCP": "tcp://10.0.0.1:80"})
    with pytest.raises(ConfigurationError) as caught:
        PlatformConfig()
    problems = {name: (shown, allowed) for name, shown, allowed in caught.value.problems}
    assert problems.keys() == (bad.keys() - {"AUTH_JWT_SECRET", "APP_VERSION_FILE"}) | {"AUTH_*"}
    assert problems["AUDIT_TRAIL_RETENTION_DAY"][1].endswith("did you mean AUDIT_TRAIL_RETENTION_DAYS?")
    assert problems["REDIS_URL"][0] == "http://u:***@h"
    assert "production" in problems["ENVIRONMENT"][1]
    assert "not both" in problems["APP_VERSION"][1]
    assert "hunter2" not in str(caught.value) + repr(caught.value.problems)
    for name, shown, allowed in caught.value.problems:
        assert f"{name} = {shown}: {allowed}" in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", "admin:hunter2@db.internal/app"),
        ("REDIS_URL", "redis:/:hunter2@h/0"),
        ("AUDIT_TRAIL_RETENTION_DAYS", "u:hunter2@h"),
        ("DISTRIBUTED_LOCKS_REDIS_URL", "h:6379?password=hunter2"),
    ],
)
def test_a_malformed_address_hides_its_password(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable) as caught:
        PlatformConfig()
    assert "hunter2" not in str(caught.value) + repr(caught.value.problems)
    assert "***" in caught.value.problems[0][1]


@pytest.mark.parametrize("section", ["database", "audit_trail", "distributed_locks"])
@pytest.mark.parametrize("value", ["hunter2", None, 7])
def test_what_is_no_section_is_refused_by_name(section: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PlatformConfig(**{section: value})
    ((name, shown, allowed),) = caught.value.problems
    assert (name, shown) == (section, "***")
    assert "dictionary" in allowed


def test_a_directory_of_secrets_that_cannot_be_read_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    monkeypatch.setenv("DOTMAC_SECRETS_DIR", str(closed))
    user = os.geteuid()
    try:
        if user == 0:  # whom no mode keeps out
            tmp_path.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(ConfigurationError) as caught:
            PlatformConfig()
    finally:
        os.seteuid(user)
    assert ("DOTMAC_SECRETS_DIR", str(closed)) in {(name, shown) for name, shown, _ in caught.value.problems}
    monkeypatch.setenv("DOTMAC_SECRETS_DIR", "x" * 300)
    with pytest.raises(ConfigurationError, match="1 setting is wrong") as caught:
        PlatformConfig()
    assert caught.value.problems[0][0] == "DOTMAC_SECRETS_DIR"


@pytest.mark.parametrize(
    ("kind", "section"),
    [(DistributedLockManager, DistributedLockConfig), (ServiceRegistry, ServiceRegistryConfig)],
)
def test_a_section_without_an_address_takes_the_services_own(
    monkeypatch: pytest.MonkeyPatch, kind: type, section: type
) -> None:
    name = "DISTRIBUTED_LOCKS" if kind is DistributedLockManager else "SERVICE_REGISTRY"
    monkeypatch.setenv("REDIS_URL", "redis://everybodys:1")
    reload_config()
    assert "everybodys:1" in repr(kind(config=section()))
    monkeypatch.setenv(f"{name}_REDIS_URL", "redis://own:2")
    reload_config()
    assert "own:2" in repr(kind(config=section()))
    assert "sections:3" in repr(kind(config=section(redis_url="redis://sections:3")))
    assert "arguments:4" in repr(kind("redis://arguments:4", config=section(redis_url="redis://sections:3")))


def test_a_broken_env_file_is_reported_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("APP_NAME=x\n\nthis is 'nothing\n")
    with pytest.raises(ConfigurationError, match=r"\.env:3"):
        PlatformConfig()
    monkeypatch.setenv("DOTMAC_ENV_FILE", str(tmp_path / "other.env"))
    with pytest.raises(ConfigurationError, match="DOTMAC_ENV_FILE"):
        PlatformConfig()


def test_unset_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PlatformConfig()
    assert (config.get_redis_url(), config.get_database_url()) == ("embedded://", "embedded://")
    monkeypatch.setattr(unified_config.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"REDIS_URL.*dotmac-platform\[embedded\]"):
        config.get_redis_url()
    monkeypatch.undo()
    production = PlatformConfig(environment="PROD")
    for ask, variable in (
        (production.get_redis_url, "REDIS_URL"),
        (production.get_database_url, "DATABASE_URL"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            ask()
        assert caught.value.problems[0][:2] == (variable, "unset")


def test_unknown_arguments_name_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean app_name"):
        PlatformConfig(app_nam="x")
    with pytest.raises(ConfigurationError, match=r"did you mean database\.url"):
        PlatformConfig(database={"urll": "x"})


def test_reload_swaps_and_keeps_the_old_when_the_new_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_NAME", "one")
    first = reload_config()
    monkeypatch.setenv("APP_NAME", "two")
    assert get_config().app_name == "one"
    assert reload_config().app_name == get_config().app_name == "two"
    monkeypatch.setenv("DEBUG", "perhaps")
    with pytest.raises(ConfigurationError):
        reload_config()
    assert get_config().app_name == "two"
    assert first.app_name == "one"


def test_threads_that_ask_together_get_one_configuration() -> None:
    unified_config._current._config = None
    found, barrier = [], threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        found.append(get_config())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(config) for config in found}) == 1
    assert len(found) == 8


def test_the_reference_lists_every_variable_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`|unset) \|", page, re.MULTILINE))
    settings = {one.variable: one.value for one in PlatformConfig().explain_all()}
    assert {name: value or "unset" for name, value in written.items()} == settings
