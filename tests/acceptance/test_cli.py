"""The command line.

Promises: `doctor` finds working servers well and says what is wrong, with a remedy, of servers that are
away and of wrong settings; `config show` and `explain` name origins and mask secrets; `--json` gives JSON;
exit codes are 0, 1 and 2; without the extra `cli` a clear message names it; colours are off where NO_COLOR
is set or in a pipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DOTMAC = Path(sys.executable).parent / "dotmac"


def dotmac(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "DOTMAC_STATE_DIR")
    }
    return subprocess.run(
        [DOTMAC, *arguments], capture_output=True, text=True, env=clean | env, timeout=120, check=False
    )


def test_doctor_on_working_servers(valkey_url: str, postgres_database: str) -> None:
    done = dotmac("doctor", "--json", REDIS_URL=valkey_url, DATABASE_URL=postgres_database)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {check["name"]: check["state"] for check in json.loads(done.stdout)}
    assert states.pop("audit tables") == "warning"
    assert states == dict.fromkeys(
        ("extension", "configuration", "redis", "redis clock", "postgresql", "postgresql clock"), "ok"
    )


def test_doctor_names_what_is_wrong() -> None:
    away = dotmac(
        "doctor",
        "--json",
        REDIS_URL="redis://u:hunter2@127.0.0.1:1/0",
        DATABASE_URL="postgresql://u:hunter2@127.0.0.1:1/x",
    )
    assert away.returncode == 1
    failed = {
        check["name"]: check["remedy"] for check in json.loads(away.stdout) if check["state"] == "failed"
    }
    assert "REDIS_URL" in failed["redis"]
    assert "DATABASE_URL" in failed["postgresql"]
    wrong = dotmac("doctor", DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT="-1", AUDIT_TRAIL_RETENTION="7")
    assert wrong.returncode == 1
    assert "DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT = -1" in wrong.stdout
    assert "did you mean AUDIT_TRAIL_RETENTION_DAYS?" in wrong.stdout
    for done in (away, wrong):
        assert "hunter2" not in done.stdout + done.stderr
        assert "\x1b" not in done.stdout


def test_config() -> None:
    shown = dotmac("config", "show", "--json", APP_NAME="shop", REDIS_URL="redis://:hunter2@h/1")
    assert shown.returncode == 0, shown.stderr
    settings = {one["variable"]: one for one in json.loads(shown.stdout)}
    assert settings["APP_NAME"] == {
        "key": "app_name",
        "variable": "APP_NAME",
        "value": "shop",
        "origin": "environment APP_NAME",
    }
    assert settings["REDIS_URL"]["value"] == "redis://:***@h/1"
    one = dotmac("config", "explain", "distributed_locks.redis_url", REDIS_URL="redis://:hunter2@h/1")
    assert one.stdout.splitlines() == [
        "distributed_locks.redis_url (DISTRIBUTED_LOCKS_REDIS_URL) = redis://:***@h/1",
        "from: environment REDIS_URL",
    ]
    table = dotmac("config", "show", NO_COLOR="1")
    assert "DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("config", "explain", "app_nam"), "did you mean app_name?"),
        (("no-such-command",), "No such command"),
        (("config", "show"), "DEBUG = perhaps"),
    ],
)
def test_wrong_use_ends_with_2(arguments: tuple[str, ...], says: str) -> None:
    done = dotmac(*arguments, **({"DEBUG": "perhaps"} if says.startswith("DEBUG") else {}))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_version_and_help() -> None:
    assert dotmac("--version").stdout.strip().count(".") == 2
    helped = dotmac("--help")
    assert helped.returncode == 0
    for name in ("audit", "config", "db", "demo", "doctor", "locks", "services"):
        assert f" {name} " in helped.stdout


def test_without_the_extra_a_message_names_it() -> None:
    code = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "typer" else find(name, *rest)
from dotmac.platform.cli.main import run
run()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == "error: the command line needs typer: pip install 'dotmac-platform[cli]'\n"
