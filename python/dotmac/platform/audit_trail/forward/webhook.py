"""Webhooks: batches of events by HTTP POST, signed as "Standard Webhooks" says.

Source: https://github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md: the headers
`webhook-id` (the same for every try of a batch), `webhook-timestamp` and `webhook-signature`, which is
`v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from dotmac.platform.audit_trail.arguments import check_seconds
from dotmac.platform.audit_trail.forward.destination import PAYLOADS, Refused, payload_of, told
from dotmac.platform.connection.urls import mask_url
from dotmac.platform.errors import DeliveryFailed, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from urllib.parse import SplitResult

    import httpx

    from dotmac.platform.audit_trail.models import AuditEvent

__all__ = ["WebhookDestination", "verify_webhook"]

# These answers are about the batch itself; all others are about the receiver, which may get better.
_ABOUT_THE_EVENTS: Final = frozenset({400, 413, 422})
_LEAST_SECRET: Final = 16
_LONGEST_PAUSE: Final = 3_600.0
_SHOWN: Final = 200
_LONGEST_STAMP: Final = 15  # digits; no clock shows more


class WebhookDestination:
    """A receiver of batches.

    Args:
        url: `https://…` (or `http://…`).
        secret: what signs; `whsec_` and base64, or any bytes or text of at least 16; several, while receivers
            change over, give several signatures.
        headers: further ones, such as `Authorization`.
        payload: `json` (our own form of an event) or `ocsf`.
        timeout: seconds for the whole of a request.
        client: an httpx client of your own (proxies, certificates); it is not closed.

    Its `label` is scheme, host and a short hash of path and query, which for many receivers are the secret.

    A body is `{"destination": …, "events": […]}`, in the order of storing. 2xx confirms it. Redirects are not
    followed. 400, 413 and 422 refuse the events themselves; anything else is tried again.

    Raises: InvalidArgument.
    """

    settle = 0.0

    def __init__(
        self,
        url: str,
        *,
        secret: str | bytes | Sequence[str | bytes],
        headers: Mapping[str, str] | None = None,
        payload: str = "json",
        timeout: float = 10.0,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        parts = urlsplit(url) if isinstance(url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgument("url", _shown(url), "give https://host/path")
        if payload not in PAYLOADS:
            raise InvalidArgument("payload", payload, f"give one of {', '.join(PAYLOADS)}")
        check_seconds("timeout", timeout)
        self.label = _label(parts)
        self._url = url
        self._secrets = _secrets(secret)
        self._headers = dict(headers or {})
        self._payload = payload
        self._timeout = timeout
        self._client = client
        self._own: httpx.AsyncClient | None = None

    async def send(self, events: Sequence[AuditEvent], key: str) -> None:
        import httpx

        body = told(
            {"destination": self.label, "events": [payload_of(event, self._payload) for event in events]}
        ).encode()
        now = str(int(time.time()))
        headers = self._headers | {
            "content-type": "application/json",
            "webhook-id": key,
            "idempotency-key": key,
            "webhook-timestamp": now,
            "webhook-signature": " ".join(_signature(one, key, now, body) for one in self._secrets),
        }
        client = self._client or self._opened()
        try:
            async with (
                asyncio.timeout(self._timeout),
                client.stream(
                    "POST",
                    self._url,
                    content=body,
                    headers=headers,
                    timeout=self._timeout,
                    follow_redirects=False,
                ) as answer,
            ):
                if answer.is_success:
                    return
                said = await _beginning(answer)
        except TimeoutError as error:
            raise DeliveryFailed(f"{self.label}: no answer within {self._timeout:g} s") from error
        except httpx.HTTPError as error:
            raise DeliveryFailed(f"{self.label}: {type(error).__name__}: {error}") from error
        text = f"{self.label}: HTTP {answer.status_code}: {said}"
        if answer.status_code in _ABOUT_THE_EVENTS:
            raise Refused(text)
        raise DeliveryFailed(text, _pause(answer.headers.get("retry-after")))

    def settled(self) -> bool:
        return True

    async def aclose(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            await own.aclose()

    def _opened(self) -> httpx.AsyncClient:
        import httpx

        if self._own is None:
            self._own = httpx.AsyncClient(timeout=self._timeout)
        return self._own


def verify_webhook(
    headers: Mapping[str, str],
    body: bytes,
    secret: str | bytes | Sequence[str | bytes],
    *,
    tolerance: float = 300.0,
    now: float | None = None,
) -> str:
    """For receivers: is that request from who knows the secret, and fresh?

    Args:
        headers: of the request; names in any case.
        body: its bytes, as they came.
        secret: the sender's, or several.
        tolerance: seconds by which the timestamp may differ from now.
        now: seconds since 1970; default: the clock.
    Returns: the batch's id: one that was taken before may be answered with 200 and left.
    Raises: InvalidArgument: it is not, and says which part.
    """
    given = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in ("webhook-id", "webhook-timestamp", "webhook-signature") if name not in given]
    if missing:
        raise InvalidArgument(missing[0], None, "the header is missing")
    stamp, key = given["webhook-timestamp"], given["webhook-id"]
    moment = time.time() if now is None else now
    if (
        not (stamp.isascii() and stamp.isdecimal() and len(stamp) <= _LONGEST_STAMP)
        or abs(moment - int(stamp)) > tolerance
    ):
        raise InvalidArgument("webhook-timestamp", stamp, f"it must lie within {tolerance:g} s of now")
    known = [_signature(one, key, stamp, body) for one in _secrets(secret)]
    for claimed in given["webhook-signature"].split(" "):
        for right in known:
            if hmac.compare_digest(claimed.encode(errors="replace"), right.encode()):
                return key
    raise InvalidArgument("webhook-signature", given["webhook-signature"], "no signature fits the body")


def _label(parts: SplitResult) -> str:
    host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    rest = parts.path.rstrip("/") + (f"?{parts.query}" if parts.query else "")
    return f"{host}#{hashlib.sha256(rest.encode(errors='replace')).hexdigest()[:8]}" if rest else host


def _shown(url: object) -> object:
    return mask_url(url) if isinstance(url, str) else url


def _signature(secret: bytes, key: str, stamp: str, body: bytes) -> str:
    digest = hmac.new(secret, f"{key}.{stamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def _secrets(given: str | bytes | Sequence[str | bytes]) -> list[bytes]:
    several = [given] if isinstance(given, str | bytes) else list(given)
    if not several:
        raise InvalidArgument("secret", "", "give at least one")
    return [_secret(one) for one in several]


def _secret(given: str | bytes) -> bytes:
    if isinstance(given, str) and given.startswith("whsec_"):
        try:
            found = base64.b64decode(given.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise InvalidArgument("secret", "whsec_…", "what follows whsec_ must be base64") from None
    else:
        found = given.encode() if isinstance(given, str) else bytes(given)
    if len(found) < _LEAST_SECRET:
        raise InvalidArgument("secret", "…", f"give at least {_LEAST_SECRET} bytes")
    return found


async def _beginning(answer: httpx.Response) -> str:
    """The first words of an answer, however long it is."""
    found = b""
    async for piece in answer.aiter_bytes():
        found += piece
        if len(found) >= _SHOWN:
            break
    return found[:_SHOWN].decode(errors="replace")


def _pause(said: str | None) -> float | None:
    """Seconds of `Retry-After` (RFC 9110, section 10.2.3), or None."""
    if said is None:
        return None
    if said.isascii() and said.isdecimal():
        return min(float(said), _LONGEST_PAUSE)
    try:
        return min(max(0.0, parsedate_to_datetime(said).timestamp() - time.time()), _LONGEST_PAUSE)
    except (ValueError, TypeError, OverflowError):
        return None
