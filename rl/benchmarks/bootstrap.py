"""Intervals by bootstrap over questions: the percentile interval of resampled means, with a seed.

A question is the unit: its samples are averaged first, and questions are drawn n of n with replacement. The benchmark
average draws within each benchmark by itself, since which benchmarks there are is no chance. Two models on the same
questions are compared by the differences, question by question (paired). It gives up BCa's corrections for bias and skew,
which are small for means of hundreds of questions and not defined where all values are alike.

Where every value is 0, or every one 1, resampling sees no spread at all; the interval is then Clopper and Pearson's exact
one, whose open end is (alpha/2)^(1/n) away. A value of None is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..seeds import derive

Values = Sequence[float | None]
ALPHA = 0.05
_CHUNK = 1 << 22
"""Draws made at once: 32 MB."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` questions with its 95 % interval, None where n = 0. `left_out`: questions without a value."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    left_out: int = 0

    def dump(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Difference:
    """Mean of B - A over questions, its interval, and the two-sided share of resamples on the other side of nought."""

    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int

    def dump(self) -> dict[str, Any]:
        return dict(vars(self))


def resampled(columns: Mapping[str, Values], *, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """`resamples` means of each column; all columns are of the same questions and see the same draws.

    A resample in which a column has no value is NaN there.
    """
    if not columns:
        return {}
    table = np.array([[np.nan if v is None else v for v in values] for values in columns.values()], dtype=float).T
    count = len(table)
    if count == 0:
        return {name: np.full(resamples, np.nan) for name in columns}
    known = ~np.isnan(table)
    both = np.hstack([np.where(known, table, 0.0), known.astype(float)])
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, step := max(1, _CHUNK // count)):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        parts.append(times @ both)
    sums = np.concatenate(parts)
    with np.errstate(invalid="ignore"):  # 0 / 0: nothing known was drawn
        means = sums[:, : len(columns)] / sums[:, len(columns) :]
    return dict(zip(columns, means.T, strict=True))


def intervals(columns: Mapping[str, Values], *, resamples: int, seed: int) -> dict[str, Interval]:
    """The interval of each column's mean."""
    drawn = resampled(columns, resamples=resamples, seed=seed)
    return {name: _interval(values, drawn[name]) for name, values in columns.items()}


def average_interval(parts: Sequence[Values], *, resamples: int, seed: int) -> Interval:
    """Of the unweighted mean of the parts' means, each part resampled by itself; `n` counts all questions."""
    known = [[v for v in part if v is not None] for part in parts]
    left_out = sum(map(len, parts)) - sum(map(len, known))
    if not parts or not all(known):
        return Interval(None, None, None, sum(map(len, known)), left_out)
    drawn = _average_draws(known, resamples, seed)
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    mean = float(np.mean([np.mean(part) for part in known]))
    return Interval(mean, float(low), float(high), sum(map(len, known)), left_out)


def paired(before: Values, after: Values, *, resamples: int, seed: int) -> Difference:
    """After less before, question by question; those without a value on one side are left out."""
    return average_difference([(before, after)], resamples=resamples, seed=seed)


def average_difference(parts: Sequence[tuple[Values, Values]], *, resamples: int, seed: int) -> Difference:
    """Of the unweighted mean over the parts (before, after), each resampled by itself."""
    changes = [
        [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
        for before, after in parts
    ]
    if not changes or not all(changes):
        return Difference(None, None, None, None, sum(map(len, changes)))
    drawn = _average_draws(changes, resamples, seed)
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    # The draws themselves count as one more on either side, so that no finite number of them gives a p of 0.
    slack = 1e-12
    sides = [int((drawn <= slack).sum()), int((drawn >= -slack).sum())]
    p = min(1.0, 2.0 * (1 + min(sides)) / (1 + len(drawn)))
    mean = float(np.mean([np.mean(part) for part in changes]))
    return Difference(mean, float(low), float(high), p, sum(map(len, changes)))


def _average_draws(parts: Sequence[Sequence[float]], resamples: int, seed: int) -> np.ndarray:
    drawn = [
        resampled({"mean": part}, resamples=resamples, seed=derive(seed, "part", index))["mean"]
        for index, part in enumerate(parts)
    ]
    return np.mean(drawn, axis=0)


def _interval(values: Values, drawn: np.ndarray) -> Interval:
    known = [float(v) for v in values if v is not None]
    n, left_out = len(known), len(values) - len(known)
    if not known:
        return Interval(None, None, None, 0, left_out)
    reach = 1 - (ALPHA / 2) ** (1 / n)
    if all(v == 0.0 for v in known):
        return Interval(0.0, 0.0, reach, n, left_out)
    if all(v == 1.0 for v in known):
        return Interval(1.0, 1 - reach, 1.0, n, left_out)
    low, high = np.nanquantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(np.mean(known)), float(low), float(high), n, left_out)
