"""The parameters by which the audit router's endpoints are asked: filters, as those of `query_events`."""

from typing import Annotated, Any

from fastapi import Query
from pydantic import AwareDatetime

from dotmac.platform.audit_trail.filter_text import exclusions_of, metadata_of
from dotmac.platform.audit_trail.models import AuditCategory, AuditLevel, AuditOutcome

__all__ = ["filters", "span"]

Several = list[str] | None
_CONDITION = "Condition on the metadata, such as `order.total>=100`, `status=paid`, `items.0.sku~A-*`, "


def filters(
    category: Annotated[list[AuditCategory] | None, Query(description="One of these.")] = None,
    level: Annotated[list[AuditLevel] | None, Query(description="One of these.")] = None,
    outcome: Annotated[list[AuditOutcome] | None, Query(description="One of these.")] = None,
    action: Annotated[Several, Query(description="One of these; `*` stands for anything.")] = None,
    user_id: Annotated[Several, Query(description="One of these.")] = None,
    tenant_id: Annotated[Several, Query(description="One of these; none means all that you may see.")] = None,
    resource_type: Annotated[Several, Query(description="One of these.")] = None,
    resource_id: Annotated[Several, Query(description="One of these.")] = None,
    correlation_id: Annotated[Several, Query(description="One of these.")] = None,
    trace_id: Annotated[Several, Query(description="One of these.")] = None,
    subject_id: Annotated[Several, Query(description="One of these.")] = None,
    ip_address: Annotated[
        Several, Query(description="One of these: addresses or networks (`10.0.0.0/8`).")
    ] = None,
    text: Annotated[
        Several, Query(description="Each occurs in the action or in the metadata, in whichever case.")
    ] = None,
    metadata: Annotated[
        Several, Query(description=_CONDITION + '`status in ["new", "paid"]`, `order`, `!order`; all hold.')
    ] = None,
    min_anomaly_score: Annotated[float | None, Query(ge=0, le=1)] = None,
    missing: Annotated[Several, Query(description="Fields that are not set, such as `user_id`.")] = None,
    exclude: Annotated[
        Several, Query(description="What is left out: `action=health.*`, `category=system` …")
    ] = None,
) -> dict[str, Any]:
    """The filters of a request, but for the times."""
    given: dict[str, Any] = {
        "categories": category,
        "levels": level,
        "outcome": outcome,
        "actions": action,
        "user_id": user_id,
        "tenant_id": tenant_id,
        "resource_type": resource_type,
        "resource_id": resource_id,
        "correlation_id": correlation_id,
        "trace_id": trace_id,
        "subject_id": subject_id,
        "ip_address": ip_address,
        "text": text,
        "metadata": metadata_of(metadata) if metadata else None,
        "min_anomaly_score": min_anomaly_score,
        "missing": missing,
        "exclude": exclusions_of(exclude) if exclude else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def span(
    start_time: Annotated[
        AwareDatetime | None, Query(description="First moment, ISO 8601 with its offset from UTC.")
    ] = None,
    end_time: Annotated[
        AwareDatetime | None, Query(description="Moment after the last, ISO 8601 with its offset from UTC.")
    ] = None,
) -> dict[str, Any]:
    """The times of a request."""
    return {"start_time": start_time, "end_time": end_time}
