"""An evaluation's completions under several rules: each score is the rule's own, each mean one computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from longreach.rl.evaluate import EvalConfig, summarize
from longreach.rl.prompts import Prompt
from longreach.rl.rollouts import RolloutGroup
from longreach.rl.rules import SCORINGS
from longreach.rl.side_by_side import accuracy_by_rule, rule_scores

TEXTS = ("</think>the answer is Paris.", "</think>the answer is the.", "the answer is Paris, France.", "Paris")


@pytest.fixture
def group(
    make_prompts: Callable[..., list[Prompt]], make_groups: Callable[..., list[RolloutGroup]]
) -> Callable[..., RolloutGroup]:
    def make(*answers: str, finish: str = "stop") -> RolloutGroup:
        prompt = make_prompts(5)[0]
        prompt = replace(prompt, example=replace(prompt.example, answers=answers, answer_type="span"))
        made = make_groups([prompt], [[0.0] * len(TEXTS)])[0]
        rollouts = [replace(r, completion=text, finish_reason=finish) for r, text in zip(made.rollouts, TEXTS, strict=True)]  # fmt: skip
        return RolloutGroup(prompt, tuple(rollouts))

    return make


def test_each_completion_is_scored_by_each_rule(group: Callable[..., RolloutGroup]) -> None:
    assert rule_scores(group("Paris"), SCORINGS) == {
        "strict": [1.0, 0.0, 0.0, 0.0],
        "cover": [1.0, 0.0, 1.0, 0.0],
        "qwenlong-l1": [1.0, 1.0, 0.0, 0.0],
        "qwenlong-l1-eval": [1.0, 1.0, 1.0, 0.0],
        "longbench": [1.0, 0.0, pytest.approx(2 / 3), 1.0],
        "longbench-em": [1.0, 0.0, 0.0, 1.0],
    }
    assert rule_scores(group("Paris", finish="length"), ("strict",)) == {"strict": [1.0, 0.0, 0.0, 0.0]}
    assert rule_scores(group(), ("strict", "longbench")) == {"strict": [None] * 4, "longbench": [None] * 4}
    assert rule_scores(group("Paris"), ()) == {}


def test_means_are_over_questions_and_old_rows_are_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {"rules": {"strict": [1.0, 0.0], "longbench": [1.0, 0.5]}},
        {"rules": {"strict": [0.0, 0.0], "longbench": [None, None]}},
        {"rules": {"strict": [1.0, 1.0]}},
        {},
    ]
    made = accuracy_by_rule(rows, ("strict", "longbench", "cover"))
    assert {rule: (estimate.mean, estimate.n) for rule, estimate in made.items()} == {
        "strict": (0.5, 3),
        "longbench": (0.75, 1),
    }


def test_the_summary_has_them_by_benchmark() -> None:
    row = {"prompt_length": 5, "chance": None, "scores": [1.0], "reasons": ["correct"], "rewards": [{"rule": 1.0}]}
    rows = [
        row | {"benchmark": "a", "rules": {"strict": [1.0], "longbench": [0.5]}},
        row | {"benchmark": "b", "rules": {"strict": [0.0], "longbench": [0.25]}},
    ]
    config = EvalConfig(rules=("strict", "longbench"))
    first, second = summarize(rows, config, bounds=[10], name="x", step=0)["benchmarks"]
    assert {rule: made["accuracy"] for rule, made in first["rules"].items()} == {"strict": 1.0, "longbench": 0.5}
    assert {rule: made["accuracy"] for rule, made in second["rules"].items()} == {"strict": 0.0, "longbench": 0.25}
    with pytest.raises(ValueError, match="'soft'"):
        EvalConfig(rules=("strict", "soft"))
