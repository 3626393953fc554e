"""`dotmac db` and `dotmac audit` as whole processes.

Promises: exit codes 0, 1 and 2 mean what they should; upgrade, status, import (twice), query with filters,
pages and JSON, and tail work on a real database; errors are a sentence on standard error, never a traceback.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import asyncpg
import pytest

from dotmac.platform.audit_trail import schema

LINES = [
    f"Dec 10 06:55:{n:02} h sshd[{n}]: "
    f"Failed password for root from 10.0.0.{7 if n % 4 else 8} port 22 ssh2\n"
    for n in range(40)
]


@pytest.fixture
def dotmac(postgres_database, valkey_url):
    environment = {
        **os.environ,
        "ENVIRONMENT": "test",
        "DATABASE_URL": postgres_database,
        "REDIS_URL": valkey_url,
        "NO_COLOR": "1",
    }

    def run(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-c", "from dotmac.platform.cli.main import run; run()", *arguments],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    return run


@contextmanager
def psql(url, before, after):
    """Runs SQL as the owner, before and after."""

    async def run(sql):
        connection = await asyncpg.connect(url)
        await connection.execute(sql)
        await connection.close()

    asyncio.run(run(before))
    try:
        yield
    finally:
        asyncio.run(run(after))


def test_the_tables_and_the_log_by_the_command_line(dotmac, tmp_path):
    assert "run `dotmac db upgrade`" in dotmac("db", "status", code=1).stdout
    assert "dotmac db upgrade" in dotmac("audit", "query", code=1).stderr
    assert f"to version {schema.HEAD}" in dotmac("db", "upgrade").stdout
    assert "up to date" in dotmac("db", "upgrade").stdout
    assert json.loads(dotmac("db", "status", "--json").stdout)["up_to_date"] is True
    assert "CREATE TABLE audit_events" in dotmac("db", "upgrade", "--sql").stdout

    log = tmp_path / "auth.log"
    log.write_text("".join([*LINES, "nonsense\n"]))
    command = ("audit", "import", str(log), "--format", "sshd", "--year", "2015", "--time-zone", "UTC")
    told = dotmac(*command).stdout
    assert "40 events stored" in told
    assert "line 41: " in told
    assert "10.0.0.7" in told
    assert "in 60 s" in told
    assert json.loads(dotmac(*command, "--json").stdout)["resumed_at"] == 41
    found = json.loads(dotmac(*command, "--from-start", "--json").stdout)
    assert (found["stored"], found["present"], found["bad"]) == (0, 40, 1)
    assert found["top_attackers"][0] == {"address": "10.0.0.7", "failures": 30}

    page = json.loads(dotmac("audit", "query", "--address", "10.0.0.8", "--limit", "6", "--json").stdout)
    assert [event["ip_address"] for event in page["events"]] == ["10.0.0.8"] * 6
    rest = dotmac(
        "audit", "query", "--address", "10.0.0.8", "--limit", "6", "--cursor", page["next_cursor"], "--json"
    )
    assert len(json.loads(rest.stdout)["events"]) == 4
    assert "ssh.login" in dotmac("audit", "query", "--action", "ssh.*", "--since", "2015-01-01").stdout
    assert json.loads(dotmac("audit", "query", "--since", "7d", "--json").stdout)["events"] == []
    assert json.loads(dotmac("audit", "query", "--min-score", "0.5", "--json").stdout)["events"]

    tail = dotmac("audit", "tail", "--from-start", "--stop-after", "40", "--json").stdout.splitlines()
    assert len({json.loads(line)["id"] for line in tail}) == 40


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("audit", "query", "--limit", "0"), "limit"),
        (("audit", "query", "--since", "soon"), "--since"),
        (("audit", "query", "--category", "NOPE"), "AUTHENTICATION"),
        (("audit", "import", "/no/such/file", "--format", "sshd"), "does not exist"),
        (("db", "status", "--url", "mysql://x"), "postgresql://"),
    ],
)
def test_a_wrong_command_ends_with_2(dotmac, arguments, told):
    assert told in dotmac(*arguments, code=2).stderr


def test_a_database_that_is_away_ends_with_1(dotmac):
    assert "error" in dotmac("db", "status", "--url", "postgresql://u@127.0.0.1:1/d", code=1).stderr


def test_control_characters_are_shown_and_not_obeyed(dotmac, tmp_path):
    dotmac("db", "upgrade")
    event = {
        "occurred_at": "2024-01-01T00:00:00Z",
        "category": "SECURITY",
        "action": "x\n2024-01-01 forged",
        "user_id": "\x1b[2Jada\x9b1m\u202e\r",
    }
    log = tmp_path / "events.ndjson"
    log.write_text(json.dumps(event) + "\n")
    dotmac("audit", "import", str(log), "--format", "ndjson")
    for command in (("query",), ("tail", "--from-start", "--stop-after", "1")):
        told = dotmac("audit", *command).stdout
        assert r"x\x0a2024-01-01 forged" in told
        assert r"\x1b[2Jada\x9b1m\u202e\x0d" in told
        assert not set(told) & {"\x1b", "\x9b", "\r", "\u202e"}


def test_roles_retention_holds_and_archives_by_the_command_line(dotmac, postgres_database, unique, tmp_path):
    dotmac("db", "upgrade", "--tenants")
    log = tmp_path / "auth.log"
    log.write_text("".join(LINES))
    command = ("audit", "import", str(log), "--format", "sshd", "--year", "2015", "--time-zone", "UTC")
    dotmac(*command, "--tenant", "acme")

    with psql(postgres_database, f"CREATE ROLE {unique}", f"DROP OWNED BY {unique}; DROP ROLE {unique}"):
        assert (
            f"{unique}: reader of acme"
            in dotmac("audit", "grant", "--reader", unique, "--tenant", "acme").stdout
        )
        listed = json.loads(dotmac("audit", "roles", "--json").stdout)
        assert listed["row_level_security"] is True
        assert [(one["role"], one["kind"], one["tenant_id"]) for one in listed["roles"]] == [
            (unique, "reader", "acme")
        ]
        assert "does not go with" in dotmac("audit", "grant", "--auditor", unique, code=1).stderr
        assert "row-level security is on" in dotmac("audit", "roles").stdout
        assert "reader no more" in dotmac("audit", "revoke", "--reader", unique).stdout
        dotmac("audit", "revoke", "--reader", unique, code=1)
        assert "name a role" in dotmac("audit", "grant", code=2).stderr

    hold = json.loads(
        dotmac(
            "audit", "hold", "add", "--reason", "case", "--by", "legal", "--tenant", "acme", "--json"
        ).stdout
    )
    retention = ("audit", "retention", "--days", "365", "--archive-url", str(tmp_path / "archive"))
    (due,) = json.loads(dotmac(*retention, "--dry-run", "--json").stdout)
    assert (due["outcome"], due["events"], due["holds"]) == ("held", 40, [hold["id"]])
    assert "held" in dotmac(*retention).stdout
    assert hold["id"] in dotmac("audit", "hold", "list").stdout
    releasing = ("audit", "hold", "release", hold["id"], "--by", "legal", "--reason", "settled")
    assert "released" in dotmac(*releasing).stdout
    assert json.loads(dotmac("audit", "hold", "list", "--json").stdout) == []
    assert len(json.loads(dotmac("audit", "hold", "list", "--all", "--json").stdout)) == 1
    done = dotmac(*retention)
    assert "dropped" in done.stdout
    assert "40 events archived" in done.stderr
    (archive,) = [one for one in json.loads(dotmac("audit", "archives", "--json").stdout) if one["url"]]
    assert (archive["state"], archive["events"]) == ("dropped", 40)
    assert "audit_events_2015_12" in dotmac("audit", "archives").stdout
    assert "made: audit_events_" in dotmac("audit", "partitions").stdout
    assert "all there" in dotmac("audit", "partitions").stdout
    assert "days" in dotmac("audit", "retention", "--days", "0", code=2).stderr
