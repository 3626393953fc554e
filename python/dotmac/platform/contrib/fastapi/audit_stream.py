"""Live events as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

Every message bears the follower's position as its id. A browser that lost the connection sends the last one
back (`Last-Event-ID`) and misses nothing. Heartbeats bear it too, so that a reader to whom nothing matched
for long does not begin where it was long ago.
"""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING

from starlette.responses import StreamingResponse

from dotmac.platform.contrib.fastapi.problems import NO_STORE
from dotmac.platform.errors import AuditUnavailable, DotmacError
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from dotmac.platform.audit_trail.models import AuditEvent
    from dotmac.platform.audit_trail.tail import Tail

__all__ = ["MEDIA_TYPE", "StreamOfEvents"]

MEDIA_TYPE = "text/event-stream"
_CHUNK = 64 << 10  # bytes that are written at once at most, but for a larger event
_RETRY_MS = 2_000
_LOOK_UP = 0.5  # seconds between looks whether the server is about to stop
_log = get_logger(__name__)


class StreamOfEvents(StreamingResponse):
    """The answer that tells of events until its client leaves, or the server is about to stop.

    Args: others: the streams that are open; this one is among them to its end.
    """

    media_type = MEDIA_TYPE

    def __init__(self, tail: Tail, heartbeat: float, longest: float, others: set[StreamOfEvents]) -> None:
        # X-Accel-Buffering: proxies of nginx's kind must not keep messages back.
        super().__init__(messages(tail, heartbeat, longest), headers={**NO_STORE, "X-Accel-Buffering": "no"})
        self._others = others
        others.add(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._others.discard(self)


async def messages(tail: Tail, heartbeat: float, longest: float) -> AsyncIterator[bytes]:
    """The stream's bytes; it ends when the server is about to stop, or the time is up.

    It reads on when what it gave was sent: a slow client makes it fall behind, and nothing piles up.

    Args:
        heartbeat: seconds after which something is sent where nothing happened.
        longest: seconds after which the stream ends.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Task[AuditEvent] | None = None
    yield f"retry: {_RETRY_MS}\n\n".encode() + _position(tail)
    sent = loop.time()
    end = sent + longest
    try:
        while loop.time() < end and not _is_stopping():
            if waiting is None:
                waiting = loop.create_task(anext(tail), name="dotmac-audit-stream")
            # Not cancelled when time is up: a look that takes longer would never come to an end.
            await asyncio.wait([waiting], timeout=min(_LOOK_UP, heartbeat))
            if waiting.done():
                done, waiting = waiting, None
                try:
                    chunk = _message(tail, done.result())
                except StopAsyncIteration:
                    return
                except AuditUnavailable as error:
                    _log.warning("a follower waits for the audit database", error=str(error))
                    continue
                except DotmacError as error:
                    _log.exception("a follower was given up")
                    yield f"event: error\ndata: {json.dumps({'code': error.code})}\n\n".encode()
                    return
                while tail.waiting and len(chunk) < _CHUNK:
                    chunk += _message(tail, await anext(tail))
                yield chunk
                sent = loop.time()
            elif loop.time() - sent >= heartbeat:
                yield _position(tail)
                sent = loop.time()
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait([waiting])
        await tail.aclose()


def _message(tail: Tail, event: AuditEvent) -> bytes:
    data = json.dumps(event.to_dict(), ensure_ascii=False, separators=(",", ":"))
    return f"id: {tail.position}\nevent: audit\ndata: {data}\n\n".encode()


def _position(tail: Tail) -> bytes:
    """A heartbeat: without data, so that no event is told of, but the client notes the id."""
    return f": alive\nid: {tail.position}\n\n".encode()


def _is_stopping() -> bool:
    """Does uvicorn wait for connections to end? It tells them nothing; but its signal handler knows."""
    handler = signal.getsignal(signal.SIGTERM)
    return getattr(getattr(handler, "__self__", None), "should_exit", False) is True
