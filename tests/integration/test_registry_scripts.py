"""Promises of the registry's scripts, run on a real server with sessions written by hand:

- the same registration twice changes nothing; an older one, or one over an older connection, is refused;
- an id of a live session is refused to others unless they take it over; that of a dead one is free;
- what is dead is neither fetched nor listed, and the sweep removes it, tells everybody, and looks at the
living
  once per ttl only;
- every change raises the revision and is published; the revision never falls, not even when the data are
lost;
- a health report counts only for the registration that was checked;
- monitors that fall silent are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

SCRIPTS = Path(__file__).parents[2] / "rust/engine/src/scripts"
TAG = "{scripts:0}"
KEYS = [f"{TAG}:{suffix}" for suffix in ("s", "m", "ri", "rv", "rn", "re", "rm")]
CHANNEL = f"{TAG}:reg"
NAMES = ("register", "deregister", "fetch", "list", "status", "monitors", "sweep")
Call = Callable[..., Any]


@pytest.fixture
def server(clean_valkey: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(clean_valkey) as client:
        yield client


@pytest.fixture
def call(server: redis.Redis) -> Call:
    common = (SCRIPTS / "common.lua").read_text() + (SCRIPTS / "registry_common.lua").read_text()
    scripts = {
        name: server.register_script(common + (SCRIPTS / f"registry_{name}.lua").read_text())
        for name in NAMES
    }

    def run(name: str, *arguments: object) -> Any:
        return scripts[name](keys=KEYS, args=list(arguments))

    return run


def now(server: redis.Redis) -> int:
    return int(server.hget(f"{TAG}:m", "l") or 0)


def session(server: redis.Redis, sid: str, *, gen: int = 1, ago: int = 0) -> None:
    """A session last seen so many milliseconds ago, by the partition's logical clock."""
    if not server.hexists(f"{TAG}:m", "l"):
        seconds, micros = server.time()
        wall = seconds * 1000 + micros // 1000
        server.hset(f"{TAG}:m", mapping={"l": wall, "w": wall, "e": "1"})
    server.hset(
        f"{TAG}:s", mapping={sid: f"{gen} 0 {now(server) - ago} 60000", f"@{sid}": json.dumps({"pid": sid})}
    )


def register(
    call: Call, id_: str, sid: str, *, gen: int = 1, epoch: int = 1, ttl: int = 5000, replace: bool = False
) -> Any:
    return call("register", "api", id_, sid, gen, epoch, ttl, int(replace), json.dumps({"id": id_}), CHANNEL)


def ids(reply: list[bytes]) -> list[str]:
    return [json.loads(entry.split(b"\0")[1])["id"] for entry in reply]


