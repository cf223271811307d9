"""Median and spread of timings: pytest-benchmark's `Stats` where it is installed, the same definitions where it isn't.

Only its statistics are used, not its fixture: the fixture calibrates and runs one function after the other, so a
machine that warms up or slows down favours whoever came first. The runner of this folder takes turns instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Of seconds: median, quartiles, least; `source` names who computed them."""

    median: float
    q1: float
    q3: float
    least: float
    rounds: int
    source: str

    @property
    def iqr(self) -> float:
        return self.q3 - self.q1


def summarize(seconds: Sequence[float]) -> Summary:
    """Summary of at least one timing; ValueError for none."""
    if not seconds:
        raise ValueError("no timings to summarize: at least one round is needed")
    try:
        from pytest_benchmark.stats import Stats
    except ImportError:
        return own(seconds)
    stats: Any = Stats()  # untyped
    for value in seconds:
        stats.update(value)
    source = f"pytest-benchmark {metadata.version('pytest-benchmark')}"
    return Summary(stats.median, stats.q1, stats.q3, stats.min, stats.rounds, source)


def own(seconds: Sequence[float]) -> Summary:
    """Without pytest-benchmark. Quartiles: medians of the halves; of an odd count, the mean of halves with and without
    the middle value."""
    data = sorted(seconds)
    half, odd = divmod(len(data), 2)
    if len(data) == 1:
        q1 = q3 = data[0]
    elif odd:
        q1 = (statistics.median(data[:half]) + statistics.median(data[: half + 1])) / 2
        q3 = (statistics.median(data[half:]) + statistics.median(data[half + 1 :])) / 2
    else:
        q1, q3 = statistics.median(data[:half]), statistics.median(data[half:])
    return Summary(statistics.median(data), q1, q3, data[0], len(data), "own")
