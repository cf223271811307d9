"""The command line: what it takes, what it says when it can't, and its exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import cli
from longreach.rl.config import dump
from longreach.rl.recipe import Recipe, to_toml

Make = Callable[..., Recipe]


@pytest.fixture
def longreach(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as stop:  # argparse's own way out
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def recipe_file(make_recipe: Make, tmp_path: Path) -> Callable[..., str]:
    def write(**keys: Any) -> str:
        path = tmp_path / "tiny.toml"
        path.write_text(to_toml(dump(make_recipe(**keys))))
        return str(path)

    return write


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "the following arguments are required"),
        (("trian", "demo"), "invalid choice: 'trian'"),
        (("train",), "the following arguments are required: recipe"),
        (("train", "demmo"), "did you mean 'demo'"),
        (("train", "/no/such/recipe.toml"), "no recipe '/no/such/recipe.toml'"),
        (("train", "."), "no recipe '.'"),
        (("train", "tests"), "no recipe 'tests'"),
        (("train", "smoke", "--rl.group-sise", "4"), "unknown key 'rl.group_sise': did you mean 'group_size'?"),
        (("train", "smoke", "--rl.group-sise=4"), "unknown key 'rl.group_sise'"),
        (("train", "smoke", "--seed", "4"), "did you mean 'run.seed'"),
        (("train", "smoke", "--rl.group-size"), "--rl.group-size needs a value"),
        (("train", "smoke", "--rl.group-size", "--dry-run"), "--rl.group-size needs a value"),
        (("train", "smoke", "--rl.group-size", "--rl.kind", "dapo"), "--rl.group-size needs a value"),
        (("train", "smoke", "--rl.group-size", "many"), "'rl.group_size' must be a whole number, not 'many'"),
        (("train", "smoke", "--rl.group-size", "1"), "rl.group_size = 1"),
        (("train", "smoke", "--phases.5.steps", "1"), "'5' is not one of the 2 items"),
        (("train", "smoke", "extra"), "unexpected argument 'extra'"),
        (("train", "smoke", "--run-d", "x"), "unknown key 'run_d'"),
        (("report", "/no/such/run"), "/no/such/run is not a run folder"),
        (("report", "x", "--rl.kind", "dapo"), "report takes no recipe keys, but got --rl.kind"),
        (("eval", "smoke", "--data.eval", ""), "set data.eval to files, datasets names or synthetic:NAME"),
    ],
)
def test_what_is_wrong_is_one_message_and_status_2(arguments: tuple[str, ...], words: str, longreach: Any) -> None:
    status, out, err = longreach(*arguments)
    assert status == 2
    assert words in err
    assert "Traceback" not in err + out


@pytest.mark.parametrize(
    "arguments", [("--help",), ("train", "--help"), ("eval", "--help"), ("demo", "-h"), ("report", "-h")]
)
def test_help(arguments: tuple[str, ...], longreach: Any) -> None:
    status, out, _ = longreach(*arguments)
    assert status == 0
    assert "usage: longreach" in out
    if arguments == ("train", "--help"):
        assert "--run.seed 4" in " ".join(out.split()) and "qwenlong-l1-14b" in out
        assert all(option in out for option in ("--run-dir", "--dry-run", "--replay", "--skip-bad-rows"))


def test_a_dry_run_prints_everything_and_writes_nothing(
    longreach: Any, recipe_file: Any, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic = {"eval": {"rows": 3, "split": "eval", "shortest": 140, "longest": 150}}
    recipe = recipe_file(
        rl__kl_weight=0.5, synthetic=synthetic, data__eval=["synthetic:eval"], data__skip_bad_rows=True
    )
    bound = make_recipe().phases[0].upper
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = longreach(
        "train", recipe, "--dry-run", "--run.seed=7", "--phases.0.steps", "9", "--run-dir", "run"
    )
    assert (status, err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert "kl_weight = 0.5" in out and "seed = 7" in out and "steps = 9" in out
    lines = {line.partition(":")[0]: line.partition(": ")[2] for line in out.splitlines() if ": prompts" in line}
    assert list(lines) == ["sft", f"phase1 (0, {bound}]", f"phase2 ({bound}, 500]", "beyond the last phase", "eval"]
    first = lines[f"phase1 (0, {bound}]"]
    assert first.startswith("prompts 6, min ") and f"max {bound}, truncated 0" in first
    assert lines["sft"].startswith("prompts 8,") and lines["eval"].startswith("prompts 3,")
    assert lines["beyond the last phase"] == "prompts 0"


def test_a_dry_run_prints_a_recipe_that_reads_back(longreach: Any, recipe_file: Any, tmp_path: Path) -> None:
    source = recipe_file(rl__kl_weight=0.5)
    _, out, _ = longreach("train", source, "--dry-run")
    printed = tmp_path / "printed.toml"
    printed.write_text(out.partition("\nsft: ")[0])
    again = longreach("train", str(printed), "--dry-run")[1]
    assert again == out


def test_a_dry_run_finds_what_training_would(longreach: Any, recipe_file: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n')
    status, _, err = longreach("train", recipe_file(), "--dry-run", "--data.train", str(bad))
    assert status == 2
    assert "bad.jsonl, row 1, answers" in err
    status, _, err = longreach(
        "train", recipe_file(rl__micro_batch_tokens=9000), "--dry-run", "--phases.1.upper", "2000"
    )
    assert status == 2
    assert "has positions for 1024" in err


def test_train_runs_and_report_draws(longreach: Any, recipe_file: Any, tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    recipe = recipe_file(data__eval=[])
    status, out, err = longreach("train", recipe, "--run-dir", run_dir, "--phases.1.steps", "1")
    assert (status, err) == (0, "")
    assert "phase2 1/1 | loss" in out
    assert f"final model: {run_dir}/model" in out
    status, out, err = longreach("train", recipe, "--run-dir", run_dir, "--phases.1.steps", "2")
    assert status == 2
    assert "was begun with another recipe" in err
    status, out, _ = longreach("report", run_dir)
    assert (status, out) == (0, f"{run_dir}/report.html\n")


def test_a_run_is_named_by_its_recipe(
    longreach: Any, recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_file(data__eval=[], phases=[], retrospective=None)
    assert longreach("train", recipe, "--name", "other")[0] == 0
    assert (tmp_path / "runs" / "other" / "metrics.jsonl").exists()


def test_bad_rows_are_skipped_on_request(longreach: Any, recipe_file: Any, data_dir: Path, tmp_path: Path) -> None:
    """With the flag that the error names."""
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text((data_dir / "train.jsonl").read_text() + '{"prompt": "x"}\n')
    recipe = recipe_file(data__train=str(mixed))
    status, _, err = longreach("train", recipe, "--dry-run")
    assert status == 2 and "--skip-bad-rows" in err
    status, out, _ = longreach("train", recipe, "--dry-run", "--skip-bad-rows")
    assert status == 0
    assert "1 bad rows were left out" in out and "skip_bad_rows = true" in out


def test_eval_prints_each_benchmark_and_bucket_and_writes_nothing(
    longreach: Any, recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_file(eval__k=2)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = longreach("eval", recipe, "--eval.temperature", "1.0")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines][:2] == ["even", "odd"]
    assert all("pass@1" in line and "pass@2" in line and "(n = " in line for line in lines[:2])
    assert lines[2].startswith("<= ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_machine_that_fails_is_status_1(longreach: Any, recipe_file: Any, tmp_path: Path) -> None:
    """Here a gradient that isn't finite: weights of 1e38 overflow."""
    status, _, err = longreach(
        "train", recipe_file(data__eval=[]), "--run-dir", str(tmp_path / "run"), "--sft.learning-rate", "1e38"
    )
    assert status == 1
    assert "gradient norm is" in err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_ctrl_c_before_anything_begins_is_no_traceback(longreach: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_recipe", interrupted)
    status, out, err = longreach("train", "smoke")
    assert (status, err) == (130, "")
    assert "stopped at once" in out


def test_replay_reaches_training(longreach: Any, recipe_file: Any, tmp_path: Path) -> None:
    status, _, err = longreach("train", recipe_file(), "--replay", str(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert status == 2
    assert "give --replay another run's folder" in err
    assert not json.dumps(err).count("Traceback")
