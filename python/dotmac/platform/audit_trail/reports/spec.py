"""How a framework's module says what its sections are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dotmac.platform.audit_trail.reports.facts import Facts

    Cell = str | int | float | None
    Compute = Callable[[Sequence[dict[str, Any]], Facts], list[tuple[Cell, ...]]]

__all__ = [
    "ChartSpec",
    "SectionSpec",
    "Spec",
    "Unanswered",
    "computed",
    "counted",
    "listing",
    "named",
    "sample",
]

# `$start`, `$end`, `$tenant` (or NULL for all), `$zone`, `$seed`, `$size`, `$subject` (or NULL) and
# `$threshold` (the score from which an event is an anomaly) stand for the parameters of the report.
PERIOD = "e.occurred_at >= $start AND e.occurred_at < $end AND ($tenant IS NULL OR e.tenant_id = $tenant)"
ANOMALY = "e.anomaly_score >= $threshold"
TIME = """to_char(e.occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
SUBJECT = (
    "coalesce(e.subject_id, e.metadata->>'subject_id', e.metadata->>'patient_id', "
    "CASE WHEN e.resource_type IN ('subject', 'person', 'patient', 'customer', 'user') "
    "THEN e.resource_id END)"
)
TARGET = (
    "coalesce(e.metadata->>'target_user', "
    "CASE WHEN e.resource_type IN ('user', 'account') THEN e.resource_id END)"
)

_EXPRESSIONS = {
    "time": TIME,
    "user": "e.user_id",
    "tenant": "e.tenant_id",
    "address": "host(e.ip_address)",
    "anomaly_score": "e.anomaly_score",
    "anomaly_reason": "e.anomaly_reasons->>0",
    "event": "e.id::text",
    "granted_by": "e.user_id",
    "target_user": TARGET,
    "subject": SUBJECT,
    "key_destroyed_at": "coalesce(e.metadata->>'key_destroyed_at', e.metadata->>'erased_at')",
    "legal_hold": "coalesce(e.metadata->>'legal_hold', e.metadata->>'holds')",
    "device": "coalesce(e.metadata->>'device', e.metadata->>'user_agent')",
    **{
        name: f"e.{name}"
        for name in (
            "category", "action", "outcome", "level", "resource_type", "resource_id", "correlation_id",
            "trace_id",
        )
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionSpec:
    """One section: a statement, whose columns are the section's, and what is said where it gives nothing.

    Attributes:
        empty: the sentence for no rows.
        needed: what has to be logged, or given, for the section to answer; told where it does not.
        about: how the rows come about, where the title does not say it.
        compute: makes the rows from the records (none without a statement) and what is known besides.
    """

    name: str
    title: str
    control: str
    columns: tuple[str, ...]
    empty: str
    needed: str = ""
    about: str = ""
    sql: str = ""
    compute: Compute | None = None


@dataclass(frozen=True, slots=True)
class ChartSpec:
    """A chart of a section's rows: the sum of a column by another one, the largest first."""

    section: str
    title: str
    by: str
    value: str = "events"
    most: int = 12


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A question of the framework that an audit trail can't answer.

    Attributes:
        control: control or article that asks.
        question: what it asks for.
        why: why the log has no answer.
        needed: where the answer is, or what would have to be given.
    """

    control: str
    question: str
    why: str
    needed: str

    def to_dict(self) -> dict[str, str]:
        """As JSON types."""
        return {"control": self.control, "question": self.question, "why": self.why, "needed": self.needed}


@dataclass(frozen=True, slots=True)
class Spec:
    """One framework: its sections, its charts, and what an audit trail alone can't tell."""

    report_type: str
    framework: str
    sections: tuple[SectionSpec, ...]
    cannot_answer: tuple[Unanswered, ...]
    charts: tuple[ChartSpec, ...] = field(default=())


def named(*words: str) -> str:
    """A condition: the action contains one of these words, between dots, underscores or dashes."""
    return f"e.action ~* '(^|[._:-])({'|'.join(words)})([._:-]|$)'"


def listing(
    name: str,
    title: str,
    control: str,
    where: str,
    columns: str,
    empty: str,
    *,
    needed: str = "",
    about: str = "",
) -> SectionSpec:
    """A section that lists events in the order of time; a column that is no field is a key of metadata."""
    names = tuple(columns.split())
    told = ", ".join(f'{expression(one)} AS "{one}"' for one in names)
    sql = f"SELECT {told} FROM audit_events e WHERE {PERIOD} AND ({where}) ORDER BY e.occurred_at, e.id"  # noqa: S608 (constants of ours)
    return SectionSpec(
        name=name,
        title=title,
        control=control,
        columns=names,
        sql=sql,
        empty=empty,
        needed=needed,
        about=about,
    )


def counted(
    name: str, title: str, control: str, where: str, by: dict[str, str], empty: str, *, needed: str = ""
) -> SectionSpec:
    """A section that counts events by some expressions."""
    told = ", ".join(f'{one} AS "{column}"' for column, one in by.items())
    places = ", ".join(str(place) for place in range(1, len(by) + 1))
    sql = (
        f"SELECT {told}, count(*) AS events FROM audit_events e WHERE {PERIOD} AND ({where}) "  # noqa: S608 (constants of ours)
        f"GROUP BY {places} ORDER BY {places}"
    )
    return SectionSpec(
        name=name, title=title, control=control, columns=(*by, "events"), sql=sql, empty=empty, needed=needed
    )


def sample(name: str, what: str, control: str, where: str, columns: str) -> SectionSpec:
    """A seeded sample of what a listing lists: the events whose SHA-256 of seed and id is smallest."""
    names = tuple(columns.split())
    told = ", ".join(f'{expression(one)} AS "{one}"' for one in names)
    sql = (
        f"SELECT {told} FROM audit_events e WHERE {PERIOD} AND ({where}) "  # noqa: S608 (constants of ours)
        "ORDER BY sha256(convert_to($seed || e.id::text, 'UTF8')), e.id LIMIT $size"
    )
    return SectionSpec(
        name=name,
        title=f"Seeded sample of {what}",
        control=control,
        columns=names,
        sql=sql,
        empty=f"The population of {what} is empty, so there is no sample.",
        about="Drawn by the stated seed: the events whose SHA-256 of seed and id is smallest.",
    )


def computed(
    name: str,
    title: str,
    control: str,
    columns: str,
    compute: Compute,
    empty: str,
    *,
    sql: str = "",
    needed: str = "",
    about: str = "",
) -> SectionSpec:
    """A section whose rows are computed."""
    return SectionSpec(
        name=name,
        title=title,
        control=control,
        columns=tuple(columns.split()),
        sql=sql,
        compute=compute,
        empty=empty,
        needed=needed,
        about=about,
    )


def expression(column: str) -> str:
    """What a column's name means: a field of the event, or a key of its metadata."""
    return _EXPRESSIONS.get(column) or f"e.metadata->>'{column}'"
