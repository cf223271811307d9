"""Rank correlation and clustered error bars against what they are by definition."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.rl.behaviours.compare import clustered, ranks, spearman
from longreach.rl.statistics import mean_and_stderr


def rank_by_definition(values: list[float], index: int) -> float:
    """The mean of the places that the value's equals can take."""
    below = sum(value < values[index] for value in values)
    equal = sum(value == values[index] for value in values)
    return below + (equal + 1) / 2


@given(st.lists(st.integers(0, 4), max_size=12))
def test_ranks(values: list[float]) -> None:
    assert ranks(values) == [rank_by_definition(values, index) for index in range(len(values))]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_spearman_is_pearson_of_the_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
        return
    one = [rank_by_definition(first, i) for i in range(len(first))]  # type: ignore[arg-type]
    other = [rank_by_definition(second, i) for i in range(len(second))]  # type: ignore[arg-type]
    assert found == pytest.approx(float(np.corrcoef(one, other)[0, 1]), abs=1e-12)
    assert found == spearman(second, first)
    assert spearman(first, [-b for b in second]) == pytest.approx(-(found or 0.0))
    assert spearman(first, [math.exp(b) for b in second]) == pytest.approx(found), "only the order matters"


def test_spearman_without_ties_is_the_textbooks_formula() -> None:
    for order in itertools.permutations(range(5)):
        differences = sum((a - b) ** 2 for a, b in enumerate(order))
        assert spearman(range(5), order) == pytest.approx(1 - 6 * differences / (5 * 24))
    assert spearman([], []) is None
    assert spearman([1.0], [2.0]) is None


def test_clusters_of_one_have_the_usual_error() -> None:
    values = [1.0, None, 3.0, 3.0, 8.0]
    assert clustered(values, range(5)) == mean_and_stderr(values)


def test_a_cluster_that_repeats_itself_adds_no_knowledge() -> None:
    values = [1.0, 3.0, 8.0, 2.0]
    once, thrice = clustered(values, range(4)), clustered(values * 3, list(range(4)) * 3)
    assert thrice.mean == pytest.approx(once.mean) and thrice.stderr == pytest.approx(once.stderr)
    assert (once.n, thrice.n) == (4, 12)


def test_the_error_is_the_spread_of_means_over_runs() -> None:
    draw, means, errors = random.Random(0), [], []
    for _ in range(600):
        values, clusters = [], []
        for cluster in range(12):
            level = draw.gauss(0, 1)
            for _ in range(1 + cluster % 4):
                values.append(level + draw.gauss(0, 0.5))
                clusters.append(cluster)
        one = clustered(values, clusters)
        means.append(one.mean)
        errors.append(one.stderr)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.12)


def test_too_few_for_an_error_bar() -> None:
    assert clustered([], []).mean is None
    assert clustered([None], ["a"]).n == 0
    assert (clustered([1.0, 2.0], ["a", "a"]).mean, clustered([1.0, 2.0], ["a", "a"]).stderr) == (1.5, None)
