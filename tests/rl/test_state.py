"""Runs of every flavour, killed, interrupted, out of disk and damaged: resumed, they end as if nothing had happened.

Kills are exceptions raised in this process right after a metrics line, before the checkpoint that may follow it, or in the
middle of an evaluation; `test_train.py` does the same with SIGKILL and the shipped recipe. The reward is a function of the
tokens alone that differs within groups, so every step has a gradient.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import train
from longreach.rl.console import Console
from longreach.rl.recipe import Recipe
from longreach.rl.train import Stopped

Make = Callable[..., Recipe]
STEPS = 2 + 3 + 3
FLAVOURS: dict[str, dict[str, Any]] = {
    "kl": {"rl__kl_weight": 0.2, "rl__updates": 2, "rl__kind": "dr_grpo"},
    "lora": {"model__lora": {"rank": 4, "alpha": 8.0}, "rl__kl_weight": 0.05},
    "dapo": {
        "rl__kind": "dapo", "rl__dynamic_sampling": True, "rl__overlong_buffer": 3, "rl__balanced_tasks": True,
        "model__yarn": 2.0, "rl__scale": "task", "rl__entropy_weight": 0.01, "rl__importance_cap": 2.0, "rl__max_batches": 3,
    },
    "entropy": {
        "rl__kind": "gspo", "rl__updates": 2, "rl__top_entropy_quantile": 0.8, "rl__entropy_weight": 0.01,
        "rl__adaptive_entropy": {"target": 99.0, "delta": 0.01}, "rl__aepo": {"low": 1.0, "high": 5.0},
        "rl__negative_clip": {"level": "token", "threshold": 6.0}, "rl__importance_range": [0.5, 5.0], "retrospective": None,
    },
    "pool": {
        "retrospective": {"source": "records", "selection": "weighted", "size": 2, "samples": 2},
        "phases__1__schedule": "cosine", "phases__1__warmup_steps": 1,
    },
    "noise": {"run__save_every": 1, "retrospective": None},
    "eval": {"run__save_every": 9, "eval__every": 2, "eval__batch": 3, "eval__base": False, "retrospective": None},
}  # fmt: skip


class Killed(Exception):
    """The process is gone."""


class Watched(Console):
    """Keeps warnings, and does something after a number of metrics lines or in the second batch of a pass."""

    def __init__(self, *, lines: int = 0, what: str = "", do: Callable[[], None] = lambda: None) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []
        self.said: list[str] = []
        self.left, self.what, self.do = lines, what, do

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def say(self, text: str) -> None:
        self.said.append(text)

    def metrics(self, *arguments: Any, **_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.do()

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        batches = []

        def advance(count: int = 1) -> None:
            batches.append(count)
            if what == self.what and len(batches) == 2:
                self.do()

        yield advance


def kill() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcome(run_dir: Path) -> dict[str, Any]:
    """What must come out the same, whatever happened on the way."""
    measured = ("timing_s/", "perf/")
    kept = [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines(run_dir / "metrics.jsonl")]
    files = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for name in ("rollouts", "evals", "pool", "model")
        for path in sorted((run_dir / name).rglob("*.*"))
    }
    return {"metrics": json.dumps(kept), **files}


def assert_same(run_dir: Path, whole: Path) -> None:
    found, expected = outcome(run_dir), outcome(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture
def recipe_of(make_recipe: Make, data_dir: Path) -> Make:
    def make(flavour: str) -> Recipe:
        if flavour == "lora":
            pytest.importorskip("peft", reason="adapters need the lora extra")
        reward = f"{data_dir / 'rewards.py'}:{'noisy' if flavour == 'noise' else 'uneven'}"
        questions = {} if flavour == "eval" else {"data__eval": []}  # evaluations take as long as all the rest
        return make_recipe(reward__function=reward, **questions, **FLAVOURS[flavour])

    return make


@pytest.fixture(scope="module")
def wholes() -> dict[str, Path]:
    return {}


@pytest.fixture
def whole(wholes: dict[str, Path], recipe_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run of a flavour."""

    def run(flavour: str) -> Path:
        if flavour not in wholes:
            wholes[flavour] = tmp_path_factory.mktemp(flavour) / "run"
            train(recipe_of(flavour), wholes[flavour], console=Watched())
        return wholes[flavour]

    return run


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_killed_runs_end_as_if_nothing_had_happened(
    flavour: str, recipe_of: Make, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """Killed after the fifth line, and then after four more: each time one step past a checkpoint within a phase."""
    recipe, run_dir = recipe_of(flavour), tmp_path / "run"
    for after in (5, 4):
        with pytest.raises(Killed):
            train(recipe, run_dir, console=Watched(lines=after, do=kill))
    train(recipe, run_dir, console=Watched())
    assert_same(run_dir, whole(flavour))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_learns_something_in_every_step(flavour: str, whole: Callable[[str], Path]) -> None:
    """Else the comparison of resumed runs would be one of untouched weights."""
    metrics = lines(whole(flavour) / "metrics.jsonl")
    assert len(metrics) == STEPS
    assert all(line["grad_norm"] > 1e-3 for line in metrics)


def test_what_the_entropy_rules_remember_goes_on_over_kills_and_phases(whole: Callable[[str], Path]) -> None:
    """Two updates a step, 0.01 more after each; AEPO masks from its first step on."""
    phases = [line for line in lines(whole("entropy") / "metrics.jsonl") if line["stage"] != "sft"]
    assert [line["entropy_coef"] for line in phases] == pytest.approx([0.015 + 0.02 * step for step in range(6)])
    assert [line["aepo/masking"] for line in phases] == [1.0] * 6


def test_a_kl_term_compares_with_the_policy_as_it_was_when_rl_began(
    whole: Callable[[str], Path], make_recipe: Make, tmp_path: Path
) -> None:
    warmed = train(make_recipe(data__eval=[], phases=[], retrospective=None), tmp_path / "warm", console=Watched())
    reference = whole("kl") / "reference" / "model.safetensors"
    assert reference.read_bytes() == (warmed / "model.safetensors").read_bytes(), "also after phase 2 began"
    assert all(line["kl"] > 0 for line in lines(whole("kl") / "metrics.jsonl") if line["stage"] != "sft")
    assert not (whole("dapo") / "reference").exists()


def test_without_its_reference_a_kl_run_does_not_go_on(recipe_of: Make, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe_of("kl"), run_dir, console=Watched(lines=5, do=kill))
    (run_dir / "reference").rename(run_dir / "elsewhere")
    with pytest.raises(ValueError, match="reference, the model that the KL term compares with, is gone"):
        train(recipe_of("kl"), run_dir, console=Watched())


def test_adapters_alone_are_trained_and_the_final_model_holds_them(
    recipe_of: Make, whole: Callable[[str], Path], tiny_dir: Path
) -> None:
    from safetensors.torch import load_file

    recipe, run_dir = recipe_of("lora"), whole("lora")
    newest = sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1]
    adapters = load_file(newest / "adapters.safetensors")
    assert adapters and all("lora_" in name for name in adapters)
    assert not (newest / "model").exists(), "the base model is on disk already"
    base, final = load_file(tiny_dir / "model.safetensors"), load_file(run_dir / "model" / "model.safetensors")
    assert base.keys() == final.keys()
    changed = {name for name in base if not base[name].equal(final[name])}
    assert recipe.model.lora is not None
    assert {name.split(".")[-2] for name in changed} == set(recipe.model.lora.targets)


