"""Settings of the audit trail, read from `AUDIT_TRAIL_*`. A leaf: it imports no service."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path  # noqa: TC003 (read by pydantic)
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from dotmac.platform.connection.config import PostgresUrl, RedisUrl, Seconds, Section

__all__ = ["AuditTrailConfig"]

Origin = Annotated[str, Field(pattern=r"^[!-*,-~]{1,200}$")]


class AuditTrailConfig(Section):
    """Settings of the audit trail.

    Args:
        postgres_url: where events are stored; None for the platform's (`DATABASE_URL`).
        redis_url: Redis or Valkey; None for the platform's (`REDIS_URL`).
        retention_days: days for which events are kept.
        anomaly_detection_enabled: score events as they are logged.
        anomaly_threshold: score in (0, 1] from which an event counts as an anomaly.
        batch_size: events that one commit stores at most.
        batch_wait_ms: milliseconds that the first event of a batch waits for others at most.
        max_pending: events that may wait for the database at once, 64 MiB of them at most; further ones
            are held up.
        timeout: seconds within which an event is durable or the call fails, and a query answers.
        connect_timeout: seconds to connect.
        pool_min_size: connections kept open.
        pool_max_size: connections at most.
        statement_cache_size: prepared statements kept per connection; 0 behind pgbouncer in transaction mode.
        sealing: append segments to the tenants' logs in the background; None: where there is a signing key.
        checkpoint_interval: seconds between two checkpoints of a log that grows.
        origin: the trail's name in its checkpoints, such as `example.com/audit`, without spaces and `+`;
            None for a random one. It can't be changed once a log has been begun.
        signing_key: Ed25519 private key that signs checkpoints, in PEM or base64.
        public_keys: keys whose checkpoints are trusted, beside the signing key's own: base64 or verifier
            keys, separated by commas. Keys that were rotated out belong here.
        anchors: places outside the database that keep each checkpoint, separated by commas: a file
            (`file:///…`), an HTTP endpoint (`https://…`), or any other address that fsspec knows (`s3://…`).
        integrity_enabled: store the hashes that make changes to the trail provable.
        spool_path: folder of what `log_event(wait=False)` has taken and not stored yet; None for one in the
            user's state directory.
        spool_max_events: events of one process that may wait there; then `log_event(wait=False)` waits.
        spool_max_mb: MiB of them.
        row_level_security: keep tenants apart by row-level security: `dotmac db upgrade` switches it on.
        archive_url: where months are archived before retention drops them, such as `s3://bucket/audit`; None
            for no archives.
        archive_options: what fsspec opens that place with, as a JSON object, such as credentials.
        forward_batch_size: events that are forwarded to a destination at once, at most.
        forward_poll: seconds between looks for events to forward.
        forward_max_attempts: tries of a batch after which its events are put aside; 0: never.
        forward_timeout: seconds within which a destination takes a batch.
        forward_secret: signs what is posted to webhooks; `whsec_` and base64, or at least 16 characters.
        redact_secrets: mask passwords, tokens, keys and the like in every event.
        redact_keep: keys that this leaves alone, with commas between, such as `page_token`.
        redact_rules: further rules as a JSON list, `[{"keys": ["ssn"], "action": "hash"}]`, with the fields
            of `RedactionRule`.
        redact_hash_key: key of the action `hash`, at least 16 bytes; with another one, values are no longer
            comparable with those before.
        personal_key: key that wraps the keys of subjects, 32 bytes in base64 or hexadecimal digits.
        personal_old_keys: such keys that were used before, with commas between, to read what they wrapped.
        personal_cache_seconds: seconds for which a subject's key is used without asking the database: within
            them an erasure is effective in every process.
        personal_cache_size: keys of subjects kept in memory at most.
    """

    postgres_url: PostgresUrl | None = None
    redis_url: RedisUrl | None = None
    retention_days: int = Field(default=365, ge=1, le=36_525)
    anomaly_detection_enabled: bool = True
    anomaly_threshold: float = Field(default=0.5, gt=0, le=1, allow_inf_nan=False)
    batch_size: int = Field(default=5_000, ge=1, le=100_000)
    batch_wait_ms: float = Field(default=5.0, ge=0, le=10_000, allow_inf_nan=False)
    max_pending: int = Field(default=20_000, ge=1)
    timeout: Seconds = 10.0
    connect_timeout: Seconds = 5.0
    pool_min_size: int = Field(default=1, ge=0, le=1_000)
    pool_max_size: int = Field(default=4, ge=1, le=1_000)
    statement_cache_size: int = Field(default=100, ge=0, le=10_000)
    sealing: bool | None = None
    checkpoint_interval: Seconds = 60.0
    origin: Origin | None = None
    signing_key: SecretStr | None = None
    public_keys: str | None = None
    anchors: str | None = None
    integrity_enabled: bool = True
    spool_path: Path | None = None
    spool_max_events: int = Field(default=1_000_000, ge=1)
    spool_max_mb: int = Field(default=1_024, ge=1, le=1 << 20)
    row_level_security: bool = False
    archive_url: str | None = None
    archive_options: SecretStr | None = None
    forward_batch_size: int = Field(default=200, ge=1, le=10_000)
    forward_poll: Seconds = 0.5
    forward_max_attempts: int = Field(default=50, ge=0)
    forward_timeout: Seconds = 10.0
    forward_secret: SecretStr | None = None
    redact_secrets: bool = True
    redact_keep: str | None = None
    redact_rules: str | None = None
    redact_hash_key: SecretStr | None = None
    personal_key: SecretStr | None = None
    personal_old_keys: SecretStr | None = None
    personal_cache_seconds: Seconds = 60.0
    personal_cache_size: int = Field(default=10_000, ge=1, le=10_000_000)

    @field_validator("redact_rules")
    @classmethod
    def _rules_are_rules(cls, value: str | None) -> str | None:
        if value is not None:
            from dotmac.platform.audit_trail.redaction import rules_from_json

            rules_from_json(value)
        return value

    @field_validator("personal_key", "personal_old_keys")
    @classmethod
    def _keys_are_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            from dotmac.platform.audit_trail.personal_key import check_key

            for text in value.get_secret_value().split(","):
                if text.strip():
                    check_key(text)
        return value

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.pool_min_size > self.pool_max_size:
            raise ValueError("pool_min_size must not be more than pool_max_size")
        return self

    @field_validator("archive_options", mode="before")
    @classmethod
    def _as_json(cls, value: object) -> object:
        return json.dumps(value) if isinstance(value, Mapping) else value

    @field_validator("archive_options")
    @classmethod
    def _is_an_object(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            sound = value is None or isinstance(json.loads(value.get_secret_value()), dict)
        except ValueError:
            sound = False
        if not sound:
            raise ValueError('give a JSON object, such as {"key": "…", "secret": "…"}')
        return value

    def archive_arguments(self) -> dict[str, Any]:
        """`archive_options` as fsspec takes them."""
        options = self.archive_options
        return dict(json.loads(options.get_secret_value())) if options is not None else {}
