"""Promises: `dotmac locks list` shows each held lock with its holder, as a table and as JSON, and nothing
that was given back; `show` one lock with its queue; `graph` who waits for whom, for Graphviz as well;
`force-release` takes away what was shown, after asking; `watch` prints what changes, a line each, until it is
interrupted, which is no failure; exit codes are 0, 1 and 2; names can't forge lines or colours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.distributed_locks import DistributedLockManager
from dotmac.platform.errors import LockLost
from support.locks import Partition, python, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = [sys.executable, "-c", "from dotmac.platform.cli.main import run; run()", "locks"]


@pytest.fixture(autouse=True)
def used(clean_valkey: str) -> None:
    """Other tests may have left managers open, to which an empty database is a loss of data with a grace."""
    view = Partition(clean_valkey, "dotmac")
    view.used_before()
    view.client.close()


def locks(url: str, *arguments: str, says: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, "REDIS_URL": url, "COLUMNS": "300"},
        input=says,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def answer(url: str, *arguments: str) -> Any:
    done = locks(url, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextlib.contextmanager
def waiters(manager: DistributedLockManager, url: str, name: str, count: int) -> Iterator[None]:
    """Threads that wait for a lock which the caller holds, and gives back inside."""

    def wait() -> None:
        with manager.acquire_lock(name):
            pass

    view = Partition(url, "dotmac")
    threads = [threading.Thread(target=wait) for _ in range(count)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda: view.queued() == number)  # noqa: B023 - awaited here
    view.client.close()
    yield
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_held_lock_is_listed_with_its_holder(clean_valkey: str) -> None:
    with DistributedLockManager(clean_valkey) as manager:
        with manager.acquire_lock("report:generation", timeout=30) as lock:
            (found,) = answer(clean_valkey, "list")
            assert found["name"] == "report:generation"
            assert found["kind"] == "exclusive"
            assert found["pid"] == os.getpid()
            assert found["fencing_token"] == lock.fencing_token
            assert found["holders"][0]["fencing_token"] == lock.fencing_token
            assert found["waiters"] == 0
            assert 0 < found["remaining"] <= 30
            shown = locks(clean_valkey, "list").stdout
            assert all(
                part in shown for part in ("report:generation", str(os.getpid()), str(lock.fencing_token))
            )
        assert answer(clean_valkey, "list") == []


def test_one_lock_is_shown_with_its_queue(clean_valkey: str) -> None:
    nobody = locks(clean_valkey, "show", "a")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "nobody holds lock 'a'" in nobody.stderr
    nobody = locks(clean_valkey, "show", "a", "--json")
    assert (nobody.returncode, nobody.stdout) == (1, "null\n")
    with DistributedLockManager(clean_valkey) as manager:
        lock = manager.acquire_lock("a", timeout=30)
        assert lock.acquire_sync()
        with waiters(manager, clean_valkey, "a", 2):
            found = answer(clean_valkey, "show", "a")
            assert found["fencing_token"] == lock.fencing_token
            assert [one["position"] for one in found["queue"]] == [1, 2]
            shown = locks(clean_valkey, "show", "a")
            assert shown.returncode == 0
            assert "a: exclusive, held by" in shown.stdout
            assert "waiting: 2" in shown.stdout
            assert all(one["owner"] in shown.stdout for one in [*found["holders"], *found["queue"]])
            lock.release_sync()


def test_who_waits_for_whom(clean_valkey: str) -> None:
    assert answer(clean_valkey, "graph") == {"nodes": [], "edges": [], "cycles": []}
    with DistributedLockManager(clean_valkey) as manager:
        lock = manager.acquire_lock("a", timeout=30)
        assert lock.acquire_sync()
        with waiters(manager, clean_valkey, "a", 1):
            (edge,) = answer(clean_valkey, "graph")["edges"]
            assert edge["lock"] == "a"
            table = locks(clean_valkey, "graph")
            assert table.returncode == 0
            assert edge["waiter"] in table.stdout
            assert edge["holder"] in table.stdout
            dot = locks(clean_valkey, "graph", "--dot").stdout
            assert dot.startswith("digraph locks {")
            assert f'"{edge["waiter"]}" -> "{edge["holder"]}" [label="a\\n' in dot
            lock.release_sync()
    assert locks(clean_valkey, "graph", "--dot", "--json").returncode == 2


def test_a_deadlock_is_named(clean_valkey: str) -> None:
    with DistributedLockManager(clean_valkey, deadlock_detection=False) as manager:
        ready = threading.Barrier(2)

        def work(first: str, second: str) -> None:
            with contextlib.suppress(LockLost), manager.acquire_lock(first, on_lost="flag"):
                ready.wait(20)
                with manager.acquire_lock(second):
                    pass

        threads = [threading.Thread(target=work, args=names) for names in (("a", "b"), ("b", "a"))]
        for thread in threads:
            thread.start()
        view = Partition(clean_valkey, "dotmac")
        wait_until(lambda: view.queued() == 2)
        view.client.close()
        shown = locks(clean_valkey, "graph").stdout
        assert "they wait for each other: " in shown
        assert locks(clean_valkey, "force-release", "a", "--yes").returncode == 0
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def test_taking_away(clean_valkey: str) -> None:
    nothing = locks(clean_valkey, "force-release", "a", "--yes")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "nobody holds lock 'a'" in nothing.stderr
    with DistributedLockManager(clean_valkey) as manager:
        lock = manager.acquire_lock("a", timeout=30)
        assert lock.acquire_sync()
        token = str(lock.fencing_token)
        wrong = locks(clean_valkey, "force-release", "a", "--token", "7", "--yes")
        assert wrong.returncode == 1
        assert "with token 7" in wrong.stderr
        for says in ("n\n", ""):
            refused = locks(clean_valkey, "force-release", "a", says=says)
            assert refused.returncode == 1
            assert token in refused.stdout
            assert "Take 'a' away?" in refused.stdout
        assert lock.held
        done = locks(clean_valkey, "force-release", "a", "--token", token, says="y\n")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("taken away\n")
        wait_until(lambda: lock.lost)
        assert lock.lost.reason == "it was released by force"
        with pytest.raises(LockLost):
            lock.release_sync()
    assert locks(clean_valkey, "force-release", "a", "--token", "0").returncode == 2


HOLDER = """
import sys, time
from dotmac.platform.distributed_locks import DistributedLockManager
with DistributedLockManager(sys.argv[1]).acquire_lock("killed", timeout=2.0):
    print("holding")
    time.sleep(60)