def test_a_kill_within_an_evaluation_comes_back_to_it(
    recipe_of: Make, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """The checkpoint of that step is written already: going on from it must not skip its evaluation."""
    recipe, run_dir = recipe_of("eval"), tmp_path / "run"
    for name in ("sft", "phase1-000002"):
        with pytest.raises(Killed):
            train(recipe, run_dir, console=Watched(what=f"evaluating {name}", do=kill))
        assert (run_dir / "evals" / f"{name}.batches.jsonl").exists()
    train(recipe, run_dir, console=Watched())
    left = run_dir / "evals" / "phase2.batches.jsonl"
    left.write_text(
        '{"batch": 0, "by": {"step": 8}, "rows": []}\n'
    )  # killed between the result and the removal of this
    train(recipe, run_dir, console=Watched())
    assert_same(run_dir, whole("eval"))
    names = {path.stem for path in (run_dir / "evals").glob("*.json")}
    assert names == {"sft", "phase1-000002", "phase1", "phase2-000002", "phase2"}


def test_a_kill_within_the_difficulty_pass_comes_back_to_it(make_recipe: Make, tmp_path: Path) -> None:
    recipe, run_dir = make_recipe(data__eval=[], sft=None), tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe, run_dir, console=Watched(what="difficulty pass after phase1", do=kill))
    assert not (run_dir / "pool").exists()
    train(recipe, run_dir, console=Watched())
    train(recipe, tmp_path / "whole", console=Watched())
    assert_same(run_dir, tmp_path / "whole")


