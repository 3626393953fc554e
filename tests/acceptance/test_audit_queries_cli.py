"""`dotmac audit query|count|histogram|facets|timeline|tail` as whole processes.

Promises: each has tables for people and JSON for programs; filters, conditions on metadata and exclusions
work as options; cursors lead on and back; `tail` goes on where another one ended, and ends by the interrupt
with 0; what is wrong ends with 2 and a sentence that names the option's value and what is right.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

from dotmac.platform.audit_trail import AuditAggregator

COMMAND = [sys.executable, "-c", "from dotmac.platform.cli.main import run; run()", "audit"]


@pytest.fixture
def env(postgres_database, valkey_url):
    async def fill():
        async with AuditAggregator(postgres_database) as audit:
            await audit.migrate()
            for number in range(12):
                await audit.log_event(
                    "SECURITY" if number % 3 == 0 else "BUSINESS",
                    "order.refused" if number % 4 == 0 else "order.placed",
                    user_id=f"u{number % 2}",
                    tenant_id="acme",
                    correlation_id=f"c{number // 4}",
                    metadata={"order": {"total": number * 10}},
                )

    asyncio.run(fill())
    return {
        **os.environ,
        "ENVIRONMENT": "test",
        "DATABASE_URL": postgres_database,
        "REDIS_URL": valkey_url,
        "NO_COLOR": "1",
    }


@pytest.fixture
def audit(env):
    def run(*arguments, code=0):
        done = subprocess.run(
            [*COMMAND, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    return run


def test_commands_that_read_events(audit):
    def asked(*arguments):
        return json.loads(audit(*arguments, "--json").stdout)

    narrow = (
        *("--metadata", "order.total>=30", "--metadata", "order.total<100"),
        *("--exclude", "category=security", "--user", "u0", "--user", "u1", "--text", "PLACED"),
    )
    page = asked("query", *narrow, "--limit", "2", "--oldest-first")
    assert [event["metadata"]["order"]["total"] for event in page["events"]] == [50, 70]
    assert page["previous_cursor"] is None
    assert page["next_cursor"] is None
    first = asked("query", "--limit", "5")
    second = asked("query", "--limit", "5", "--cursor", first["next_cursor"])
    back = asked("query", "--limit", "5", "--cursor", second["previous_cursor"])
    assert back["events"] == first["events"]
    told = audit("query", "--limit", "5", "--cursor", first["next_cursor"])
    assert "more: --cursor" in told.stderr
    assert "back: --cursor" in told.stderr

    assert asked("count", "--outcome", "denied") == {"count": 3}
    assert audit("count", "--missing", "trace_id").stdout == "12\n"

    counted = asked("histogram", "--by", "day", "--by", "category", "--tenant", "acme", "--fill")
    assert counted["total"] == 12
    assert {bucket["category"] for bucket in counted["buckets"]} == {"security", "business"}
    assert "█" in audit("histogram", "--by", "category", "--time-zone", "Europe/Berlin").stdout

    facets = asked("facets", "--field", "user_id", "--field", "outcome", "--limit", "1")["facets"]
    assert [(one["field"], one["distinct"], one["other"]) for one in facets] == [
        ("user_id", 2, 6),
        ("outcome", 2, 3),
    ]
    assert "(1 others)" in audit("facets", "--field", "user_id", "--limit", "1").stdout

    line = asked("timeline", "c1", "--tenant", "acme")
    assert [step["event"]["action"] for step in line["steps"]] == ["order.refused", *["order.placed"] * 3]
    assert "4 events in 0." in audit("timeline", "c1").stdout
    assert "longest" in audit("timeline", "c1").stdout


def test_tail_goes_on_and_ends_by_the_interrupt(audit, env):
    seen, after = [], ()
    for _ in range(3):
        told = (
            audit("tail", "--from-start", "--stop-after", "4", "--json")
            if not after
            else audit("tail", *after, "--stop-after", "4", "--json")
        )
        seen += [json.loads(line)["metadata"]["order"]["total"] for line in told.stdout.splitlines()]
        after = ("--after", told.stderr.strip().rpartition(" ")[2])
    assert seen == [number * 10 for number in range(12)]
    with subprocess.Popen(
        [*COMMAND, "tail", "--from-start", "--action", "order.refused"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        assert following.stdout is not None
        assert "order.refused" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        _, err = following.communicate(timeout=30)
    assert following.returncode == 0, err
    assert "go on: --after" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("query", "--metadata", "="), "path=value"),
        (("query", "--exclude", "nope=1"), "the filters are category"),
        (("query", "--cursor", "x"), "next_cursor"),
        (("histogram", "--by", "dey"), "minute, hour, day"),
        (("histogram", "--time-zone", "Mars"), "IANA"),
        (("facets", "--field", "metadata"), "category, level"),
        (("timeline", "c", "--limit", "0"), "limit"),
        (("tail", "--after", "x"), "position"),
        (("count", "--since", "soon"), "--since"),
    ],
)
def test_a_wrong_command_ends_with_2(audit, arguments, told):
    assert told in audit(*arguments, code=2).stderr
