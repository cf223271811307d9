"""Accuracies with honest error bars: avg@k, unbiased pass@k, and the difference of two stages.

Samples of one question are not independent, so the question is the unit: scores are averaged within a question first,
and the standard error is that of the questions' means (clustered by question, as in Miller 2024, arXiv 2411.00640).
A score of `None` means "no verdict": it is left out and counted, never read as 0.

Everything is plain Python on floats (fp64, `math.fsum`): no arrays and no seeds; a bootstrap is what we give up.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Scores = Sequence[float | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` questions. `mean` is None for n = 0; `stderr` is None for n < 2, where no spread can be seen."""

    mean: float | None
    stderr: float | None
    n: int
    left_out: int = 0


def mean_and_stderr(values: Iterable[float | None]) -> Estimate:
    """Mean and standard error s / sqrt(n), s the unbiased standard deviation; `left_out` counts the None values."""
    given = list(values)
    known = [float(value) for value in given if value is not None]
    n = len(known)
    if n == 0:
        return Estimate(None, None, 0, len(given))
    mean = math.fsum(known) / n
    # A second pass over the deviations: sum(x^2) - n mean^2 cancels badly for accuracies near 1.
    variance = math.fsum((value - mean) ** 2 for value in known) / (n - 1) if n > 1 else None
    return Estimate(mean, None if variance is None else math.sqrt(variance / n), n, len(given) - n)


def accuracy(scores_by_question: Iterable[Scores]) -> Estimate:
    """avg@k: the mean over questions of each question's mean score, with the standard error clustered by question.

    `left_out` counts scores without a verdict; a question that has none at all is not in `n`.
    """
    questions = [list(scores) for scores in scores_by_question]
    estimate = mean_and_stderr(mean_and_stderr(scores).mean for scores in questions)
    missing = sum(score is None for scores in questions for score in scores)
    return Estimate(estimate.mean, estimate.stderr, estimate.n, missing)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold at least one of the c correct: 1 - C(n-c, k)/C(n, k).

    Unbiased (Chen et al. 2021, arXiv 2107.03374). Computed on whole numbers and rounded once, so that neither a large
    n overflows nor a small c cancels. ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c={c} correct of n={n} samples: c must lie in 0..n")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples and k >= 1, got n={n}: draw more samples or lower k")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws


def pass_at(scores_by_question: Iterable[Scores], k: int, *, correct_at: float = 1.0) -> Estimate:
    """Mean over questions of the unbiased pass@k; a sample is correct when its score is at least `correct_at`.

    `left_out` counts the questions with fewer than k verdicts, for which pass@k isn't defined.
    """
    values: list[float | None] = []
    for scores in scores_by_question:
        known = [score for score in scores if score is not None]
        correct = sum(score >= correct_at for score in known)
        values.append(pass_at_k(len(known), correct, k) if len(known) >= k else None)
    return mean_and_stderr(values)


def paired_difference(before: Mapping[str, Scores], after: Mapping[str, Scores]) -> Estimate:
    """Mean of (after - before) over the questions with a verdict in both, matched by id, and its standard error.

    Pairing removes the spread between easy and hard questions, which two separate standard errors would count twice.
    `left_out` counts the questions without a partner or without a verdict on one side.
    """
    differences: list[float | None] = []
    for question in {**before, **after}:
        first = mean_and_stderr(before.get(question, ())).mean
        second = mean_and_stderr(after.get(question, ())).mean
        differences.append(None if first is None or second is None else second - first)
    return mean_and_stderr(differences)


def bucket_of(length: int, bounds: Sequence[int]) -> int | None:
    """The upper bound of the bucket with lower < length <= upper; None when `length` is above the last bound.

    `bounds`: upper bounds in tokens, strictly rising; the first bucket starts above 0.
    """
    if not bounds or bounds[0] <= 0 or any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"bucket bounds {list(bounds)} must be positive, strictly rising, and at least one")
    if length <= 0:
        raise ValueError(f"length {length} lies in no bucket: lengths are in tokens, from 1")
    index = bisect_left(bounds, length)
    return bounds[index] if index < len(bounds) else None


def accuracy_by_bucket(
    lengths: Sequence[int], scores_by_question: Sequence[Scores], bounds: Sequence[int]
) -> list[tuple[int | None, Estimate]]:
    """`accuracy` of each length bucket, in order, empty ones too; questions above the last bound follow under None."""
    if len(lengths) != len(scores_by_question):
        raise ValueError(f"{len(lengths)} lengths for {len(scores_by_question)} questions: give one length a question")
    members: dict[int | None, list[Scores]] = {bound: [] for bound in bounds}
    for length, scores in zip(lengths, scores_by_question, strict=True):
        members.setdefault(bucket_of(length, bounds), []).append(scores)
    return [(upper, accuracy(scores)) for upper, scores in members.items()]
