"""The audit trail over HTTP.

Promises:
- nothing is served before the router is mounted, and it can't be made without a guard; a guard that answers
  with anything but `AuditAccess` lets nobody see anything; what it raises is the answer;
- a caller sees the events of its tenants alone: in lists, single events, counts, histograms, facets (also
  those of the tenant), timelines and streams; asking for another tenant is 403, another's event is 404;
- lists lead on and back by cursors, with the filters of `query_events` as parameters;
- errors are `application/problem+json` with status, detail, code and field, those of the guard and of FastAPI
  too; errors of the database do not say where it is;
- the OpenAPI document is valid, and describes problems and the stream by their media types;
- a stream tells of each event once, with its id; it goes on after `Last-Event-ID`; it sends heartbeats that
  bear the position; it ends with its client, at the end of a server that stops, and after a while, so that
  the guard is asked again; there are only so many;
- a client that does not read holds the stream up, not the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from uuid import uuid4

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.histogram import GROUPS
from dotmac.platform.audit_trail.time_units import UNITS
from dotmac.platform.cli.demo.processes import serve
from dotmac.platform.contrib.fastapi import AuditAccess, audit_router, unprotected
from dotmac.platform.contrib.fastapi.audit import Field, Unit
from dotmac.platform.errors import InvalidArgument

PROBLEM = "application/problem+json"


def guard(request: Request) -> AuditAccess:
    """Names of tenants in a header stand for a login."""
    who = request.headers.get("x-tenants")
    if who is None:
        raise HTTPException(401, "who are you?", {"WWW-Authenticate": "Bearer"})
    return AuditAccess.everything() if who == "*" else AuditAccess.of(*who.split(","))


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url) as aggregator:
        yield aggregator


def client_of(app, **headers):
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@pytest.fixture
async def app(audit):
    made = FastAPI()
    made.include_router(audit_router(audit, guard, heartbeat=0.3))
    return made


@pytest.fixture
async def tenants(audit, unique):
    """Two tenants with 30 events each; every third shares a correlation id with one of the other tenant."""
    names = (f"{unique}-a", f"{unique}-b")
    for number in range(30):
        for name in names:
            await audit.log_event(
                "DATA_ACCESS" if number % 2 else "SECURITY",
                f"step.{number:02}",
                user_id=f"u{number % 3}",
                tenant_id=name,
                ip_address=f"10.0.0.{number % 4}",
                correlation_id=f"{unique}-c" if number % 3 == 0 else None,
                metadata={"order": {"total": number}},
            )
    return names


async def test_it_is_off_until_mounted_and_never_without_a_guard(audit):
    async with client_of(FastAPI(), **{"x-tenants": "*"}) as client:
        assert (await client.get("/audit/events")).status_code == 404
    with pytest.raises(TypeError):
        audit_router(audit)
    with pytest.raises(InvalidArgument, match="authorize"):
        audit_router(audit, None)
    for wrong in (
        {"heartbeat": 0},
        {"heartbeat": "1"},
        {"max_streams": 0},
        {"max_streams": True},
        {"stream_seconds": 0},
    ):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            audit_router(audit, guard, **wrong)
    with pytest.raises(InvalidArgument, match="tenants"):
        AuditAccess.of()


@pytest.mark.parametrize("answer", [None, True, "acme", {"tenants": None}])
async def test_a_guard_that_says_nothing_clear_lets_nobody_in(audit, answer):
    app = FastAPI()
    app.include_router(audit_router(audit, lambda: answer))
    async with client_of(app) as client:
        for path in ("/audit/events", "/audit/count", "/audit/stream", f"/audit/events/{uuid4()}"):
            told = await client.get(path)
            assert (told.status_code, told.headers["content-type"]) == (500, PROBLEM)
            assert told.json()["code"] == "configuration"


async def test_an_open_router_has_to_be_asked_for(audit, tenants):
    app = FastAPI()
    app.include_router(audit_router(audit, unprotected, prefix="/trail"))
    async with client_of(app) as client:
        found = await client.get("/trail/count", params={"tenant_id": list(tenants)})
        assert found.json() == {"count": 60}


async def test_lists_lead_on_and_back(app, audit, tenants):
    mine = tenants[0]
    expected = [event.to_dict() for event in await audit.query_events(tenant_id=mine)]
    async with client_of(app, **{"x-tenants": mine}) as client:
        pages, cursor = [], None
        while True:
            asked = {"limit": 7} | ({"cursor": cursor} if cursor else {})
            answer = await client.get("/audit/events", params=asked)
            assert answer.headers["cache-control"] == "no-store"
            pages.append(answer.json())
            cursor = pages[-1]["next_cursor"]
            if cursor is None:
                break
        assert [event for page in pages for event in page["events"]] == expected
        assert pages[0]["previous_cursor"] is None
        back = (
            await client.get("/audit/events", params={"limit": 7, "cursor": pages[2]["previous_cursor"]})
        ).json()
        assert back["events"] == pages[1]["events"]


async def test_parameters_mean_what_the_filters_mean(app, audit, tenants):
    asked = {
        "category": "security", "level": "info", "outcome": "success", "action": ["step.0*", "step.1*"],
        "user_id": ["u0", "u1"], "ip_address": "10.0.0.0/30", "text": "STEP", "missing": "trace_id",
        "metadata": ["order.total>=4", "order"], "exclude": ["action=step.10", "metadata=order.total=12"],
        "order": "asc", "start_time": "2020-01-01T00:00:00Z",
    }  # fmt: skip
    async with client_of(app, **{"x-tenants": tenants[0]}) as client:
        found = (await client.get("/audit/events", params=asked)).json()["events"]
        assert [event["action"] for event in found] == ["step.04", "step.06", "step.16", "step.18"]
        assert (await client.get("/audit/count", params=asked)).json() == {"count": 4}
        facets = (await client.get("/audit/facets", params={"field": ["category", "user_id"]})).json()[
            "facets"
        ]
        assert [facet["field"] for facet in facets] == ["category", "user_id"]
        assert facets[1]["values"] == [{"value": f"u{n}", "count": 10} for n in range(3)]
        counted = (await client.get("/audit/histogram", params={"by": ["day", "category"]})).json()
        assert counted["total"] == 30
        assert {bucket["category"] for bucket in counted["buckets"]} == {"security", "data_access"}


async def test_a_caller_sees_its_tenants_alone(app, audit, tenants, unique):
    mine, other = tenants
    foreign = (await audit.query_events(tenant_id=other, limit=1))[0]
    own = (await audit.query_events(tenant_id=mine, limit=1))[0]
    async with client_of(app, **{"x-tenants": mine}) as client:

        async def get(path, **params):
            return (await client.get(f"/audit/{path}", params=params)).json()

        assert {event["tenant_id"] for event in (await get("events", limit=1000))["events"]} == {mine}
        assert await get("count") == {"count": 30}
        assert {bucket["tenant_id"] for bucket in (await get("histogram", by="tenant_id"))["buckets"]} == {
            mine
        }
        assert [one["value"] for one in (await get("facets", field="tenant_id"))["facets"][0]["values"]] == [
            mine
        ]
        steps = (await get(f"timelines/{unique}-c"))["steps"]
        assert [step["event"]["tenant_id"] for step in steps] == [mine] * 10
        assert (await get(f"events/{own.id}"))["id"] == str(own.id)
        hidden = await client.get(f"/audit/events/{foreign.id}")
        absent = await client.get(f"/audit/events/{uuid4()}")
        assert (hidden.status_code, absent.status_code) == (404, 404)
        assert hidden.json()["title"] == "Not Found"
        for path in ("events", "count", "histogram", "facets", f"timelines/{unique}-c", "stream"):
            refused = await client.get(f"/audit/{path}", params={"tenant_id": other})
            assert (refused.status_code, refused.headers["content-type"]) == (403, PROBLEM)
    async with client_of(app, **{"x-tenants": ",".join(tenants)}) as client:
        assert (await client.get("/audit/count")).json() == {"count": 60}
        assert (await client.get("/audit/count", params={"tenant_id": other})).json() == {"count": 30}


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("events?limit=0", 422, {"title": "Unprocessable Entity"}),
        ("events?category=nope", 422, {}),
        ("events?start_time=2024-01-01T00:00:00", 422, {}),
        ("events/not-an-id", 422, {}),
        ("histogram?by=metadata", 422, {}),
        ("events?cursor=x", 400, {"code": "audit.cursor", "title": "Bad Request", "type": "about:blank"}),
        ("events?ip_address=10.0.0", 400, {"code": "argument.invalid", "field": "ip_address"}),
        ("events?metadata=%3D", 400, {"field": "metadata"}),
        ("events?exclude=level%3Dnope", 400, {"field": "exclude['levels']"}),
        ("events?missing=action", 400, {"field": "missing"}),
        ("histogram?time_zone=Mars", 400, {"field": "time_zone"}),
        ("histogram?by=day&by=hour", 400, {"field": "by"}),
        ("stream?after=x", 400, {"code": "audit.cursor"}),
    ],
)
async def test_errors_are_problems(app, path, status, told):
    async with client_of(app, **{"x-tenants": "*"}) as client:
        answer = await client.get(f"/audit/{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    content = answer.json()
    assert content["status"] == status
    assert content["detail"]
    assert told.items() <= content.items()


async def test_the_guards_errors_are_problems_with_its_headers(app):
    async with client_of(app) as client:
        for path in ("events", "stream", "facets"):
            answer = await client.get(f"/audit/{path}")
            assert (answer.status_code, answer.headers["content-type"]) == (401, PROBLEM)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["detail"] == "who are you?"


async def test_a_database_that_is_away_is_503_and_keeps_its_address():
    app = FastAPI()
    async with AuditAggregator("postgresql://secret@127.0.0.1:1/d", timeout=0.3) as audit:
        app.include_router(audit_router(audit, unprotected))
        async with client_of(app) as client:
            for path in ("events", "stream"):
                answer = await client.get(f"/audit/{path}")
                assert (answer.status_code, answer.headers["content-type"]) == (503, PROBLEM)
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["code"] == "audit.unavailable"
                assert "127.0.0.1" not in answer.text
                assert "secret" not in answer.text


async def test_the_openapi_document_says_what_comes(app):
    async with client_of(app) as client:
        document = (await client.get("/openapi.json")).json()
    paths = {path: item["get"] for path, item in document["paths"].items()}
    assert set(paths) == {
        f"/audit/{name}"
        for name in (
            "events", "events/{event_id}", "count", "histogram", "facets", "timelines/{correlation_id}",
            "stream",
        )
    }  # fmt: skip
    for path, operation in paths.items():
        good = operation["responses"]["200"]["content"]
        assert set(good) == ({"text/event-stream"} if path.endswith("stream") else {"application/json"})
        for status in ("400", "401", "403", "422", "503"):
            assert set(operation["responses"][status]["content"]) == {PROBLEM}
    named = {one["name"]: one for one in paths["/audit/events"]["parameters"]}
    assert {"start_time", "end_time", "category", "metadata", "exclude", "cursor", "limit"} <= set(named)
    by = str(next(one for one in paths["/audit/histogram"]["parameters"] if one["name"] == "by"))
    assert all(repr(name) in by for name in (*UNITS, *GROUPS))
    assert Unit.__args__ == UNITS
    assert Field.__args__ == tuple(GROUPS)


# --- streams, on a real server


@contextlib.asynccontextmanager
async def served(app):
    """The address of a uvicorn in this loop."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()


