"""The audit trail over HTTP, for a viewer: off until an application mounts it, and never without a guard."""

# Without `from __future__ import annotations`: FastAPI reads annotations made of each router's own guard.
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query
from pydantic import AwareDatetime
from starlette.responses import JSONResponse, Response

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.facets import DEFAULT_FIELDS
from dotmac.platform.audit_trail.queries import MAX_VALUES
from dotmac.platform.audit_trail.query import MAX_LIMIT, Order
from dotmac.platform.contrib.fastapi import audit_models as models
from dotmac.platform.contrib.fastapi.audit_access import AuditAccess, checked
from dotmac.platform.contrib.fastapi.audit_params import filters, span
from dotmac.platform.contrib.fastapi.audit_stream import MEDIA_TYPE, StreamOfEvents
from dotmac.platform.contrib.fastapi.problems import NO_STORE, Problem, ProblemRoute, problem
from dotmac.platform.errors import InvalidArgument

__all__ = ["audit_router"]

# Spelled out: as a `model` it would be told to be of the media type of the good answer.
_PROBLEM = {"content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A parameter is wrong", **_PROBLEM},
    401: {"description": "The guard does not know you", **_PROBLEM},
    403: {"description": "A tenant whose events you may not see", **_PROBLEM},
    422: {"description": "A parameter is of another type", **_PROBLEM},
    503: {"description": "The audit database does not answer", **_PROBLEM},
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events `audit`",
        "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
    }
}
_LONGEST_HEARTBEAT = 3_600
_LONGEST_STREAM = 86_400
_PAGE = 100
# Written out, for type checkers: `time_units.UNITS` and `histogram.GROUPS`.
Unit = Literal["minute", "hour", "day", "week", "month", "quarter", "year"]
Field = Literal[
    "category",
    "level",
    "outcome",
    "action",
    "user_id",
    "tenant_id",
    "resource_type",
    "resource_id",
    "ip_address",
    "correlation_id",
]


def audit_router(
    audit: AuditAggregator,
    authorize: Callable[..., Any],
    *,
    prefix: str = "/audit",
    tags: Sequence[str] = ("audit",),
    heartbeat: float = 15.0,
    max_streams: int = 100,
    stream_seconds: float = 900.0,
) -> APIRouter:
    """Endpoints that read the audit trail: `app.include_router(audit_router(audit, authorize))`.

    `GET /events` (pages), `/events/{id}`, `/count`, `/histogram`, `/facets`, `/timelines/{correlation_id}`
    and `/stream` (live, server-sent events). Errors are `application/problem+json`.

    Args:
        audit: where events are read; the application closes it.
        authorize: a dependency of FastAPI, which says what the caller may see: returns `AuditAccess`, or
            raises HTTPException. `unprotected` lets everybody see everything.
        prefix: path before each endpoint's.
        tags: in the OpenAPI document.
        heartbeat: seconds after which a stream sends something where nothing happened, 0.1 to 3,600.
        max_streams: streams at once in this process; further ones are answered by 503.
        stream_seconds: a stream ends after so long; its client connects anew, goes on where it was, and the
            guard is asked again: who may no longer look does not look on. 1 to 86,400.
    Raises: InvalidArgument.
    """
    if not callable(authorize):
        raise InvalidArgument(
            "authorize", authorize, "give a dependency that returns AuditAccess; or unprotected, for all"
        )
    if not isinstance(heartbeat, int | float) or not 0.1 <= heartbeat <= _LONGEST_HEARTBEAT:  # noqa: PLR2004 (bounds told in the text)
        raise InvalidArgument("heartbeat", heartbeat, f"give seconds from 0.1 to {_LONGEST_HEARTBEAT}")
    if isinstance(max_streams, bool) or not isinstance(max_streams, int) or max_streams < 1:
        raise InvalidArgument("max_streams", max_streams, "give a whole number, at least 1")
    if not isinstance(stream_seconds, int | float) or not 1 <= stream_seconds <= _LONGEST_STREAM:
        raise InvalidArgument("stream_seconds", stream_seconds, f"give seconds from 1 to {_LONGEST_STREAM}")
    router = APIRouter(prefix=prefix, tags=list(tags), route_class=ProblemRoute, responses=_ERRORS)

    def access(answer: Annotated[Any, Depends(authorize)]) -> AuditAccess:
        return checked(answer)

    def allowed(
        seen: Annotated[AuditAccess, Depends(access)], given: Annotated[dict[str, Any], Depends(filters)]
    ) -> dict[str, Any]:
        """The request's filters, narrowed to the tenants that the caller may see."""
        tenants = seen.narrow(given.get("tenant_id"))
        return given if tenants is None else {**given, "tenant_id": tenants}

    _add_events(router, audit, access, allowed)
    _add_counts(router, audit, allowed)
    _add_stream(router, audit, allowed, (heartbeat, stream_seconds, max_streams))
    return router


