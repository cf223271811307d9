"""The run folder: claimed by one process and one recipe, rewound to a step, and made of whole lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longreach.rl.run import BatchLog, RunFolder, Stopwatch, read_lines


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path / "run")
    made.open("seed = 0\n")
    yield made
    made.close()


def refused(root: Path, text: str = "seed = 0\n") -> str:
    """What opening says when it refuses."""
    other = RunFolder(root)
    with pytest.raises(ValueError, match="give another --run-dir") as error:
        other.open(text)
    other.close()
    return str(error.value)


def test_a_folder_keeps_its_recipe_and_opens_again_with_it(folder: RunFolder) -> None:
    assert (folder.root / "recipe.toml").read_text() == "seed = 0\n"
    folder.close()
    again = RunFolder(folder.root)
    again.open("seed = 0\n")
    again.close()


def test_a_second_process_is_refused_while_the_first_one_runs(folder: RunFolder) -> None:
    assert "another process is training" in refused(folder.root)
    folder.close()
    again = RunFolder(folder.root)
    again.open("seed = 0\n")
    again.close()


def test_another_recipe_is_refused_and_the_difference_named(folder: RunFolder) -> None:
    folder.close()
    message = refused(folder.root, "seed = 1\n")
    assert "there: seed = 0; here: seed = 1" in message
    assert (folder.root / "recipe.toml").read_text() == "seed = 0\n"


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert "is not empty and not a run folder" in refused(tmp_path)
    assert "is a file" in refused(tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_whose_first_process_died_before_the_recipe_stood_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "recipe.toml.unfinished").write_text("se")
    made = RunFolder(tmp_path)
    made.open("seed = 0\n")
    made.close()
    assert (tmp_path / "recipe.toml").read_text() == "seed = 0\n"


def test_what_a_run_was_begun_with_is_held_to(folder: RunFolder) -> None:
    folder.claim("data", "abc")
    folder.claim("data", "abc")
    folder.claim("replay", "none")
    with pytest.raises(ValueError, match=r"the data is not what .* was begun with"):
        folder.claim("data", "abd")


def test_metrics_are_json_without_nan(folder: RunFolder) -> None:
    folder.add_metrics({"stage": "sft", "step": 1, "loss": math.nan, "kl": math.inf, "reward": 0.5, "n": 3})
    assert json.loads(folder.metrics_file.read_text(), parse_constant=pytest.fail) == {
        "stage": "sft", "step": 1, "loss": None, "kl": None, "reward": 0.5, "n": 3,
    }  # fmt: skip


def test_rewind_cuts_off_what_came_after_a_step(folder: RunFolder) -> None:
    for step in range(1, 5):
        folder.add_metrics({"stage": "phase1", "step": step, "loss": 0.1 * step})
        folder.write_lines(folder.rollouts_file("phase1", step), [{"step": step}])
        folder.write_lines(folder.eval_file(f"at{step}"), [{"step": step}])
        BatchLog(folder.root / "evals" / f"at{step}.batches.jsonl", {"step": step}).add(0, [])
    with folder.metrics_file.open("a") as file:
        file.write('{"stage": "phase1", "st')  # torn by a kill
    for name in ("phase1", "phase2"):
        BatchLog(folder.root / "rollouts" / f"difficulty-{name}.jsonl", {"step": 2 if name == "phase1" else 4}).add(
            0, []
        )
        folder.write_lines(folder.pool_file(name), [{"prompt_id": "p"}])
    folder.rewind(2, ["phase2"])
    assert [line["step"] for line in map(json.loads, folder.metrics_file.read_text().splitlines())] == [1, 2]
    left = sorted(str(p.relative_to(folder.root)) for p in folder.root.glob("*/**/*") if p.is_file())
    assert left == [
        "evals/at1.batches.jsonl", "evals/at1.json", "evals/at2.batches.jsonl", "evals/at2.json", "pool/phase1.jsonl",
        "rollouts/difficulty-phase1.jsonl", "rollouts/phase1/000001.jsonl", "rollouts/phase1/000002.jsonl",
    ]  # fmt: skip
    before = folder.metrics_file.read_bytes()
    folder.rewind(2, [])
    assert folder.metrics_file.read_bytes() == before


def test_metrics_go_on_after_a_torn_line_that_was_cut_off(folder: RunFolder) -> None:
    folder.add_metrics({"step": 1})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 2')
    folder.rewind(1, [])
    folder.add_metrics({"step": 2})
    assert [line["step"] for line in read_lines(folder.metrics_file)] == [1, 2]


def test_a_line_file_is_whole_or_the_old_one(folder: RunFolder) -> None:
    path = folder.pool_file("phase1")
    folder.write_lines(path, [{"a": "é"}])

    def broken() -> Iterator[dict[str, Any]]:
        yield {"a": 1}
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        folder.write_lines(path, broken())
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n'


@pytest.mark.parametrize("torn", ['{"batch": 1, "by": {"step"', '{"batch": 1, "by": {"step": 1}, "rows": [1]}', ""])
def test_a_batch_log_survives_any_end_of_its_last_line(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    BatchLog(path, {"step": 1}).add(0, [{"a": 1}])
    with path.open("a") as file:
        file.write(torn)
    log = BatchLog(path, {"step": 1})
    assert log.get(0) == [{"a": 1}]
    assert log.get(1) == ([1] if torn.endswith("}") else None)  # a whole line but for its end is whole
    log.add(2, [{"b": 2}])
    log.add(3, [{"c": 3}])
    again = BatchLog(path, {"step": 1})
    assert [again.get(i) for i in (0, 2, 3)] == [[{"a": 1}], [{"b": 2}], [{"c": 3}]]


def test_a_batch_log_takes_nothing_made_by_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    BatchLog(path, {"step": 1}).add(0, [{"a": 1}])
    assert BatchLog(path, {"step": 2}).get(0) is None


def test_a_stopwatch_adds_up_also_when_interrupted() -> None:
    watch = Stopwatch()
    with watch("gen"):
        pass
    first = watch.seconds["timing_s/gen"]
    with pytest.raises(KeyError), watch("gen"):
        raise KeyError
    assert watch.seconds["timing_s/gen"] > first >= 0
    assert set(watch.seconds) == {"timing_s/gen"}
