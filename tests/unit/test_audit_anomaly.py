"""The detector as Python sees it.

Promises: a burst of failed logins is flagged with a reason that a person can read; of ten generated days of
normal logins (office hours, 3 % mistyped, some users forgetting their password) fewer than one event in
10,000 is flagged; the same seed gives the same scores; bad settings are refused; it is quick.
"""

from __future__ import annotations

import random
import time

import pytest

from dotmac.platform._native import RateDetector

DAY = 86_400


def normal_days(seed, days=10, users=200):
    """Logins of an office: times in seconds, user, address, failed; in the order of time."""
    chance = random.Random(seed)
    events = []
    for day in range(days):
        for user in range(users):
            for _ in range(chance.randrange(1, 6)):
                moment = day * DAY + chance.gauss(9.5, 1.5) * 3600
                address = (
                    f"10.1.{user % 8}.{user}" if chance.random() < 0.7 else f"10.9.0.{chance.randrange(4)}"
                )
                mistyped = chance.choice([1, 1, 1, 2, 3]) if chance.random() < 0.03 else 0
                if chance.random() < 0.002:
                    mistyped = 5
                events += [(moment + 8 * turn, f"u{user}", address, True) for turn in range(mistyped)]
                events.append((moment + 8 * mistyped, f"u{user}", address, False))
    return sorted(events)


def run(detector, events):
    return [
        detector.score(
            int(moment * 1e6),
            failed=failed,
            noun="logins",
            user=user,
            address=address,
            tenant="t",
            action="login",
        )
        for moment, user, address, failed in events
    ]


@pytest.mark.parametrize("seed", range(3))
def test_normal_days_raise_no_alarm(seed):
    events = normal_days(seed)
    scores = run(RateDetector(seed=seed), events)
    flagged = [(event, score) for event, score in zip(events, scores, strict=True) if score[0] >= 0.5]
    assert len(events) > 5_000
    assert len(flagged) * 10_000 < len(events), flagged[:5]


def test_an_attack_within_normal_days_is_flagged_with_its_reasons():
    events = normal_days(7, days=3)
    start = 2.4 * DAY
    attack = [(start + n, "u7", "203.0.113.9", True) for n in range(60)]
    mixed = sorted(events + attack)
    scores = dict(zip(mixed, run(RateDetector(seed=1), mixed), strict=True))
    late = [scores[event] for event in attack[15:]]
    assert all(score >= 0.5 for score, _ in late)
    assert any(
        "failed logins from 203.0.113.9 in 60 s" in reason for _, reasons in late for reason in reasons
    )
    assert any("for user u7" in reason for _, reasons in late for reason in reasons)


def test_seeds_repeat():
    events = normal_days(1, days=1)
    assert run(RateDetector(capacity=50, seed=3), events) == run(RateDetector(capacity=50, seed=3), events)


def test_memory_is_bounded():
    detector = RateDetector(capacity=100)
    for number in range(5_000):
        detector.score(number, failed=True, address=f"10.0.{number // 256}.{number % 256}")
    assert detector.entities == 100


@pytest.mark.parametrize("capacity", [0, 3, 1 << 30])
def test_bad_settings_are_refused(capacity):
    with pytest.raises(ValueError, match="capacity"):
        RateDetector(capacity=capacity)


def test_times_at_the_ends_of_the_range_do_no_harm():
    detector = RateDetector()
    for moment in (0, 2**63 - 1, -(2**63), 5, -5):
        score, _ = detector.score(moment, failed=True, user="a", address="b")
        assert 0 <= score <= 1


def test_scoring_is_quick():
    detector = RateDetector()
    best = float("inf")
    for turn in range(5):
        began = time.perf_counter()
        for number in range(2_000):
            detector.score(
                turn * 10**9 + number, failed=False, user=f"u{number % 50}", address="a", tenant="t"
            )
        best = min(best, (time.perf_counter() - began) / 2_000)
    assert best < 20e-6  # a microsecond or two on a quiet machine
