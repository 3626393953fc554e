"""What the scripts of the locks leave on a server, whatever happened to those who called them.

Promises: when all sessions have ended, nothing is left but counters, though a session died with releases on
their way, the server was replaced in the middle of a sweep, or what a dead session had asked for came late;
a sweep leaves the living alone; a lock with many holders is read in few calls;
whoever could hold a lock beside those who do is given it; tokens never repeat, though data were lost twice
under a clock that was set back.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from dotmac.platform.connection.embedded import EmbeddedValkey
from support.lock_scripts import Scripts

if TYPE_CHECKING:
    from collections.abc import Iterator

WALKS = 40
LATE, DROPPED = "late", "dropped"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def scripts(server: EmbeddedValkey) -> Scripts:
    scripts = Scripts(server.url)
    scripts.client.flushall()
    scripts.tick(0)
    scripts.used_before()
    return scripts


def test_a_lock_with_many_holders_is_read_in_few_calls(scripts: Scripts) -> None:
    """The server serves nobody else meanwhile."""
    for sid in "SW":
        scripts.heartbeat(sid, "n")
    for number in range(2_500):
        assert scripts.acquire("many", "S", number, owner=f"r{number}", unusual="s")[0] == 1
    scripts.client.config_resetstat()
    assert scripts.acquire("many", "W", 1, owner="w1")[0] == 2
    commands = scripts.client.info("commandstats")
    assert sum(one["calls"] for name, one in commands.items() if "config" not in name) < 40
    assert scripts.acquire("other", "W", 2, owner="w2")[0] == 1
    assert scripts.acquire("other", "S", 2_500, owner="r2111")[0] == 2
    cycle = scripts.acquire("many", "W", 3, owner="w2", waiting="5000 s 1 ")
    assert (cycle[0], cycle[1::6], cycle[5::6]) == (-1, [b"many", b"other"], [b"r2111", b"w2"])
    # And one that comes back after several locks.
    for number in range(2_600, 2_604):
        assert scripts.acquire(f"lock {number}", "S", number, owner=f"t{number}")[0] == 1
        if number > 2_600:
            assert scripts.acquire(f"lock {number}", "S", number + 100, owner=f"t{number - 1}")[0] == 2
    longer = scripts.acquire("lock 2600", "S", 2_800, owner="t2603", waiting="5000 s 1 ")
    assert (longer[0], longer[5::6]) == (-1, [b"t2600", b"t2601", b"t2602", b"t2603"])


def pass_time(scripts: Scripts, seconds: float, *sids: str, gen: int = 1) -> None:
    """Those sessions go on, two heartbeats a second."""
    for _ in range(int(seconds * 2)):
        scripts.tick(500)
        for sid in sids:
            scripts.heartbeat(sid, gen=gen)


def test_what_ends_after_its_session(scripts: Scripts) -> None:
    """Its releases were lost with its connection, and it has told on a new one that it holds nothing any
    more; then it dies."""
    scripts.heartbeat("S", "n", longest=60_000)
    scripts.heartbeat("O", "n")
    assert scripts.acquire("renewed", "S", 1, timeout=60_000)[0] == 1
    assert scripts.acquire("fixed", "S", 2, timeout=60_000, unusual="@")[0] == 1
    scripts.heartbeat("S", "r", gen=2)
    pass_time(scripts, 40, "O")
    assert b"fixed" in scripts.holders(), "as long as it was promised"
    pass_time(scripts, 60, "O")
    assert not scripts.holders()


def test_a_sweep_leaves_the_living_alone(scripts: Scripts) -> None:
    for sid in ("S", "T", "dead"):
        scripts.heartbeat(sid, "n")
    for number in range(60):
        assert scripts.acquire(f"own {number}", "S", number)[0] == 1
        assert scripts.acquire("shared", "S", 100 + number, unusual="s")[0] == 1
    assert scripts.acquire("of the dead", "dead", 1)[0] == 1
    looked = set()
    for _ in range(120):
        pass_time(scripts, 0.5, "S", "T")
        looked |= {member for member in scripts.client.zrange(scripts.key("x"), 0, -1) if member[:1] == b"!"}
    assert b"of the dead" not in scripts.holders()
    assert len(scripts.holders()) == 120
    assert not looked, "nobody waits for any of them"


@pytest.mark.parametrize("passed", [40, 90])
def test_a_sweep_that_another_server_goes_on_with(own_valkey: EmbeddedValkey, passed: int) -> None:
    """Where a sweep has come to is a place in one process's memory."""
    scripts = Scripts(own_valkey.url)
    scripts.used_before()
    scripts.heartbeat("S", "n")
    scripts.heartbeat("O", "n")
    for number in range(3000):
        scripts.acquire(f"lock number {number}", "S", number)
    pass_time(scripts, 13, "O")
    pass_time(scripts, passed / 2, "O")
    assert scripts.client.hget(scripts.key("m"), "c") != b"0"
    scripts.client.save()
    own_valkey.restart()
    after = Scripts(own_valkey.url)
    after.now, after.process = scripts.now, "B"
    after.tick(500)
    assert after.heartbeat("O", "r", gen=2)[0] == 1
    pass_time(after, 200, "O", gen=2)
    assert not after.holders()


