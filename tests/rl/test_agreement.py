"""Counts of rule and judge, by benchmark: from a step's rollouts, an evaluation's rows, and onto the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longreach.rl.agreement import agreement_metrics, confusion
from longreach.rl.evaluate import EvalConfig, summarize
from longreach.rl.prompts import Prompt
from longreach.rl.report import collect, write_report
from longreach.rl.rollouts import RolloutGroup
from longreach.rl.step_metrics import rollout_metrics

from . import browser
from .browser import needs_browser

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


def evaluated(benchmark: str, *parts: dict[str, Any]) -> dict[str, Any]:
    row = {"benchmark": benchmark, "chance": None, "prompt_length": 9, "scores": [1.0] * len(parts)}
    return {**row, "rewards": list(parts)}


def test_an_evaluation_reports_them_and_rows_of_older_runs_have_none() -> None:
    rows = [evaluated("hotpot", *(parts for name, parts in SCORED if name == "hotpot"))]
    old = {key: value for key, value in evaluated("old", {}).items() if key != "rewards"}
    made = summarize([*rows, old], EvalConfig(k=1), bounds=[10], name="base", step=0)
    assert made["agreement"] == {"hotpot": {"both": 1, "rule_only": 2, "judge_only": 1, "neither": 0}}
    json.dumps(made)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two stages of training, one step logged twice, and an evaluation."""

    def line(stage: str, step: int, **cells: float) -> dict[str, Any]:
        return {"stage": stage, "step": step, **{f"reward/agreement/a/b {cell}": n for cell, n in cells.items()}}

    lines = [
        line("phase1", 1, **{"x/both": 3.0, "x/rule_only": 0.0}),
        line("phase1", 2, **{"x/both": 99.0}),
        line("phase1", 2, **{"x/both": 4.0, "x/neither": 1.0}),
        line("phase2", 3, **{"x/both": 1.0, "x/rule_only": 5.0, "x/other": 7.0}),
        {"stage": "phase2", "step": 4, "reward/agreement/z/both": None, "reward": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (tmp_path / "evals").mkdir()
    summary = summarize(
        [evaluated("<b>", {"rule": 0.0, "judge": 1.0})], EvalConfig(), bounds=[10], name="phase1", step=2
    )  # fmt: skip
    (tmp_path / "evals" / "phase1.json").write_text(json.dumps(summary))
    (tmp_path / "evals" / "phase2.json").write_text('{"stage": "phase2", "agreement": {"a": 3, "b": {"both": "x"}}}')
    return tmp_path


def test_the_report_sums_steps_by_stage_and_tells_of_disputes(run: Path) -> None:
    data = collect(run)
    cells = ("both", "rule_only", "judge_only", "neither")
    found = [(r["stage"], r["kind"], r["benchmark"], *(r[cell] for cell in cells)) for r in data["agreement"]]
    assert found == [
        ("phase1", "training", "a/b x", 7, 0, 0, 1),
        ("phase1", "evaluation", "<b>", 0, 0, 1, 0),
        ("phase2", "training", "a/b x", 1, 5, 0, 0),
    ]
    assert any("denied" in note for note in data["notes"])
    page = write_report(run).read_text()
    assert "drawAgreement" in page and "<b>" not in page.partition('id="data"')[2].partition("</script>")[0]


def test_a_run_without_a_judge_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "phase1", "step": 1, "reward": 0.5}\n')
    data = collect(tmp_path)
    assert data["agreement"] == []
    assert not any("denied" in note for note in data["notes"])


@needs_browser
def test_the_table_is_drawn(run: Path, tmp_path: Path) -> None:
    made = browser.dom(write_report(run), tmp_path / "profile")
    assert "rule yes, judge no" in made
    assert "0.833" in made, "5 of the 6 that the rule accepted"
