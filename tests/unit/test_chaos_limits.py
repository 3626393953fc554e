"""What the judge of `make chaos` excuses, and no further.

Promises: where a server lost its data, two overlap only if there was no grace, or if one was kept from the
server all through it, and for a heartbeat; leases and places are kept else; where another server took over,
only a grant that was lost with the one before is excused; all of that is counted with its cause.
"""

from __future__ import annotations

from chaos.checker import check
from chaos.history import SECOND, Fault, History, Write
from chaos.limits import GRACE, HEARTBEAT, LATE, LOST_WRITE, NEWCOMER, UNREACHED
from support.histories import at, attempt, good, overtaken, rules


def lost_data(kind: str = "flushall", overlap: float = 0.5, grace: int = 0) -> History:
    """The first holder went on for a while after its lock was lost with the data and granted to another."""
    history = good()
    history.faults.append(Fault(kind, "server", at(1.0), at(1.0), grace=grace))
    history.attempts[0] = attempt("00", 0.0, 0.1, 1.1 + overlap, 11)
    history.attempts[3] = attempt("00", 3.5, 3.6, 4.0, 13)
    history.attempts[1] = attempt("01", 0.5, 1.1, 3.4, 12)
    return history


def test_data_that_a_newcomer_finds_lost_excuses_one_heartbeat() -> None:
    verdict = check(lost_data())
    assert verdict.violations == []
    assert verdict.counts[f"overlaps: {NEWCOMER}"] == 1
    assert verdict.longest_overlap == SECOND // 2
    limit = (HEARTBEAT + LATE) / SECOND
    assert rules(lost_data(overlap=limit - 0.2)) == []
    assert rules(lost_data(overlap=limit + 0.2)) == ["overlap"]
    assert rules(lost_data("server clock")) == ["overlap"], "no data is lost by that"


def test_with_a_grace_nobody_overlaps() -> None:
    assert rules(lost_data(grace=GRACE - 1)) == []
    assert rules(lost_data(grace=GRACE)) == ["overlap"]


def test_who_is_kept_from_the_server_all_through_the_grace_is_told_later() -> None:
    history = lost_data(overlap=1.95, grace=GRACE)
    kept_away = Fault("stalled", "worker-00", at(0.5), at(3.5))
    history.faults.append(kept_away)
    verdict = check(history)
    assert verdict.violations == []
    assert verdict.counts[f"overlaps: {UNREACHED}"] == 1
    kept_away.end = at(2.9)
    assert rules(history) == ["overlap"], "it had time enough"
    kept_away.end, kept_away.target = at(3.5), "worker-01"
    assert rules(history) == ["overlap"], "that one could reach it"


def test_a_holder_that_died_before_it_could_take_its_lease_back_believes_nothing() -> None:
    history = lost_data(overlap=1.5, grace=GRACE)
    process = history.process("worker-00-0")
    process.killed, process.died = True, at(3.5)
    assert rules(history) == []
    process.died = at(4.5)
    assert rules(history) == ["overlap"], "it had time enough"


def test_tokens_may_be_below_earlier_ones_until_somebody_who_knew_has_opened() -> None:
    told = 1.05 + (HEARTBEAT + LATE) / SECOND
    for held, grace, found in ((1.3, 0, []), (told + 0.2, 0, ["order"] * 2), (1.3, GRACE, ["order"] * 2)):
        history = good()
        history.writes = []
        history.attempts = [
            attempt("00", 0.0, 0.1, 1.0, 11),
            attempt("01", held - 0.1, held, held + 0.2, 5),
        ]
        history.faults.append(Fault("flushall", "server", at(1.05), at(1.05), grace=grace))
        assert rules(history) == found