def test_what_a_dead_session_had_asked_for_comes_late(scripts: Scripts) -> None:
    scripts.heartbeat("S", "n")
    scripts.heartbeat("O", "n")
    for number in range(800):
        scripts.acquire(f"lock number {number}", "O", number)
    pass_time(scripts, 12, "O")
    for number in range(40):
        # Behind the place to which the sweep has come, as far as these are.
        reply = scripts.acquire(f"late {number}", "S", number, unusual="@" if number % 2 else "")
        assert reply[0] == 1
        if number % 5 == 0:
            scripts.tick(20)
            scripts.heartbeat("O")
    pass_time(scripts, 120, "O")
    assert [field for field in scripts.holders() if field.startswith(b"late")] == []
    assert scripts.acquire("later", "S", 99)[0] == -2


def test_tokens_over_data_that_were_lost_twice(scripts: Scripts) -> None:
    """The second time before the only survivor had heard of what was given out since the first."""
    scripts.heartbeat("A.0", "n")
    scripts.heartbeat("B.0", "n")
    first = scripts.acquire("a", "A.0", 1)[1]
    told = scripts.heartbeat("B.0")[6]
    scripts.lose_data()
    scripts.tick(-3_600_000)
    epoch = scripts.heartbeat("A.1", f"k1 {told}")[1].decode()
    told = max(told, scripts.heartbeat("B.1", f"k1 {told}")[6])
    pass_time(scripts, 4, "A.1", "B.1")
    second = scripts.acquire("a", "A.1", 1)[1]
    assert second > first
    scripts.lose_data()
    scripts.heartbeat("B.2", f"k{epoch} {told}")
    pass_time(scripts, 4, "B.2")
    assert scripts.acquire("a", "B.2", 1)[1] > second


def test_more_silent_ones_than_one_script_passes_over(scripts: Scripts) -> None:
    for sid in ("H", "A", "D", "X"):
        scripts.heartbeat(sid, "n")
    scripts.acquire("a", "H", 1, unusual="s")
    leaving = scripts.acquire("a", "X", 1, unusual="s")[1]
    scripts.acquire("a", "D", 1)
    for number in range(2, 602):
        scripts.acquire("a", "D", number, unusual="s")
    scripts.acquire("a", "A", 1, unusual="s")
    pass_time(scripts, 4, "H", "A", "X")
    scripts.release("a", leaving)
    pass_time(scripts, 2, "H", "A")
    assert sorted(record[3] for record in scripts.holders().values()) == [b"A", b"H"]


@pytest.mark.parametrize("kind", ["k1", "s"])
def test_who_is_silent_before_his_turn_keeps_his_place(scripts: Scripts, kind: str) -> None:
    """A full semaphore, and readers for whom only writers wait: nobody could be served in their place."""
    for sid in ("H", "W", "V"):
        scripts.heartbeat(sid, "n")
    holding = scripts.acquire("a", "H", 1, unusual=kind)[1]
    waits = kind if kind != "s" else ""
    assert scripts.acquire("a", "W", 1, unusual=waits, timeout=600)[0] == 2
    assert scripts.acquire("a", "V", 1, unusual=waits)[0] == 2
    pass_time(scripts, 9, "H", "V")
    pass_time(scripts, 1, "H", "V", "W")
    scripts.release("a", holding)
    assert [record[3] for record in scripts.holders().values()] == [b"W"]


