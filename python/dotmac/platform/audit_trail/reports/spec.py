"""How a framework's module says what its sections are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SectionSpec", "Spec", "listing", "named"]

# Parameters of every statement: the period, the tenant or NULL, the zone of days and hours, the seed.
PERIOD = "e.occurred_at >= $1 AND e.occurred_at < $2 AND ($3::text IS NULL OR e.tenant_id = $3)"
# In the place of `$threshold` comes the score from which an event is an anomaly, by the settings.
THRESHOLD = "$threshold"
ANOMALY = f"e.anomaly_score >= {THRESHOLD}"
TIME = """to_char(e.occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""

_EXPRESSIONS = {
    "time": TIME,
    "user": "e.user_id",
    "tenant": "e.tenant_id",
    "address": "host(e.ip_address)",
    "anomaly_score": "e.anomaly_score",
    "anomaly_reason": "e.anomaly_reasons->>0",
    **{
        name: f"e.{name}"
        for name in (
            "category", "action", "outcome", "level", "resource_type", "resource_id", "correlation_id",
            "trace_id",
        )
    },
}  # fmt: skip
SUBJECT = (
    "coalesce(e.metadata->>'subject_id', e.metadata->>'patient_id', CASE WHEN e.resource_type IN "
    "('subject', 'person', 'patient', 'customer', 'user') THEN e.resource_id END)"
)


@dataclass(frozen=True, slots=True)
class SectionSpec:
    """One section: a statement, whose columns are the section's, and the sentence for no rows."""

    name: str
    title: str
    control: str
    columns: tuple[str, ...]
    sql: str
    empty: str


@dataclass(frozen=True, slots=True)
class Spec:
    """One framework: its sections and what an audit trail alone can't tell."""

    report_type: str
    framework: str
    sections: tuple[SectionSpec, ...]
    cannot_answer: tuple[str, ...]


def named(*words: str) -> str:
    """A condition: the action contains one of these words, between dots, underscores or dashes."""
    return f"e.action ~* '(^|[._:-])({'|'.join(words)})([._:-]|$)'"


def listing(name: str, title: str, control: str, where: str, columns: str, empty: str) -> SectionSpec:
    """A section that lists events in the order of time; a column that is no field is a key of metadata."""
    names = tuple(columns.split())
    told = ", ".join(f"{_EXPRESSIONS.get(one) or _metadata(one)} AS {one}" for one in names)
    sql = f"SELECT {told} FROM audit_events e WHERE {PERIOD} AND ({where}) ORDER BY e.occurred_at, e.id"  # noqa: S608 (constants of ours)
    return SectionSpec(name, title, control, names, sql, empty)


def counted(name: str, title: str, control: str, where: str, by: dict[str, str], empty: str) -> SectionSpec:
    """A section that counts events by some expressions."""
    told = ", ".join(f"{expression} AS {one}" for one, expression in by.items())
    places = ", ".join(str(place) for place in range(1, len(by) + 1))
    sql = (
        f"SELECT {told}, count(*) AS events FROM audit_events e WHERE {PERIOD} AND ({where}) "  # noqa: S608 (constants of ours)
        f"GROUP BY {places} ORDER BY {places}"
    )
    return SectionSpec(name, title, control, (*by, "events"), sql, empty)


def _metadata(key: str) -> str:
    return f"e.metadata->>'{key}'"