@pytest.mark.parametrize("moment", [{"lines": 4}, {"lines": STEPS}, {"what": "evaluating phase1-000002"}])
def test_ctrl_c_saves_where_it_is(
    moment: dict[str, Any], recipe_of: Make, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe, run_dir = recipe_of("eval"), tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)  # not Python's own where the shell had it ignored
    with pytest.raises(Stopped, match="the same command goes on from here"):
        train(recipe, run_dir, console=Watched(**moment, do=interrupt))
    done = len(lines(run_dir / "metrics.jsonl"))
    assert (run_dir / "checkpoints" / f"{done:08d}").exists()
    assert signal.getsignal(signal.SIGINT) is before
    train(recipe, run_dir, console=Watched())
    assert_same(run_dir, whole("eval"))


@contextmanager
def small_disk() -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """(fill, free): while filled, no file may grow beyond 100 kB, which the model's exceed and no other does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield (
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(
    recipe_of: Make, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe, run_dir, console = recipe_of("noise"), tmp_path / "run", Watched(lines=3)
    with small_disk() as (fill, free):

        def fill_then_kill() -> None:
            fill()
            console.left, console.do = 2, kill

        console.do = fill_then_kill
        with pytest.raises(Killed):
            train(recipe, run_dir, console=console)
        assert [text.split(":")[0] for text in console.warnings] == [
            "no checkpoint of step 3", "no checkpoint of step 4",
        ]  # fmt: skip
        assert "last good one" in console.warnings[0] and "00000002" in console.warnings[0]
        assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["00000001", "00000002"]
        free()
        again = Watched()
        train(recipe, run_dir, console=again)
    assert any("at step 2" in text for text in again.said)
    assert_same(run_dir, whole("noise"))


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_checkpoints(
    recipe_of: Make, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir, console = tmp_path / "run", Watched(lines=3)
    with small_disk() as (fill, free):

        def fill_then_free() -> None:
            fill()
            console.left, console.do = 2, free

        console.do = fill_then_free
        train(recipe_of("noise"), run_dir, console=console)
    assert len(console.warnings) == 2
    assert_same(run_dir, whole("noise"))


def test_a_final_model_that_does_not_fit_is_an_error_and_not_a_traceback_of_safetensors(
    recipe_of: Make, tmp_path: Path
) -> None:
    with small_disk() as (fill, _), pytest.raises(OSError, match="I/O error"):
        train(recipe_of("noise"), tmp_path / "run", console=Watched(lines=STEPS, do=fill))


def test_damaged_checkpoints_are_passed_over_and_named(
    recipe_of: Make, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe, run_dir = recipe_of("noise"), tmp_path / "run"
    train(recipe, run_dir, console=Watched())
    for expected in ("falling back", "starting from the beginning"):
        folders = sorted((run_dir / "checkpoints").glob("[0-9]*"))
        hurt = folders[-1:] if expected == "falling back" else folders
        for folder in hurt:
            damaged = folder / "optimizer.json"
            damaged.write_bytes(damaged.read_bytes() + b" ")
        console = Watched(lines=1, do=kill)
        with pytest.raises(Killed):
            train(recipe, run_dir, console=console)
        assert any(expected in text for text in console.warnings)
        left = sorted((run_dir / "checkpoints").glob("[0-9]*"))
        assert left == [folder for folder in folders if folder not in hurt], "a damaged one must not outlive good ones"
        train(recipe, run_dir, console=Watched())
        assert_same(run_dir, whole("noise"))


def test_a_pool_of_a_phase_that_is_trained_again_is_made_again(recipe_of: Make, tmp_path: Path) -> None:
    recipe, run_dir = recipe_of("pool"), tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe, run_dir, console=Watched(lines=6, do=kill))
    pool = run_dir / "pool" / "phase1.jsonl"
    expected = pool.read_text()
    pool.write_text(expected.replace('"selected": true', '"selected": false'))
    for folder in sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1:]:  # the end of phase 1
        (folder / "progress.json").write_text("{}")
    train(recipe, run_dir, console=Watched())
    assert pool.read_text() == expected


def test_a_run_replays_only_from_another_one_with_rollouts(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(data__eval=[])
    for replay in (tmp_path / "nothing", tmp_path / "run"):
        with pytest.raises(ValueError, match="give --replay another run's folder with saved rollouts"):
            train(recipe, tmp_path / "run", replay=replay, console=Watched())
    assert not (tmp_path / "run").exists()


def test_a_replayed_run_is_bitwise_the_one_it_replays_and_stays_a_replay(
    recipe_of: Make, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe, run_dir = recipe_of("dapo"), tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe, run_dir, replay=whole("dapo"), console=Watched(lines=4, do=kill))
    with pytest.raises(ValueError, match=r"the replay is not what .* was begun with"):
        train(recipe, run_dir, console=Watched())
    train(recipe, run_dir, replay=whole("dapo"), console=Watched())
    mine, theirs = outcome(run_dir), outcome(whole("dapo"))
    assert {k: v for k, v in mine.items() if "difficulty" not in k} == {
        k: v for k, v in theirs.items() if "difficulty" not in k
    }


def test_a_replay_that_lacks_a_step_says_which(recipe_of: Make, whole: Callable[[str], Path], tmp_path: Path) -> None:
    short = tmp_path / "short"
    (short / "rollouts").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"phase1/000003\.jsonl is missing: .* has no saved rollouts of that step"):
        train(recipe_of("kl"), tmp_path / "run", replay=short, console=Watched())


def test_other_data_in_the_same_folder_is_refused(make_recipe: Make, data_dir: Path, tmp_path: Path) -> None:
    rows = (data_dir / "train.jsonl").read_text()
    mine = tmp_path / "train.jsonl"
    mine.write_text(rows)
    recipe = make_recipe(data__train=str(mine), data__eval=[])
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", console=Watched(lines=3, do=kill))
    for old, new in (('"answers": ["3"]', '"answers": ["33"]'), ('"benchmark": "odd"', '"benchmark": "new"')):
        mine.write_text(rows.replace(old, new))
        with pytest.raises(ValueError, match="the data is not what"):
            train(recipe, tmp_path / "run", console=Watched())
    mine.write_text(rows)
    train(recipe, tmp_path / "run", console=Watched())


def test_a_refused_run_leaves_the_folder_unlocked(recipe_of: Make, make_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(recipe_of("noise"), tmp_path / "run", console=Watched(lines=1, do=kill))
    for _ in range(2):
        with pytest.raises(ValueError, match="was begun with another recipe"):
            train(make_recipe(), tmp_path / "run", console=Watched())