async def messages(response):
    """The messages of a stream, as a browser reads them: (id, event, data); heartbeats have no data."""
    message = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            message[name] = value
        elif message:
            yield message.get("id"), message.get("event"), message.get("data")
            message = {}


async def read(url, count, **asked):
    """So many events of a stream, and the last id."""
    seen, last = [], None
    async with httpx.AsyncClient(timeout=30) as client, client.stream("GET", url, **asked) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        async for identity, event, data in messages(response):
            last = identity or last
            if event == "audit":
                seen.append(json.loads(data))
                if len(seen) == count:
                    break
    return seen, last


async def test_a_stream_tells_of_each_event_once_and_goes_on(app, audit, unique):
    async with served(app) as url:
        mine = {"x-tenants": unique}
        reading = asyncio.create_task(read(f"{url}/audit/stream", 5, headers=mine))
        await asyncio.sleep(0.7)
        stored = []
        for number in range(20):
            stored.append(await audit.log_event("SYSTEM", f"n{number}\n{number}", tenant_id=unique))
            await audit.log_event("SYSTEM", "other", tenant_id=f"{unique}-other")
        first, last = await asyncio.wait_for(reading, 30)
        second, last = await read(f"{url}/audit/stream", 7, headers={**mine, "Last-Event-ID": last})
        third, last = await read(f"{url}/audit/stream", 8, headers=mine, params={"after": last})
        assert [event["id"] for event in first + second + third] == [str(one) for one in stored]
        assert first[3]["action"] == "n3\n3"
        whole, _ = await read(f"{url}/audit/stream", 20, headers=mine, params={"since_start": "true"})
        assert [event["id"] for event in whole] == [str(one) for one in stored]


