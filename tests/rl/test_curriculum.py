"""Phases take exactly lower < length <= upper; nothing is lost and nothing is taken twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from longreach.rl.curriculum import Phase, assign, check_bounds, describe, phase_name
from longreach.rl.prompts import Prompt

FIRST = Phase(upper=20_000, max_completion=10_000, steps=1, learning_rate=2e-6)
PHASES = (FIRST, replace(FIRST, upper=60_000))


def test_bounds_are_exact_at_their_edges() -> None:
    lengths = [60_000, 1, 20_000, 20_001, 60_001, 19_999, 59_999, 1_000_000]
    members, beyond = assign(lengths, PHASES)
    assert [[lengths[i] for i in phase] for phase in members] == [[1, 20_000, 19_999], [60_000, 20_001, 59_999]]
    assert [lengths[i] for i in beyond] == [60_001, 1_000_000]


def test_every_prompt_stands_in_one_place() -> None:
    members, beyond = assign(list(range(1, 70_000, 7)), PHASES)
    assert sorted([*members[0], *members[1], *beyond]) == list(range(len(range(1, 70_000, 7))))


def test_without_prompts_or_phases() -> None:
    assert assign([], PHASES) == ([[], []], [])
    assert assign([5], ()) == ([], [0])


def test_bounds_must_grow() -> None:
    check_bounds(PHASES)
    for upper in (20_000, 19_999):
        with pytest.raises(
            ValueError, match=rf"phases\.1\.upper = {upper} does not lie above phases\.0\.upper = 20000"
        ):
            check_bounds((FIRST, replace(FIRST, upper=upper)))


def test_a_phase_hands_on_its_sampling_and_learning_rate() -> None:
    phase = Phase(9, 8, 10, 1e-3, warmup_steps=2, schedule="linear", temperature=0.7, top_p=0.9, top_k=5)
    sampling = phase.sampling()
    assert (sampling.max_completion, sampling.temperature, sampling.top_p, sampling.top_k) == (8, 0.7, 0.9, 5)
    rates = [phase.rates().at(step, phase.steps) for step in range(10)]
    assert rates[:3] == [0.5e-3, 1e-3, 1e-3]
    assert rates[9] == pytest.approx(1e-3 / 8)


def test_names_count_from_one() -> None:
    assert [phase_name(0), phase_name(1)] == ["phase1", "phase2"]


def test_describe_counts_and_measures(make_prompts: Callable[..., list[Prompt]]) -> None:
    prompts = make_prompts(5, 9, 3, 7)
    prompts[0] = replace(prompts[0], truncated_from=50)
    assert describe(prompts) == {"prompts": 4, "min": 3, "median": 7, "max": 9, "truncated": 1}
    assert describe([]) == {"prompts": 0}
