"""Counts of rule and judge, by benchmark: from a step's rollouts, an evaluation's rows, and onto the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from longreach.rl.agreement import agreement_metrics, confusion
from longreach.rl.prompts import Prompt
from longreach.rl.rollouts import RolloutGroup
from longreach.rl.step_metrics import rollout_metrics

SCORED = [
    ("hotpot", {"rule": 1.0, "judge": 1.0}),
    ("hotpot", {"rule": 1.0, "judge": 0.0}),
    ("hotpot", {"rule": 1.0, "judge": 0.0, "mine": 0.3}),
    ("hotpot", {"rule": 0.0, "judge": 1.0}),
    ("docmath", {"rule": 0.0, "judge": 0.0}),
    ("docmath", {"rule": 0.0, "judge": None}),
    ("docmath", {"rule": 1.0, "judge": None}),
    ("docmath", {"rule": None, "judge": None}),
    ("docmath", {"judge": 1.0}),
    ("frames", {"rule": 1.0}),
]


def test_each_cell_counts_what_both_have_scored() -> None:
    assert confusion(SCORED) == {
        "docmath": {"both": 0, "rule_only": 0, "judge_only": 0, "neither": 1},
        "hotpot": {"both": 1, "rule_only": 2, "judge_only": 1, "neither": 0},
    }


def test_metrics_are_named_by_benchmark_and_absent_without_a_judge() -> None:
    made = agreement_metrics(SCORED)
    assert made["reward/agreement/hotpot/rule_only"] == 2.0
    assert len(made) == 8
    assert agreement_metrics([("frames", {"rule": 1.0})]) == {}


def test_a_step_reports_them(
    make_prompts: Callable[..., list[Prompt]], make_groups: Callable[..., list[RolloutGroup]]
) -> None:
    [group] = make_groups(make_prompts(3), [[0.0, 0.0, 0.0]])
    parts: list[dict[str, Any]] = [
        {"rule": 1.0, "judge": 0.0},
        {"rule": 0.0, "judge": 0.0},
        {"rule": 0.0, "judge": None},
    ]
    rollouts = tuple(replace(r, rewards=p) for r, p in zip(group.rollouts, parts, strict=True))
    made = rollout_metrics([RolloutGroup(group.prompt, rollouts)])
    found = {name: value for name, value in made.items() if "agreement" in name}
    assert found == {
        f"reward/agreement/even/{cell}": count
        for cell, count in (("both", 0.0), ("rule_only", 1.0), ("judge_only", 0.0), ("neither", 1.0))
    }
