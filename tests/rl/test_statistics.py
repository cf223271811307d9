"""Statistics against brute force: every draw, every subset, and the textbook formula in exact fractions."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import combinations

import pytest

from longreach.rl.statistics import (
    Estimate,
    accuracy,
    accuracy_by_bucket,
    bucket_of,
    mean_and_stderr,
    paired_difference,
    pass_at,
    pass_at_k,
)


def exact_stderr(values: list[float]) -> float:
    exact = [Fraction(value) for value in values]
    mean = sum(exact, Fraction(0)) / len(exact)
    variance = sum(((value - mean) ** 2 for value in exact), Fraction(0)) / (len(exact) - 1)
    return math.sqrt(variance / len(exact))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_pass_at_k_equals_the_enumeration_of_all_draws(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == sum(any(draw) for draw in draws) / len(draws)


def test_pass_at_k_neither_overflows_nor_cancels() -> None:
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(10**15, 1, 1) == 1e-15
    assert pass_at_k(5_000, 2_500, 2_500) == 1.0
    assert pass_at_k(4_096, 2, 64) == float(1 - Fraction(math.comb(4_094, 64), math.comb(4_096, 64)))


def test_pass_at_k_is_unbiased() -> None:
    """Over every outcome of n = 5 independent samples the estimator's mean is the true 1 - (1 - p)^k, exactly."""
    p, n = Fraction(3, 10), 5
    for k in range(1, n + 1):
        expected = sum(
            math.comb(n, c) * p**c * (1 - p) ** (n - c) * Fraction(pass_at_k(n, c, k)).limit_denominator(1000)
            for c in range(n + 1)
        )
        assert expected == 1 - (1 - p) ** k


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in|needs at least"):
        pass_at_k(n, c, k)


def test_mean_and_stderr() -> None:
    rng = random.Random(0)
    values = [rng.random() for _ in range(50)]
    estimate = mean_and_stderr([*values, None, None])
    assert estimate.mean == pytest.approx(sum(values) / 50, rel=1e-14)
    assert estimate.stderr == pytest.approx(exact_stderr(values), rel=1e-14)
    assert (estimate.n, estimate.left_out) == (50, 2)


def test_too_few_values_have_no_stderr() -> None:
    assert mean_and_stderr([]) == Estimate(None, None, 0, 0)
    assert mean_and_stderr([None]) == Estimate(None, None, 0, 1)
    assert mean_and_stderr([0.25]) == Estimate(0.25, None, 1, 0)
    assert mean_and_stderr([1.0, 1.0]) == Estimate(1.0, 0.0, 2, 0)


def test_stderr_is_clustered_by_question() -> None:
    """Copying each question's samples adds no information, so it may not shrink the error bar."""
    few = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    many = [scores * 10 for scores in few]
    assert accuracy(many) == accuracy(few)
    assert accuracy(few).stderr == pytest.approx(exact_stderr([0.5, 1.0, 0.0]), rel=1e-14)
    every_sample = mean_and_stderr([score for scores in many for score in scores])
    assert every_sample.stderr is not None and every_sample.stderr < 0.5 * exact_stderr([0.5, 1.0, 0.0])


def test_stderr_is_the_spread_of_repeated_experiments() -> None:
    """s^2/n averages, over every sample of 3 from a small population, to the true variance of the mean (unbiased)."""
    population = [0.0, 0.5, 1.0]
    samples = [(a, b, c) for a in population for b in population for c in population]
    means = [sum(sample) / 3 for sample in samples]
    true_variance = sum((mean - 0.5) ** 2 for mean in means) / len(means)
    estimated = [mean_and_stderr(sample).stderr or 0.0 for sample in samples]
    assert sum(stderr**2 for stderr in estimated) / len(samples) == pytest.approx(true_variance, rel=1e-12)


def test_no_verdict_is_left_out_not_zero() -> None:
    assert accuracy([[1.0, None], [None, None], [0.0, 1.0]]) == Estimate(0.75, 0.25, 2, 3)
    assert pass_at([[1.0, None], [None, None], [0.0, 1.0]], 2) == Estimate(1.0, None, 1, 2)


def test_questions_with_unequal_samples_weigh_the_same() -> None:
    assert accuracy([[1.0], [0.0, 0.0, 0.0]]).mean == 0.5


def test_pass_at_counts_full_marks_only_unless_told() -> None:
    scores = [[0.5, 0.0], [1.0, 0.0]]
    assert pass_at(scores, 1).mean == 0.25
    assert pass_at(scores, 1, correct_at=0.5).mean == 0.5
    assert pass_at(scores, 2).mean == 0.5


def test_paired_difference_matches_questions_by_id() -> None:
    before = {"a": [0.0, 0.0], "b": [1.0, 0.0], "c": [1.0, 1.0], "only before": [1.0]}
    after = {"c": [1.0, 1.0], "b": [1.0, 1.0], "a": [0.5, 0.5], "only after": [0.0], "d": [None]}
    difference = paired_difference(before, after)
    assert difference.mean == pytest.approx(1 / 3)
    assert difference.stderr == pytest.approx(exact_stderr([0.5, 0.5, 0.0]), rel=1e-14)
    assert (difference.n, difference.left_out) == (3, 3)


def test_pairing_removes_the_spread_between_questions() -> None:
    before = {str(i): [i / 20] for i in range(10)}
    after = {str(i): [i / 20 + 0.25] for i in range(10)}
    stderr = paired_difference(before, after).stderr
    assert stderr is not None and stderr < 1e-15
    assert (accuracy(before.values()).stderr or 0.0) > 0.04


@pytest.mark.parametrize(
    ("length", "upper"), [(1, 100), (99, 100), (100, 100), (101, 200), (200, 200), (201, None), (10**6, None)]
)
def test_bucket_takes_its_upper_bound(length: int, upper: int | None) -> None:
    assert bucket_of(length, [100, 200]) == upper


@pytest.mark.parametrize(("length", "bounds"), [(5, []), (5, [0, 10]), (5, [10, 10]), (5, [20, 10]), (0, [10])])
def test_bucket_refuses_bad_bounds_and_lengths(length: int, bounds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"bounds|no bucket"):
        bucket_of(length, bounds)


def test_accuracy_by_bucket_keeps_empty_buckets_and_reports_what_is_above() -> None:
    buckets = accuracy_by_bucket([10, 30, 100, 20], [[1.0], [0.0], [1.0, 0.0], [0.0]], [10, 15, 30])
    assert buckets == [
        (10, Estimate(1.0, None, 1, 0)),
        (15, Estimate(None, None, 0, 0)),
        (30, Estimate(0.0, 0.0, 2, 0)),
        (None, Estimate(0.5, None, 1, 0)),
    ]
    assert [upper for upper, _ in accuracy_by_bucket([10], [[1.0]], [10, 15])] == [10, 15]
    with pytest.raises(ValueError, match="one length a question"):
        accuracy_by_bucket([10], [], [10])
