"""What goes wrong, and when: a function of the seed alone.

A lane is what a fault hits: the server, the clocks with it, or one worker's place. Faults of one lane follow
one another, those of different lanes overlap. Storms of faults take turns with calm spells, in which the
order of the queues can be judged.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SERVER = "server"
HOUR = 3600
CLOCKS = ("server clock", "worker clock")


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault that will be.

    Args:
        at: seconds after the start, or when the lane is free again.
        lane: what it hits.
        kind: what happens, a name in `KINDS`.
        amount: how long it lasts, seconds; for a clock, by how much it is off from then on.
    """

    at: float
    lane: str
    kind: str
    amount: float

    def __str__(self) -> str:
        return f"{self.at:7.2f} s  {self.lane:<8} {self.kind} ({self.amount:g} s)"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault: how often it happens beside the others, and from what range its amount is drawn."""

    weight: int
    least: float
    most: float


STANDALONE, SENTINEL, CLUSTER = "standalone", "sentinel", "cluster"

ON_THE_SERVER = {
    "server stopped": Kind(6, 0.05, 4.0),
    "server restarted": Kind(3, 0.0, 3.0),
    "server emptied": Kind(2, 0.0, 2.0),
    "flushall": Kind(3, 0.0, 0.0),
    "script flush": Kind(4, 0.0, 0.0),
    "client pause": Kind(4, 0.05, 2.0),
    "connections cut": Kind(4, 0.0, 0.0),
}
ON_SENTINELS = {
    "primary killed": Kind(4, 0.0, 2.0),
    "primary killed ahead": Kind(4, 0.0, 2.0),
    "primary stopped": Kind(4, 0.0, 2.0),
    "failover": Kind(4, 0.0, 0.0),
    "replica killed": Kind(3, 0.0, 2.0),
    "script flush": Kind(2, 0.0, 0.0),
    "connections cut": Kind(3, 0.0, 0.0),
}
ON_A_CLUSTER = {
    "slot moved": Kind(4, 0.0, 0.0),
    "slot half moved": Kind(4, 0.05, 2.0),
    "primary killed": Kind(3, 0.0, 2.0),
    "primary killed ahead": Kind(3, 0.0, 2.0),
    "failover": Kind(3, 0.0, 0.0),
    "replica killed": Kind(2, 0.0, 2.0),
    "script flush": Kind(2, 0.0, 0.0),
    "connections cut": Kind(2, 0.0, 0.0),
}
ON_A_WORKER = {
    "stopped": Kind(8, 0.02, 6.0),
    "killed": Kind(6, 0.0, 1.0),
    "cut": Kind(5, 0.0, 0.0),
    "answer cut": Kind(8, 0.0, 0.0),
    "answer halved": Kind(5, 0.01, 1.5),
    "answer half cut": Kind(4, 0.0, 0.0),
    "stalled": Kind(5, 0.05, 4.0),
    "delayed": Kind(5, 0.5, 4.0),
}
# Without a proxy there is only this.
ON_A_PROCESS = {kind: ON_A_WORKER[kind] for kind in ("stopped", "killed")}
BY_TOPOLOGY = {
    STANDALONE: (ON_THE_SERVER, ON_A_WORKER, CLOCKS),
    SENTINEL: (ON_SENTINELS, ON_A_PROCESS, ()),
    CLUSTER: (ON_A_CLUSTER, ON_A_PROCESS, ()),
}
# Seconds: the first fault, a storm, the calm spell behind it, and between two faults at the mean.
FIRST, STORM, SPELL, PACE = 1.0, 9.0, 4.0, 0.9
# Longest stop of the server, once in a long run.
LONG_STOP = 30.0
LONG_RUN = 120.0


def schedule(seed: int, seconds: float, places: list[str], topology: str = STANDALONE) -> list[Planned]:
    """All faults of a run, in order.

    Args:
        seed: decides all.
        seconds: length of the run.
        places: the workers' lanes.
        topology: what the servers are to one another.
    """
    chance = random.Random(seed)
    server, worker, clocks = BY_TOPOLOGY[topology]
    # Each kind once, however short the run, and then as many as the storms have room for.
    kinds = [("server", kind) for kind in server] + [("worker", kind) for kind in worker]
    kinds += [("clock", kind) for kind in clocks]
    chance.shuffle(kinds)
    kinds += [_any(chance, topology) for _ in range(int(seconds / PACE) - len(kinds))]
    faults = []
    for where, kind in kinds:
        at = chance.uniform(FIRST, seconds)
        while at > STORM and at % (STORM + SPELL) > STORM:
            at = chance.uniform(FIRST, seconds)
        faults.append(_plan(chance, round(at, 2), where, kind, places, topology))
    if seconds >= LONG_RUN and topology == STANDALONE:
        at = round(seconds * chance.uniform(0.3, 0.7), 2)
        faults.append(Planned(at, SERVER, "server stopped", LONG_STOP))
    return sorted(faults, key=lambda fault: fault.at)


def _any(chance: random.Random, topology: str) -> tuple[str, str]:
    server, worker, clocks = BY_TOPOLOGY[topology]
    where = chance.choices(["worker", "server", "clock"], [70, 18, 12 if clocks else 0])[0]
    if where == "clock":
        return where, chance.choice(clocks)
    kinds = server if where == "server" else worker
    return where, chance.choices(list(kinds), [kind.weight for kind in kinds.values()])[0]


def _plan(
    chance: random.Random, at: float, where: str, kind: str, places: list[str], topology: str
) -> Planned:
    if where == "clock":
        return Planned(at, SERVER, kind, chance.choice([HOUR, -HOUR, 0]))
    server, worker, _ = BY_TOPOLOGY[topology]
    known = (server if where == "server" else worker)[kind]
    # Most are short; some last for longer than a lease.
    amount = round(known.least + (known.most - known.least) * chance.random() ** 2, 3)
    return Planned(at, SERVER if where == "server" else chance.choice(places), kind, amount)
