"""The breaker's states, by a clock that the test turns."""

from __future__ import annotations

from longreach.rl.judge_breaker import CLOSED, HALF_OPEN, OPEN, Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(3, 10.0, clock)
    for _ in range(3):
        assert breaker.claim() == 0.0
        breaker.failed()
    return breaker


def test_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(3, 10.0, Clock())
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert (breaker.state, breaker.claim(), breaker.opened, breaker.outage()) == (CLOSED, 0.0, 0, 0.0)
    assert opened(Clock()).state == OPEN


def test_one_probe_after_the_pause_closes_it() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 4
    assert (breaker.claim(), breaker.outage()) == (6.0, 4.0)
    clock.now += 6
    assert breaker.claim() == 0.0
    assert breaker.state == HALF_OPEN
    assert breaker.claim() > 0, "one probe, not two"
    breaker.succeeded()
    assert (breaker.state, breaker.claim(), breaker.outage()) == (CLOSED, 0.0, 0.0)


def test_a_probe_that_fails_opens_it_again_and_the_outage_goes_on() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    assert breaker.claim() == 0.0
    breaker.failed()
    assert (breaker.state, breaker.claim(), breaker.opened, breaker.outage()) == (OPEN, 10.0, 2, 10.0)


def test_a_probe_that_is_called_off_leaves_its_place() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    assert breaker.claim() == 0.0
    breaker.abandoned()
    assert breaker.claim() == 0.0


def test_what_was_under_way_before_is_no_news() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 9
    breaker.failed()
    assert breaker.claim() == 1.0, "the pause doesn't begin anew"
    assert breaker.opened == 1
    breaker.succeeded()
    assert breaker.state == CLOSED, "but a success is: the server answers"
    breaker.abandoned()
    assert breaker.state == CLOSED