def test_a_machine_that_is_late_now_and_then_excuses_nothing() -> None:
    history = lost_data(grace=GRACE)
    history.faults += [
        Fault("overload", "machine", at(n / 10), at(n / 10) + SECOND // 9) for n in range(10, 45)
    ]
    assert rules(history) == ["overlap"]
    history.faults.append(Fault("overload", "machine", at(1), at(3.5)))
    assert rules(history) == []


def test_data_lost_before_both_or_after_both_excuses_nothing() -> None:
    for when in (-1, 5):
        history = lost_data()
        history.faults[0].begin = history.faults[0].end = at(when)
        assert rules(history) == ["overlap"]


def test_a_promise_broken_by_lost_data_that_nobody_acted_on() -> None:
    history = lost_data(overlap=0)
    history.attempts[0].promised = at(2.9)
    history.attempts[0].acted = at(0.8)
    verdict = check(history)
    assert verdict.violations == []
    assert verdict.counts[f"overlaps: {NEWCOMER}"] == 0


def forgotten(kind: str, grace: int = 0) -> History:
    """The last holder is told that the server knows nothing of its lease."""
    history = good()
    history.calm = None
    history.faults.append(Fault(kind, "server", at(2.7), at(2.7), wall=20, grace=grace))
    lost = history.attempts[3]
    lost.lost, lost.how = (at(3.0), "the server no longer knows the lease"), "lost"
    return history


def test_leases_are_taken_back_in_the_grace() -> None:
    verdict = check(forgotten("flushall"))
    assert verdict.violations == []
    assert verdict.counts[f"losses: {NEWCOMER}"] == 1
    assert rules(forgotten("flushall", GRACE)) == ["forgotten"]
    assert rules(forgotten("server restarted")) == ["forgotten"], "that loses nothing"


def test_a_lease_is_not_said_to_have_run_out_by_a_flush() -> None:
    history = forgotten("flushall", GRACE)
    history.attempts[3].lost = (at(3.0), "its lease ran out before a heartbeat was confirmed")
    assert rules(history) == ["lost early"]


def failed_over(kind: str = "primary killed", overlap: float = 0.5) -> History:
    """The first holder's grant was lost with the server that made it, and the next one granted it anew."""
    history = lost_data(kind, overlap)
    history.faults[0].wall = 12
    return history


def test_a_grant_lost_in_a_failover_excuses_one_heartbeat() -> None:
    verdict = check(failed_over())
    assert verdict.violations == []
    assert verdict.counts[f"overlaps: {LOST_WRITE}"] == 1
    limit = (HEARTBEAT + LATE) / SECOND
    assert rules(failed_over(overlap=limit + 0.2)) == ["overlap"]
    for wall in (11, 13):
        history = failed_over()
        history.faults[0].wall = wall
        assert rules(history) == ["overlap"], "one server granted both"
    assert rules(failed_over("slot moved")) == ["overlap"], "nobody took over"


def test_a_replaced_server_that_grants_once_more() -> None:
    """It was asked after the new one had granted the lock, and its holder was told in time."""
    history = failed_over(overlap=0)
    history.attempts[0] = attempt("00", 1.3, 1.4, 1.6, 11)
    verdict = check(history)
    assert verdict.violations == []
    assert verdict.counts[f"tokens out of order: {LOST_WRITE}"] == 2
    history.faults.clear()
    assert set(rules(history)) == {"overlap", "order"}


def test_after_a_failover_only_what_others_hold_may_be_forgotten() -> None:
    history = forgotten("failover")
    assert rules(history) == ["forgotten"]
    history.attempts.append(attempt("01", 2.5, 2.95, 3.5, 20))
    verdict = check(history)
    assert verdict.violations == []
    assert verdict.counts[f"losses: {LOST_WRITE}"] == 1
    history = forgotten("failover")
    lost = history.attempts[3]
    lost.lost = (at(3.0), "lock 'a' had ended when it was given back")
    assert rules(history) == [], "it could not be taken back any more"


def test_refused_while_it_held_after_lost_data() -> None:
    history = lost_data()
    history.writes = [Write(at(1.2), "a", "write", 12, True), Write(at(1.3), "a", "write", 11, False)]
    verdict = check(history)
    assert verdict.violations == []
    assert verdict.counts[f"writes refused to a holder: {NEWCOMER}"] == 1


def test_places_are_kept_over_lost_data() -> None:
    history = overtaken()
    history.faults.append(Fault("flushall", "server", at(4), at(4), grace=GRACE))
    assert rules(history) == ["overtaken"]
    history.faults[0].grace = 0
    assert rules(history) == []
