"""The example of an audit viewer, as a whole process.

Promises: nobody looks without a login; each person sees the events of their tenants, listed, counted and
live, and goes on after a break; the page is served; the server ends in order while a stream is
open.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.cli.demo.processes import serve

EXAMPLE = Path(__file__).parents[2] / "examples" / "audit_viewer"


async def next_event(lines):
    async for line in lines:
        if line.startswith("id: "):
            last = line.removeprefix("id: ")
        if line.startswith("data: "):
            return json.loads(line.removeprefix("data: ")), last
    raise AssertionError("the stream ended")


async def test_audit_viewer(postgres_database: str, clean_valkey: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "DATABASE_URL": postgres_database,
        "REDIS_URL": clean_valkey,
        "VIEWERS": "ada:secret:acme;root:secret2:*",
    }
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
        for tenant in ("acme", "other"):
            await audit.log_event("BUSINESS", "order.placed", tenant_id=tenant, user_id="bob")
        with serve("app:app", tmp_path / "log", env, EXAMPLE) as server:
            ada = httpx.AsyncClient(base_url=server.url, auth=("ada", "secret"), timeout=30)
            root = httpx.AsyncClient(base_url=server.url, auth=("root", "secret2"), timeout=30)
            async with ada, root, httpx.AsyncClient(base_url=server.url, timeout=30) as stranger:
                for login in (None, ("ada", "guess"), ("eve", "secret")):
                    answer = await stranger.get("/audit/events", auth=login)
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"].startswith("Basic")
                assert (await stranger.get("/")).status_code == 401
                assert "EventSource" in (await ada.get("/")).text
                assert [e["tenant_id"] for e in (await ada.get("/audit/events")).json()["events"]] == ["acme"]
                assert (await root.get("/audit/count")).json() == {"count": 2}
                async with ada.stream("GET", "/audit/stream") as live:
                    lines = live.aiter_lines()
                    await anext(lines)
                    await audit.log_event("BUSINESS", "hidden", tenant_id="other")
                    await audit.log_event("BUSINESS", "one", tenant_id="acme")
                    event, last = await next_event(lines)
                    assert event["action"] == "one"
                await audit.log_event("BUSINESS", "two", tenant_id="acme")
                async with ada.stream("GET", "/audit/stream", headers={"Last-Event-ID": last}) as live:
                    lines = live.aiter_lines()
                    assert (await next_event(lines))[0]["action"] == "two"
                    assert server.stop() in {0, -signal.SIGTERM}
            assert "Traceback" not in server.log.read_text()
