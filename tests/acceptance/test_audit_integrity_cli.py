"""`dotmac audit key|checkpoint|verify|prove|explain` as whole processes.

Promises: a key is made once, for its owner alone; what the library's own writers store verifies; exit code 1
means that something was tampered with, and it is named; a proof is checked without any database, and a
changed one is refused; no private key is ever shown.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator

CRASH = """
import asyncio, os
from dotmac.platform.audit_trail import AuditAggregator
async def work():
    await AuditAggregator().log_event('SYSTEM', 'x')
    os._exit(0)
asyncio.run(work())
"""


@pytest.fixture
def dotmac(postgres_database, tmp_path):
    key = tmp_path / "key.pem"
    environment = {
        **os.environ,
        "ENVIRONMENT": "test",
        "DATABASE_URL": postgres_database,
        "AUDIT_TRAIL_ORIGIN": "example.com/audit",
        "AUDIT_TRAIL_ANCHORS": (tmp_path / "anchors").as_uri(),
        "NO_COLOR": "1",
    }

    def run(*arguments, code=0, **more):
        done = subprocess.run(
            [sys.executable, "-c", "from dotmac.platform.cli.main import run; run()", *arguments],
            env=environment | ({"AUDIT_TRAIL_SIGNING_KEY_FILE": str(key)} if key.exists() else {}) | more,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert "PRIVATE" not in done.stdout + done.stderr
        return done

    return run


async def log(url):
    async with AuditAggregator(url) as audit:
        many = (
            audit.log_event("DATA_ACCESS", f"read.{n}", tenant_id=("acme", None)[n % 2], metadata={"n": n})
            for n in range(100)
        )
        await asyncio.gather(*many)
        return await audit.log_event("SECURITY", "last", ip_address="2001:db8::1", user_id="zoë")


async def tamper(url, *statements):
    connection = await asyncpg.connect(url)
    await connection.execute("SET session_replication_role = replica")
    for statement in statements:
        assert await connection.execute(statement) != "UPDATE 0"
    await connection.close()


def test_from_a_key_to_a_proof(dotmac, postgres_database, tmp_path):
    dotmac("db", "upgrade")
    assert "AUDIT_TRAIL_SIGNING_KEY" in dotmac("audit", "checkpoint", code=2).stderr
    public = dotmac("audit", "key", "--new", str(tmp_path / "key.pem")).stdout.strip()
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    assert "exists" in dotmac("audit", "key", "--new", str(tmp_path / "key.pem"), code=2).stderr
    assert json.loads(dotmac("audit", "key", "--json").stdout) == {"public_key": public}

    event = str(asyncio.run(log(postgres_database)))
    assert "not sealed yet" in dotmac("audit", "prove", event, code=1).stderr
    done = json.loads(dotmac("audit", "checkpoint", "--json").stdout)
    assert done["errors"] == []
    assert {one["origin"] for one in done["checkpoints"]} == {"example.com/audit", "example.com/audit/acme"}
    assert "0 segments sealed, 0 checkpoints" in dotmac("audit", "checkpoint").stdout
    report = json.loads(dotmac("audit", "verify", "--json", "--strict").stdout)
    # Two logs, and each of the two processes that signed or could have told the anchor of their newest state.
    assert (report["ok"], report["events"], report["anchored"], report["counts"]) == (True, 101, 4, {})
    assert "nothing was tampered with" in dotmac("audit", "verify", "--tenant", "acme").stdout

    proof = tmp_path / "proof.json"
    dotmac("audit", "prove", event, "--output", str(proof))
    away = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    shown = dotmac("audit", "verify", "--proof", str(proof), "--key", public, **away).stdout
    assert "the proof holds" in shown
    assert "zoë" in shown
    found = json.loads(dotmac("audit", "verify", "--proof", str(proof), "--json").stdout)
    assert found["event"]["id"] == event
    proof.write_text(proof.read_text().replace("zoë", "zoe"))
    assert "not in the segment" in dotmac("audit", "verify", "--proof", str(proof), code=1).stderr

    asyncio.run(tamper(postgres_database, "UPDATE audit_events SET action = 'x' WHERE action = 'last'"))
    report = json.loads(dotmac("audit", "verify", "--json", code=1).stdout)
    (finding,) = report["findings"]
    assert (finding["kind"], finding["event_id"], finding["tenant_id"]) == ("event_changed", event, "")
    assert "TAMPERED WITH" in dotmac("audit", "verify", code=1).stdout
    assert "not what was stored" in dotmac("audit", "verify", "--since", "1h", code=1).stdout
    assert "nothing was tampered with" in dotmac("audit", "verify", "--until", "2020-01-01").stdout
    assert "--key" in dotmac("audit", "verify", "--key", "nonsense", code=2).stderr


def test_a_writer_that_crashed_is_told_until_it_is_explained(dotmac, postgres_database, tmp_path):
    dotmac("db", "upgrade")
    dotmac("audit", "key", "--new", str(tmp_path / "key.pem"))
    environment = {**os.environ, "DATABASE_URL": postgres_database}
    subprocess.run([sys.executable, "-c", CRASH], env=environment, check=True, timeout=60)
    dotmac("audit", "checkpoint")
    assert dotmac("audit", "verify", "--strict").returncode == 0  # a moment ago: it may be at work
    asyncio.run(
        tamper(postgres_database, "UPDATE audit_writers SET started_at = started_at - interval '2 hours'")
    )
    # Its segment's time is in the log: a day later would be the honest way to get here.
    asyncio.run(
        tamper(
            postgres_database,
            "UPDATE audit_segments SET recorded_at = recorded_at - interval '2 hours'",
            "UPDATE audit_events SET recorded_at = recorded_at - interval '2 hours'",
        )
    )
    report = json.loads(dotmac("audit", "verify", "--json", code=1).stdout)
    (told,) = [one for one in report["findings"] if one["kind"] == "writer_open"]
    assert told["notice"]
    assert "explained" in dotmac("audit", "explain", told["writer"], "the machine lost power").stdout
    report = json.loads(dotmac("audit", "verify", "--json", code=1).stdout)
    assert "writer_open" not in report["counts"]
    assert "unexplained" in dotmac("audit", "explain", told["writer"], "again", code=2).stderr
    assert "say in words" in dotmac("audit", "explain", told["writer"], " ", code=2).stderr
