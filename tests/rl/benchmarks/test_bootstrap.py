"""Intervals against every resample there is, exact binomial quantiles, and their coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from longreach.rl.benchmarks.bootstrap import (
    Interval,
    Values,
    average_difference,
    average_interval,
    intervals,
    paired,
    resampled,
)


def one(values: Values, seed: int = 0, resamples: int = 20_000) -> Interval:
    return intervals({"x": values}, resamples=resamples, seed=seed)["x"]


def binomial_quantile(n: int, p: float, q: float) -> float:
    """Smallest share k/n whose cumulative probability reaches q."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k / n
    return 1.0


def test_draws_are_those_of_every_resample_there_is() -> None:
    """Five values have 3,125 equally likely resamples: mean, spread and quantiles of ours are theirs."""
    values = [0.0, 0.25, 0.5, 1.0, 1.0]
    exact = np.array([np.mean(draw) for draw in itertools.product(values, repeat=5)])
    drawn = resampled({"x": values}, resamples=200_000, seed=1)["x"]
    # 200,000 draws have a standard error of 0.0004 on the mean, and quantiles lie on a lattice of 0.05.
    assert drawn.mean() == pytest.approx(exact.mean(), abs=0.002)
    assert drawn.std() == pytest.approx(exact.std(), abs=0.002)
    made = one(list(values), resamples=200_000)
    assert made.mean == pytest.approx(0.55)
    assert made.low == pytest.approx(np.quantile(exact, 0.025), abs=0.0501)
    assert made.high == pytest.approx(np.quantile(exact, 0.975), abs=0.0501)


@pytest.mark.parametrize("n, right", [(200, 130), (200, 190), (50, 5), (824, 577)])
def test_of_right_and_wrong_it_is_the_binomial(n: int, right: int) -> None:
    """Resampled means of 0s and 1s are Binomial(n, p)/n exactly, so the interval is its quantiles: one step off at most."""
    made = one([1.0] * right + [0.0] * (n - right))
    assert made.low is not None and made.high is not None
    assert abs(made.low - binomial_quantile(n, right / n, 0.025)) <= 1 / n + 1e-12
    assert abs(made.high - binomial_quantile(n, right / n, 0.975)) <= 1 / n + 1e-12


def test_coverage_is_about_95_percent() -> None:
    """Of 400 evaluations of 200 questions at 70 %: the truth lies within 376 +- 3 standard errors of 4.4, less what the percentile
    interval is known to miss (about one in a hundred at this size)."""
    draws = np.random.default_rng(3).random((400, 200)) < 0.7
    hits = 0
    for index, row in enumerate(draws):
        made = one(row.astype(float).tolist(), seed=index, resamples=1000)
        assert made.low is not None and made.high is not None
        hits += made.low <= 0.7 <= made.high
    assert 362 <= hits <= 393


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    values = np.random.default_rng(0).random(60).tolist()
    assert one(values, 5) == one(values, 5)
    assert one(values, 5).low != one(values, 6).low


def test_all_alike_is_the_exact_interval_not_a_point() -> None:
    """Clopper and Pearson: with 20 of 20 right the lower end solves p^20 = 0.025."""
    made = one([1.0] * 20)
    assert (made.mean, made.high) == (1.0, 1.0)
    assert made.low is not None and made.low**20 == pytest.approx(0.025)
    wrong = one([0.0] * 20)
    assert wrong.low == 0.0 and wrong.high == pytest.approx(1 - made.low)
    assert one([0.5] * 20).low == 0.5


def test_what_has_no_value_is_left_out_and_counted() -> None:
    made = one([1.0, None, 0.0, None])
    assert (made.mean, made.n, made.left_out) == (0.5, 2, 2)
    nothing = one([None, None])
    assert (nothing.mean, nothing.low, nothing.n, nothing.left_out) == (None, None, 0, 2)
    assert one([]).n == 0
    # A resample that draws nothing known is no 0: with one of two known every mean is its value.
    assert set(
        resampled({"x": [0.25, None]}, resamples=200, seed=0)["x"][
            ~np.isnan(resampled({"x": [0.25, None]}, resamples=200, seed=0)["x"])
        ]
    ) == {0.25}


