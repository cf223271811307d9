"""Advantages against a plain numpy statement, for each scale, and the length penalty at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from longreach.rl.advantages import SCALES, group_advantages, overlong_penalty, reward_spread

REWARDS: list[list[float | None]] = [
    [1.0, 0.0, 0.0, 0.5],
    [0.25, None, 1.0, 0.0],
    [1.0, 1.0, 1.0, 1.0],
    [None, None, None, None],
    [0.0, 0.0, 2.0, -1.0],
    [None, 0.5, None, None],
]
TASKS = ["a", "b", "a", "c", "b", "d"]


def stated(scale: str) -> np.ndarray:
    """(r - mean of the group) / (unbiased deviation over what `scale` says + 1e-4), NaN for no verdict."""
    r = np.array([[np.nan if x is None else x for x in row] for row in REWARDS])
    result = np.full_like(r, np.nan)
    for i, row in enumerate(r):
        over = {"group": row, "task": r[[t == TASKS[i] for t in TASKS]], "batch": r, "none": row}[scale]
        known = over[~np.isnan(over)]
        spread = np.std(known, ddof=1) if len(known) > 1 else 0.0
        verdicts = row[~np.isnan(row)]
        mean = verdicts.mean() if len(verdicts) else 0.0
        result[i] = (row - mean) / (1.0 if scale == "none" else spread + 1e-4)
    return result


@pytest.mark.parametrize("scale", SCALES)
def test_each_scale_equals_its_statement(scale: str) -> None:
    ours = group_advantages(REWARDS, TASKS, scale)
    assert [[a is None for a in row] for row in ours] == [[r is None for r in row] for row in REWARDS]
    made = np.array([[np.nan if a is None else a for a in row] for row in ours])
    np.testing.assert_allclose(made, stated(scale), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_scales_differ() -> None:
    first = {scale: group_advantages(REWARDS, TASKS, scale)[0][0] for scale in SCALES}
    assert len(set(first.values())) == len(SCALES)


def test_the_scale_is_the_groups_unless_said() -> None:
    assert group_advantages(REWARDS, TASKS) == group_advantages(REWARDS, TASKS, "group")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e-9])
def test_equal_rewards_have_advantages_of_exactly_zero(scale: str, value: float) -> None:
    """A rounding error of 1e-17 over 1e-4 would send every row of such a group through the backward for nothing."""
    assert group_advantages([[value] * 3, [0.0, 1.0, value]], ["a", "a"], scale)[0] == [0.0, 0.0, 0.0]


def test_a_completion_without_verdict_changes_nothing_for_the_others() -> None:
    with_none = group_advantages([[1.0, None, 0.0, 0.5, None]], ["a"])[0]
    without = group_advantages([[1.0, 0.0, 0.5]], ["a"])[0]
    assert [a for a in with_none if a is not None] == without


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale 'std' is not one of group, task, batch, none"):
        group_advantages(REWARDS, TASKS, "std")


def test_spread() -> None:
    assert reward_spread([1.0, None, 0.0]) == pytest.approx(math.sqrt(0.5))
    assert reward_spread([0.1] * 7) == 0.0
    assert reward_spread([1.0, None]) == reward_spread([]) == 0.0


@pytest.mark.parametrize(
    "length, penalty",
    [(0, 0.0), (8_999, 0.0), (9_000, 0.0), (9_001, -0.001), (9_500, -0.5), (9_999, -0.999), (10_000, -1.0), (10_001, -1.0)],
)  # fmt: skip
def test_the_length_penalty_of_the_released_script(length: int, penalty: float) -> None:
    assert overlong_penalty(length, limit=10_000, buffer=1_000) == pytest.approx(penalty, abs=1e-12)


def test_without_a_buffer_there_is_no_length_penalty() -> None:
    assert overlong_penalty(10_000, limit=10_000, buffer=0) == 0.0