def test_who_is_passed_over_for_others_gets_his_place_back(scripts: Scripts) -> None:
    """A silent writer ahead of a reader, beside a reader that holds."""
    for sid in ("H", "W", "R"):
        scripts.heartbeat(sid, "n")
    holding = scripts.acquire("a", "H", 1, unusual="s")[1]
    place = scripts.acquire("a", "W", 1)[2].decode()
    scripts.acquire("a", "R", 1, unusual="s")
    pass_time(scripts, 7, "H", "R")
    assert sorted(record[3] for record in scripts.holders().values()) == [b"H", b"R"]
    assert scripts.heartbeat("W")[3] == b"1 late;"
    scripts.acquire("a", "R", 2)
    scripts.acquire("a", "W", 2, waiting=f"5000 y 0 {place}")
    for record in list(scripts.holders().values()):
        scripts.release("a", int(record[1]))
    assert holding
    assert [record[5] for record in scripts.holders().values()] == [b"W:2"]


def test_an_offer_of_what_has_outlived_its_session(scripts: Scripts) -> None:
    """Its giver forgets it, whatever the answer: so it is free."""
    scripts.heartbeat("S.0", "n")
    scripts.heartbeat("O.0", "n")
    fence = scripts.acquire("a", "S.0", 1, timeout=3_600_000, unusual="@")[1]
    scripts.heartbeat("S.0")
    pass_time(scripts, 60, "O.0")
    assert scripts.heartbeat("S.0")[0] == 0
    scripts.heartbeat("S.1", "n")
    assert scripts.call("offer", "a", fence, 5000, "O.0", 1) == 0
    assert scripts.holders(), "it was not its to offer"
    assert scripts.call("offer", "a", fence, 5000, "S.1", 1) == 0
    assert not scripts.holders()


# ---- random walks