def test_many_draws_are_made_in_parts_that_are_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50).tolist()
    whole = resampled({"x": values}, resamples=100, seed=2)["x"]
    monkeypatch.setattr("longreach.rl.benchmarks.bootstrap._CHUNK", 50 * 7)
    parts = resampled({"x": values}, resamples=100, seed=2)["x"]
    assert parts == pytest.approx(whole)
    assert len(parts) == 100


def test_columns_see_the_same_questions() -> None:
    drawn = resampled({"a": [0.0, 1.0, 1.0], "b": [1.0, 0.0, 0.0]}, resamples=50, seed=0)
    assert drawn["a"] + drawn["b"] == pytest.approx(np.ones(50))


def test_the_average_weighs_benchmarks_alike_and_adds_their_variances() -> None:
    """Var(mean of 2 means) = (s1^2/n1 + s2^2/n2) / 4, whatever the sizes; the interval is 1.96 of it to 3 %."""
    small, large = [1.0, 0.0] * 20, ([1.0] * 3 + [0.0]) * 200
    made = average_interval([small, large], resamples=20_000, seed=0)
    assert made.mean == pytest.approx((0.5 + 0.75) / 2)
    assert made.n == 840
    sd = math.sqrt(0.25 / 40 + 0.1875 / 800) / 2
    assert made.low is not None and made.high is not None
    assert made.high - made.low == pytest.approx(2 * 1.96 * sd, rel=0.03)
    assert average_interval([small, [None]], resamples=200, seed=0).mean is None


def test_benchmarks_of_one_size_are_drawn_apart() -> None:
    """Four alike: their errors average out, so the interval is half of one's; the same draws for all would keep it whole."""
    part = [1.0, 0.0] * 100
    four, single = (
        average_interval([part] * 4, resamples=20_000, seed=0),
        average_interval([part], resamples=20_000, seed=0),
    )
    assert four.high is not None and four.low is not None and single.high is not None and single.low is not None
    assert four.high - four.low == pytest.approx((single.high - single.low) / 2, rel=0.06)


def test_pairing_takes_out_how_hard_questions_are() -> None:
    """B is right wherever A is, and on 12 of 200 more: the difference is certain to +-3.3, where unpaired ones would give +-9.6."""
    before = [1.0] * 90 + [0.0] * 110
    after = [1.0] * 102 + [0.0] * 98
    made = paired(before, after, resamples=20_000, seed=0)
    assert made.mean == pytest.approx(0.06)
    assert made.low is not None and made.high is not None
    # Sum of changes is Binomial(200, 0.06).
    assert abs(made.low - binomial_quantile(200, 0.06, 0.025)) <= 1 / 200 + 1e-12
    assert abs(made.high - binomial_quantile(200, 0.06, 0.975)) <= 1 / 200 + 1e-12
    # No resample of changes that are never negative lies below 0: p is bounded by P(no change drawn) = 0.94^200.
    assert made.p == pytest.approx(2 / 20_001, rel=0.01, abs=3 / 20_001)


def test_p_is_the_share_beyond_nought() -> None:
    """Changes +1, -1, 0 of three questions: 27 resamples, of which 17 are <= 0 and 17 >= 0 (7 are 0): p is 1."""
    assert paired([0.0, 1.0, 1.0], [1.0, 0.0, 1.0], resamples=5000, seed=0).p == 1.0
    made = paired([0.0] * 4, [1.0, 1.0, 1.0, -1.0], resamples=200_000, seed=0)
    exact = [sum(draw) for draw in itertools.product([1, 1, 1, -1], repeat=4)]
    assert made.p == pytest.approx(2 * sum(s <= 0 for s in exact) / 256, abs=0.005)
    alike = paired([0.5] * 9, [0.5] * 9, resamples=500, seed=0)
    assert (alike.mean, alike.low, alike.high, alike.p) == (0.0, 0.0, 0.0, 1.0)
    swapped = paired([1.0, 1.0, 1.0, -1.0], [0.0] * 4, resamples=200_000, seed=0)
    assert swapped.mean == -0.5 and swapped.p == pytest.approx(made.p, abs=0.005)


def test_questions_without_a_value_on_one_side_are_no_pair() -> None:
    made = paired([None, 0.0, 1.0], [1.0, 1.0, None], resamples=200, seed=0)
    assert (made.mean, made.n) == (1.0, 1)
    assert average_difference([([None], [1.0])], resamples=200, seed=0).mean is None
