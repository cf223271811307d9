"""How far two ways of counting agree, and means whose error bars know that samples of one question are alike.

Spearman's rank correlation with ties at their mean rank (Pearson's of the ranks) says whether both put responses in the same
order; the means say whether one sees more than the other. Plain Python on floats.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

from ..statistics import Estimate


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation in [-1, 1]; None where one side is constant, as with fewer than two pairs: nothing is ordered."""
    assert len(first) == len(second)
    one, other = ranks(first), ranks(second)
    middle = (len(one) + 1) / 2  # the mean rank, ties or not
    together = math.fsum((a - middle) * (b - middle) for a, b in zip(one, other, strict=True))
    spread = math.fsum((a - middle) ** 2 for a in one) * math.fsum((b - middle) ** 2 for b in other)
    return max(-1.0, min(1.0, together / math.sqrt(spread))) if spread else None


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranked, start = [0.0] * len(values), 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            ranked[index] = (start + 1 + stop) / 2
        start = stop
    return ranked


def clustered(values: Sequence[float | None], clusters: Sequence[Hashable]) -> Estimate:
    """Mean over all values, and its standard error for clusters that are independent while their members aren't.

    se^2 = G / (G - 1) * sum over clusters of (sum of deviations)^2 / n^2: for clusters of one it is s / sqrt(n). `n` counts
    values; None values are left out. No error bar for fewer than two clusters.
    """
    known = [(float(value), cluster) for value, cluster in zip(values, clusters, strict=True) if value is not None]
    n = len(known)
    if not n:
        return Estimate(None, None, 0, len(values))
    mean = math.fsum(value for value, _ in known) / n
    deviations: dict[Hashable, float] = defaultdict(float)
    for value, cluster in known:
        deviations[cluster] += value - mean
    groups = len(deviations)
    if groups < 2:
        return Estimate(mean, None, n, len(values) - n)
    variance = groups / (groups - 1) * math.fsum(total**2 for total in deviations.values()) / n**2
    return Estimate(mean, math.sqrt(variance), n, len(values) - n)