class Session:
    """What a client does by the protocol, as far as the scripts see it."""

    def __init__(self, walk: Walk, number: int) -> None:
        self.walk, self.number = walk, number
        self.serial, self.gen, self.requests_made = 0, 1, 0
        self.alive = True
        self.epoch = ""
        self.told = 0
        self.acknowledge = ""
        self.requests: dict[int, dict[str, Any]] = {}
        self.held: dict[int, dict[str, Any]] = {}
        self.unsure: set[int] = set()
        self._open()

    @property
    def sid(self) -> str:
        return f"S{self.number}.{self.serial}"

    def longest(self) -> int:
        asked = [one["timeout"] for one in (*self.requests.values(), *self.held.values())]
        return max([10_000, *asked])

    def ask(self, wish: dict[str, Any]) -> None:
        number = self.requests_made = self.requests_made + 1
        self.requests[number] = wish | {"sid": self.sid}
        if wish["timeout"] > 10_000:
            self.beat()  # the session has to last as long
        if number in self.requests:
            self._send(number)

    def beat(self, mode: str = "h") -> None:
        if mode == "r":
            self.gen += 1
            mode = f"r{self.epoch} {self.told}"
        claims = tuple(
            (lease["name"], fence) for fence, lease in self.held.items() if lease["unclaimed"] or mode != "h"
        )
        reply = self.walk.scripts.heartbeat(
            self.sid, mode, longest=self.longest(), gen=self.gen, claims=claims, acknowledge=self.acknowledge
        )
        if reply[0] == 0 or reply[1].decode() != self.epoch:
            self._gone()
            return
        self.told = max(self.told, reply[6])
        self._learn(reply[3].decode())
        accepted = {int(fence) for fence in reply[7:]}
        for _, fence in claims:
            if fence in self.held:
                if fence in accepted:
                    self.held[fence]["unclaimed"] = False
                else:
                    self.unsure.add(fence)
        if self.unsure or mode != "h":
            self._opened(reply[5])

    def look(self) -> None:
        """Hears of grants, and ends what has a fixed length."""
        for field, record in self.walk.scripts.holders().items():
            flag, fence, _, sid, _, request, *_ = record
            if flag in b"uU" and sid.decode() == self.sid:
                number = int(request.rpartition(b":")[2])
                if number in self.requests:
                    self._granted(number, int(fence), unclaimed=True)
                elif int(fence) not in self.held:
                    self.walk.scripts.call("cancel", field.split(b"\0")[0], request)
        for fence, lease in list(self.held.items()):
            if lease["fixed"] and lease["ends"] - 30 <= self.walk.scripts.now:
                self.release(fence)

    def release(self, fence: int) -> None:
        self.walk.scripts.release(self.held.pop(fence)["name"], fence)

    def cancel(self, number: int) -> None:
        wish = self.requests.pop(number)
        self.walk.scripts.call("cancel", wish["name"], f"{wish['sid']}:{number}")

    def close(self) -> None:
        for number in list(self.requests):
            self.cancel(number)
        for fence in list(self.held):
            self.release(fence)
        self.walk.scripts.call("close", self.sid)
        self.alive = False

    # ---- inside

    def _open(self) -> None:
        mode = f"k{self.epoch} {self.told}" if self.epoch else "n"
        reply = self.walk.scripts.heartbeat(self.sid, mode, longest=self.longest(), gen=self.gen)
        self.epoch = reply[1].decode()
        self.told = max(self.told, reply[6])
        self._opened(reply[5])

    def _opened(self, takes_back: int) -> None:
        scripts = self.walk.scripts
        taken: set[int] = set()
        if self.unsure and takes_back:
            cells: list[Any] = []
            for fence in self.unsure & self.held.keys():
                lease = self.held[fence]
                ends = lease["ends"] - scripts.now if lease["fixed"] else ""
                request = f"{self.sid}:{lease['number']}"
                cells += [lease["name"], fence, lease["owner"], lease["timeout"], ends, request, 1]
                cells += [lease["mode"], "here"]
            taken = {int(fence) for fence in scripts.call("assert", self.sid, self.gen, *cells)[1:]}
        for fence in self.unsure - taken:
            self.held.pop(fence, None)
        self.unsure = set()
        for number in list(self.requests):
            if number in self.requests:
                self._send(number, again=True)

    def _gone(self) -> None:
        self.serial += 1
        self.unsure = set(self.held)
        self._open()

    def _send(self, number: int, *, again: bool = False) -> None:
        wish = self.requests[number]
        wish["sid"] = self.sid
        unusual = ("!" if again else "") + ("@" if wish["fixed"] else "")
        unusual += "" if wish["mode"] == "x" else wish["mode"]
        held = sum(lease["owner"] == wish["owner"] for lease in self.held.values())
        waiting = f"{wish['priority']} {wish['policy']} {held} {wish['rank']}"
        reply = self.walk.scripts.acquire(
            wish["name"],
            self.sid,
            number,
            owner=wish["owner"],
            timeout=wish["timeout"],
            unusual=unusual,
            wait=wish["wait"],
            waiting="" if waiting == "5000 y 0 " else waiting,
            gen=self.gen,
            script=self.walk.chance.choice(["acquire", "acquire", "acquire slowly"]),
        )
        match reply[0]:
            case 1 | 5:
                self._granted(number, reply[1], unclaimed=reply[0] == 5)
            case 2:
                wish["rank"] = reply[2].decode()
            case -2:
                self._gone()
            case _:
                self.requests.pop(number)
                if again:
                    self.walk.scripts.call("cancel", wish["name"], f"{self.sid}:{number}")

    def _granted(self, number: int, fence: int, *, unclaimed: bool) -> None:
        wish = self.requests.pop(number)
        if fence not in self.held:
            self.walk.grant(fence, wish["name"])
            ends = self.walk.scripts.now + wish["timeout"]
            self.held[fence] = wish | {"number": number, "unclaimed": unclaimed, "ends": ends}

    def _learn(self, notes: str) -> None:
        self.acknowledge = notes
        for note in filter(None, notes.split(";")):
            what, _, why = note.partition(" ")
            number = int(what)
            if why in (LATE, DROPPED):
                if number in self.requests:
                    wish = self.requests[number]
                    self.cancel(number)
                    self.ask(wish | {"rank": wish["rank"] if why == LATE else ""})
            elif why.startswith("deadlock"):
                self.requests.pop(number, None)
            else:
                self.held.pop(number, None)


