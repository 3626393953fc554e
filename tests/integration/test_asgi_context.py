"""The ASGI middleware.

Promises: events that are logged while a request is answered know its correlation id, client, user and tenant: in
FastAPI's endpoints of both kinds, dependencies, background tasks, streams, and in websockets; requests at the
same time do not mix; the correlation id comes from the header, the trace or nowhere, is bounded and goes back;
the client's address is believed as far as trusted proxies vouch for it, and no further; the lifespan and unknown
protocols pass through; a request that is cancelled or fails leaves nothing; on a real server as well.
"""

# ruff: noqa: E501 (tables read best by the line)

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Annotated

import httpx
import pytest
import uvicorn
from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st

from dotmac.platform.audit_trail import AuditAggregator, current_audit_context
from dotmac.platform.contrib.asgi import AuditContextMiddleware
from dotmac.platform.errors import InvalidArgument

TRACE = "0af7651916cd43dd8448eb211c80319c"


def seen():
    now = current_audit_context()
    return [now.user_id, now.tenant_id, now.correlation_id, now.ip_address]


def make_app(**options):
    app, log = FastAPI(), []

    async def login(request: Request):
        request.state.user = request.headers.get("x-user")

    @app.get("/async", dependencies=[Depends(login)])
    async def asynchronous():
        await asyncio.sleep(0)
        return seen()

    @app.get("/sync", dependencies=[Depends(login)])
    def synchronous(inner: Annotated[list, Depends(seen)]):
        return inner if inner == seen() else "another one in the dependency"

    @app.get("/background", dependencies=[Depends(login)])
    async def background(tasks: BackgroundTasks):
        tasks.add_task(lambda: log.append(seen()))

    @app.get("/stream", dependencies=[Depends(login)])
    async def stream():
        async def parts():
            for _ in range(3):
                await asyncio.sleep(0)
                yield f"{seen()}\n"

        return StreamingResponse(parts())

    @app.get("/own")
    async def own():
        return StreamingResponse(iter(()), headers={"X-Correlation-ID": "mine"})

    @app.get("/fail")
    async def fail():
        raise RuntimeError("on purpose")

    @app.websocket("/ws")
    async def socket(ws: WebSocket):
        ws.state.user = "wanda"
        await ws.accept()
        await ws.send_json(seen())
        await ws.close()

    options.setdefault("user", lambda scope: scope.get("state", {}).get("user"))
    app.add_middleware(AuditContextMiddleware, **options)
    app.state.log = log
    return app