async def test_heartbeats_bear_the_position(app, audit, unique):
    async with served(app) as url:
        seen = []
        headers = {"x-tenants": unique}
        client = httpx.AsyncClient(timeout=30)
        async with client, client.stream("GET", f"{url}/audit/stream", headers=headers) as response:
            async for message in messages(response):
                seen.append(message)
                if len(seen) == 5:
                    break
        assert all(data is None for _, _, data in seen)
        positions = [identity for identity, _, _ in seen if identity is not None]
        assert len(positions) >= 4
        stored = await audit.log_event("SYSTEM", "x", tenant_id=unique)
        found, _ = await read(f"{url}/audit/stream", 1, headers={**headers, "Last-Event-ID": positions[0]})
        assert found[0]["id"] == str(stored)


async def test_streams_are_counted_and_end_with_their_clients(audit, unique):
    app = FastAPI()
    app.include_router(audit_router(audit, guard, heartbeat=0.2, max_streams=2))
    headers = {"x-tenants": unique}
    async with served(app) as url, httpx.AsyncClient(timeout=30, headers=headers) as client:
        # One whose start fails does not count.
        for _ in range(3):
            assert (await client.get(f"{url}/audit/stream", params={"after": "x"})).status_code == 400
        async with contextlib.AsyncExitStack() as open_ones:
            for _ in range(2):
                stream = client.stream("GET", f"{url}/audit/stream")
                assert (await open_ones.enter_async_context(stream)).status_code == 200
            refused = await client.get(f"{url}/audit/stream")
            assert (refused.status_code, refused.headers["content-type"]) == (503, PROBLEM)
            assert refused.headers["retry-after"] == "5"
        async with asyncio.timeout(10):
            while True:
                async with client.stream("GET", f"{url}/audit/stream") as again:
                    if again.status_code == 200:
                        break
                await asyncio.sleep(0.1)
        tasks = [task for task in asyncio.all_tasks() if task.get_name() == "dotmac-audit-stream"]
        async with asyncio.timeout(10):
            while any(not task.done() for task in tasks):
                await asyncio.sleep(0.05)


