"""Who is carried into the next phase: the threshold of the paper's experiment and the weighted draw of its equation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from longreach.rl.prompts import Prompt
from longreach.rl.retrospective import PoolEntry, RetrospectiveConfig, difficulty, score, select
from longreach.rl.rollouts import RolloutGroup


def entry(name: str, mean: float | None, samples: int = 8) -> PoolEntry:
    return PoolEntry(name, "b", 10, mean, None if mean is None else difficulty(mean, samples), samples)


@pytest.fixture
def rewarded(
    make_prompts: Callable[..., list[Prompt]], make_groups: Callable[..., list[RolloutGroup]]
) -> Callable[..., list[RolloutGroup]]:
    """Groups with these rewards, one prompt a row."""

    def make(*rewards: list[float | None]) -> list[RolloutGroup]:
        prompts = make_prompts(*range(3, 3 + len(rewards)))
        groups = make_groups(prompts, [[0.0] * len(row) for row in rewards])
        return [
            replace(g, rollouts=tuple(replace(r, reward=x) for r, x in zip(g.rollouts, row, strict=True)))
            for g, row in zip(groups, rewards, strict=True)
        ]

    return make


def test_difficulty_is_one_over_the_mean_and_finite_at_zero() -> None:
    assert difficulty(0.25, 8) == 4.0
    assert difficulty(1.0, 8) == 1.0
    assert difficulty(0.0, 8) == 16.0  # half a success in eight
    assert difficulty(0.0, 8) > difficulty(1 / 8, 8)
    assert difficulty(-1.0, 4) == 8.0  # a reward function may go below zero


def test_score_takes_means_over_verdicts_alone(rewarded: Callable[..., list[RolloutGroup]]) -> None:
    entries = score(rewarded([1.0, 0.0, None, 0.0], [None, None], [0.0, 0.0]))
    assert [(e.prompt_id, e.samples) for e in entries] == [("p0", 3), ("p1", 0), ("p2", 2)]
    assert [e.mean_reward for e in entries] == [pytest.approx(1 / 3), None, 0.0]
    assert [e.difficulty for e in entries] == [pytest.approx(3.0), None, 4.0]
    assert [(e.prompt_length, e.benchmark) for e in entries] == [(3, "even"), (4, "odd"), (5, "even")]


def test_a_prompt_met_twice_is_one_entry_over_all_its_completions(
    rewarded: Callable[..., list[RolloutGroup]],
) -> None:
    groups = rewarded([1.0, 1.0], [1.0, 0.0])
    twice = [
        groups[0],
        groups[1],
        replace(groups[0], rollouts=tuple(replace(r, reward=0.0) for r in groups[0].rollouts)),
    ]
    entries = score(twice)
    assert [(e.prompt_id, e.mean_reward, e.samples) for e in entries] == [("p0", 0.5, 4), ("p1", 0.5, 2)]


@pytest.mark.parametrize(
    "threshold, chosen", [(0.0, {"zero"}), (0.25, {"zero", "quarter"}), (1.0, {"zero", "quarter", "all"})]
)
def test_the_threshold_takes_everything_up_to_it(threshold: float, chosen: set[str]) -> None:
    entries = [entry("zero", 0.0), entry("quarter", 0.25), entry("all", 1.0), entry("silent", None)]
    made = select(entries, RetrospectiveConfig(threshold=threshold), seed=0)
    assert {e.prompt_id for e in made if e.selected} == chosen
    assert [e.prompt_id for e in made] == ["zero", "quarter", "all", "silent"]
    whys = {e.prompt_id: e.why for e in made}
    assert whys["zero"] == f"mean reward 0.000 <= {threshold:g}"
    assert whys["all"] == f"mean reward 1.000 {'<=' if threshold == 1 else '>'} {threshold:g}"
    assert whys["silent"] == "no verdict on any completion"


def test_a_draw_of_one_is_in_proportion_to_difficulty() -> None:
    """4,000 draws: the standard error of a share is at most 0.008; four of them leave a chance of 1 in 4,000 to fail."""
    entries = [
        entry("easy", 1.0),
        entry("half", 0.5),
        entry("quarter", 0.25),
        entry("zero", 0.0),
        entry("silent", None),
    ]
    config, draws = RetrospectiveConfig(selection="weighted", size=1), 4000
    seen = Counter(e.prompt_id for seed in range(draws) for e in select(entries, config, seed) if e.selected)
    weights = {"easy": 1, "half": 2, "quarter": 4, "zero": 16}
    for name, weight in weights.items():
        assert seen[name] / draws == pytest.approx(weight / sum(weights.values()), abs=0.032)
    assert seen["silent"] == 0


def test_a_second_draw_follows_the_weights_that_are_left() -> None:
    """P(a and b) of weights 1, 2, 4 drawn without replacement, by hand; P(c left out) = 1/7*2/6 + 2/7*1/5."""
    entries = [entry("a", 1.0), entry("b", 0.5), entry("c", 0.25)]
    config, draws = RetrospectiveConfig(selection="weighted", size=2), 4000
    left = Counter(e.prompt_id for seed in range(draws) for e in select(entries, config, seed) if not e.selected)
    assert left["c"] / draws == pytest.approx(1 / 7 * 2 / 6 + 2 / 7 * 1 / 5, abs=0.02)


def test_the_draw_is_without_replacement_and_says_why() -> None:
    entries = [entry(str(i), i / 10) for i in range(10)] + [entry("silent", None)]
    config = RetrospectiveConfig(selection="weighted", size=4)
    made = select(entries, config, seed=3)
    assert sum(e.selected for e in made) == 4
    assert made == select(entries, config, seed=3)
    assert made != select(entries, config, seed=4)
    assert {e.why.split(" with")[0] for e in made} == {"drawn", "not drawn", "no verdict on any completion"}
    assert made[5].why.endswith("with weight 2.00")


def test_a_draw_larger_than_the_pool_takes_all_that_has_a_verdict() -> None:
    made = select([entry("a", 1.0), entry("b", None)], RetrospectiveConfig(selection="weighted", size=9), seed=0)
    assert [e.selected for e in made] == [True, False]


def test_a_dump_has_what_the_run_folder_promises() -> None:
    line = select([entry("a", 0.0)], RetrospectiveConfig(), seed=0)[0].dump()
    assert line == {
        "prompt_id": "a", "benchmark": "b", "prompt_length": 10, "mean_reward": 0.0, "difficulty": 16.0, "samples": 8,
        "selected": True, "why": "mean reward 0.000 <= 0",
    }  # fmt: skip