def test_a_registration_is_fetched_and_listed(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    code, revision = register(call, "a", "s1")
    assert code == 1
    assert call("fetch", "api") == [b"1", revision, b's1 1 5000 up\0{"id": "a"}']
    assert call("list", "", 10) == [b"", b's1 1 5000 up\0{"id": "a"}']
    assert call("fetch", "ap") == [b"1", b"0"]


def test_more_instances_than_are_read_at_once(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    session(server, "s2")
    for number in range(2_100):
        assert register(call, f"i{number:04}", f"s{1 + number % 2}")[0] == 1
    server.hset(f"{TAG}:s", "s2", f"1 0 {now(server) - 50_000} 60000")
    living = [f"i{number:04}" for number in range(0, 2_100, 2)]
    assert ids(call("fetch", "api")[2:]) == living
    assert ids(call("list", "", 1_500)[1:]) == living[:750]


def test_it_needs_a_session(call: Call) -> None:
    assert register(call, "a", "nobody") == [0]
    assert call("fetch", "api") == [b"", b"0"]


def test_twice_the_same_changes_nothing_and_older_ones_are_refused(server: redis.Redis, call: Call) -> None:
    session(server, "s1", gen=4)
    _, revision = register(call, "a", "s1", gen=4, epoch=7)
    assert register(call, "a", "s1", gen=4, epoch=7) == [2, revision]
    assert register(call, "a", "s1", gen=4, epoch=6) == [-3, b"7"]
    assert register(call, "a", "s1", gen=3, epoch=8) == [-3, b"0"]
    assert call("deregister", "api", "a", "s1", 6, CHANNEL) == [-3, b"7"]
    assert call("fetch", "api")[1] == revision


def test_an_id_belongs_to_its_live_session(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    session(server, "s2")
    register(call, "a", "s1")
    assert register(call, "a", "s2") == [-1, b"s1", b'{"pid": "s1"}']
    assert call("deregister", "api", "a", "s2", 1, CHANNEL) == [-1, b"s1"]
    assert register(call, "a", "s2", replace=True)[0] == 1
    assert register(call, "a", "s1")[0] == -1, "the former owner sees that it was taken over"


def test_an_id_of_a_dead_session_is_free(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    session(server, "s2")
    register(call, "a", "s1", ttl=1000)
    session(server, "s1", ago=1001)
    assert register(call, "a", "s2")[0] == 1


def test_the_dead_are_neither_fetched_nor_listed_and_the_sweep_removes_them(
    server: redis.Redis, call: Call
) -> None:
    for sid in ("s1", "s2"):
        session(server, sid)
        register(call, f"of-{sid}", sid, ttl=1000)
    register(call, "long", "s1", ttl=50_000)
    session(server, "s1", ago=2000)
    assert ids(call("fetch", "api")[2:]) == ["long", "of-s2"]
    assert ids(call("list", "", 10)[1:]) == ["long", "of-s2"]
    assert call("sweep", 100, CHANNEL) == 0, "nothing can have died yet, as far as the server looked"
    # The second passes without heartbeats.
    for _ in range(2):
        server.hincrby(f"{TAG}:m", "l", 600)
        session(server, "s2")
    pubsub = server.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(CHANNEL)
    pubsub.get_message(timeout=1)
    assert call("sweep", 100, CHANNEL) == 1
    message = pubsub.get_message(timeout=5)
    assert message is not None
    assert message["data"] == b"api\0" + call("fetch", "api")[1]
    pubsub.close()
    assert server.hlen(f"{TAG}:ri") == 2
    looks = dict(server.zrange(f"{TAG}:re", 0, -1, withscores=True))
    assert looks[b"api\0of-s2"] > now(server), "the living is put off by a whole ttl"
    assert call("sweep", 100, CHANNEL) == 0


def test_the_sweep_is_bounded(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    for n in range(25):
        register(call, f"i{n}", "s1", ttl=100)
    server.hdel(f"{TAG}:s", "s1")
    server.hincrby(f"{TAG}:m", "l", 200)
    assert [call("sweep", 10, CHANNEL) for _ in range(4)] == [10, 10, 5, 0]
    assert [server.exists(key) for key in KEYS[2:6]] == [0, 0, 0, 0], "nothing is left behind"


def test_revisions_rise_over_everything(server: redis.Redis, call: Call) -> None:
    revisions = []
    for epoch in range(1, 4):
        session(server, "s1")
        revisions.append(int(register(call, "a", "s1", epoch=epoch)[1]))
        revisions.append(int(register(call, "b", "s1", epoch=epoch)[1]))
        if epoch == 2:
            call("deregister", "api", "a", "s1", 9, CHANNEL)
            assert call("deregister", "api", "b", "s1", 9, CHANNEL) == [1, b"0"]
        else:
            server.flushdb()
    assert revisions == sorted(set(revisions))


def test_pages_go_through_every_service_once(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    for name in ("b", "a", "ab"):
        for n in range(3):
            call(
                "register", name, f"{name}{n}", "s1", 1, 1, 5000, 0, json.dumps({"id": f"{name}{n}"}), CHANNEL
            )
    seen, after = [], b""
    while True:
        after, *entries = call("list", after, 2)
        seen += ids(entries)
        if not after:
            break
    assert seen == ["a0", "a1", "a2", "ab0", "ab1", "ab2", "b0", "b1", "b2"]


def test_a_health_report_counts_only_for_what_was_checked(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    _, before = register(call, "a", "s1", epoch=1)
    assert call("status", "api", "a", 1, "up", CHANNEL) == 0
    assert call("fetch", "api")[1] == before
    assert call("status", "api", "a", 1, "down", CHANNEL) == 1
    assert b" down\0" in call("fetch", "api")[2]
    assert call("fetch", "api")[1] > before
    register(call, "a", "s1", epoch=2)
    assert call("status", "api", "a", 1, "down", CHANNEL) == -1
    assert b" up\0" in call("fetch", "api")[2], "a new registration begins healthy"
    assert call("status", "api", "nobody", 1, "down", CHANNEL) == -1


def test_monitors_that_fall_silent_are_left_out(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    assert call("monitors", "m1", 1000)[1:] == [b"m1"]
    server.hincrby(f"{TAG}:m", "l", 600)
    assert call("monitors", "m2", 1000)[1:] == [b"m1", b"m2"]
    server.hincrby(f"{TAG}:m", "l", 600)
    assert call("monitors", "m2", 1000)[1:] == [b"m2"]
    count = call("monitors", "m2", 0)
    assert count[0].endswith(b" 0")
    register(call, "a", "s1")
    assert call("monitors", "m1", 1000)[0] == count[0][:-1] + b"1", "every change is counted"


def test_a_step_of_the_clock_kills_nobody(server: redis.Redis, call: Call) -> None:
    session(server, "s1")
    register(call, "a", "s1", ttl=5000)
    # The server's wall clock seems to have jumped by an hour since it was last judged.
    wall = int(server.hget(f"{TAG}:m", "w") or 0)
    server.hset(f"{TAG}:m", "w", wall - 3_600_000)
    assert ids(call("fetch", "api")[2:]) == ["a"]
