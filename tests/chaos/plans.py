"""What a task or thread sets out to do: drawn from a seed, so that it can be repeated."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

from redis.crc import key_slot

from chaos.kinds import EXCLUSIVE, KINDS
from support.cluster import PARTITIONS, partition_of

if TYPE_CHECKING:
    import random

    from chaos.kinds import Kind

    # Names of locks by family.
    Group = dict[str, list[str]]

FAMILIES = sorted({kind.family for kind in KINDS})
NAMES = 5  # locks of each family in a group: few, so that they are fought for
SLOTS = 16_384
OFFERED = 1.5  # seconds for which an offer stands


@dataclass(slots=True)
class Plan:
    """What is to be done with one lock, or with several at once; seconds."""

    kind: Kind
    locks: tuple[str, ...]
    timeout: float
    fixed: bool
    patience: float | None
    priority: int
    on_lost: str
    by_hand: bool
    hold: float
    extend: float | None
    again: bool
    offer: bool
    deeper: Plan | None
    cancel: tuple[str, float] | None


def one_group() -> list[Group]:
    """The locks of a server with one partition."""
    return [{family: [f"{family}{number}" for number in range(NAMES)] for family in FAMILIES}]


def groups_of(namespace: str, primaries: int) -> list[Group]:
    """The locks of a cluster: a partition at each primary, as the slots are at the start.

    Locks that one task holds together are of one group, since cycles are found within a partition.
    """

    def at(number: int) -> int:
        slots = (key_slot(f"{namespace}:{partition}".encode()) for partition in range(PARTITIONS))
        return next(p for p, slot in enumerate(slots) if slot * primaries // SLOTS == number)

    return [
        {
            family: list(
                islice((n for n in (f"{family}{i}" for i in count()) if partition_of(n) == partition), NAMES)
            )
            for family in FAMILIES
        }
        for partition in map(at, range(primaries))
    ]


def draw(chance: random.Random, groups: list[Group], timeouts: list[float]) -> Plan:
    """A plan for the locks of one of the groups."""
    return _draw(chance, chance.choice(groups), timeouts, 0, frozenset())


def _draw(
    chance: random.Random, group: Group, timeouts: list[float], depth: int, taken: frozenset[str]
) -> Plan:
    """Nested ones take other locks, in any order: those that close a circle are refused."""
    kind = chance.choices(KINDS, [kind.weight for kind in KINDS])[0]
    lock = chance.choice(group[kind.family])
    if lock in taken:
        return _draw(chance, group, timeouts, depth, taken)
    locks: tuple[str, ...] = (lock,)
    if kind is EXCLUSIVE and chance.random() < 0.15:
        free = [name for name in group[kind.family] if name not in taken and name != lock]
        locks = (lock, *chance.sample(free, min(len(free), chance.randint(1, 2))))
    timeout = chance.choice(timeouts)
    hold = chance.choices(
        [chance.uniform(0, 0.015), chance.uniform(0.03, 0.15), chance.uniform(0.5, 1.5) * timeout],
        [75, 22, 3],
    )[0]
    deeper = None
    if depth < 2 and chance.random() < 0.15:
        deeper = _draw(chance, group, timeouts, depth + 1, taken | set(locks))
    cancel = None
    if depth == 0 and chance.random() < 0.25:
        cancel = chance.choice([("turns", chance.randrange(14)), ("seconds", chance.expovariate(20))])
    return Plan(
        kind=kind,
        locks=locks,
        timeout=timeout,
        fixed=chance.random() < 0.15,
        patience=chance.choices([None, 0.0, chance.uniform(0.01, 0.5), 3.0], [60, 10, 15, 15])[0],
        priority=chance.choices([0, -5, 5], [80, 10, 10])[0],
        on_lost=chance.choice(["cancel", "flag"]),
        by_hand=chance.random() < 0.3,
        hold=hold,
        extend=chance.choice([0.5, 1.0, 3.0]) if chance.random() < 0.1 else None,
        again=kind.again,
        offer=len(locks) == 1 and not kind.again and depth == 0 and chance.random() < 0.05,
        deeper=deeper,
        cancel=cancel,
    )
