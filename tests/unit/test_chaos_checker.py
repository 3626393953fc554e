"""The judge of `make chaos` finds what it is there for.

Promises: every kind of violation is found in a history made by hand that differs from a good one in just
that; what the locks do not promise is excused no further than `chaos/limits.py` says; a history is read back
as it was written, from killed processes too; the same seed gives the same faults.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from chaos.checker import check, report
from chaos.faults import BY_TOPOLOGY, CLUSTER, SENTINEL, STANDALONE, schedule
from chaos.history import SECOND, Fault, History, Recorder, Write, load
from chaos.limits import TURN
from chaos.plans import draw, groups_of, one_group
from chaos.register import Register
from support.histories import at, attempt, good, overtaken, rules, together

if TYPE_CHECKING:
    from pathlib import Path


def test_a_good_history() -> None:
    verdict = check(good())
    assert verdict.violations == []
    assert verdict.counts["grants"] == 3
    assert "violations: none" in report(good(), verdict)


def test_two_at_once() -> None:
    history = good()
    history.attempts[1] = attempt("01", 0.5, 0.9, 2.0, 12)
    verdict = check(history)
    assert [violation.rule for violation in verdict.violations] == ["overlap"]
    assert "worker-01-0" in report(history, verdict)


def test_a_grant_within_what_a_killed_holder_had_been_promised() -> None:
    history = good()
    history.attempts[0].promised = at(1.5)
    history.attempts[0].ended, history.attempts[0].left = None, None
    history.process("worker-00-0").killed = True
    assert rules(history) == ["overlap"]
    history.attempts[0].promised = at(1.1)
    assert rules(history) == []


@pytest.mark.parametrize(
    ("capacity", "costs", "found"),
    [
        (2, (1, 1), []),
        (2, (1, 1, 1), ["overlap"]),
        (1000, (1, 1, 1), []),
        (1000, (1, 1000), ["overlap"]),
        (1000, (1000, 1), ["overlap"]),
    ],
    ids=["permits", "a permit too many", "readers", "a writer among readers", "a reader beside a writer"],
)
def test_holders_of_a_shared_lock(capacity: int, costs: tuple[int, ...], found: list[str]) -> None:
    assert rules(together(capacity, *costs)) == found


def in_a_cycle() -> History:
    """Each holds what the other asks for, and one is refused."""
    history = good()
    history.calm = None
    history.writes = []
    two = {"how": "deadlock", "ended": at(2), "scope": "b2", "lock": "a"}
    edges = [("a", "s1/b2", 41, "s0/a1"), ("b", "s0/a1", 40, "s1/b2")]
    history.attempts = [
        attempt("00", 0.0, 0.1, 3.0, 11, scope="a1"),
        attempt("01", 0.0, 0.1, 2.1, 12, scope="b2", lock="b"),
        attempt("00", 1.0, 2.2, 3.0, 13, scope="a1", lock="b"),
        attempt("01", 1.5, edges=edges, **two),
    ]
    history.process("worker-00-0").pid, history.process("worker-01-0").pid = 40, 41
    return history


def test_a_cycle_that_was_one() -> None:
    verdict = check(in_a_cycle())
    assert verdict.violations == []
    assert verdict.counts["cycles looked at"] == 1


@pytest.mark.parametrize("why", ["open", "not held", "held before", "not asked", "asked later", "not in it"])
def test_a_cycle_that_was_none(why: str) -> None:
    history = in_a_cycle()
    first, second, asks, refused = history.attempts
    match why:
        case "open":
            refused.edges[1] = ("b", "s0/a1", 40, "s1/b3")
        case "not held":
            second.scope = "b3"
        case "held before":
            second.ended = second.left = second.acted = second.promised = at(0.5)
        case "not asked":
            asks.lock = "c"
        case "asked later":
            asks.asked = at(2.1)
        case _:
            refused.scope = first.scope
    assert "no cycle" in rules(history)


def test_a_token_used_twice() -> None:
    history = good()
    history.attempts[3].fence = 12
    assert rules(history) == ["reuse"]


def test_tokens_that_fall() -> None:
    history = good()
    history.attempts[3].fence = 10
    assert set(rules(history)) == {"order"}


def test_a_reader_with_a_lower_token_than_a_writer_before() -> None:
    history = together(1000, 1, 1)
    history.attempts[0].fence, history.attempts[1].fence = 12, 11
    assert rules(history) == [], "readers hear of their grants in any order"
    writer = attempt("02", 0, 1.1, 2, 13, cost=1000, capacity=1000)
    reader = attempt("00", 0.2, 2.1, 3, 14, cost=1, capacity=1000)
    history.process("worker-02-0").said_goodbye, history.process("worker-02-0").status = True, 0
    history.attempts += [writer, reader]
    assert rules(history) == []
    writer.fence, reader.fence = 14, 13
    assert rules(history) == ["order"]


def test_a_lock_is_handed_on_under_its_token() -> None:
    history = good()
    history.attempts[3] = attempt("00", 1.9, 2.6, 3.0, 12, adopted=True)
    assert rules(history) == []
    history.attempts.append(attempt("02", 2.0, 2.2, 2.4, 14))
    assert "order" in rules(history), "somebody got in between"


def test_a_later_holder_with_a_lower_token() -> None:
    """Both had asked before either was granted, so only who held first tells."""
    history = good()
    history.writes = []
    history.attempts[0].fence, history.attempts[1].fence = 12, 11
    history.attempts[1].asked = at(0.05)
    assert rules(history) == ["order"]


def test_a_register_that_lets_a_lower_token_in() -> None:
    history = good()
    history.writes.append(Write(at(2.1), "a", "write", 11, True))
    assert rules(history) == ["register"]


def test_a_register_that_refuses_without_reason() -> None:
    history = good()
    history.writes.append(Write(at(2.1), "a", "write", 12, False))
    assert rules(history) == ["register"]


def test_a_refused_token_that_nobody_was_granted() -> None:
    history = good()
    history.writes.append(Write(at(2.1), "a", "write", 7, False))
    assert rules(history) == ["register"]


def test_readers_are_refused_after_a_later_writer_only() -> None:
    history = good()
    history.writes = [
        Write(at(0.1), "a", "read", 12, True),
        Write(at(0.2), "a", "read", 11, True),
        Write(at(2.7), "a", "write", 13, True),
    ]
    assert rules(history) == []
    history.writes.append(Write(at(2.8), "a", "read", 12, True))
    assert rules(history) == ["register"]


def test_refused_while_it_held() -> None:
    """Another had been granted the lock, and wrote, though nothing of it was noted."""
    history = good()
    history.attempts.append(attempt("02", 2.5, how="released", fence=20))
    history.writes += [Write(at(2.7), "a", "write", 20, True), Write(at(2.8), "a", "write", 13, False)]
    assert rules(history) == ["refused while held"]


def test_pushing_in() -> None:
    history = overtaken()
    verdict = check(history)
    assert [violation.rule for violation in verdict.violations] == ["overtaken"]
    assert verdict.counts["places in queues compared"] == 1


def test_pushing_in_before_one_that_was_never_granted() -> None:
    history = overtaken()
    history.attempts[1] = attempt("01", 1.0, how="cancelled", ended=at(7))
    assert rules(history) == ["overtaken"]
    history.attempts[1] = attempt("01", 1.0, how="cancelled", ended=at(5))
    assert rules(history) == []


def test_who_is_slow_to_answer_when_a_holder_has_died_is_passed_over_once() -> None:
    history = overtaken()
    dead = history.attempts[0]
    dead.left = dead.ended = None
    dead.how = ""
    history.process("worker-00-0").killed, history.process("worker-00-0").died = True, at(2)
    history.process("worker-00-0").said_goodbye, history.process("worker-00-0").status = False, None
    verdict = check(history)
    assert verdict.violations == []
    assert verdict.counts["slow to answer a roll call"] == 1
    # Then it has its place back, and nobody else comes before it.
    waiting = history.attempts[1]
    waiting.held = waiting.acted = waiting.promised = at(6.5)
    assert rules(history) == ["overtaken"]


def test_a_higher_priority_goes_first() -> None:
    history = overtaken()
    history.attempts[2].priority = 5
    assert rules(history) == []
    history.attempts[1].held, history.attempts[1].fence, history.attempts[1].ended = at(5.1), 12, at(6)
    history.attempts[1].acted = history.attempts[1].promised = history.attempts[1].left = at(6)
    history.attempts[2] = attempt("02", 3.0, 6.1, 7.0, 13, priority=5)
    assert rules(history) == ["overtaken"]
    history.attempts[1].of = 2
    assert rules(history) == [], "it has heard of that when the other one was granted, too"
    history.attempts[1].of = 1
    history.faults.append(Fault("stopped", "worker-01", at(1.5), at(5)))
    assert rules(history) == [], "it may have been granted before, and not have heard of it"


@pytest.mark.parametrize(
    "why", ["asked together", "kept away", "only tried", "asked in turn", "handed on", "had it before"]
)
def test_who_may_go_first(why: str) -> None:
    history = overtaken()
    if why == "asked in turn":
        history.attempts[1].place = 1
    elif why == "handed on":
        history.attempts[1].adopted = True
    elif why == "had it before":
        history.attempts[1] = attempt(
            "01", 1.0, how="timeout", ended=at(7), of=3, fixed=True, timeout=2 * SECOND
        )
    elif why == "asked together":
        history.attempts[1].asked = history.attempts[2].asked - SECOND // 2
    elif why == "kept away":
        history.faults.append(Fault("stopped", "worker-01", at(2), at(3)))
    else:
        history.attempts[2].patience = 0
        history.attempts[2].asked = at(5.05)
    assert rules(history) == []


def test_a_waiter_that_is_not_served() -> None:
    history = good()
    history.attempts.append(attempt("02", 3.0, how="cancelled", ended=history.calm + TURN + SECOND))
    assert rules(history) == ["starved"]
    history.attempts[-1].ended = history.calm + TURN - SECOND
    assert rules(history) == []


def test_a_waiter_that_is_never_heard_of_again() -> None:
    history = good()
    history.attempts.append(attempt("02", 3.0, how="", ended=None))
    history.end = history.calm + TURN + SECOND
    assert rules(history) == ["unended", "starved"]
    history.process("worker-02-0").killed = True
    assert rules(history) == []


def test_a_wait_beyond_its_patience() -> None:
    history = good()
    history.calm = None
    history.attempts.append(attempt("02", 3.0, how="timeout", patience=SECOND, ended=at(10)))
    assert rules(history) == ["patience"]
    history.faults.append(Fault("stopped", "worker-02", at(3), at(9)))
    assert rules(history) == []


def test_an_unexpected_error() -> None:
    history = good()
    history.attempts[3].how = "error"
    assert rules(history) == ["error"]


@pytest.mark.parametrize("what", ["status", "said_goodbye"])
def test_a_process_that_ends_badly(what: str) -> None:
    history = good()
    setattr(history.process("worker-01-0"), what, False if what == "said_goodbye" else 1)
    assert rules(history) == ["process"]


def test_a_loss_without_a_cause() -> None:
    history = good()
    lost = history.attempts[3]
    lost.lost, lost.how = (at(3.0), "its lease ran out"), "lost"
    assert rules(history) == ["lost early"]
    for harmless in ("server clock", "worker clock", "script flush"):
        history.faults = [Fault(harmless, "server", at(2.7), at(2.7))]
        assert rules(history) == ["lost early"]
    history.faults = [Fault("stopped", "worker-01", at(2.7), at(2.9))]
    assert rules(history) == ["lost early"], "that was another"
    history.faults = [Fault("stopped", "worker-00", at(2.7), at(2.9))]
    assert rules(history) == []


def test_a_lease_of_fixed_length_ends_by_itself_but_not_before() -> None:
    history = good()
    lost = history.attempts[3]
    lost.lost, lost.how, lost.fixed = (at(3.0), "its lease ran out"), "lost", True
    lost.promised = at(2.99)
    assert rules(history) == []
    lost.promised = at(3.0)
    assert rules(history) == ["lost early"]
    lost.held, lost.of = None, 2
    assert rules(history) == ["lost early"], "while others of several were waited for"
    lost.lost = (at(4.5), "its lease ran out")
    assert rules(history) == []


def test_no_answer_without_a_cause() -> None:
    history = good()
    history.attempts[2].how = "unavailable"
    assert rules(history) == ["unavailable"]
    history.process("worker-02-0").begun = at(1)
    assert rules(history) == [], "it was still connecting when its patience ended"
    history.process("worker-02-0").begun = 0
    history.faults = [Fault("client pause", "server", at(1), at(1.2))]
    assert rules(history) == []


def test_what_is_left_behind() -> None:
    history = good()
    history.complaints.append((at(5), "left on the server: h 'a'"))
    assert rules(history) == ["left behind"]


def test_a_history_read_back(tmp_path: Path) -> None:
    run = Recorder(tmp_path / "run.jsonl")
    run("fault", at(0), number=1, kind="killed", target="worker-00", amount=0)
    run("killed", at(1), worker="worker-00-0")
    run("killed", at(1), worker="worker-01-0")
    run("mended", at(2), number=1)
    run("fault", at(3), number=-1, kind="overload", target="machine", until=at(4))
    run("fault", at(5), number=2, kind="flushall", target="server", amount=0, wall=17)
    run("grace", at(5.5), number=2, length=3)
    run("calm", at(6))
    run("exit", at(7), worker="worker-00-1", status=0)
    run("complaint", at(8), text="left")
    first = Recorder(tmp_path / "worker-00-0.jsonl")
    first("begin", at(-1), pid=40)
    ask = {"lock": "a", "kind": "exclusive", "cost": 1, "capacity": 1}
    ask |= {"timeout": SECOND, "fixed": False, "patience": None}
    first("ask", at(0), number=1, **ask)
    first("held", at(0.1), number=1, fence=5)
    first("seen", at(0.2), number=1, until=at(1.1))
    first("ask", at(0.3), number=2, **ask)
    with (tmp_path / "worker-00-0.jsonl").open("ab") as file:
        file.write(b'{"at": 12')
    second = Recorder(tmp_path / "worker-00-1.jsonl")
    second("ask", at(2), number=1, **ask)
    second("held", at(2.1), number=1, fence=6)
    second("seen", at(2.2), number=1, until=at(3))
    second("unsure", at(2.3), number=1)
    second("seen", at(2.4), number=1, until=at(9))
    second("leaving", at(2.5), number=1)
    second("lost", at(2.6), number=1, reason="why")
    second("end", at(2.7), number=1, how="lost")
    second("complaint", at(2.8), text="of its own")
    second("goodbye", at(2.9))
    register = Register(Recorder(tmp_path / "register.jsonl"))
    assert register.write("a", "write", 6)
    assert not register.write("a", "write", 5)
    assert not register.write("a", "read", 5)
    assert register.write("a", "any", 5)
    assert register.write("b", "write", 5)

    history = load(tmp_path)
    killed, unanswered, whole = history.attempts
    assert (killed.fence, killed.acted, killed.promised, killed.ended) == (5, at(0.2), at(1.1), None)
    assert (unanswered.held, unanswered.ended) == (None, None)
    assert (whole.worker, whole.acted, whole.promised) == ("worker-00-1", at(2.4), at(2.5))
    assert (whole.left, whole.lost, whole.how) == (at(2.5), (at(2.6), "why"), "lost")
    assert [(fault.kind, fault.begin, fault.end) for fault in history.faults] == [
        ("killed", at(0), at(2)),
        ("overload", at(3), at(4)),
        ("flushall", at(5), at(8)),
    ]
    assert (history.faults[2].wall, history.faults[2].grace) == (17, 3)
    assert history.process("worker-00-0").pid == 40
    assert [write.accepted for write in history.writes] == [True, False, False, True, True]
    assert history.complaints == [(at(2.8), "worker-00-1: of its own"), (at(8), "left")]
    assert {name: (one.killed, one.status) for name, one in history.processes.items()} == {
        "worker-00-0": (True, None),
        "worker-01-0": (True, None),
        "worker-00-1": (False, 0),
    }
    assert (history.calm, history.end) == (at(6), at(8))


def test_an_extension_leaves_open_how_long_it_may_believe(tmp_path: Path) -> None:
    Recorder(tmp_path / "run.jsonl")("calm", at(9))
    record = Recorder(tmp_path / "worker-00-0.jsonl")
    ask = {"lock": "a", "kind": "exclusive", "cost": 1, "capacity": 1}
    record("ask", at(0), number=1, timeout=SECOND, fixed=False, patience=None, **ask)
    record("held", at(0.1), number=1, fence=5)
    record("seen", at(0.2), number=1, until=at(9))
    record("unsure", at(0.3), number=1)
    (killed,) = load(tmp_path).attempts
    assert killed.promised == at(0.3)


def test_the_same_seed_gives_the_same_faults() -> None:
    places = ["worker-00", "worker-01"]
    assert schedule(7, 60, places) == schedule(7, 60, places)
    assert schedule(7, 60, places) != schedule(8, 60, places)


@pytest.mark.parametrize("topology", [STANDALONE, SENTINEL, CLUSTER])
@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_fault_is_in_a_run(seed: int, topology: str) -> None:
    kinds = {fault.kind for fault in schedule(seed, 15, ["worker-00", "worker-01"], topology)}
    server, worker, clocks = BY_TOPOLOGY[topology]
    assert kinds == {*server, *worker, *clocks}


def test_a_long_run_has_a_long_stop() -> None:
    assert any(fault.amount == 30 for fault in schedule(1, 600, ["worker-00"]))


def test_what_is_held_together_is_of_one_group() -> None:
    groups = groups_of("n", 3)
    assert len({name for group in groups for names in group.values() for name in names}) == 3 * len(
        one_group()[0]
    ) * len(one_group()[0]["x"])
    chance = random.Random(1)
    for _ in range(500):
        plan, together = draw(chance, groups, [1.0]), set[int]()
        while plan is not None:
            for name in plan.locks:
                together |= {n for n, group in enumerate(groups) if name in group[plan.kind.family]}
            plan = plan.deeper
        assert len(together) == 1


def test_one_of_several_is_held_while_the_others_are_waited_for() -> None:
    lost = (at(4), "lock 'a' was lost: its lease ran out before a heartbeat was confirmed")
    history = good()
    history.writes = []
    history.attempts = [
        attempt("00", 0.0, left=4, how="lost", of=3, lost=lost, fixed=True, timeout=4 * SECOND),
        attempt("01", 1.5, 1.6, 1.7, 12),
    ]
    assert rules(history) == [], "it was granted, and waited for the others"
    history.attempts[0].lost = (at(1), lost[1])
    assert rules(history) == ["lost early"]
