"""Errors of the audit router's endpoints as `application/problem+json` (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from dotmac.platform.audit_trail.filter_text import SINGULAR
from dotmac.platform.errors import (
    AuditUnavailable,
    DotmacError,
    InvalidArgument,
    InvalidCursor,
    SchemaOutdated,
    ServerRefused,
)
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["Problem", "ProblemRoute", "problem", "problem_of"]

MEDIA_TYPE = "application/problem+json"
NO_STORE = {"Cache-Control": "no-store"}
STATUS: dict[type[DotmacError], int] = {
    InvalidArgument: 400,
    InvalidCursor: 400,
    AuditUnavailable: 503,
    SchemaOutdated: 503,
    ServerRefused: 503,
}
# Errors whose text speaks of nothing but the request; that of others goes to the log alone.
_TOLD = (InvalidArgument, InvalidCursor)
_FIELDS = {name: singular for singular, name in SINGULAR.items()}
_log = get_logger(__name__)


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field("about:blank", description="`about:blank`: the status says it all; see `code`.")
    title: str
    status: int
    detail: str
    code: str | None = Field(None, description="Stable name of the error; each has a page in the documents.")
    field: str | None = Field(None, description="The parameter that is wrong.")


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> JSONResponse:
    """The answer for an error; `more` are further members of it."""
    title = next((known.phrase for known in HTTPStatus if known == status), "Error")
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail, **more}
    return JSONResponse(content, status, {**NO_STORE, **(headers or {})}, media_type=MEDIA_TYPE)


def problem_of(error: DotmacError, path: str) -> JSONResponse:
    """The answer for one of the platform's errors; `path` is for the log."""
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    if isinstance(error, _TOLD):
        if not isinstance(error, InvalidArgument):
            return problem(status, str(error), code=error.code)
        name = _FIELDS.get(error.field, error.field)
        told = str(InvalidArgument(name, error.value, error.allowed))
        return problem(status, told, code=error.code, field=name)
    _log.warning("audit request failed", path=path, status=status, code=error.code, error=str(error))
    detail = (type(error).__doc__ or "").partition("\n")[0]
    headers = {"Retry-After": "1"} if error.retryable else None
    return problem(status, detail, headers, code=error.code)


class ProblemRoute(APIRoute):
    """A route whose errors are problems, those of its dependencies included."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with errors turned into answers."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                errors = [
                    {"field": str(found["loc"][:2][-1]), "in": str(found["loc"][0]), "message": found["msg"]}
                    for found in error.errors()
                ]
                told = "; ".join(f"{found['field']}: {found['message']}" for found in errors)
                return problem(422, told, errors=errors)
            except HTTPException as error:
                return problem(error.status_code, str(error.detail), error.headers)
            except DotmacError as error:
                return problem_of(error, request.url.path)

        return handle
