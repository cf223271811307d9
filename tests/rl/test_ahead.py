"""Sampling ahead: how old what is trained on can be, that weights never change within a step's rollouts, and how it ends."""

from __future__ import annotations

import threading
import time

import pytest

from longreach.rl.ahead import Ahead


class Generator:
    """Samples the version that its weights are of, slowly; `changed` says whether they changed while it did."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds, self.version, self.changed = seconds, 0, False
        self.stop = threading.Event()
        self.order: list[int] = []

    def collect(self, step: int, version: int) -> tuple[int, int]:
        self.order.append(step)
        before = self.version
        assert before == version
        self.stop.wait(self.seconds)
        self.changed |= self.version != before
        return step, self.version


def run(staleness: int, steps: int, sampling: float, training: float) -> tuple[Generator, list[int]]:
    """Ages of what each step trained on, by the generator's own account."""
    generator, ages = Generator(sampling), []
    with Ahead(generator.collect, staleness=staleness, first=1, last=steps) as ahead:
        for step in range(1, steps + 1):
            (sampled_for, version), told = ahead.take(step)
            assert (sampled_for, version) == (step, told)
            ages.append(step - 1 - version)
            time.sleep(training)
            with ahead.boundary(step):
                generator.version = step
    return generator, ages


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize("sampling, training", [(0.02, 0.0), (0.0, 0.02), (0.01, 0.01)])
def test_nothing_is_older_than_the_bound_and_nothing_of_two_versions(
    staleness: int, sampling: float, training: float
) -> None:
    generator, ages = run(staleness, 8, sampling, training)
    assert max(ages) <= staleness and ages[0] == 0
    assert not generator.changed
    assert generator.order == list(range(1, 9))


def test_the_bound_is_reached_where_sampling_is_fast() -> None:
    _, ages = run(2, 6, 0.0, 0.03)
    assert ages[2:] == [2] * 4


def test_sampling_and_training_overlap() -> None:
    generator = Generator(0.0)
    inside, trained = threading.Event(), threading.Event()

    def collect(step: int, version: int) -> int:
        if step == 2:
            inside.set()
            assert trained.wait(10), "step 1 did not train while step 2 was sampled"
        return step

    with Ahead(collect, staleness=1, first=1, last=2, cancel=generator.stop.set) as ahead:
        assert ahead.take(1).made == 1
        assert inside.wait(10)
        trained.set()
        with ahead.boundary(1):
            pass
        assert ahead.take(2) == (2, 0)


def test_what_sampling_raises_comes_out_of_its_own_step() -> None:
    def collect(step: int, version: int) -> int:
        if step == 2:
            raise OSError("the server is gone")
        return step

    with Ahead(collect, staleness=1, first=1, last=3) as ahead:
        assert ahead.take(1).made == 1
        with pytest.raises(OSError, match="the server is gone"):
            ahead.take(2)


def leave(generator: Generator) -> None:
    """A block that is left by Ctrl-C while step 1 is being sampled."""
    with Ahead(generator.collect, staleness=1, first=1, last=9, cancel=generator.stop.set) as ahead:
        ahead._thread.submit(ahead._one, 1)
        while not generator.order:
            time.sleep(0.01)
        raise KeyboardInterrupt


def test_leaving_calls_off_what_is_under_way() -> None:
    generator, start = Generator(60.0), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        leave(generator)
    assert time.monotonic() - start < 30
    assert generator.order == [1]


def test_an_evaluation_in_a_boundary_is_alone_with_the_generator() -> None:
    generator = Generator(0.02)
    with Ahead(generator.collect, staleness=2, first=1, last=5) as ahead:
        assert not ahead.ready(1, 0.0)
        ahead.take(1)
        assert not ahead.still(0.0) or generator.order == [1]
        with ahead.boundary(1):
            begun = list(generator.order)
            time.sleep(0.06)
            assert generator.order == begun
            generator.version = 1
        assert ahead.take(2).version in (0, 1)
    assert not generator.changed
