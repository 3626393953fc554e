"""Who and where for every event that is logged while a request is answered: ASGI, whatever the framework.

    app.add_middleware(AuditContextMiddleware, user=user_of, trusted_proxies=["10.0.0.0/8"])

Plain ASGI, so that the context reaches what the application starts (threads of `asyncio.to_thread`, tasks,
background tasks) and neither streams nor websockets are held up.
"""

from __future__ import annotations

import inspect
import ipaddress
import re
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from dotmac.platform.audit_trail.context import audit_context
from dotmac.platform.audit_trail.entry import parse_address
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]
    Asked = Callable[[Scope], Any]

__all__ = ["AuditContextMiddleware"]

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@~-]{0,127}")
# W3C Trace Context, section 3.2: version, trace id, parent id, flags; later versions may add to it.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_FORWARDED_FOR = re.compile(r"(?:^|;)\s*for\s*=\s*(\"[^\"]*\"|[^;\s]*)", re.IGNORECASE)
_MOST_HOPS = 32
_STARTS = ("http.response.start", "websocket.accept", "websocket.http.response.start")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AuditContextMiddleware:
    """Puts an `audit_context` around each request and each websocket.

    The correlation id is the first of `correlation_headers` that holds 1 to 128 letters, digits or
    `._:/+=@~-`, else the trace id of `traceparent`, else a new one; the response bears it, unless the
    application has set it there.

    Args:
        app: the application behind.
        user: asked with the scope for who it is; None for nobody. A function is asked at each event, so that
            what authentication put in the scope meanwhile counts; a coroutine function once, before the
            application.
        tenant: the same for the tenant.
        metadata: the same for entries of every event's metadata.
        trusted_proxies: addresses and networks whose word about the client is believed; `unix` for peers on a
            Unix socket. Without any, the client is who has connected.
        proxy_header: the header that these proxies write, `x-forwarded-for` or `forwarded` (RFC 7239). Only
            this one: the other could be the client's own invention.
        correlation_headers: where the correlation id comes from.
        response_header: name under which the response bears it; None for not at all.

    Raises: InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        app: App,
        *,
        user: Asked | None = None,
        tenant: Asked | None = None,
        metadata: Asked | None = None,
        trusted_proxies: Iterable[str] = (),
        proxy_header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for",
        correlation_headers: Sequence[str] = ("X-Correlation-ID", "X-Request-ID"),
        response_header: str | None = "X-Correlation-ID",
    ) -> None:
        for name, value in (("user", user), ("tenant", tenant), ("metadata", metadata)):
            if value is not None and not callable(value):
                raise InvalidArgument(name, value, "give a function of the scope")
        if proxy_header not in ("x-forwarded-for", "forwarded"):
            raise InvalidArgument("proxy_header", proxy_header, "give 'x-forwarded-for' or 'forwarded'")
        headers = [*correlation_headers, *([response_header] if response_header is not None else [])]
        for header in headers:
            if not isinstance(header, str) or _HEADER_NAME.fullmatch(header) is None:
                raise InvalidArgument("correlation_headers", header, "give names of headers")
        self.app = app
        self._asked = {"user_id": user, "tenant_id": tenant, "metadata": metadata}
        self._peers = _Peers(trusted_proxies, proxy_header)
        self._sources = [header.lower().encode() for header in correlation_headers]
        self._response_header = None if response_header is None else response_header.lower().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        correlation = self._correlation(scope)
        given = {name: await _answer(ask, scope) for name, ask in self._asked.items() if ask is not None}
        with audit_context(
            correlation_id=correlation, ip_address=self._peers.client(scope), inherit=False, **given
        ):
            await self.app(scope, receive, self._telling(correlation, send))

    def _correlation(self, scope: Scope) -> str:
        for wanted in self._sources:
            for value in _headers(scope, wanted):
                if _IDENTIFIER.fullmatch(value):
                    return value
        traced = _headers(scope, b"traceparent")
        # Section 3.3: who gets more than one starts a trace of its own.
        found = _TRACEPARENT.fullmatch(traced[0].strip()) if len(traced) == 1 else None
        if found is not None and (found[2] is None or not traced[0].startswith("00")):
            return found[1]
        return str(uuid4())

    def _telling(self, correlation: str, send: Send) -> Send:
        header = self._response_header
        if header is None:
            return send

        async def tell(message: Message) -> None:
            if message["type"] in _STARTS:
                headers = list(message.get("headers") or ())
                if not any(bytes(name).lower() == header for name, _ in headers):
                    message = {**message, "headers": [*headers, (header, correlation.encode())]}
            await send(message)

        return tell


async def _answer(ask: Asked, scope: Scope) -> Any:
    call = ask if inspect.isfunction(ask) or inspect.ismethod(ask) else getattr(ask, "__call__", ask)  # noqa: B004
    if inspect.iscoroutinefunction(call):
        return await ask(scope)
    return lambda: ask(scope)


def _headers(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope.get("headers") or () if name.lower() == wanted]


class _Peers:
    """Who the client is: the first from the right whom no trusted proxy is."""

    def __init__(self, trusted: Iterable[str], header: str) -> None:
        if isinstance(trusted, str):
            raise InvalidArgument("trusted_proxies", trusted, "give a list of addresses and networks")
        self._header = header.encode()
        self._unix = False
        self._networks: list[Network] = []
        for one in trusted:
            if one == "unix":
                self._unix = True
                continue
            try:
                self._networks.append(ipaddress.ip_network(one))
            except ValueError as error:
                raise InvalidArgument(
                    "trusted_proxies", one, f"give an address or a network ({error})"
                ) from None

    def client(self, scope: Mapping[str, Any]) -> str | None:
        """The client's address, None where nobody knows it."""
        peer = scope.get("client")
        host = peer[0] if peer else None
        address = parse_address(host)
        believed = self._unix if not host else address is not None and self._is_trusted(address)
        hops = self._hops(scope) if believed and (self._unix or self._networks) else []
        while believed and hops:
            said = parse_address(hops.pop())
            if said is None:
                break  # "unknown", a name, nonsense: what stands left of it is nobody's word
            address, believed = said, self._is_trusted(said)
        return address

    def _is_trusted(self, address: str) -> bool:
        found = ipaddress.ip_address(address)
        return any(found in network for network in self._networks)

    def _hops(self, scope: Any) -> list[str]:
        """What the header says, from left to right; the nearest proxy wrote the last one."""
        parts = ",".join(_headers(scope, self._header)).rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]
        if self._header == b"forwarded":
            found = [_FORWARDED_FOR.search(part) for part in parts]
            parts = [one[1] if one is not None else "" for one in found]
        return [_without_port(part.strip().strip('"')) for part in parts]


def _without_port(text: str) -> str:
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