class Walk:
    """Sessions that do this and that; what they must find is asserted on the way."""

    def __init__(self, scripts: Scripts, seed: int) -> None:
        self.scripts, self.chance = scripts, random.Random(seed)
        self.granted: dict[int, str] = {}
        self.offers: list[tuple[int, dict[str, Any]]] = []
        kinds = ["x", "rw", "rw", "k"]
        self.kinds = {name: self.chance.choice(kinds) for name in ("A", "B", "C")}
        self.sessions = [Session(self, number) for number in range(self.chance.randint(2, 4))]
        self.data: tuple[list[tuple[str, bytes | None]], int] | None = None

    def alive(self) -> list[Session]:
        return [session for session in self.sessions if session.alive]

    def grant(self, fence: int, name: str) -> None:
        assert self.granted.setdefault(fence, name) == name, f"token {fence} is given out twice"

    def step(self) -> None:
        """Somebody does something, or something happens."""
        chance, scripts = self.chance, self.scripts
        living = self.alive()
        if not living or chance.random() < 0.02:
            self.sessions.append(Session(self, len(self.sessions)))
            return
        for session in living:
            session.look()
        session = chance.choice(living)
        dice = chance.random()
        if dice < 0.40:
            self._acquire(session)
        elif dice < 0.60 and session.held:
            session.release(chance.choice(list(session.held)))
        elif dice < 0.66 and session.requests:
            session.cancel(chance.choice(list(session.requests)))
        elif dice < 0.70 and session.held:
            self._offer(session)
        elif dice < 0.74 and self.offers:
            self._adopt(session)
        elif dice < 0.77 and session.held:
            self._extend(session)
        elif dice < 0.785:
            scripts.call("force", chance.choice(list(self.kinds)), "")
        elif dice < 0.80:
            session.close()
        elif dice < 0.81:
            session.alive = False
        elif dice < 0.82:
            scripts.lose_data()
        elif dice < 0.84:
            self.data = [(key, scripts.client.dump(key)) for key in scripts.keys], scripts.now
        elif dice < 0.85 and self.data is not None and scripts.now - self.data[1] < 5000:
            self._fail_over()
        elif dice < 0.92:
            scripts.tick(chance.choice([3, 20, 300]))
        else:
            scripts.tick(chance.choice([100, 400, 900]))
            for one in chance.sample(living, len(living)):
                if chance.random() < 0.85:
                    one.beat()

    def rest(self) -> None:
        """Nothing happens for a minute but heartbeats."""
        if not self.alive():
            self.sessions.append(Session(self, len(self.sessions)))
        for _ in range(150):
            self.scripts.tick(450)
            for session in self.alive():
                session.look()
                session.beat()

    def _acquire(self, session: Session) -> None:
        chance = self.chance
        name = chance.choice(list(self.kinds))
        mode = {"x": ["x"], "rw": ["x", "s", "s"], "k": ["k2"]}[self.kinds[name]]
        owner = f"P{session.number}/{chance.choice([str(session.requests_made), 'o'])}"
        if any(wish["owner"] == owner for wish in session.requests.values()):
            return
        session.ask(
            {
                "name": name,
                "mode": chance.choice(mode),
                "owner": owner,
                "timeout": chance.choice([500, 3000, 10_000, 30_000]),
                "fixed": chance.random() < 0.15,
                "wait": chance.choice("wwwwt"),
                "priority": chance.choice([5000, 5000, 5000, 4000, 6000]),
                "policy": chance.choice("yypls"),
                "rank": "",
            }
        )

    def _offer(self, session: Session) -> None:
        fence = self.chance.choice(list(session.held))
        lease = session.held.pop(fence)
        within = self.chance.choice([300, 2000, 20_000])
        if self.scripts.call("offer", lease["name"], fence, within, session.sid, session.gen):
            self.offers.append((fence, lease))

    def _adopt(self, session: Session) -> None:
        fence, lease = self.offers.pop(self.chance.randrange(len(self.offers)))
        timeout, fixed = self.chance.choice([3000, 20_000]), self.chance.random() < 0.3
        number = session.requests_made = session.requests_made + 1
        wish = lease | {"timeout": timeout, "fixed": fixed, "owner": f"P{session.number}/{number}"}
        session.requests[number] = wish | {"wait": "t", "rank": "", "sid": session.sid}
        session.beat()
        if number not in session.requests:
            return
        unusual = ("@" if fixed else "") + f"a{fence}"
        owner = session.requests[number]["owner"]
        reply = self.scripts.acquire(
            lease["name"],
            session.sid,
            number,
            owner=owner,
            timeout=timeout,
            unusual=unusual,
            wait="t",
            gen=session.gen,
        )
        if reply[0] == 1:
            session._granted(number, fence, unclaimed=False)
        else:
            session.requests.pop(number, None)

    def _extend(self, session: Session) -> None:
        fence = self.chance.choice(list(session.held))
        lease, timeout = session.held[fence], self.chance.choice([500, 5000, 30_000])
        lease["timeout"] = max(timeout, lease["timeout"])
        session.beat()
        if fence not in session.held:
            return
        if self.scripts.call("extend", lease["name"], fence, timeout, session.sid, session.gen)[0] == 1:
            lease["timeout"], lease["ends"] = timeout, self.scripts.now + timeout
        else:
            session.held.pop(fence)
            self.scripts.release(lease["name"], fence)

    def _fail_over(self) -> None:
        """Another process serves what the data were some seconds ago."""
        scripts, (data, _) = self.scripts, self.data or ([], 0)
        self.data = None
        scripts.tick(40)
        scripts.process += "B"
        for key, value in data:
            scripts.client.delete(key)
            if value is not None:
                scripts.client.restore(key, 0, value)
        for session in self.alive():
            session.beat("r")
            # What the server thinks that it holds, and it has given back.
            for field, record in scripts.holders().items():
                fence = int(record[1])
                its = record[3].decode() == session.sid and record[5] != b"offered"
                if session.alive and its and fence not in session.held:
                    scripts.release(field.split(b"\0")[0].decode(), fence)


