"""Addresses of Redis or Valkey and of PostgreSQL: read, checked, and shown without their password.

Nothing here opens a connection. An address that can't be used is refused with `InvalidArgument`, whose text
names what is allowed and never contains a password.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote

from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DEFAULT_PARTITIONS",
    "DEFAULT_TIMEOUT",
    "EMBEDDED",
    "MOST_PARTITIONS",
    "RedisTarget",
    "mask_url",
    "parse_redis_url",
    "postgres_dsn",
]

EMBEDDED = "embedded://"
DEFAULT_TIMEOUT = 5.0
DEFAULT_PARTITIONS = 64
MOST_PARTITIONS = 1024
MASK = "***"

_LONGEST = 8192
_PORT = 6379
_SENTINEL_PORT = 26_379
_HIGHEST_PORT = 65_535
_HIGHEST_DB = 2**31 - 1
_SCHEMES: dict[str, Literal["tcp", "tls", "unix"]] = {
    "redis": "tcp",
    "valkey": "tcp",
    "rediss": "tls",
    "valkeys": "tls",
    "unix": "unix",
}
_VIA_SENTINEL = "+sentinel"
_VIA_CLUSTER = "+cluster"
_REDIS_ALLOWED = (
    "it must be redis://, rediss://, valkey://, valkeys://, unix://, redis+sentinel://, rediss+sentinel://, "
    "redis+cluster://, rediss+cluster:// or embedded://"
)
_DRIVERS = ("asyncpg", "psycopg", "psycopg2")
_POSTGRES_ALLOWED = "it must be postgresql://user:password@host:port/database or embedded://"

_SECRET_OPTION = re.compile(
    r"(?i)([?&](?:key|sig|[^=&#]*(?:password|passwd|secret|token|signature|credential|"
    r"(?:api|access|account|auth)[_-]?key)[^=&#]*)=)[^&#]*"
)
# Where what stands alone before the @ is a user's name; elsewhere it may be a token.
_NAMES_USERS = re.compile(r"(?i)(?:redis|rediss|valkey|valkeys|postgres|postgresql)(?:\+\w+)?")
_UNSAFE = re.compile(r"[\x00-\x20\x7f]")
_SPLIT = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?"
)


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """Where a Redis or Valkey server is and how to talk to it.

    Args:
        kind: `tcp`, `tls` (TCP with TLS) or `unix` (a Unix domain socket).
        host: name or address; empty for `unix`.
        port: TCP port; 0 for `unix`.
        path: the socket's path; empty unless `unix`.
        db: number of the logical database.
        username: ACL user; None for the default user.
        password: its password; never shown by `repr` or `str`.
        tls_ca: PEM file of the authorities to trust instead of the system's.
        tls_cert: PEM file of the client's certificate.
        tls_key: PEM file of its private key.
        tls_server_name: name to ask for and to check, where it isn't `host`.
        tls_insecure: do not check the server's certificate.
        connect_timeout: seconds allowed for connecting, greetings included.
        request_timeout: seconds allowed for the answer to one request.
        service: what the sentinels call the primary; empty where `host` and `port` say where the server is.
        sentinels: whom to ask for host and port, each with a login and TLS of its own.
        cluster: nodes of a cluster, which say where the others are; empty where there is none.
        partitions: how many partitions the cluster's locks and services are spread over, 1 to 1,024; None
            where nobody has said it.
    """

    kind: Literal["tcp", "tls", "unix"] = "tcp"
    host: str = "localhost"
    port: int = 6379
    path: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_server_name: str | None = None
    tls_insecure: bool = False
    connect_timeout: float = DEFAULT_TIMEOUT
    request_timeout: float = DEFAULT_TIMEOUT
    service: str = ""
    sentinels: tuple[RedisTarget, ...] = ()
    cluster: tuple[RedisTarget, ...] = ()
    partitions: int | None = None

    def with_timeouts(self, connect_timeout: float | None, request_timeout: float | None) -> RedisTarget:
        """The same with other timeouts, in seconds, where it has the default ones; None changes nothing."""
        changes: dict[str, Any] = {}
        if connect_timeout is not None and self.connect_timeout == DEFAULT_TIMEOUT:
            changes["connect_timeout"] = connect_timeout
        if request_timeout is not None and self.request_timeout == DEFAULT_TIMEOUT:
            changes["request_timeout"] = request_timeout
        sentinels = tuple(one.with_timeouts(connect_timeout, request_timeout) for one in self.sentinels)
        return replace(self, sentinels=sentinels, **changes)

    def with_partitions(self, partitions: int | None) -> RedisTarget:
        """The same for so many partitions, where it is a cluster that does not say itself how many; None is
        the default."""
        if not self.cluster or self.partitions is not None:
            return self
        return replace(self, partitions=partitions or DEFAULT_PARTITIONS)

    def __str__(self) -> str:
        """The address as a URL, the password masked, options other than the database left out."""
        user = quote(self.username or "", safe="")
        login = f"{user}:{MASK}@" if self.password is not None else f"{user}@" if user else ""
        if self.kind == "unix":
            return f"unix://{login}{quote(self.path)}?db={self.db}"
        scheme = "rediss" if self.kind == "tls" else "redis"
        if self.sentinels:
            places = ",".join(one.place for one in self.sentinels)
            return f"{scheme}+sentinel://{login}{places}/{quote(self.service, safe='')}/{self.db}"
        if self.cluster:
            return f"{scheme}+cluster://{login}{','.join(one.place for one in self.cluster)}"
        return f"{scheme}://{login}{self.place}/{self.db}"

    @property
    def place(self) -> str:
        """`host:port`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def mask_url(url: str) -> str:
    """The URL with every password and token in it replaced by `***`; works on malformed input too, hiding too
    much rather than too little. A path is shown as it is."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "", url
    login, at, place = rest.rpartition("@")
    if at and ":" in login:
        login = f"{login.partition(':')[0]}:{MASK}"
    elif login and "/" not in login and not _NAMES_USERS.fullmatch(scheme):
        login = MASK
    return _SECRET_OPTION.sub(rf"\g<1>{MASK}", f"{scheme}{mark}{login}{at}{place}")


def parse_redis_url(url: str) -> RedisTarget:
    """Read the address of a Redis or Valkey server.

    `redis://` and `valkey://` are plain TCP, `rediss://` and `valkeys://` TLS, `unix:///path` a socket. User,
    password, path and options are percent-decoded; the database stands in the path or in `?db=`. Options:
    `db`, `username`, `password`, `connect_timeout`, `request_timeout` (seconds), and with TLS `tls_ca`,
    `tls_cert`, `tls_key`, `tls_server_name`, `tls_insecure`. The names that redis-py uses in its URLs for the
    same things (`ssl_ca_certs`, `socket_timeout` …) are understood as well.

    `redis+sentinel://host1:26379,host2:26379/service/db` names sentinels, which say where the primary of the
    service is. User and password are for the primary, the options `sentinel_username` and `sentinel_password`
    for the sentinels; TLS (`rediss+sentinel://`) and timeouts are for both.

    `redis+cluster://host1:6379,host2:6379` names nodes of a cluster, which say where the others are; all have
    the same user, password, TLS (`rediss+cluster://`) and timeouts. The option `partitions` says how many
    partitions locks and services are spread over.

    Raises: InvalidArgument: the address can't be used; says what is allowed.
    """
    parts = _split("redis_url", url, _REDIS_ALLOWED)
    scheme = parts["scheme"]
    if scheme == "embedded":
        raise _refused(url, "an embedded server has no address before it runs; resolve_redis() starts it")
    via_sentinel, via_cluster = scheme.endswith(_VIA_SENTINEL), scheme.endswith(_VIA_CLUSTER)
    kind = _SCHEMES.get(scheme.removesuffix(_VIA_SENTINEL).removesuffix(_VIA_CLUSTER))
    if kind is None or (kind == "unix" and (via_sentinel or via_cluster)):
        raise _refused(url, _REDIS_ALLOWED)
    login, _, place = parts["authority"].rpartition("@")
    username, _, password = login.partition(":")
    fields: dict[str, Any] = {
        "kind": kind,
        "username": _decoded(url, username) or None,
        "password": _decoded(url, password) or None,
    }
    if kind == "unix":
        path = _decoded(url, parts["path"])
        if place or len(path) < 2:  # noqa: PLR2004 - a path is a slash and at least one letter
            raise _refused(url, "a socket is written unix:///absolute/path/to.sock")
        fields |= {"host": "", "port": 0, "path": path}
    else:
        number = parts["path"].strip("/")
        if via_sentinel:
            service, _, number = parts["path"].removeprefix("/").rstrip("/").partition("/")
            fields |= {"host": "", "port": 0, "service": _decoded(url, service)}
        elif via_cluster:
            fields |= {"host": "", "port": 0}
        else:
            host, port = _host_and_port(url, place, "redis_url")
            fields |= {"host": host or "localhost", "port": port or _PORT}
        if number:
            fields["db"] = _database(url, number)
    _add_options(url, parts["query"], fields, via_sentinel=via_sentinel, via_cluster=via_cluster)
    if via_sentinel:
        fields["sentinels"] = _sentinels(url, place, fields)
    elif via_cluster:
        if fields.get("db"):
            raise _refused(url, "a cluster has only the database 0")
        login_of_all = {name: fields[name] for name in ("username", "password")}
        fields["cluster"] = _targets(url, place, fields, login_of_all, "node", _PORT)
    return RedisTarget(**fields)


def postgres_dsn(url: str) -> str:
    """The address of a PostgreSQL database as asyncpg and libpq read it.

    SQLAlchemy's driver suffix (`+asyncpg`, `+psycopg`) is taken off, `postgres://` becomes `postgresql://`,
    and SQLAlchemy's `ssl=` option for asyncpg becomes `sslmode=`.

    Raises: InvalidArgument: the address can't be used; says what is allowed.
    """
    parts = _split("postgres_url", url, _POSTGRES_ALLOWED)
    scheme, plus, driver = parts["scheme"].partition("+")
    if scheme == "embedded":
        raise _refused(
            url,
            "an embedded server has no address before it runs; resolve_database() starts it",
            "postgres_url",
        )
    if scheme not in ("postgresql", "postgres") or (plus and driver not in _DRIVERS):
        raise _refused(url, _POSTGRES_ALLOWED, "postgres_url")
    login, at, places = parts["authority"].rpartition("@")
    for place in places.split(","):
        _host_and_port(url, place, "postgres_url")
    if parts["path"].count("/") > 1:
        raise _refused(url, "the path is the name of one database", "postgres_url")
    query = re.sub(r"(^|&)ssl=", r"\1sslmode=", parts["query"])
    return f"postgresql://{login}{at}{places}{parts['path']}{'?' if query else ''}{query}"


def _split(field_name: str, url: str, allowed: str) -> dict[str, str]:
    if not isinstance(url, str):
        raise InvalidArgument(field_name, url, f"it must be a string; {allowed}")
    if len(url) > _LONGEST:
        raise InvalidArgument(
            field_name, mask_url(url[:_LONGEST]), f"it must be at most {_LONGEST} characters long"
        )
    if _UNSAFE.search(url):
        raise InvalidArgument(
            field_name, mask_url(url), "spaces and control characters must be percent-encoded"
        )
    scheme, mark, rest = url.partition("://")
    match = _SPLIT.fullmatch(f"{scheme.lower()}{mark}{rest}")
    if match is None:
        if mark and "#" in rest:
            allowed = "a '#' must be written %23"
        raise InvalidArgument(field_name, mask_url(url), allowed)
    return {name: text or "" for name, text in match.groupdict().items()}


def _host_and_port(url: str, place: str, field_name: str) -> tuple[str, int]:
    """Host and port; an empty host or a port of 0 where they aren't given."""
    match = re.fullmatch(
        r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<name>[^\[\]:@]*))(?::(?P<port>[^:]*))?", place
    )
    if match is None:
        raise _refused(url, "the host is a name, an IPv4 address, or an IPv6 address in brackets", field_name)
    port = match["port"] or ""
    if port and not (port.isascii() and port.isdigit() and 0 < int(port[:9]) <= _HIGHEST_PORT):
        raise _refused(url, f"the port must be a number from 1 to {_HIGHEST_PORT}", field_name)
    host = match["v6"] or _decoded(url, match["name"] or "", field_name)
    return host, int(port or 0)


