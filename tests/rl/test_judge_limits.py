"""No minute, wherever it begins, sees more than the limit."""

from __future__ import annotations

import random

import pytest

from longreach.rl.judge_limits import Limit, Limits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def most_in_a_minute(taken: list[tuple[float, float]]) -> float:
    return max(sum(amount for at, amount in taken if start <= at < start + 60) for start, _ in taken)


@pytest.mark.parametrize("seed", range(5))
def test_no_window_holds_more_than_the_limit(seed: int) -> None:
    draw, limit, now = random.Random(seed), Limit(100), 0.0
    taken: list[tuple[float, float]] = []
    for _ in range(400):
        now += draw.expovariate(1.0)
        one = limit.take(draw.uniform(0.1, 40), now)
        assert one.at >= now
        taken.append((one.at, one.amount))
    assert taken == sorted(taken, key=lambda one: one[0]), "first come, first served"
    assert 60 < most_in_a_minute(taken) <= 100 + 1e-9, "used, and not passed"


def test_room_is_used_at_once_and_then_waited_for() -> None:
    clock = Clock()
    limits = Limits(3, 0, clock)
    assert [limits.take(1)[0] for _ in range(7)] == [0, 0, 0, 60, 60, 60, 120]
    assert limits.waited == 300
    clock.now += 200
    assert limits.take(1)[0] == 0


def test_both_limits_hold() -> None:
    limits = Limits(10, 100, Clock())
    assert [limits.take(60)[0] for _ in range(3)] == [0, 60, 120]
    assert [Limits(2, 1000, Clock()).take(60)[0] for _ in range(1)] == [0]
    few = Limits(2, 1000, Clock())
    assert [few.take(60)[0] for _ in range(3)] == [0, 0, 60]


def test_zero_is_no_limit() -> None:
    limits = Limits(0, 0, Clock())
    assert {limits.take(1e9)[0] for _ in range(1000)} == {0.0}


def test_more_than_a_minutes_share_goes_alone_and_not_never() -> None:
    limits = Limits(0, 100, Clock())
    assert [limits.take(cost)[0] for cost in (500, 1, 500)] == [0, 60, 120]


def test_what_a_request_really_cost_makes_room() -> None:
    limits = Limits(0, 100, Clock())
    _, first = limits.take(90)
    limits.used(first, 10)
    assert limits.take(90)[0] == 0
    wait, second = limits.take(50)
    assert wait == 60
    limits.used(first, 1e6)  # long out of the window: changes nothing
    limits.used(second, 100)
    assert limits.take(1)[0] == 120


def test_a_hold_runs_out() -> None:
    clock = Clock()
    limits = Limits(0, 0, clock)
    limits.hold(5)
    limits.hold(3)
    assert limits.held() == 5
    clock.now += 6
    assert limits.held() == 0