"""


def test_watching(clean_valkey: str) -> None:
    with DistributedLockManager(clean_valkey) as manager:
        first = manager.acquire_lock("there", timeout=30)
        assert first.acquire_sync()
        watcher = subprocess.Popen(
            [*COMMAND, "watch", "--json", "--interval", "0.1"],
            env={**os.environ, "REDIS_URL": clean_valkey},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert watcher.stdout is not None

        def next_one() -> tuple[str, str]:
            assert watcher.stdout is not None
            change = json.loads(watcher.stdout.readline())
            assert change["at"]
            assert change["pid"]
            return change["event"], change["lock"]

        assert next_one() == ("held", "there")
        with waiters(manager, clean_valkey, "there", 1):
            assert next_one() == ("waiting", "there")
            # It goes on to the waiter, who gives it back at once: perhaps between two looks.
            first.release_sync()
            assert next_one() == ("released", "there")
        holder = python(HOLDER, clean_valkey)
        events = []
        while ("acquired", "killed") not in events:
            events.append(next_one())
        holder.kill()
        assert next_one() == ("lost", "killed")
        watcher.send_signal(signal.SIGINT)
        out, err = watcher.communicate(timeout=20)
        assert (watcher.returncode, out, err) == (0, "", "")


def test_watching_for_some_rounds(clean_valkey: str) -> None:
    with (
        DistributedLockManager(clean_valkey) as manager,
        manager.acquire_lock("a\n\x1b[31mb", timeout=30) as lock,
    ):
        done = locks(clean_valkey, "watch", "--count", "2", "--interval", "0.1")
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = done.stdout.splitlines()
        assert r"held      a\x0a\x1b[31mb" in line
        assert f"token {lock.fencing_token}" in line
        for command in (["list"], ["show", lock.name], ["graph"]):
            assert "\x1b" not in locks(clean_valkey, *command).stdout


def test_a_server_that_is_away() -> None:
    for command in (["list"], ["show", "a"], ["graph"], ["force-release", "a", "--yes"], ["watch"]):
        done = locks("redis://127.0.0.1:1/0?request_timeout=0.5", *command)
        assert (done.returncode, done.stdout) == (1, ""), command
        assert done.stderr.startswith("error: "), command
