"""Median and quartiles: by hand, and the same as pytest-benchmark's."""

from __future__ import annotations

import random

import pytest

from bench import summary


@pytest.mark.parametrize(
    ("seconds", "median", "q1", "q3"),
    [
        ([3.0], 3, 3, 3),
        ([1, 2], 1.5, 1, 2),
        ([4, 1, 3, 2], 2.5, 1.5, 3.5),
        ([5, 1, 3, 2, 4], 3, 1.75, 4.25),  # halves without the middle: 1.5, 4.5; with it: 2, 4
        ([7, 1, 6, 2, 5, 3, 4], 4, 2.25, 5.75),
    ],
)
def test_by_hand(seconds: list[float], median: float, q1: float, q3: float) -> None:
    found = summary.own(seconds)
    assert (found.median, found.q1, found.q3, found.least) == (median, q1, q3, min(seconds))
    assert found.iqr == q3 - q1
    assert found.rounds == len(seconds)


def test_both_sources_agree() -> None:
    pytest.importorskip("pytest_benchmark")
    draw = random.Random(0)
    for count in range(1, 14):
        seconds = [draw.random() for _ in range(count)]
        ours, theirs = summary.own(seconds), summary.summarize(seconds)
        assert theirs.source.startswith("pytest-benchmark ")
        assert (ours.median, ours.q1, ours.q3, ours.least) == pytest.approx(
            (theirs.median, theirs.q1, theirs.q3, theirs.least), rel=1e-12
        )


def test_nothing_to_summarize() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        summary.summarize([])
