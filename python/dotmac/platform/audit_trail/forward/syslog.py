"""Syslog: RFC 5424 messages over UDP (RFC 5426), TCP with octet counting (RFC 6587) and TLS (RFC 5425).

Syslog has no acknowledgements. Over TCP and TLS a batch counts as delivered once the peer's system confirmed
all bytes and the connection was still whole a second later; whatever was sent less than that before a break
is sent again over the next connection. What a server loses after it took it can't be known here; nor can
anything over UDP.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
import termios
from contextlib import suppress
from datetime import UTC
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from dotmac.platform.audit_trail.arguments import check_seconds
from dotmac.platform.audit_trail.forward.destination import PAYLOADS, payload_of, told
from dotmac.platform.errors import DeliveryFailed, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dotmac.platform.audit_trail.models import AuditEvent

__all__ = ["SyslogDestination", "message"]

_PORTS: Final = {"syslog+udp": 514, "syslog+tcp": 601, "syslog+tls": 6514}
# RFC 5424, table 2. Our levels have no notice, alert or emergency.
_SEVERITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_LOG_AUDIT: Final = 13  # facility "log audit", table 1
_UDP_MAX: Final = 65_507  # an IPv4 datagram; RFC 5426, section 3.2
_NOT_PRINTABLE: Final = re.compile(r"[^\x21-\x7e]")
_NOT_NAME: Final = re.compile(r'[^\x21-\x7e]|[= \]"]')
_IN_PARAMETER: Final = re.compile(r'(["\\\]])')
_BOM: Final = b"\xef\xbb\xbf"
_PARAMETERS: Final = (
    ("id", "id"),
    ("category", "category"),
    ("outcome", "outcome"),
    ("user", "user_id"),
    ("tenant", "tenant_id"),
    ("resourceType", "resource_type"),
    ("resource", "resource_id"),
    ("ip", "ip_address"),
    ("correlation", "correlation_id"),
)
_SHORT: Final = ("metadata", "anomaly_reasons", "unmapped")


class SyslogDestination:
    """A syslog server.

    Args:
        url: `syslog+udp://host`, `syslog+tcp://host` or `syslog+tls://host`, with a port where it is not 514,
            601 or 6514.
        facility: 0 to 23; 13 is "log audit".
        app_name: APP-NAME, at most 48 printable ASCII characters.
        hostname: HOSTNAME; default: this machine's.
        sd_id: name of the structured data; 32473 is the number that RFC 5612 keeps for examples: give your
        own.
        payload: what the message is: `json` (the event) or `ocsf`.
        max_size: bytes of a message at most; from a longer one metadata is left out, and it says so. Default:
            65,507 over UDP, else 1 MiB and 64 KiB.
        timeout: seconds to connect, and for a batch to be taken.
        settle: seconds for which the connection must stay whole after a batch.
        ssl_context: for TLS; default: the system's authorities, and the host's name is checked.

    Raises: InvalidArgument.
    """

    def __init__(
        self,
        url: str,
        *,
        facility: int = _LOG_AUDIT,
        app_name: str = "dotmac-audit",
        hostname: str | None = None,
        sd_id: str = "audit@32473",
        payload: str = "json",
        max_size: int | None = None,
        timeout: float = 10.0,
        settle: float = 1.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._kind, self._host, self._port = _parts(url)
        if isinstance(facility, bool) or not isinstance(facility, int) or not 0 <= facility <= 23:  # noqa: PLR2004 (told in the text)
            raise InvalidArgument("facility", facility, "give a number from 0 to 23")
        if payload not in PAYLOADS:
            raise InvalidArgument("payload", payload, f"give one of {', '.join(PAYLOADS)}")
        if _NOT_NAME.search(sd_id) or not 1 <= len(sd_id) <= 32:  # noqa: PLR2004 (RFC 5424, section 6.3.2)
            raise InvalidArgument("sd_id", sd_id, 'give 1 to 32 printable ASCII characters without = ] or "')
        check_seconds("timeout", timeout)
        check_seconds("settle", settle)
        self.label = f"{self._kind}://{self._host}:{self._port}"
        self.settle = settle
        self._facility = facility
        self._app_name = _field(app_name, 48)
        self._hostname = _field(hostname or socket.gethostname(), 255)
        self._sd_id = sd_id
        self._payload = payload
        self._timeout = timeout
        self._tls = (ssl_context or ssl.create_default_context()) if self._kind == "syslog+tls" else None
        self._max_size = max_size or (_UDP_MAX if self._kind == "syslog+udp" else (1 << 20) + (64 << 10))
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._datagrams: asyncio.DatagramTransport | None = None
        self._failure: Exception | None = None

    async def send(self, events: Sequence[AuditEvent], key: str) -> None:  # noqa: ARG002 (syslog has no place for it)
        messages = [self._message(event) for event in events]
        try:
            async with asyncio.timeout(self._timeout):
                if self._kind == "syslog+udp":
                    await self._send_datagrams(messages)
                else:
                    await self._send_stream(messages)
        except (OSError, asyncio.IncompleteReadError) as error:  # TimeoutError and ssl.SSLError are OSErrors
            self._drop()
            why = f"no progress within {self._timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            raise DeliveryFailed(f"{self.label}: {why or type(error).__name__}") from error
        except BaseException:
            self._drop()  # cancelled in the middle: half a message may be on its way
            raise

    def settled(self) -> bool:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._drop()
            raise DeliveryFailed(f"{self.label}: {failure}")
        if self._stream is None:
            return True
        reader, writer = self._stream
        if writer.is_closing() or reader.at_eof() or reader.exception() is not None:
            self._drop()
            raise DeliveryFailed(f"{self.label}: the server closed the connection")
        return writer.transport.get_write_buffer_size() == 0 and _unconfirmed(writer) == 0

    async def aclose(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream[1].close()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(self._timeout):
                    await stream[1].wait_closed()
        self._drop()

    def _message(self, event: AuditEvent) -> bytes:
        return message(
            payload_of(event, self._payload),
            event,
            facility=self._facility,
            hostname=self._hostname,
            app_name=self._app_name,
            sd_id=self._sd_id,
            max_size=self._max_size,
        )

    async def _send_stream(self, messages: list[bytes]) -> None:
        if self._stream is None:
            self._stream = await asyncio.open_connection(
                self._host, self._port, ssl=self._tls, server_hostname=self._host if self._tls else None
            )
        self.settled()
        writer = self._stream[1]
        for one in messages:
            writer.write(b"%d %b" % (len(one), one))
            await writer.drain()

    async def _send_datagrams(self, messages: list[bytes]) -> None:
        loop = asyncio.get_running_loop()
        if self._datagrams is None:
            self._datagrams, _ = await loop.create_datagram_endpoint(
                lambda: _Errors(self._failed), remote_addr=(self._host, self._port)
            )
        self.settled()
        for count, one in enumerate(messages):
            self._datagrams.sendto(one)
            if count % 16 == 15:  # noqa: PLR2004 (let errors and others be heard)
                await asyncio.sleep(0)

    def _failed(self, error: Exception) -> None:
        self._failure = error

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream[1].transport.abort()
        datagrams, self._datagrams = self._datagrams, None
        if datagrams is not None:
            datagrams.close()


class _Errors(asyncio.DatagramProtocol):
    def __init__(self, told_to: Any) -> None:
        self._told_to = told_to

    def error_received(self, exc: Exception) -> None:
        self._told_to(exc)


def message(
    said: dict[str, Any],
    event: AuditEvent,
    *,
    facility: int,
    hostname: str,
    app_name: str,
    sd_id: str,
    max_size: int,
) -> bytes:
    """One event as a message of RFC 5424, section 6.

    Args: said: what the message's text is. max_size: bytes of the whole message.
    """
    priority = facility * 8 + _SEVERITIES.get(event.level.value, 5)
    when = event.occurred_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    columns = event.to_dict()
    parameters = "".join(
        f' {name}="{_IN_PARAMETER.sub(_escape, str(columns[column]))}"'
        for name, column in _PARAMETERS
        if columns[column] is not None
    )
    head = (
        f"<{priority}>1 {when} {hostname} {app_name} - {_field(event.action, 32)} [{sd_id}{parameters}] "
    ).encode()
    text = told(said).encode()
    if len(head) + len(_BOM) + len(text) > max_size:
        short = {name: value for name, value in said.items() if name not in _SHORT}
        text = told(short | {"shortened": True}).encode()
    if len(head) + len(_BOM) + len(text) > max_size:
        text = told({"id": str(event.id), "shortened": True}).encode()
    return head + _BOM + text


def _escape(found: re.Match[str]) -> str:
    return f"\\{found[1]}"


def _field(text: str, most: int) -> str:
    return _NOT_PRINTABLE.sub("_", text)[:most] or "-"


def _parts(url: object) -> tuple[str, str, int]:
    allowed = "give syslog+udp://host, syslog+tcp://host or syslog+tls://host, maybe with a port"
    if not isinstance(url, str):
        raise InvalidArgument("url", url, allowed)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidArgument("url", url, allowed) from None
    if parts.scheme not in _PORTS or not parts.hostname or parts.path.strip("/") or parts.username:
        raise InvalidArgument("url", url, allowed)
    return parts.scheme, parts.hostname, port or _PORTS[parts.scheme]


def _unconfirmed(writer: asyncio.StreamWriter) -> int:
    """Bytes that the peer's system has not confirmed yet (tcp(7), SIOCOUTQ); 0 where that can't be known."""
    import fcntl

    sock = writer.get_extra_info("socket")
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    except OSError:
        return 0
    return int(struct.unpack("i", answer)[0])
