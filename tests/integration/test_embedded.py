"""Embedded servers.

Promises: `embedded://` gives all processes of a user one working server of each kind, however many start it
at once; it stops with its last user, also where that one is killed or is a forked child; a killed user
doesn't count, a forked child does; a server that died, or that nobody could stop or set up to the end, serves
the next user; private servers can be killed, paused and restarted at the same address; the socket of a server
is never put where another user could be listening; anything but `embedded://` is handed through unchanged.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
import psutil
import pytest
import redis

from dotmac.platform.connection import embedded
from dotmac.platform.connection.embedded import EmbeddedPostgres, EmbeddedValkey
from dotmac.platform.errors import InvalidArgument, ServerUnavailable

USER = """
import sys
from dotmac.platform.connection.embedded import resolve_redis
print(resolve_redis("embedded://"), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place():
    """Not `tmp_path`: each session of pytest closes that one's parent to other users, and where the tests run
    as root, PostgreSQL runs as another user."""
    with tempfile.TemporaryDirectory(prefix="dotmac-test-") as directory:
        yield Path(directory)


@pytest.fixture
def state(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DOTMAC_STATE_DIR", str(place / "state"))
    yield place / "state"
    embedded.release()
    for server in (
        EmbeddedValkey(place / "state" / "valkey", port=0),
        EmbeddedPostgres(place / "state" / "postgres18"),
    ):
        server.stop()  # what a failed test has left


def user() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def alive(state: Path) -> bool:
    return EmbeddedValkey(state / "valkey", port=0).running()


def watcher_of(state: Path) -> int:
    """The pid of the process that cleans up, which it writes when it begins to wait."""
    wait_until(lambda: (state / "watcher").read_text().endswith("\n"))
    return int((state / "watcher").read_text())


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def test_processes_that_start_together_share_one_server_until_the_last_ends(state: Path) -> None:
    users = [user() for _ in range(3)]
    try:
        urls = {process.stdout.readline().strip() for process in users}
        assert len(urls) == 1
        with redis.Redis.from_url(urls.pop()) as client:
            assert client.ping()
            assert Path(client.info()["executable"]).name == "valkey-server"
        for process in users[:2]:
            process.communicate()
            assert process.returncode == 0
        assert alive(state)
        users[2].communicate()
        assert users[2].returncode == 0
        assert not alive(state)
    finally:
        for process in users:
            process.kill()
            process.communicate()


def test_a_killed_user_does_not_count(state: Path) -> None:
    first, second = user(), user()
    assert first.stdout.readline() == second.stdout.readline() != ""
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert alive(state)
    second.communicate()
    assert not alive(state)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_servers_stop_behind_a_killed_last_user(state: Path, number: signal.Signals) -> None:
    last = user()
    assert last.stdout.readline()
    watcher = watcher_of(state)
    last.send_signal(number)
    last.communicate()
    assert last.returncode == -number
    wait_until(lambda: not alive(state))
    wait_until(lambda: ended(watcher))


def test_a_server_left_behind_is_taken_over_and_watched_again(state: Path) -> None:
    orphaned = user()
    url = orphaned.stdout.readline().strip()
    pid, watcher = EmbeddedValkey(state / "valkey", port=0).pid, watcher_of(state)
    os.kill(watcher, signal.SIGKILL)
    wait_until(lambda: ended(watcher))
    orphaned.kill()
    orphaned.communicate()
    second = user()
    assert second.stdout.readline().strip() == url
    assert EmbeddedValkey(state / "valkey", port=0).pid == pid
    wait_until(lambda: not ended(watcher_of(state)))
    second.kill()
    second.communicate()
    wait_until(lambda: not alive(state))


def test_a_child_that_outlives_its_parent_stops_the_servers_with_its_end(state: Path) -> None:
    code = """
import os, sys
from dotmac.platform.connection.embedded import resolve_redis
resolve_redis("embedded://")
if os.fork():
    print("parent ends", flush=True)
else:
    sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        parent.wait(60)
        assert alive(state)
    finally:
        parent.communicate()  # which the child takes for its sign
    wait_until(lambda: not alive(state))


async def test_a_database_that_was_never_made_is_made_by_the_next_user(state: Path) -> None:
    # As a process leaves it that is killed between the server's start and its database.
    EmbeddedPostgres(state / "postgres18").start()
    connection = await asyncpg.connect(await embedded.aresolve_database("embedded://"))
    assert await connection.fetchval("SELECT current_database()") == "dotmac"
    await connection.close()


@pytest.mark.parametrize("trap", ["open", "link", "foreign"])
def test_a_socket_is_not_put_into_anothers_directory(
    place: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    server = EmbeddedValkey(place / ("long" * 25), port=0)
    short = server.socket.parent
    assert short.parent == place
    if trap == "open":
        short.chmod(0o755)
    elif trap == "link":
        short.rmdir()
        (place / "elsewhere").mkdir(mode=0o700)
        short.symlink_to(place / "elsewhere")
    elif os.geteuid():
        pytest.skip("only root can give a directory away")
    else:
        os.chown(short, 65534, 65534)
    with pytest.raises(ServerUnavailable, match="not a private directory"):
        server.start()


def test_a_forked_child_keeps_the_servers(state: Path) -> None:
    url = embedded.resolve_redis("embedded://")
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ready, 1)
        os._exit(0)
    embedded.release()
    assert alive(state)
    assert embedded.resolve_redis("embedded://") == url
    os.write(write, b"x")
    os.waitpid(child, 0)
    os.close(ready)
    os.close(write)
    embedded.release()
    assert not alive(state)


async def test_a_dead_server_is_started_again_and_both_kinds_work(state: Path) -> None:
    url = await embedded.aresolve_redis("embedded://")
    EmbeddedValkey(state / "valkey", port=0).kill()
    assert not alive(state)
    assert await embedded.aresolve_redis("EMBEDDED://") == url
    with redis.Redis.from_url(url) as client:
        assert client.ping()
    connection = await asyncpg.connect(await embedded.aresolve_database("embedded://"))
    assert await connection.fetchval("SELECT current_database()") == "dotmac"
    await connection.close()


async def test_other_addresses_are_handed_through() -> None:
    for url in ("redis://h:1/2", "postgresql+asyncpg://h/d", ""):
        assert embedded.resolve_redis(url) == await embedded.aresolve_redis(url) == url
        assert embedded.resolve_database(url) == await embedded.aresolve_database(url) == url
    for resolve in (embedded.resolve_redis, embedded.resolve_database):
        with pytest.raises(InvalidArgument, match="stands alone"):
            resolve("embedded://elsewhere/1")


def test_private_valkey_survives_kill_pause_and_restart() -> None:
    with EmbeddedValkey(args=("--requirepass", "secret")) as server:
        url, pid = server.url.replace("redis://", "redis://:secret@"), server.pid
        with redis.Redis.from_url(url) as client:
            assert client.ping()
        server.pause()
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
        assert not server.running()
        server.resume()
        wait_until(server.running)
        server.kill()
        assert server.pid is None
        server.restart()
        assert server.pid not in (None, pid)
        with redis.Redis.from_url(url) as client:
            assert client.ping()
        directory = server.directory
    assert not directory.exists()


async def test_private_postgres_survives_kill_and_restart(place: Path) -> None:
    with EmbeddedPostgres(place / ("long" * 25), settings={"work_mem": "5MB"}) as server:
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("SHOW work_mem") == "5MB"
        await connection.execute("CREATE TABLE kept (n int)")
        await connection.close()
        server.kill()
        assert not server.running()
        server.restart()
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("SELECT count(*) FROM kept") == 0
        await connection.close()
    assert not server.running()


def test_a_server_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(ServerUnavailable, match="no-such-setting"),
        EmbeddedValkey(args=("--no-such-setting", "1")),
    ):
        pytest.fail("it started")
