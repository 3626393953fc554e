"""One health check over HTTP: only hosts that may be asked, no redirects, bounded in time and size."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dotmac.platform.service_registry.arguments import health_host

if TYPE_CHECKING:
    import httpx

    from dotmac.platform.service_registry.models import ServiceInstance

__all__ = ["Prober", "forbidden"]

_LARGEST_BODY = 64 * 1024
# Where clouds answer with credentials, outside of the link-local range that is refused as a whole.
_METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
)
# Whose last 32 bits are an IPv4 address: mapped, compatible (RFC 4291), NAT64 (RFC 6052, RFC 8215).
_EMBEDDING = tuple(
    ipaddress.IPv6Network(prefix) for prefix in ("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48")
)


def forbidden(address: str) -> bool:
    """Whether an address must not be asked: link-local, metadata service, multicast, unspecified.

    An IPv6 address that stands for an IPv4 address is judged by both.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    return any(
        one.is_link_local or one.is_multicast or one.is_unspecified or one in _METADATA
        for one in (ip, *_embedded(ip))
    )


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that traffic to an IPv6 address may reach."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    found = [ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF) for prefix in _EMBEDDING if ip in prefix]
    if ip.sixtofour is not None:
        found.append(ip.sixtofour)
    if ip.teredo is not None:
        found.extend(ip.teredo)
    return found


class Prober:
    """Asks instances for their health.

    Args:
        timeout: seconds for one check, from resolving the name to the answer.
        allowed_hosts: hosts that may be asked beside the registered one.
    """

    def __init__(self, timeout: float, allowed_hosts: frozenset[str] = frozenset()) -> None:
        self._timeout, self._allowed = timeout, allowed_hosts
        self._client: httpx.AsyncClient | None = None

    async def aclose(self) -> None:
        """Closes its connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def probe(self, instance: ServiceInstance) -> str | None:
        """None if the instance is well, else what is wrong.

        The URL was checked when it was registered, but not necessarily by this version or with these
        settings:
        it is checked again before each request.
        """
        url = instance.health_check_url or ""
        host = health_host(url)
        if host is None or (host != instance.host.lower() and host not in self._allowed):
            return f"its health check URL may not be asked: {url!r}"
        try:
            async with asyncio.timeout(self._timeout):
                return await self._ask_each(url, host)
        except TimeoutError:
            return f"no answer within {self._timeout:g} s"

    async def _ask_each(self, url: str, host: str) -> str | None:
        import httpx

        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # the latter for names that IDNA can't encode
            return f"its name can't be resolved: {error}"
        # The address that was judged is the one that is asked: a name can't change its meaning in between.
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        problem: str | None = f"{host} has no address"
        for address in addresses:
            if forbidden(address):
                problem = f"{address} may not be asked for health"
                continue
            try:
                return await self._ask(url, host, address)
            except httpx.ConnectError as error:
                problem = f"no connection: {error}"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                return f"{type(error).__name__}: {error}"
        return problem

    async def _ask(self, url: str, host: str, address: str) -> str | None:
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(
                follow_redirects=False,
                trust_env=False,
                timeout=self._timeout,
                # A check that reuses a connection would not notice that nobody accepts new ones.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        asked = httpx.URL(url)
        request = self._client.build_request(
            "GET",
            asked.copy_with(host=address),
            headers={"Host": asked.netloc.decode("ascii"), "Accept": "*/*"},
            extensions={"sni_hostname": host},
        )
        response = await self._client.send(request, stream=True)
        try:
            size = 0
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > _LARGEST_BODY:
                    return f"its answer is longer than {_LARGEST_BODY} bytes"
        finally:
            await response.aclose()
        if not response.is_success:
            return f"HTTP status {response.status_code}"
        return None