def _add_events(
    router: APIRouter,
    audit: AuditAggregator,
    access: Callable[..., AuditAccess],
    allowed: Callable[..., dict[str, Any]],
) -> None:
    @router.get("/events", response_model=models.PageAnswer)
    async def events(
        given: Annotated[dict[str, Any], Depends(allowed)],
        times: Annotated[dict[str, Any], Depends(span)],
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Events per page.")] = _PAGE,
        order: Annotated[Order, Query(description="Newest or oldest first.")] = Order.NEWEST_FIRST,
        cursor: Annotated[
            str | None, Query(description="A page's `next_cursor` or `previous_cursor`, with its filters.")
        ] = None,
    ) -> Response:
        """One page of events."""
        page = await audit.query_events(**times, limit=limit, order=order, cursor=cursor, **given)
        return _json(
            {
                "events": [event.to_dict() for event in page],
                "next_cursor": page.next_cursor,
                "previous_cursor": page.previous_cursor,
            }
        )

    @router.get(
        "/events/{event_id}",
        response_model=models.EventAnswer,
        responses={404: {"description": "No such event that you may see", **_PROBLEM}},
    )
    async def event(
        event_id: UUID,
        seen: Annotated[AuditAccess, Depends(access)],
        occurred_at: Annotated[
            AwareDatetime | None, Query(description="When it happened: finds ids not of version 7 quickly.")
        ] = None,
    ) -> Response:
        """The event of that id."""
        found = await audit.get_event(event_id, tenant_id=seen.narrow(None), occurred_at=occurred_at)
        if found is None or not seen.covers(found.tenant_id):
            return problem(404, f"there is no event {event_id} that you may see")
        return _json(found.to_dict())

    @router.get("/timelines/{correlation_id:path}", response_model=models.TimelineAnswer)
    async def timeline(
        correlation_id: str,
        seen: Annotated[AuditAccess, Depends(access)],
        tenant_id: Annotated[list[str] | None, Query(description="One of these.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Events at most.")] = 1_000,
    ) -> Response:
        """The events of one piece of work, oldest first, with the time between them."""
        tenants = seen.narrow(tenant_id)
        return _json((await audit.timeline(correlation_id, limit=limit, tenant_id=tenants)).to_dict())


def _add_counts(router: APIRouter, audit: AuditAggregator, allowed: Callable[..., dict[str, Any]]) -> None:
    @router.get("/count", response_model=models.CountAnswer)
    async def count(
        given: Annotated[dict[str, Any], Depends(allowed)], times: Annotated[dict[str, Any], Depends(span)]
    ) -> Response:
        """How many events there are."""
        return _json({"count": await audit.count_events(**times, **given)})

    @router.get("/histogram", response_model=models.HistogramAnswer)
    async def histogram(
        given: Annotated[dict[str, Any], Depends(allowed)],
        times: Annotated[dict[str, Any], Depends(span)],
        by: Annotated[
            list[Unit | Field] | None,
            Query(description="What to count by, a unit of time among it; default: day."),
        ] = None,
        time_zone: Annotated[str, Query(description="Whose days, an IANA name.")] = "UTC",
        fill: Annotated[bool, Query(description="Buckets of 0, too, where there are no events.")] = False,
    ) -> Response:
        """Counts by unit of time, by field, or by both."""
        named = tuple(by or ("day",))
        found = await audit.histogram(**times, by=named, time_zone=time_zone, fill=fill, **given)
        return _json(found.to_dict())

    @router.get("/facets", response_model=models.FacetsAnswer)
    async def facets(
        given: Annotated[dict[str, Any], Depends(allowed)],
        times: Annotated[dict[str, Any], Depends(span)],
        field: Annotated[list[Field] | None, Query(description="Fields; default: the usual ones.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_VALUES, description="Values per field.")] = 20,
    ) -> Response:
        """The commonest values of fields, each under all filters but the field's own."""
        named = tuple(field or DEFAULT_FIELDS)
        found = await audit.facets(**times, fields=named, limit=limit, **given)
        return _json({"facets": [facet.to_dict() for facet in found.values()]})


def _add_stream(
    router: APIRouter,
    audit: AuditAggregator,
    allowed: Callable[..., dict[str, Any]],
    limits: tuple[float, float, int],
) -> None:
    heartbeat, longest, max_streams = limits
    streams: set[StreamOfEvents] = set()

    @router.get("/stream", status_code=200, response_class=StreamOfEvents, responses=_STREAM)
    async def stream(
        given: Annotated[dict[str, Any], Depends(allowed)],
        last_event_id: Annotated[
            str | None, Header(description="Go on after this message; browsers send it by themselves.")
        ] = None,
        after: Annotated[
            str | None, Query(description="The same, for clients that can't send the header.")
        ] = None,
        since_start: Annotated[bool, Query(description="Begin with the first stored event.")] = False,
    ) -> Response:
        """Events as they are stored, as server-sent events named `audit`; each has its id to go on from."""
        if len(streams) >= max_streams:
            return problem(503, f"{max_streams} streams are open already", {"Retry-After": "5"})
        resumed = last_event_id or after
        tail = audit.tail(after=resumed, since_start=since_start and not resumed, **given)
        response = StreamOfEvents(tail, heartbeat, longest, streams)
        try:
            await tail.start()  # what fails is answered as a problem, not in the stream
        except BaseException:
            streams.discard(response)
            raise
        return response


def _json(content: dict[str, Any]) -> JSONResponse:
    return JSONResponse(content, headers=NO_STORE)
