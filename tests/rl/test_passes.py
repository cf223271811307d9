"""Evaluations and difficulty passes of a run: who is carried on and why, and the summary of what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import passes, train
from longreach.rl.console import Console
from longreach.rl.recipe import Recipe
from longreach.rl.run import RunFolder

Make = Callable[..., Recipe]
REWARDS = """
def by_question(answers, **columns):
    return [{"0": None, "1": 0.0, "2": 0.0, "3": 0.5}.get(gold[0], 1.0) for gold in answers]


def short(completion_ids, answers, **columns):
    return [float(int(gold[0]) > 2) for gold in answers]
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(make_recipe: Make, tmp_path: Path) -> Callable[..., Path]:
    """Trains with a reward that hangs on the question alone, so that difficulty is known."""
    (tmp_path / "mine.py").write_text(REWARDS)

    def make(function: str = "by_question", **keys: Any) -> Path:
        recipe = make_recipe(reward__function=f"{tmp_path / 'mine.py'}:{function}", sft=None, data__eval=[], **keys)
        train(recipe, tmp_path / "run", console=Console(quiet=True))
        return tmp_path / "run"

    return make


def test_the_hard_prompts_of_a_phase_go_on_into_the_next(run: Callable[..., Path]) -> None:
    """Phase 1 holds train-0 to train-5; of these 1 and 2 are never answered, and 0 never gets a verdict."""
    run_dir = run(retrospective={"samples": 2}, rl__batch_prompts=8)
    pool = lines(run_dir / "pool" / "phase1.jsonl")
    assert [entry["prompt_id"] for entry in pool] == [f"train-{i}" for i in range(6)]
    assert [(entry["mean_reward"], entry["samples"], entry["selected"]) for entry in pool] == [
        (None, 0, False), (0.0, 2, True), (0.0, 2, True), (0.5, 2, False), (1.0, 2, False), (1.0, 2, False),
    ]  # fmt: skip
    assert [entry["why"] for entry in pool[:4]] == [
        "no verdict on any completion", "mean reward 0.000 <= 0", "mean reward 0.000 <= 0", "mean reward 0.500 > 0",
    ]  # fmt: skip
    seen = {line["prompt_id"] for file in (run_dir / "rollouts" / "phase2").iterdir() for line in lines(file)}
    assert seen == {"train-1", "train-2", *(f"train-{i}" for i in range(6, 12))}, (
        "24 draws from 8: every one three times"
    )


def test_the_fresh_pass_samples_with_the_next_phases_limits(run: Callable[..., Path]) -> None:
    run_dir = run(retrospective={"samples": 5}, phases__0__max_completion=2, phases__1__max_completion=9)
    drawn = [row for batch in lines(run_dir / "rollouts" / "difficulty-phase1.jsonl") for row in batch["rows"]]
    assert len(drawn) == 6 * 5
    assert 2 < max(len(row["completion_ids"]) for row in drawn) <= 9
    trained = [row for file in (run_dir / "rollouts" / "phase1").iterdir() for row in lines(file)]
    assert max(len(row["completion_ids"]) for row in trained) == 2


def test_the_phases_own_records_serve_without_sampling_and_without_the_length_penalty(run: Callable[..., Path]) -> None:
    run_dir = run(retrospective={"source": "records"}, rl__batch_prompts=6, rl__overlong_buffer=5, rl__group_size=3)
    assert not (run_dir / "rollouts" / "difficulty-phase1.jsonl").exists()
    pool = {entry["prompt_id"]: entry for entry in lines(run_dir / "pool" / "phase1.jsonl")}
    assert {name: entry["mean_reward"] for name, entry in pool.items()} == pytest.approx(
        {"train-0": None, "train-1": 0.0, "train-2": 0.0, "train-3": 0.5, "train-4": 1.0, "train-5": 1.0}
    )
    assert {entry["samples"] for name, entry in pool.items() if name != "train-0"} == {3 * 3}, (
        "three steps met each once"
    )
    trained = [row for file in (run_dir / "rollouts" / "phase1").iterdir() for row in lines(file)]
    assert min(row["reward"] for row in trained if row["reward"] is not None) < 0, "there was a penalty to leave out"


def test_prompts_that_stay_hard_are_carried_through_every_phase(
    run: Callable[..., Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    original = passes.select

    def spied(entries: Any, config: Any, seed: int) -> Any:
        seeds.append(seed)
        return original(entries, config, seed)

    monkeypatch.setattr(passes, "select", spied)
    median = int((data_dir / "median").read_text())
    phase = {"max_completion": 4, "steps": 1, "learning_rate": 1e-3}
    phases = [{**phase, "upper": upper} for upper in (median, median + 20, 500)]
    run_dir = run(function="short", phases=phases, retrospective={"samples": 2})
    pools = [{e["prompt_id"] for e in lines(run_dir / "pool" / f"phase{k}.jsonl") if e["selected"]} for k in (1, 2)]
    assert pools == [{"train-0", "train-1", "train-2"}] * 2
    assert seeds[0] != seeds[1], "two draws of one run are not to fall on the same ranks"


def test_the_summary_has_a_line_for_each_stage_evaluated_so_far(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    bucket = {"upper": 10, "accuracy": 0.5, "stderr": 0.1, "n": 4, "left_out": 0}
    above = {**bucket, "upper": None, "accuracy": None, "stderr": None, "n": 0}
    for name, chance in (("base", None), ("phase1", 0.25)):
        folder.eval_file(name).parent.mkdir(exist_ok=True)
        folder.eval_file(name).write_text(json.dumps({"stage": name, "chance": chance, "buckets": [bucket, above]}))
    passes.summary(folder, ["base", "sft", "phase1"])
    made = json.loads((tmp_path / "summary.json").read_text())
    assert made["chance"] == 0.25
    assert [stage["name"] for stage in made["stages"]] == ["base", "phase1"]
    assert made["stages"][0]["buckets"] == [bucket, above]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_summary_of_nothing_draws_no_picture(tmp_path: Path) -> None:
    passes.summary(RunFolder(tmp_path), ["base"])
    assert json.loads((tmp_path / "summary.json").read_text()) == {"chance": None, "stages": []}
    assert not (tmp_path / "accuracy.png").exists()


def test_a_bucket_in_words() -> None:
    bucket = {"upper": 512, "accuracy": 0.1234, "stderr": None, "n": 7}
    assert passes.bucket_line(bucket) == "<= 512: 12.3 ± - % (n = 7)"
    assert passes.bucket_line({**bucket, "upper": None}) == "above: 12.3 ± - % (n = 7)"