async def test_a_stream_ends_in_time_so_that_the_guard_is_asked_again(audit, unique):
    app = FastAPI()
    known = {unique}

    def by_list(who: str) -> AuditAccess:
        if who not in known:
            raise HTTPException(403, "no more")
        return AuditAccess.of(who)

    app.include_router(audit_router(audit, by_list, stream_seconds=1))
    async with served(app) as url, httpx.AsyncClient(timeout=30, params={"who": unique}) as client:
        began = time.monotonic()
        async with client.stream("GET", f"{url}/audit/stream") as response:
            seen = [message async for message in messages(response)]
        assert 0.5 < time.monotonic() - began < 10
        stored = await audit.log_event("SYSTEM", "between", tenant_id=unique)
        last = [identity for identity, _, _ in seen if identity][-1]
        async with client.stream("GET", f"{url}/audit/stream", headers={"Last-Event-ID": last}) as response:
            found = [json.loads(data) async for _, event, data in messages(response) if event == "audit"]
        assert [event["id"] for event in found] == [str(stored)]
        known.clear()
        assert (await client.get(f"{url}/audit/stream")).status_code == 403


async def test_a_client_that_does_not_read_holds_nothing_in_memory(app, audit, unique):
    big = {"x": "y" * 20_000}
    async with served(app) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 12)
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        writer.write(f"GET /audit/stream HTTP/1.1\r\nHost: x\r\nx-tenants: {unique}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(6):
            await asyncio.gather(
                *(audit.log_event("SYSTEM", "big", tenant_id=unique, metadata=big) for _ in range(250))
            )
        await asyncio.sleep(1.5)
        import gc

        from dotmac.platform.audit_trail.tail import Tail

        held = [one.waiting for one in gc.get_objects() if isinstance(one, Tail)]
        assert held
        assert max(held) <= 1_000, "one block at most"
        # 1,500 events of 20 kB were stored; the server sent what fits into buffers, then waited.
        count, buffered = 0, b""
        async with asyncio.timeout(60):
            while count < 1_500:
                buffered += await reader.read(1 << 20)
                *whole, buffered = buffered.split(b"event: audit")
                count += len(whole)
        writer.close()


APP = """
import os
from fastapi import FastAPI
from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.contrib.fastapi import audit_router, unprotected
app = FastAPI()
app.include_router(audit_router(AuditAggregator(os.environ["DATABASE_URL"]), unprotected))
"""


async def test_a_server_that_stops_is_not_held_up_by_its_streams(migrated_url, tmp_path):
    (tmp_path / "viewer.py").write_text(APP)
    env = {**os.environ, "DATABASE_URL": migrated_url, "PYTHONPATH": os.pathsep.join(sys.path)}
    with serve("viewer:app", tmp_path / "log", env, tmp_path) as server:
        client = httpx.AsyncClient(timeout=30)
        async with client, client.stream("GET", f"{server.url}/audit/stream") as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("retry")
            began = time.monotonic()
            server.process.terminate()
            async for _ in lines:
                pass
        assert await asyncio.to_thread(server.process.wait, 20) in {0, -15}
        assert time.monotonic() - began < 10
        assert "Traceback" not in server.log.read_text()
