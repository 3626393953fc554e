"""Every name that the platform gives to telemetry: metrics, spans and attributes, each with its convention.

Metric and span names under `dotmac.` are our own, formed by the rules of
https://opentelemetry.io/docs/specs/semconv/general/naming/ and
https://opentelemetry.io/docs/specs/semconv/general/metrics/ (durations in seconds, counts in braces, no unit
and no `total` in a name). Names of locks, users and resources never become attributes of a metric: their
number has no bound. This module imports nothing of the platform.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

# Whose instruments these are: https://opentelemetry.io/docs/specs/otel/common/instrumentation-scope/
SCOPE: Final = "dotmac.platform"

# Attributes that the conventions define.
ERROR_TYPE: Final = "error.type"  # https://opentelemetry.io/docs/specs/semconv/registry/attributes/error/
DB_SYSTEM: Final = "db.system.name"  # https://opentelemetry.io/docs/specs/semconv/registry/attributes/db/

# Attributes of our own; on metrics only those with few values.
REGISTRY_SERVICE: Final = "dotmac.registry.service"  # spans only
REGISTRY_HEALTH: Final = "dotmac.registry.health"  # healthy, unhealthy
AUDIT_CATEGORY: Final = "dotmac.audit.category"
AUDIT_LEVEL: Final = "dotmac.audit.level"
AUDIT_DETECTOR: Final = "dotmac.audit.detector"
AUDIT_FORMAT: Final = "dotmac.audit.format"  # json, ndjson, csv, parquet, pdf, ocsf
AUDIT_DESTINATION: Final = "dotmac.audit.destination"  # names of the configured destinations of forwarding

LOCK_QUEUE_POSITION: Final = "dotmac.lock.queue.position"  # spans only
LOCK_WAIT_TIME: Final = "dotmac.lock.wait.time"  # seconds; spans only

# Spans.
SPAN_LOCK_ACQUIRE: Final = "dotmac.lock acquire"
SPAN_REGISTRY_REGISTER: Final = "dotmac.registry register"
SPAN_REGISTRY_DEREGISTER: Final = "dotmac.registry deregister"
SPAN_REGISTRY_DISCOVER: Final = "dotmac.registry discover"
SPAN_AUDIT_LOG: Final = "dotmac.audit log"
SPAN_AUDIT_SPOOL: Final = "dotmac.audit spool"
SPAN_AUDIT_COMMIT: Final = "dotmac.audit commit"
SPAN_AUDIT_QUERY: Final = "dotmac.audit query"

# Metrics of the lock manager.
LOCK_ACQUIRE_DURATION: Final = "dotmac.lock.acquire.duration"
LOCK_HOLD_DURATION: Final = "dotmac.lock.hold.duration"
LOCK_QUEUE_LENGTH: Final = "dotmac.lock.queue.length"
LOCK_CONTENTIONS: Final = "dotmac.lock.contentions"
LOCK_TIMEOUTS: Final = "dotmac.lock.timeouts"
LOCK_DEADLOCKS: Final = "dotmac.lock.deadlocks"
LOCK_LOSSES: Final = "dotmac.lock.losses"
LOCK_HEARTBEATS: Final = "dotmac.lock.heartbeats"
LOCK_LATE_HEARTBEATS: Final = "dotmac.lock.heartbeats.late"

# Metrics of the service registry.
REGISTRY_REGISTRATIONS: Final = "dotmac.registry.registrations"
REGISTRY_DEREGISTRATIONS: Final = "dotmac.registry.deregistrations"
REGISTRY_REREGISTRATIONS: Final = "dotmac.registry.reregistrations"
REGISTRY_DISCOVERIES: Final = "dotmac.registry.discoveries"
REGISTRY_PICKS: Final = "dotmac.registry.picks"
REGISTRY_HEALTH_CHECKS: Final = "dotmac.registry.health_checks"
REGISTRY_HEALTH_DURATION: Final = "dotmac.registry.health_check.duration"

# Metrics of the audit trail.
AUDIT_EVENTS: Final = "dotmac.audit.events"
AUDIT_ANOMALIES: Final = "dotmac.audit.anomalies"
AUDIT_BATCH_SIZE: Final = "dotmac.audit.batch.size"
AUDIT_COMMIT_DURATION: Final = "dotmac.audit.commit.duration"
AUDIT_COMMIT_FAILURES: Final = "dotmac.audit.commit.failures"
AUDIT_SEGMENTS_SEALED: Final = "dotmac.audit.segments.sealed"
AUDIT_CHECKPOINTS: Final = "dotmac.audit.checkpoints"
AUDIT_SEAL_FAILURES: Final = "dotmac.audit.seal.failures"
AUDIT_PARTITIONS_MADE: Final = "dotmac.audit.partitions.made"
AUDIT_PARTITIONS_DROPPED: Final = "dotmac.audit.partitions.dropped"
AUDIT_EXPORTED: Final = "dotmac.audit.exported"
AUDIT_EXPORT_DURATION: Final = "dotmac.audit.export.duration"
AUDIT_EXPORT_FAILURES: Final = "dotmac.audit.export.failures"
AUDIT_FORWARDED: Final = "dotmac.audit.forwarded"
AUDIT_FORWARD_DURATION: Final = "dotmac.audit.forward.duration"
AUDIT_FORWARD_FAILURES: Final = "dotmac.audit.forward.failures"
AUDIT_DEAD_LETTERS: Final = "dotmac.audit.forward.dead_letters"


class Metric(NamedTuple):
    """What an instrument measures; `unit` as UCUM writes it."""

    kind: Literal["counter", "histogram"]
    unit: str
    description: str


METRICS: Final[dict[str, Metric]] = {
    LOCK_ACQUIRE_DURATION: Metric("histogram", "s", "Time from asking for a lock to the answer."),
    LOCK_HOLD_DURATION: Metric("histogram", "s", "Time from the grant of a lock to its release or loss."),
    LOCK_QUEUE_LENGTH: Metric(
        "histogram", "{waiter}", "Length of a lock's queue with the one who has just joined it."
    ),
    LOCK_CONTENTIONS: Metric("counter", "{acquisition}", "Acquisitions that had to wait for another holder."),
    LOCK_TIMEOUTS: Metric("counter", "{acquisition}", "Acquisitions given up after their blocking timeout."),
    LOCK_DEADLOCKS: Metric(
        "counter", "{deadlock}", "Acquisitions refused since waiting would close a cycle."
    ),
    LOCK_LOSSES: Metric("counter", "{lock}", "Locks whose lease ended before their holder gave them back."),
    LOCK_HEARTBEATS: Metric("counter", "{heartbeat}", "Heartbeats that the server confirmed."),
    LOCK_LATE_HEARTBEATS: Metric("counter", "{heartbeat}", "Heartbeats sent later than one interval."),
    REGISTRY_REGISTRATIONS: Metric("counter", "{registration}", "Instances registered."),
    REGISTRY_DEREGISTRATIONS: Metric("counter", "{registration}", "Instances deregistered."),
    REGISTRY_REREGISTRATIONS: Metric("counter", "{registration}", "Instances registered anew after a loss."),
    REGISTRY_DISCOVERIES: Metric("counter", "{discovery}", "Lookups of a service's instances."),
    REGISTRY_PICKS: Metric("counter", "{pick}", "Instances chosen by get_service, pick and use_service."),
    REGISTRY_HEALTH_CHECKS: Metric("counter", "{check}", "Health checks made."),
    REGISTRY_HEALTH_DURATION: Metric("histogram", "s", "Duration of one health check."),
    AUDIT_EVENTS: Metric("counter", "{event}", "Audit events stored."),
    AUDIT_ANOMALIES: Metric("counter", "{anomaly}", "Anomalies detected."),
    AUDIT_BATCH_SIZE: Metric("histogram", "{event}", "Events stored by one commit."),
    AUDIT_COMMIT_DURATION: Metric("histogram", "s", "Duration of one commit."),
    AUDIT_COMMIT_FAILURES: Metric("counter", "{commit}", "Commits that failed."),
    AUDIT_SEGMENTS_SEALED: Metric("counter", "{segment}", "Segments appended to tenants' logs."),
    AUDIT_CHECKPOINTS: Metric("counter", "{checkpoint}", "Checkpoints signed."),
    AUDIT_SEAL_FAILURES: Metric("counter", "{failure}", "Passes, logs and anchors that were not sealed."),
    AUDIT_PARTITIONS_MADE: Metric("counter", "{partition}", "Partitions made ahead."),
    AUDIT_PARTITIONS_DROPPED: Metric("counter", "{partition}", "Partitions dropped by retention."),
    AUDIT_EXPORTED: Metric("counter", "{event}", "Events written to exports."),
    AUDIT_EXPORT_DURATION: Metric("histogram", "s", "Duration of one export."),
    AUDIT_EXPORT_FAILURES: Metric("counter", "{export}", "Exports that failed or were cancelled."),
    AUDIT_FORWARDED: Metric("counter", "{event}", "Events that a destination confirmed."),
    AUDIT_FORWARD_DURATION: Metric("histogram", "s", "Time from an event's storage to its confirmation."),
    AUDIT_FORWARD_FAILURES: Metric("counter", "{attempt}", "Attempts that a destination did not confirm."),
    AUDIT_DEAD_LETTERS: Metric("counter", "{event}", "Events put aside after the bound of attempts."),
}
