"""The columns of an export, in their order: the same for every format, and only ever added to."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["COLUMNS", "KINDS", "NAMES", "SELECT", "Column"]


class Column(NamedTuple):
    """A column: its name, its kind in `_native`, and how it is selected where not by its name."""

    name: str
    kind: str
    sql: str | None = None


COLUMNS: Final = (
    Column("id", "uuid"),
    Column("occurred_at", "time"),
    Column("recorded_at", "time"),
    Column("category", "text"),
    Column("action", "text"),
    Column("level", "text"),
    Column("outcome", "text"),
    Column("user_id", "text"),
    Column("tenant_id", "text"),
    Column("resource_type", "text"),
    Column("resource_id", "text"),
    Column("ip_address", "address"),
    Column("correlation_id", "text"),
    Column("trace_id", "text"),
    Column("span_id", "text"),
    Column("metadata", "json"),
    Column("anomaly_score", "float"),
    Column("anomaly_reasons", "json", "coalesce(anomaly_reasons, '[]')"),
    Column("subject_id", "text"),
    Column("personal", "json"),
)
NAMES: Final = tuple(column.name for column in COLUMNS)
KINDS: Final = [(column.name, column.kind) for column in COLUMNS]
SELECT: Final = "SELECT " + ", ".join(column.sql or column.name for column in COLUMNS)
