"""What is sampled from a run, and where its documents come from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from longreach.rl.behaviours.lexical import normal
from longreach.rl.behaviours.responses import Response, points, read_documents, sample

from .conftest import build_run, reasoning

ALL = [Response(question, f"{question}{index}", None) for question in "abcde" for index in range(4)]


def test_a_sample_is_fixed_and_grows_question_by_question() -> None:
    assert sample(ALL, 7) == sample(list(ALL), 7)
    for size in range(1, len(ALL)):
        assert sample(ALL, size) == sample(ALL, size + 1)[:size]
    assert Counter(one.question for one in sample(ALL, 5)) == dict.fromkeys("abcde", 1)
    assert max(Counter(one.question for one in sample(ALL, 11)).values()) == 3
    assert sorted(one.text for one in sample(ALL, 99)) == sorted(one.text for one in ALL)
    assert [one.question for one in sample(ALL, 5)] != list("abcde"), "not the file's order"


def test_points_of_a_run(run: Path) -> None:
    notes: list[str] = []
    found = list(points(run, 5, 50, notes))
    assert [(p.kind, p.stage, p.step, len(p.responses), p.of) for p in found] == [
        ("training", "phase1", 1, 5, 8), ("training", "phase1", 2, 5, 8), ("training", "phase1", 3, 5, 8),
        ("evaluation", "base", 0, 5, 8), ("evaluation", "phase1", 3, 5, 8),
    ]  # fmt: skip
    assert notes == []
    assert [r.question for r in found[3].responses] == [r.question for r in found[4].responses]
    assert {r.text for r in found[1].responses} <= {reasoning(2, p, s) for p in range(4) for s in range(2)}
    assert {r.score for r in found[3].responses} == {1.0, None}


def test_steps_are_spread_evenly_and_the_last_is_among_them(tmp_path: Path) -> None:
    run = build_run(tmp_path / "long", steps=10)
    assert [p.step for p in points(run, 1, 3, []) if p.kind == "training"] == [3, 6, 10]


def test_torn_and_unfinished_files_are_told_of(run: Path) -> None:
    step = run / "rollouts" / "phase1" / "000003.jsonl"
    step.write_text(step.read_text()[:-30])
    (run / "evals" / "base.json").unlink()
    (run / "rollouts" / "difficulty-phase1.jsonl").write_text("{}\n")
    notes: list[str] = []
    assert [(p.stage, p.of) for p in points(run, 99, 50, notes)] == [
        ("phase1", 8),
        ("phase1", 8),
        ("phase1", 7),
        ("phase1", 8),
    ]
    assert len(notes) == 2 and "torn" in notes[0] and "base.completions.jsonl" in notes[1]


def test_documents_are_those_of_the_questions(run: Path) -> None:
    wanted = {json.dumps(["b", "train-1"]), json.dumps(["b", "eval-2"]), json.dumps(["other", "eval-2"])}
    said: list[str] = []
    found = read_documents(run, wanted, said.append)
    assert found == {key: normal("In 1998 the plant in Lyon was closed.") for key in wanted if "other" not in key}
    assert said == []


@pytest.mark.parametrize("spoil", ["train.jsonl", "recipe.toml"])
def test_documents_that_are_gone_are_warned_of(run: Path, spoil: str) -> None:
    (run / spoil).unlink()
    said: list[str] = []
    assert read_documents(run, {json.dumps(["b", "train-1"])}, said.append) == {}
    assert len(said) == 1 and spoil.split(".")[0] in said[0]


def test_generated_rows_are_read_from_the_run_folder(run: Path) -> None:
    text = (run / "recipe.toml").read_text().replace(f"{run}/train.jsonl", "synthetic:made")
    (run / "recipe.toml").write_text(text + "[synthetic.made]\nrows = 2\n")
    (run / "data").mkdir()
    (run / "train.jsonl").rename(run / "data" / "made.jsonl")
    assert len(read_documents(run, {json.dumps(["b", "train-1"])}, pytest.fail)) == 1