def waits_for_nothing(scripts: Scripts, name: str) -> str:
    """Why somebody should not be waiting for a lock; empty where nobody does, or with reason."""
    first = scripts.client.zrangebylex(scripts.key("q"), f"[{name}\0", f"({name}\1", 0, 1)
    if not first:
        return ""
    stands = scripts.client.hget(scripts.key("h"), name)
    raw = scripts.client.hget(scripts.key("w"), b"r" + first[0].split(b"\0")[2])
    if not stands or not raw or stands[:2] in (b"&g", b"&r"):
        return f"{name}: {first} waits, and {stands} holds it"
    if stands[:1] not in b"+U&":
        return f"{name}: {stands} does not know that somebody waits"
    mode = raw.split(b"\0")[6]
    if stands[:1] != b"&":
        return ""
    had, count = stands[1:].split(b"\0")
    joins = mode == had and (mode == b"s" or int(count) < int(mode[1:] or 0))
    return f"{name}: {first} could join {stands}" if joins else ""


@pytest.mark.parametrize("seed", range(WALKS))
def test_random_walks(server: EmbeddedValkey, seed: int) -> None:
    scripts = Scripts(server.url)
    scripts.client.flushall()
    scripts.tick(60_000 * seed)
    scripts.used_before()
    walk = Walk(scripts, seed)
    for _ in range(walk.chance.choice([30, 80, 200])):
        walk.step()
    walk.rest()
    assert [why for name in walk.kinds if (why := waits_for_nothing(scripts, name))] == []
    assert [record for record in scripts.holders().values() if record[5] == b"offered"] == []
    for session in walk.alive():
        if walk.chance.random() < 0.5:
            session.close()
    scripts.heartbeat("onlooker", "n")
    pass_time(scripts, 120, "onlooker")
    scripts.call("close", "onlooker")
    assert scripts.left() == {}
