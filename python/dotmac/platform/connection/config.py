"""What all configuration sections share, and the database section. A leaf: it imports no service.

A section made by hand raises pydantic's `ValidationError` for a bad value; the text never shows the value,
which may be a secret. The whole configuration (`core.unified_config`) raises `ConfigurationError` instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from dotmac.platform.connection.urls import EMBEDDED, MOST_PARTITIONS, mask_url, parse_redis_url, postgres_dsn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DatabaseConfig", "Namespace", "Partitions", "PostgresUrl", "RedisUrl", "Seconds", "Section"]

_LONGEST_TIME = 366 * 86_400.0


def _redis(url: str) -> str:
    if url.lower() != EMBEDDED:
        parse_redis_url(url)
    return url


def _postgres(url: str) -> str:
    if url.lower() != EMBEDDED:
        postgres_dsn(url)
    return url


RedisUrl = Annotated[str, AfterValidator(_redis)]
PostgresUrl = Annotated[str, AfterValidator(_postgres)]
Seconds = Annotated[float, Field(gt=0, le=_LONGEST_TIME, allow_inf_nan=False)]
Partitions = Annotated[int, Field(ge=1, le=MOST_PARTITIONS)]
Namespace = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$")]


class Section(BaseModel):
    """A part of the configuration: checked when made, unchangeable afterwards, shown without secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, mask_url(value) if isinstance(value, str) and "://" in value else value


class DatabaseConfig(Section):
    """PostgreSQL of the application; the audit trail uses it unless it is given its own.

    Args:
        url: `postgresql://…`, `postgresql+asyncpg://…` or `embedded://`.
        pool_min_size: connections kept open.
        pool_max_size: connections at most.
        connect_timeout: seconds to connect.
        command_timeout: seconds for one statement.
        statement_cache_size: prepared statements kept per connection; 0 behind pgbouncer.
    """

    url: PostgresUrl | None = None
    pool_min_size: int = Field(default=1, ge=0, le=1_000)
    pool_max_size: int = Field(default=10, ge=1, le=1_000)
    connect_timeout: Seconds = 5.0
    command_timeout: Seconds = 30.0
    statement_cache_size: int = Field(default=100, ge=0, le=10_000)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.pool_min_size > self.pool_max_size:
            raise ValueError("pool_min_size must not be more than pool_max_size")
        return self


def is_secret(annotation: object) -> bool:
    """Does a field of that type hold a secret?"""
    return annotation is SecretStr or SecretStr in getattr(annotation, "__args__", ())
