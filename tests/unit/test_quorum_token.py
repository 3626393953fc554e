"""Fencing with several servers.

Promises: whatever majorities holders get, in whatever order and however far apart the servers' counters are,
a holder that was overtaken is refused, and one that was not is let in; their maximum would not do.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dotmac.platform.distributed_locks import QuorumToken


def holders(size: int, seed: int) -> list[QuorumToken]:
    """The tokens of one holder after the other, each with a majority of the servers at least."""
    chance = random.Random(seed)
    counters = [chance.randrange(10**9) for _ in range(size)]
    found = []
    for _ in range(12):
        mine: list[int | None] = [None] * size
        for server in chance.sample(range(size), chance.randint(size // 2 + 1, size)):
            counters[server] += chance.choice([1, 1, 1, 1000])
            mine[server] = counters[server]
        found.append(QuorumToken(mine))
    return found


@given(st.integers(3, 7), st.integers(0, 2**32), st.data())
def test_who_was_overtaken_is_refused(size: int, seed: int, data: st.DataObject) -> None:
    tokens = holders(size, seed)
    seen: tuple[int | None, ...] = (None,) * size
    latest = -1
    # Writes arrive in any order, also more than once.
    for index in data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=30)):
        assert tokens[index].overtaken(seen) == (index < latest)
        if index >= latest:
            seen, latest = tokens[index].merged(seen), index


def test_a_single_number_would_not_do() -> None:
    first, second = QuorumToken([1000, 5, None]), QuorumToken([None, 6, 7])
    assert max(t for t in first if t) > max(t for t in second if t), "the later holder has the lower maximum"
    assert first.overtaken(second.merged(first))
    assert not second.overtaken(first)


def test_tokens_of_other_servers_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        QuorumToken([1, 2, 3]).overtaken([1, 2])
    with pytest.raises(ValueError, match="zip"):
        QuorumToken([1, 2, 3]).merged([1, 2, 3, 4])
