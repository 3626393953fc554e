"""`dotmac audit export|import|forward`, and the example of a receiver, as whole processes.

Promises: an export to a file, to standard output and compressed holds the events of its filters; import
gives them back and adds nothing twice; forwarding delivers to a signed webhook, once for each event in the
example's file also where both are restarted; exit codes 0, 1 and 2 mean what they should, and errors are a
sentence.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest

from dotmac.platform.audit_trail import AuditAggregator
from support.receivers import WebhookServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "audit_receiver"
SECRET = "a secret for these tests"


@pytest.fixture
def environment(postgres_database, valkey_url):
    return {
        **os.environ, "ENVIRONMENT": "test", "DATABASE_URL": postgres_database, "REDIS_URL": valkey_url,
        "NO_COLOR": "1", "AUDIT_TRAIL_FORWARD_SECRET": SECRET,
    }  # fmt: skip


@pytest.fixture
async def audit(postgres_database):
    async with AuditAggregator(postgres_database) as aggregator:
        await aggregator.migrate()
        for number in range(30):
            await aggregator.log_event(
                "DATA_ACCESS", "record.read", user_id=f"u{number % 3}", resource_id=number
            )
        yield aggregator


@pytest.fixture
def dotmac(environment):
    async def run(*arguments, code=0, without=()):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from dotmac.platform.cli.main import run; run()", "audit", *arguments,
            env={name: value for name, value in environment.items() if name not in without},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == code, (out, errors)
        assert b"Traceback" not in errors
        return out, errors.decode()

    return run


async def test_export_and_import(audit, dotmac, tmp_path):
    out, _ = await dotmac("export", str(tmp_path / "e.csv"), "--user", "u1", "--json")
    made = json.loads(out)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "e.csv").read_text())))
    assert made["rows"] == len(rows) == 10
    assert {row["user_id"] for row in rows} == {"u1"}
    out, _ = await dotmac("export", str(tmp_path / "e.ndjson.gz"), "--newest-first", "--since", "1d")
    assert b"30 events" in out
    lines = gzip.decompress((tmp_path / "e.ndjson.gz").read_bytes()).splitlines()
    assert json.loads(lines[0])["resource_id"] == "29"
    out, errors = await dotmac("export", "-", "--format", "ocsf")
    assert len([json.loads(line) for line in out.splitlines()]) == 30
    assert "30 events" in errors

    out, _ = await dotmac("import", str(tmp_path / "e.ndjson.gz"))
    assert b"30 events: 0 stored, 30 there already, 0 bad" in out
    out, _ = await dotmac("import", str(tmp_path / "e.csv"), "--json")
    assert json.loads(out)["present"] == 10

    assert "path_or_stream" in (await dotmac("export", str(tmp_path / "no" / "e.csv"), code=2))[1]
    assert "format" in (await dotmac("export", str(tmp_path / "e.xml"), code=2))[1]
    away = ("--url", "postgresql://u:p@127.0.0.1:1/d")
    assert "no answer" in (await dotmac("export", str(tmp_path / "x.csv"), *away, code=1))[1]
    assert not (tmp_path / "x.csv").exists()


async def test_forward(audit, dotmac):
    async with WebhookServer() as server:
        out, _ = await dotmac("forward", server.url, "--from-start", "--once", "--user", "u2", "--json")
        assert json.loads(out) == {"delivered": 10, "dead_letters": 0, "failures": 0, "elsewhere": False}
        assert len(server.ids) == 10
        server.choose = lambda events: 400
        out, _ = await dotmac("forward", server.url, "--once", "--name", "other", "--from-start")
        # With the reports about them, which are refused as well and make no further ones.
        assert b"0 events delivered, 31 put aside" in out
        server.choose = None
        out, _ = await dotmac("forward", server.url, "--name", "other", "--dead-letters")
        assert b"31 events delivered" in out
    errors = (await dotmac("forward", server.url, "--once", "--name", "third", "--from-start", code=1))[1]
    assert "127.0.0.1" in errors
    assert "AUDIT_TRAIL_FORWARD_SECRET" in (
        await dotmac("forward", server.url, code=2, without={"AUDIT_TRAIL_FORWARD_SECRET"})
    )[1]  # fmt: skip
    assert "url" in (await dotmac("forward", "gopher://host", code=2))[1]
    assert "--ca-file" in (await dotmac("forward", "syslog+tls://host", "--ca-file", "/none", code=2))[1]


async def test_the_example_keeps_each_event_once(audit, environment, unused_tcp_port, tmp_path):
    store = tmp_path / "received.ndjson"

    async def start(*arguments, **more):
        return await asyncio.create_subprocess_exec(
            sys.executable, *arguments, env={**environment, **more}, cwd=EXAMPLE,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip

    async def receiver():
        return await start(
            "-m", "uvicorn", "receiver:app", "--port", str(unused_tcp_port),
            AUDIT_SECRET=SECRET, AUDIT_STORE=str(store),
        )  # fmt: skip

    async def forwarder():
        return await start(
            "-c", "from dotmac.platform.cli.main import run; run()", "audit", "forward",
            f"http://127.0.0.1:{unused_tcp_port}/audit", "--from-start",
            AUDIT_TRAIL_FORWARD_BATCH_SIZE="7",
        )  # fmt: skip

    async def until(count):
        async with asyncio.timeout(60):
            while not store.exists() or len(store.read_text().splitlines()) < count:
                await asyncio.sleep(0.05)

    running = [await receiver(), await forwarder()]
    try:
        await until(30)
        for number, make in enumerate((receiver, forwarder)):
            running[number].kill()
            await running[number].wait()
            for count in range(10):
                await audit.log_event("BUSINESS", "later", resource_id=count)
            running[number] = await make()
            await until(40 + 10 * number)
    finally:
        for process in running:
            if process.returncode is None:
                process.kill()
            await process.wait()
    ids = [json.loads(line)["id"] for line in store.read_text().splitlines()]
    assert ids == [str(event.id) async for event in audit.iter_events(order="asc")]
