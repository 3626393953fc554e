"""Promises: `dotmac locks list` shows each held lock with its holder, as a table and as JSON, and nothing
that was given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from dotmac.platform.distributed_locks import DistributedLockManager


def _list(url: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from dotmac.platform.cli.main import run; run()", "locks", "list", *options],
        env={**os.environ, "REDIS_URL": url, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_a_held_lock_is_listed_with_its_holder(clean_valkey: str) -> None:
    with DistributedLockManager(clean_valkey) as manager:
        with manager.acquire_lock("report:generation", timeout=30) as lock:
            (found,) = json.loads(_list(clean_valkey, "--json"))
            assert found["name"] == "report:generation"
            assert found["pid"] == os.getpid()
            assert found["fencing_token"] == lock.fencing_token
            assert found["waiters"] == 0
            assert 0 < found["remaining"] <= 30
            assert "report:generation" in _list(clean_valkey)
        assert json.loads(_list(clean_valkey, "--json")) == []
