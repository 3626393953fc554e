"""Addresses of servers.

Promises: every supported form is read into the same target that wrote it; anything else is refused with
`InvalidArgument` on the right field; no error text and no shown form ever contains a password.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dotmac.platform.connection.urls import RedisTarget, mask_url, parse_redis_url, postgres_dsn
from dotmac.platform.errors import InvalidArgument

SECRET = "s3cr3t-p4ss"
word = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=20)


def quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


@given(
    st.sampled_from(["redis", "valkey", "rediss", "valkeys", "REDIS"]),
    st.one_of(st.none(), word),
    st.one_of(st.none(), word),
    st.one_of(st.just("localhost"), st.ip_addresses().map(str), st.just("cache-1.example.org")),
    st.integers(1, 65_535),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
def test_tcp_addresses_are_read_back(scheme, user, password, host, port, db, in_query) -> None:
    login = quoted(user or "") + (f":{quoted(password)}" if password is not None else "")
    place = f"[{host}]" if ":" in host else host
    tail = f"?db={db}" if in_query else f"/{db}"
    target = parse_redis_url(f"{scheme}://{login}{'@' if login else ''}{place}:{port}{tail}")
    assert target.kind == ("tls" if scheme.endswith("s") and scheme != "redis" else "tcp")
    assert (target.username, target.password) == (user, password)
    assert (target.host, target.port, target.db) == (host, port, db)


@given(
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/"), min_size=1),
    st.integers(0, 99),
)
def test_sockets_are_read_back(name: str, db: int) -> None:
    target = parse_redis_url(f"unix:///run/{quoted(name)}?db={db}")
    assert target == RedisTarget(kind="unix", host="", port=0, path=f"/run/{name}", db=db)


def test_defaults_and_options() -> None:
    assert parse_redis_url("redis://") == RedisTarget()
    target = parse_redis_url(
        "rediss://u:p@h?tls_ca=%2Fca.pem&tls_cert=/c.pem&tls_key=/k.pem&tls_server_name=x"
        "&tls_insecure=true&connect_timeout=1.5&request_timeout=2&db=3"
    )
    assert target == RedisTarget(
        "tls", "h", 6379, "", 3, "u", "p", "/ca.pem", "/c.pem", "/k.pem", "x", True, 1.5, 2.0
    )
    assert parse_redis_url("rediss://h?ssl_cert_reqs=none&socket_timeout=7&ssl_ca_certs=/a") == RedisTarget(
        "tls", "h", tls_insecure=True, request_timeout=7.0, tls_ca="/a"
    )


@given(
    st.sampled_from(["redis", "valkey", "rediss", "valkeys"]),
    st.lists(
        st.tuples(
            st.one_of(st.just("s1.example.org"), st.ip_addresses().map(str)),
            st.one_of(st.none(), st.integers(1, 65_535)),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda place: (place[0], place[1] or 26_379),
    ),
    word,
    st.one_of(st.none(), word),
    st.integers(0, 99),
)
def test_sentinels_are_read_back(scheme, places, service, password, db) -> None:
    shown = ",".join(
        (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "") for host, port in places
    )
    options = f"?sentinel_password={quoted(password)}" if password is not None else ""
    target = parse_redis_url(f"{scheme}+sentinel://u:p@{shown}/{quoted(service)}/{db}{options}")
    kind = "tls" if scheme in ("rediss", "valkeys") else "tcp"
    assert target == RedisTarget(
        kind,
        host="",
        port=0,
        db=db,
        username="u",
        password="p",
        service=service,
        sentinels=tuple(RedisTarget(kind, host, port or 26_379, password=password) for host, port in places),
    )
    again = parse_redis_url(str(target))
    assert (again.service, again.db) == (service, db)
    assert [one.place for one in again.sentinels] == [one.place for one in target.sentinels]


def test_timeouts_and_tls_are_for_the_sentinels_too() -> None:
    target = parse_redis_url(
        "rediss+sentinel://:p@a,b:7/m?db=2&connect_timeout=1&tls_ca=/ca&tls_server_name=x"
        f"&sentinel_username=w&sentinel_password={SECRET}"
    )
    shared = {"tls_ca": "/ca", "tls_server_name": "x", "connect_timeout": 1.0}
    login = {"username": "w", "password": SECRET}
    assert target.sentinels == (
        RedisTarget("tls", "a", 26_379, **login, **shared),
        RedisTarget("tls", "b", 7, **login, **shared),
    )
    assert (target.db, target.tls_ca, target.connect_timeout) == (2, "/ca", 1.0)
    assert SECRET not in str(target) + repr(target)
    assert str(target) == "rediss+sentinel://:***@a:26379,b:7/m/2"
    other = target.with_timeouts(9.0, 8.0)
    assert (other.connect_timeout, other.request_timeout) == (1.0, 8.0)
    assert {(one.connect_timeout, one.request_timeout) for one in other.sentinels} == {(1.0, 8.0)}


def test_nodes_of_a_cluster_share_login_tls_and_timeouts() -> None:
    target = parse_redis_url(
        f"rediss+cluster://u:{SECRET}@a,[::1]:7?connect_timeout=1&tls_ca=/ca&partitions=16"
    )
    shared = {"username": "u", "password": SECRET, "tls_ca": "/ca", "connect_timeout": 1.0}
    assert target.cluster == (RedisTarget("tls", "a", 6379, **shared), RedisTarget("tls", "::1", 7, **shared))
    assert (target.kind, target.db, target.partitions, target.sentinels) == ("tls", 0, 16, ())
    assert SECRET not in str(target) + repr(target)
    assert str(target) == "rediss+cluster://u:***@a:6379,[::1]:7"
    assert target.with_partitions(32) is target
    plain = parse_redis_url("valkey+cluster://")
    assert [node.place for node in plain.cluster] == ["localhost:6379"]
    assert plain.partitions is None
    assert plain.with_partitions(None).partitions == 64
    assert plain.with_partitions(32).partitions == 32
    assert parse_redis_url("redis://h").with_partitions(32).partitions is None


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "redis://"),
        ("localhost:6379", "redis://"),
        ("http://h", "unix://"),
        ("redis+sentinel://h", "service is missing"),
        ("redis+sentinel://h/", "service is missing"),
        ("redis+sentinel://h//0", "service is missing"),
        ("redis+sentinel://a,,b/m", "no host"),
        ("redis+sentinel://a,b:x/m", "1 to 65535"),
        ("redis+sentinel://a,b,a:26379/m", "a:26379 must be named once"),
        ("redis+sentinel://a/m/x", "database"),
        ("redis+sentinel://a/m/0/1", "database"),
        ("redis+sentinel://a/m?sentinel_username=u", "sentinel_password"),
        ("redis+sentinel://a/m?tls_ca=/x", "needs rediss://"),
        ("redis://h?sentinel_password=x", "needs redis+sentinel://"),
        ("unix+sentinel:///a/m", "redis+sentinel://"),
        ("embedded+sentinel://a/m", "redis+sentinel://"),
        ("redis+cluster://a/1", "only the database 0"),
        ("redis+cluster://a?db=1", "only the database 0"),
        ("redis+cluster://a/x", "database"),
        ("redis+cluster://a,,b", "a node between commas has no host"),
        ("redis+cluster://a,a:6379", "the node a:6379 must be named once"),
        ("redis+cluster://a?partitions=0", "from 1 to 1024"),
        ("redis+cluster://a?partitions=1025", "from 1 to 1024"),
        ("redis+cluster://a?partitions=many", "from 1 to 1024"),
        ("redis+cluster://a?tls_ca=/x", "needs rediss://"),
        ("redis://a?partitions=64", "needs redis+cluster://"),
        ("redis+sentinel://a/m?partitions=64", "needs redis+cluster://"),
        ("unix+cluster:///a", "redis+cluster://"),
        ("embedded://", "resolve_redis"),
        ("redis://h:0", "1 to 65535"),
        ("redis://h:65536", "1 to 65535"),
        ("redis://h:٣", "1 to 65535"),
        ("redis://h:port", "1 to 65535"),
        ("redis://h/minus", "database"),
        ("redis://h/-1", "database"),
        ("redis://h/2147483648", "database"),
        ("redis://h/1?db=2", "given once"),
        ("redis://h/1/2", "database"),
        ("redis://h?colour=red", "known are"),
        ("redis://h?connect_timeout=0", "positive"),
        ("redis://h?connect_timeout=nan", "positive"),
        ("redis://h?connect_timeout=inf", "positive"),
        ("redis://h?tls_ca=/x", "needs rediss://"),
        ("rediss://h?tls_insecure=maybe", "true or false"),
        ("rediss://h?tls_key=/k", "tls_cert"),
        ("rediss://h?tls_ca=", "needs a value"),
        ("redis://[::1", "brackets"),
        ("redis://::1", "brackets"),
        ("unix://relative/x.sock", "unix:///"),
        ("unix://", "unix:///"),
        ("redis://h/#", "%23"),
        ("redis://a b", "percent-encoded"),
        ("redis://h\n", "percent-encoded"),
        ("redis://%ff@h", "UTF-8"),
        ("redis://%00@h", "NUL"),
        pytest.param("redis://" + "h" * 10_000_000, "at most", id="10 MB"),
    ],
)
def test_what_cannot_be_used_is_refused(url: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_redis_url(url)
    assert caught.value.field == "redis_url"
    assert says in caught.value.allowed
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("value", [None, 7, b"redis://h", ["redis://h"]])
def test_only_strings_are_addresses(value: object) -> None:
    with pytest.raises(InvalidArgument, match="must be a string"):
        parse_redis_url(value)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(InvalidArgument, match="must be a string"):
        postgres_dsn(value)  # type: ignore[arg-type]  # the point of the test


@given(st.text(max_size=60))
def test_any_text_gives_a_target_or_a_typed_error(text: str) -> None:
    for read in (parse_redis_url, postgres_dsn):
        for url in (text, f"redis://{text}", f"postgresql://{text}"):
            try:
                read(url)
            except InvalidArgument:
                continue


@given(
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=10),
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=10),
)
@example("?", "")
def test_no_shown_form_contains_the_password(before: str, after: str) -> None:
    password = f"{before}{SECRET}{after}"
    assert SECRET not in mask_url(f"redis://user:{password}@host:6379/0")
    assert SECRET not in mask_url(f"postgresql+asyncpg://user:{password}@host/db")
    for url in (
        f"redis://user:{password}@host:port/0",
        f"http://:{password}@host",
        f"redis://u:{password}@h?x=1",
    ):
        with pytest.raises(InvalidArgument) as caught:
            parse_redis_url(url)
        assert SECRET not in str(caught.value)
        assert SECRET not in repr(caught.value.value)


def test_targets_and_options_hide_the_password() -> None:
    target = parse_redis_url(f"redis://user:{SECRET}@host/2")
    assert SECRET not in repr(target)
    assert str(target) == "redis://user:***@host:6379/2"
    assert str(parse_redis_url("unix:///a/b.sock?db=1")) == "unix:///a/b.sock?db=1"
    assert mask_url(f"redis://h?password={SECRET}&db=1") == "redis://h?password=***&db=1"
    assert mask_url("redis://user@h") == "redis://user@h"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://tok@host/x", "https://***@host/x"),
        ("tok@host", "***@host"),
        ("postgresql+asyncpg://user@host/db", "postgresql+asyncpg://user@host/db"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://h/x?token=tok&a=1", "https://h/x?token=***&a=1"),
        ("https://h/x?a=1&KEY=tok#f", "https://h/x?a=1&KEY=***#f"),
        ("https://h/x?sv=1&sig=tok", "https://h/x?sv=1&sig=***"),
        ("https://h/x?api_key=tok&apikey=tok", "https://h/x?api_key=***&apikey=***"),
        (
            "https://h/x?X-Amz-Credential=tok&X-Amz-Signature=tok&X-Amz-Expires=9",
            "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Expires=9",
        ),
        ("rediss://h?tls_key=/etc/key.pem", "rediss://h?tls_key=/etc/key.pem"),
    ],
)
def test_tokens_are_hidden(url: str, shown: str) -> None:
    assert mask_url(url) == shown


@pytest.mark.parametrize(
    ("url", "dsn"),
    [
        (
            "postgresql+asyncpg://user:pass@localhost:5432/dotmac",
            "postgresql://user:pass@localhost:5432/dotmac",
        ),
        ("postgresql+psycopg://u@h/d", "postgresql://u@h/d"),
        (
            "postgres://u:p%40@[::1]:5433/d?application_name=x",
            "postgresql://u:p%40@[::1]:5433/d?application_name=x",
        ),
        ("postgresql://postgres@/d?host=/run/pg", "postgresql://postgres@/d?host=/run/pg"),
        ("postgresql://a:1,b:2/d", "postgresql://a:1,b:2/d"),
        ("postgresql+asyncpg://h/d?ssl=require", "postgresql://h/d?sslmode=require"),
        ("postgresql://h", "postgresql://h"),
    ],
)
def test_database_addresses(url: str, dsn: str) -> None:
    assert postgres_dsn(url) == dsn


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://h/d", "postgresql://"),
        ("postgresql+oracle://h/d", "postgresql://"),
        ("postgresql://h:99999/d", "1 to 65535"),
        ("postgresql://h/a/b", "one database"),
        ("embedded://", "resolve_database"),
        ("", "postgresql://"),
    ],
)
def test_bad_database_addresses(url: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        postgres_dsn(url)
    assert caught.value.field == "postgres_url"
    assert says in caught.value.allowed