def _add_options(
    url: str, query: str, fields: dict[str, Any], *, via_sentinel: bool, via_cluster: bool
) -> None:
    for name, value in _options(url, query):
        if name.startswith("tls_") and fields["kind"] != "tls":
            raise _refused(url, f"the option {name} needs rediss:// or valkeys://")
        if name.startswith("sentinel_") and not via_sentinel:
            raise _refused(url, f"the option {name} needs redis+sentinel:// or rediss+sentinel://")
        if name == "partitions" and not via_cluster:
            raise _refused(url, f"the option {name} needs redis+cluster:// or rediss+cluster://")
        if name in fields and fields[name] not in (None, value):
            raise _refused(url, f"{name} must be given once")
        fields[name] = value
    if fields.get("tls_key") is not None and fields.get("tls_cert") is None:
        raise _refused(url, "tls_key needs tls_cert beside it")


def _sentinels(url: str, places: str, fields: dict[str, Any]) -> tuple[RedisTarget, ...]:
    """The targets of the sentinels; takes their options out of the fields of the server's own target."""
    if not fields["service"]:
        raise _refused(url, "the service is missing, as in redis+sentinel://host1,host2/service/db")
    login = {name: fields.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    if login["username"] is not None and login["password"] is None:
        raise _refused(url, "sentinel_username needs sentinel_password beside it")
    return _targets(url, places, fields, login, "sentinel", _SENTINEL_PORT)


def _targets(
    url: str, places: str, fields: dict[str, Any], login: dict[str, Any], what: str, port_of_most: int
) -> tuple[RedisTarget, ...]:
    """The servers named between commas, with TLS and timeouts as in the fields."""
    shared = {name: fields[name] for name in fields if name.startswith("tls_") or name.endswith("_timeout")}
    found: dict[tuple[str, int], RedisTarget] = {}
    for place in places.split(","):
        host, port = _host_and_port(url, place, "redis_url")
        if not host and "," in places:
            raise _refused(url, f"a {what} between commas has no host")
        address = (host or "localhost", port or port_of_most)
        if address in found:
            raise _refused(url, f"the {what} {found[address].place} must be named once")
        fields_of_it = {"kind": fields["kind"], "host": address[0], "port": address[1], **login, **shared}
        found[address] = RedisTarget(**fields_of_it)
    return tuple(found.values())


def _decoded(url: str, text: str, field_name: str = "redis_url") -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _refused(url, "percent-encoded text must be UTF-8", field_name) from None
    if "\0" in decoded:
        raise _refused(url, "a NUL character is never allowed", field_name)
    return decoded


def _database(url: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _HIGHEST_DB):  # noqa: PLR2004
        raise _refused(url, f"the database must be a number from 0 to {_HIGHEST_DB}")
    return int(text)


def _options(url: str, query: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for pair in filter(None, query.split("&")):
        name, _, text = pair.partition("=")
        option = _OPTIONS.get(name)
        if option is None:
            # Where an @ follows, this is not an option but the rest of a password with a question mark in it.
            shown = f"the option {name!r}" if "@" not in query else "an option"
            raise _refused(url, f"{shown} is unknown; known are {', '.join(sorted(_OPTIONS))}")
        target, read = option
        found.append((target, read(url, _decoded(url, text.replace("+", "%20")))))
    return found


def _refused(url: str, allowed: str, field_name: str = "redis_url") -> InvalidArgument:
    return InvalidArgument(field_name, mask_url(url), allowed)


def _text(url: str, text: str) -> str:
    if not text:
        raise _refused(url, "an option needs a value")
    return text


def _seconds(url: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise _refused(url, "a timeout is a positive number of seconds")
    return seconds


def _partitions(url: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) <= MOST_PARTITIONS):
        raise _refused(url, f"partitions must be a number from 1 to {MOST_PARTITIONS}")
    return int(text)


def _flag(url: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise _refused(url, "tls_insecure is true or false")


def _cert_reqs(url: str, text: str) -> bool:
    if text in ("required", "optional"):
        return False
    if text == "none":
        return True
    raise _refused(url, "ssl_cert_reqs is required, optional or none")


_OPTIONS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "db": ("db", _database),
    "username": ("username", _text),
    "password": ("password", _text),
    "connect_timeout": ("connect_timeout", _seconds),
    "request_timeout": ("request_timeout", _seconds),
    "partitions": ("partitions", _partitions),
    "sentinel_username": ("sentinel_username", _text),
    "sentinel_password": ("sentinel_password", _text),
    "tls_ca": ("tls_ca", _text),
    "tls_cert": ("tls_cert", _text),
    "tls_key": ("tls_key", _text),
    "tls_server_name": ("tls_server_name", _text),
    "tls_insecure": ("tls_insecure", _flag),
    # The same things under the names of redis-py's URLs.
    "socket_connect_timeout": ("connect_timeout", _seconds),
    "socket_timeout": ("request_timeout", _seconds),
    "ssl_ca_certs": ("tls_ca", _text),
    "ssl_certfile": ("tls_cert", _text),
    "ssl_keyfile": ("tls_key", _text),
    "ssl_cert_reqs": ("tls_insecure", _cert_reqs),
}
