"""Ratios to limits that change while something is measured."""

import time

import pytest

from benchmarks import limits
from benchmarks.limits import Samples, Work, beside


class Changing:
    """A machine whose memory halves its rate each time that it is asked."""

    def __init__(self):
        self.rate = 64.0

    def read(self, seconds):
        self.rate /= 2
        return self.rate


def test_shares_are_of_the_limit_beside_each_call(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(limits.time, "perf_counter", lambda: float(next(clock)))
    (samples,) = beside(Changing(), {"a": Work(lambda: None, {"read": 12.0})}, rounds=2).values()
    assert samples.seconds == [1, 1]
    assert samples.limits == {"read": [(32 + 16) / 2, (8 + 4) / 2]}
    assert samples.rate("read") == 12
    assert samples.share("read") == pytest.approx((12 / 24 + 12 / 6) / 2)


def test_a_foreign_work_is_timed_until_its_budget_is_spent():
    works = {
        "ours": Work(lambda: None, {"read": 1.0}),
        "theirs": Work(lambda: time.sleep(0.01), {"read": 1.0}, foreign=True),
    }
    samples = beside(Changing(), works, rounds=3, budget_seconds=0.005)
    assert {name: len(each.seconds) for name, each in samples.items()} == {"ours": 3, "theirs": 1}


def test_relative_is_within_a_round():
    one, other = (Samples(Work(lambda: None, {"read": 8.0}), seconds) for seconds in ([1.0, 4, 2], [2.0, 4, 6]))
    assert other.relative(one) == 2


def test_the_least_time_is_that_of_the_limit_which_binds():
    work = Work(lambda: None, {"read": 8.0, "dot": 6.0})
    samples = Samples(work, [1.0], {"read": [4.0, 2, 1], "dot": [1.0]})
    assert samples.least_seconds("read") == 4
    assert samples.least_seconds("read", "dot") == 6