def client_of(app, peer="192.0.2.1"):
    transport = httpx.ASGITransport(app, client=(peer, 1), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert seen() == [None] * 4


async def test_every_kind_of_endpoint():
    app = make_app(tenant=lambda scope: dict(scope["headers"]).get(b"x-tenant", b"").decode() or None)
    wanted = ["ada", "t1", "c-1", "192.0.2.1"]
    headers = {"X-User": "ada", "X-Tenant": "t1", "X-Correlation-ID": "c-1"}
    async with client_of(app) as client:
        for path in ("/async", "/sync"):
            answer = await client.get(path, headers=headers)
            assert answer.json() == wanted, path
            assert answer.headers["x-correlation-id"] == "c-1"
        assert (await client.get("/stream", headers=headers)).text == f"{wanted}\n" * 3
        await client.get("/background", headers=headers)
        assert app.state.log == [wanted]
        assert (await client.get("/own", headers=headers)).headers.get_list("x-correlation-id") == ["mine"]
        assert (await client.get("/fail", headers=headers)).status_code == 500
        assert (await client.get("/async")).json()[:2] == [None, None]


async def test_requests_at_the_same_time_do_not_mix():
    async with client_of(make_app()) as client:

        async def ask(number):
            path = ("/async", "/sync")[number % 2]
            return (
                await client.get(path, headers={"X-User": f"u{number}", "X-Request-ID": f"c{number}"})
            ).json()

        found = await asyncio.gather(*(ask(number) for number in range(60)))
    assert [(one[0], one[2]) for one in found] == [(f"u{number}", f"c{number}") for number in range(60)]


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({"X-Correlation-ID": "a", "X-Request-ID": "b"}, "a"),
        ({"X-Request-ID": "b:1/2=3@x~y+z-._"}, "b:1/2=3@x~y+z-._"),
        ({"X-Correlation-ID": "a b", "X-Request-ID": "b"}, "b"),
        ({"X-Correlation-ID": "x" * 128}, "x" * 128),
        ({"X-Correlation-ID": "x" * 129}, None),
        ({"X-Correlation-ID": ""}, None),
        ({"X-Correlation-ID": "<script>"}, None),
        ({"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}, TRACE),
        ({"X-Request-ID": "b", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}, "b"),
        ({"traceparent": f"cc-{TRACE}-b7ad6b7169203331-01-what-the-future-brings"}, TRACE),
        ({"traceparent": f"00-{TRACE}-b7ad6b7169203331-01-x"}, None),
        ({"traceparent": f"ff-{TRACE}-b7ad6b7169203331-01"}, None),
        ({"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"}, None),
        ({"traceparent": f"00-{TRACE}-{'0' * 16}-01"}, None),
        ({"traceparent": f"00-{TRACE.upper()}-b7ad6b7169203331-01"}, None),
    ],
)
async def test_the_correlation_id(headers, wanted):
    async with client_of(make_app()) as client:
        answer = await client.get("/async", headers=headers)
    found = answer.json()[2]
    assert found == wanted if wanted else uuid.UUID(found)
    assert answer.headers["x-correlation-id"] == found


async def raw(app, kind="http", headers=(), client=("192.0.2.1", 1), **more):
    """One message of a scope of one's own; what was sent."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": f"{kind}.connect" if kind == "websocket" else "http.request"}

    scope = {
        "type": kind, "path": "/ws", "raw_path": b"/ws", "query_string": b"", "root_path": "", "scheme": "ws",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers], "client": client,
        "server": ("test", 1), "subprotocols": [], "state": {}, "method": "GET", **more,
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


async def test_websockets():
    sent = await raw(make_app(), "websocket", [("X-Correlation-ID", "c-9")])
    assert sent[0]["type"] == "websocket.accept"
    assert (b"x-correlation-id", b"c-9") in sent[0]["headers"]
    assert sent[1]["text"] == '["wanda",null,"c-9","192.0.2.1"]'
    refused = make_app()
    refused.router.routes.clear()
    sent = await raw(refused, "websocket", [("X-Correlation-ID", "c-9")])
    assert sent


async def test_what_is_no_request_passes_through():
    passed = []

    async def app(scope, receive, send):
        passed.append((scope["type"], seen(), receive, send))

    async def receive(): ...
    async def send(message): ...

    middleware = AuditContextMiddleware(app, user=lambda _: 1 / 0)
    for kind in ("lifespan", "something new"):
        await middleware({"type": kind}, receive, send)
    assert passed == [(kind, [None] * 4, receive, send) for kind in ("lifespan", "something new")]


async def test_coroutine_functions_are_asked_before_the_application():
    async def who(scope):
        await asyncio.sleep(0)
        return "ada"

    class Tenant:
        async def __call__(self, scope):
            return 7

    async with client_of(make_app(user=who, tenant=Tenant())) as client:
        assert (await client.get("/async")).json()[:2] == ["ada", 7]


async def test_cancelled_requests_leave_nothing():
    started = asyncio.Event()

    async def app(scope, receive, send):
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(raw(AuditContextMiddleware(app)))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async def inside():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await raw(AuditContextMiddleware(app))
        return seen()

    assert await inside() == [None] * 4


# --- the client's address

PROXIES = ["10.0.0.0/8", "2001:db8::/32"]
CHAINS = [
    ([], "203.0.113.9", "192.0.2.1", "192.0.2.1"),
    (PROXIES, "203.0.113.9", "192.0.2.1", "192.0.2.1"),
    (PROXIES, "203.0.113.9", "10.0.0.1", "203.0.113.9"),
    (PROXIES, "1.1.1.1, 203.0.113.9", "10.0.0.1", "203.0.113.9"),
    (PROXIES, "1.1.1.1, 203.0.113.9, 10.0.0.2,10.0.0.3", "10.0.0.1", "203.0.113.9"),
    (PROXIES, "10.0.0.2, 10.0.0.3", "10.0.0.1", "10.0.0.2"),
    (PROXIES, "1.1.1.1, unknown, 10.0.0.3", "10.0.0.1", "10.0.0.3"),
    (PROXIES, "1.1.1.1, garbage", "10.0.0.1", "10.0.0.1"),
    (PROXIES, "", "10.0.0.1", "10.0.0.1"),
    (PROXIES, "203.0.113.9:4711", "10.0.0.1", "203.0.113.9"),
    (PROXIES, "[2001:db9::1]:4711", "2001:db8::1", "2001:db9::1"),
    (PROXIES, "2001:db9::1", "::ffff:10.0.0.1", "2001:db9::1"),
    (PROXIES, "203.0.113.9", "testclient", None),
]


@pytest.mark.parametrize(("trusted", "header", "peer", "wanted"), CHAINS)
async def test_x_forwarded_for(trusted, header, peer, wanted):
    async with client_of(make_app(trusted_proxies=trusted), peer) as client:
        headers = {"X-Forwarded-For": header, "Forwarded": "for=6.6.6.6"}
        assert (await client.get("/async", headers=headers)).json()[3] == wanted


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("for=203.0.113.9;proto=https;by=10.0.0.1", "203.0.113.9"),
        ('for=1.1.1.1, For="[2001:db9::1]:4711"', "2001:db9::1"),
        ("for=1.1.1.1, for=_hidden", "10.0.0.1"),
        ("for=1.1.1.1, for=unknown, for=10.0.0.7", "10.0.0.7"),
        ('for="1.1.1.1, for=203.0.113.9', "203.0.113.9"),
        ("proto=https", "10.0.0.1"),
        ('by=10.0.0.1 ; for="203.0.113.9:80"', "203.0.113.9"),
    ],
)
async def test_forwarded(header, wanted):
    app = make_app(trusted_proxies=PROXIES, proxy_header="forwarded")
    async with client_of(app, "10.0.0.1") as client:
        headers = {"Forwarded": header, "X-Forwarded-For": "6.6.6.6"}
        assert (await client.get("/async", headers=headers)).json()[3] == wanted


async def test_several_headers_and_unix_sockets():
    seen_by = []

    async def app(scope, receive, send):
        seen_by.append(seen()[3])

    hops = [("X-Forwarded-For", "6.6.6.6, 203.0.113.9"), ("X-Forwarded-For", "10.0.0.2")]
    await raw(AuditContextMiddleware(app, trusted_proxies=["unix", *PROXIES]), headers=hops, client=None)
    await raw(AuditContextMiddleware(app, trusted_proxies=["unix", *PROXIES]), headers=hops, client=("", 0))
    await raw(AuditContextMiddleware(app, trusted_proxies=PROXIES), headers=hops, client=None)
    await raw(AuditContextMiddleware(app, trusted_proxies=["unix"]), headers=hops, client=("10.0.0.1", 0))
    assert seen_by == ["203.0.113.9", "203.0.113.9", None, "10.0.0.1"]


@given(
    st.lists(st.sampled_from(["10.0.0.9", "6.6.6.6", "garbage", "", "[::1", '"', "for="]), max_size=40),
    st.text(max_size=30),
)
def test_nobody_left_of_the_first_stranger_is_believed(hops, noise):
    found = []

    async def app(scope, receive, send):
        found.append(seen()[3])

    middleware = AuditContextMiddleware(app, trusted_proxies=["10.0.0.0/8"])
    header = ", ".join([*hops, "203.0.113.9", "10.0.0.2"])
    scope_headers = [
        (b"x-forwarded-for", noise.encode() + b"," + header.encode()),
        (b"x-correlation-id", noise.encode()),
    ]
    asyncio.run(middleware({"type": "http", "headers": scope_headers, "client": ("10.0.0.1", 1)}, None, None))
    assert found == ["203.0.113.9"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"user": "ada"}, "user"),
        ({"trusted_proxies": "10.0.0.0/8"}, "list"),
        ({"trusted_proxies": ["10.0.0.1/8"]}, "host bits"),
        ({"trusted_proxies": ["proxy"]}, "trusted_proxies"),
        ({"proxy_header": "x-real-ip"}, "forwarded"),
        ({"correlation_headers": ["a b"]}, "correlation_headers"),
        ({"response_header": "a\r\nb"}, "correlation_headers"),
    ],
)
def test_wrong_arguments(wrong, told):
    with pytest.raises(InvalidArgument, match=told):
        AuditContextMiddleware(lambda *_: None, **wrong)


async def test_on_a_real_server_into_a_real_trail(migrated_url, unique):
    audit = AuditAggregator(migrated_url)
    app = make_app(trusted_proxies=["127.0.0.1"])

    @app.get("/log")
    async def log():
        return str(await audit.log_event("DATA_ACCESS", unique))

    @app.get("/slow")
    async def slow():
        await audit.log_event("DATA_ACCESS", f"{unique}.slow")
        await asyncio.sleep(0.2)
        return str(await audit.log_event("DATA_ACCESS", f"{unique}.slow"))

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        headers = {"X-Forwarded-For": "203.0.113.9"}
        answers = await asyncio.gather(
            *(client.get("/log", headers={**headers, "X-Request-ID": f"{unique}-{n}"}) for n in range(20))
        )
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/slow", headers={"X-Request-ID": f"{unique}-gone"}, timeout=0.1)
        assert (await client.get("/async")).json()[2] != f"{unique}-gone"
        await asyncio.sleep(0.3)
    server.should_exit = True
    await serving
    found = {str(event.id): event for event in await audit.query_events(actions=unique)}
    for number, answer in enumerate(answers):
        event = found[answer.json()]
        assert (event.correlation_id, event.ip_address) == (f"{unique}-{number}", "203.0.113.9")
        assert re.fullmatch(rf"{unique}-{number}", answer.headers["x-correlation-id"])
    last = await audit.query_events(actions=f"{unique}.slow")
    assert {event.correlation_id for event in last} == {f"{unique}-gone"}
    await audit.aclose()
