"""What the audit router's endpoints answer, for the OpenAPI document."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 (pydantic reads the annotations)
from typing import Any
from uuid import UUID  # noqa: TC003 (pydantic reads the annotations)

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["CountAnswer", "EventAnswer", "FacetsAnswer", "HistogramAnswer", "PageAnswer", "TimelineAnswer"]


class EventAnswer(BaseModel):
    """One stored event."""

    model_config = ConfigDict(extra="allow")

    id: UUID
    occurred_at: datetime
    recorded_at: datetime
    category: str
    action: str
    level: str
    outcome: str
    user_id: str | None
    tenant_id: str | None
    resource_type: str | None
    resource_id: str | None
    ip_address: str | None
    correlation_id: str | None
    trace_id: str | None
    span_id: str | None
    metadata: dict[str, Any]
    anomaly_score: float | None
    anomaly_reasons: list[str]


class PageAnswer(BaseModel):
    """One page of events."""

    events: list[EventAnswer]
    next_cursor: str | None = Field(description="`cursor` of the next page; null on the last one.")
    previous_cursor: str | None = Field(description="`cursor` of the page before; null on the first one.")


class CountAnswer(BaseModel):
    """How many events there are."""

    count: int


class BucketAnswer(BaseModel):
    """One bucket: a member for each of the histogram's `by`, and how many events fall together."""

    model_config = ConfigDict(extra="allow")

    count: int


class HistogramAnswer(BaseModel):
    """Counts by unit of time and by field."""

    by: list[str]
    time_zone: str
    source: str = Field(description="`rollup` or `events`; exact either way.")
    total: int
    buckets: list[BucketAnswer]


class ValueAnswer(BaseModel):
    """A value and how many events have it; null for those that have none."""

    value: str | None
    count: int


class FacetAnswer(BaseModel):
    """The commonest values of one field."""

    field: str
    values: list[ValueAnswer]
    distinct: int
    other: int = Field(description="Events whose value is not among `values`.")


class FacetsAnswer(BaseModel):
    """A facet for each field that was asked for."""

    facets: list[FacetAnswer]


class StepAnswer(BaseModel):
    """One event of a timeline; times since are seconds."""

    since_start: float
    since_previous: float
    event: EventAnswer


class TimelineAnswer(BaseModel):
    """The events of one piece of work, oldest first; durations are seconds."""

    correlation_id: str
    start: datetime | None
    end: datetime | None
    duration: float
    longest_gap: float | None
    longest_gap_before: UUID | None
    first_failure: UUID | None
    users: list[str]
    truncated: bool
    steps: list[StepAnswer]
