"""The platform's errors as answers to HTTP requests.

| error               | status                  | why                                                 |
|---------------------|-------------------------|-----------------------------------------------------|
| `LockTimeout`       | 423 Locked              | somebody else has it; the request changed nothing   |
| `DeadlockDetected`  | 409 Conflict            | requests each hold what the other one waits for     |
| `LockLost`          | 503 Service Unavailable | broken off midway: whether it did something is open |
| `ServerUnavailable` | 503 Service Unavailable | Redis or Valkey could not be reached in time        |

Where the same request can succeed later without a change, `Retry-After` says when to try. `LockLost` has
none: only the caller knows whether the work may be done twice. The body is `{"detail": …, "code": …}`, with
the error's stable code and a text that names neither locks nor servers; those go to the log.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from dotmac.platform.errors import (
    DeadlockDetected,
    DotmacError,
    InvalidArgument,
    LockLost,
    LockTimeout,
    ServerUnavailable,
)
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["STATUS", "install_error_handlers"]

_log = get_logger(__name__)
STATUS: dict[type[DotmacError], int] = {
    LockTimeout: 423,
    DeadlockDetected: 409,
    LockLost: 503,
    ServerUnavailable: 503,
}
_TRY_AGAIN_LATER, _INTERNAL_ERROR = 1013, 1011  # close codes of WebSockets, RFC 6455 and its registry


def install_error_handlers(app: Starlette, *, retry_after: float = 1.0) -> None:
    """Answers requests that fail by `LockTimeout`, `DeadlockDetected`, `LockLost` or `ServerUnavailable`.

    Args:
        app: a FastAPI or Starlette application that does not serve yet.
        retry_after: seconds after which clients should try again, rounded up to whole ones.
    Raises: InvalidArgument: `retry_after` is negative or no number.
    """
    if not isinstance(retry_after, int | float) or not 0 <= retry_after < math.inf:
        raise InvalidArgument("retry_after", retry_after, "it must be a number of seconds, 0 or more")
    later = {"Retry-After": str(math.ceil(retry_after))}

    async def answer(connection: Any, error: Exception) -> Any:
        assert isinstance(error, DotmacError)
        status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
        text = (inspect.getdoc(type(error)) or "").partition("\n")[0]
        _log.warning(
            "request failed", path=connection.url.path, status=status, code=error.code, error=str(error)
        )
        if isinstance(connection, WebSocket):
            await connection.close(_TRY_AGAIN_LATER if error.retryable else _INTERNAL_ERROR, text)
            return None
        content = {"detail": text, "code": error.code}
        return JSONResponse(content, status, later if error.retryable else None)

    for kind in STATUS:
        app.add_exception_handler(kind, answer)
