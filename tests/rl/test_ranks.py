"""A run on 1, 2 or 4 ranks is the same run: rollouts, rewards, metrics and weights, also when ranks change in between.

Everything is fp64 (norms too), so that what differs is the order of sums: 1e-16, which AdamW's division by small second
moments and a few dozen updates make larger. `TOLERANCE` is relative to a weight's largest entry. A gradient that is a mean
over ranks, a loss or a metric normalised per rank, an unequal random stream: each is off by a share of the whole.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longreach.rl.config import dump
from longreach.rl.ranks import Ranks
from longreach.rl.recipe import Recipe

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ranks_run.py")
TOLERANCE = 1e-11
MEASURED = ("timing_s/", "perf/")
WAIT_S = 300.0
FLAVOURS: dict[str, dict[str, Any]] = {
    "kl": {"rl__kl_weight": 0.2, "rl__updates": 2, "rl__kind": "dr_grpo", "model__gradient_checkpointing": True,
        "data__eval": [],
    },
    "dapo": {
        "rl__kind": "dapo", "rl__dynamic_sampling": True, "rl__overlong_buffer": 3, "rl__scale": "task", "data__eval": [],
        "rl__entropy_weight": 0.01, "rl__importance_cap": 2.0, "rl__max_batches": 3,
    },
    "lora": {"model__lora": {"rank": 4, "alpha": 8.0}, "rl__kl_weight": 0.05, "rl__kind": "bnpo"},
    "entropy": {
        "rl__kind": "gspo", "rl__updates": 2, "rl__top_entropy_quantile": 0.8, "rl__entropy_weight": 0.01, "data__eval": [],
        "rl__adaptive_entropy": {"target": 99.0, "delta": 0.01}, "rl__aepo": {"low": 1.0, "high": 5.0},
        "rl__importance_range": [0.5, 5.0], "retrospective": None,
    },
}  # fmt: skip
ON_TWO: dict[str, dict[str, Any]] = {"entropy": {"ulysses": 2}, "dapo": {"shard": False}}
ON_FOUR: dict[str, dict[str, Any]] = {"kl": {"ring": 2}, "dapo": {"shard": False}}


class Runs:
    """Trains recipes on so many ranks, in one set of processes."""

    def __init__(self, start: Callable[..., Any], folder: Path) -> None:
        self.start, self.folder, self.count = start, folder, 0

    def __call__(self, ranks: int, jobs: Sequence[dict[str, Any]]) -> list[Any]:
        """The ended processes."""
        self.count += 1
        folder = self.folder / f"{self.count}-on-{ranks}"
        folder.mkdir()
        (folder / "jobs.json").write_text(json.dumps(list(jobs)))
        started = self.start(ranks, SCRIPT, folder)
        for rank in started:
            rank.wait(WAIT_S)
        return started


def job(recipe: Recipe, run_dir: Path, **parts: Any) -> dict[str, Any]:
    return {"name": run_dir.name, "recipe": dump(recipe), "run_dir": str(run_dir), **parts}


def well(ranks: Sequence[Any]) -> None:
    assert [rank.status for rank in ranks] == [0] * len(ranks), "\n".join(
        rank.err.read_text()[-3000:] for rank in ranks
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(start_ranks: Callable[..., Any], folder: Path) -> Runs:
    return Runs(start_ranks, folder)


@pytest.fixture(scope="module")
def recipe_of(make_recipe: Callable[..., Recipe], data_dir: Path) -> Callable[..., Recipe]:
    def make(flavour: str, **parallel: Any) -> Recipe:
        keys = {
            "model__dtype": "float64", "phases__1__upper": 120, "rl__batch_prompts": 4, "rl__micro_batch_tokens": 140,
            "sft__micro_batch_tokens": 200, "eval__k": 2, "retrospective__samples": 2, **FLAVOURS[flavour],
        }  # fmt: skip
        if keys.get("retrospective", True) is None:
            del keys["retrospective__samples"]
        return make_recipe(**keys, **{f"parallel__{key}": value for key, value in parallel.items()})

    return make


@pytest.fixture(scope="module")
def alone(runs: Runs, recipe_of: Callable[..., Recipe], folder: Path) -> dict[str, Path]:
    """Run folders of one process."""
    made = {name: folder / f"{name}-1" for name in FLAVOURS}
    well(runs(1, [job(recipe_of(name), path) for name, path in made.items()]))
    return made


@pytest.fixture(scope="module")
def on_two(runs: Runs, recipe_of: Callable[..., Recipe], folder: Path) -> dict[str, Path]:
    made = {name: folder / f"{name}-2" for name in FLAVOURS}
    well(runs(2, [job(recipe_of(name, **ON_TWO.get(name, {})), path) for name, path in made.items()]))
    return made


@pytest.fixture(scope="module")
def on_four(runs: Runs, recipe_of: Callable[..., Recipe], folder: Path) -> dict[str, Path]:
    made = {name: folder / f"{name}-4" for name in ON_FOUR}
    well(runs(4, [job(recipe_of(name, **ON_FOUR[name]), path) for name, path in made.items()]))
    return made


@pytest.fixture(scope="module")
def parts(start_ranks: Callable[..., Any], folder: Path) -> list[dict[str, Any]]:
    """What three ranks found (`ranks_parts.py`)."""
    started = start_ranks(3, SCRIPT.with_name("ranks_parts.py"), folder)
    for rank in started:
        rank.wait(WAIT_S)
    well(started)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def assert_same(made: Path, whole: Path) -> None:
    """Sampled tokens, rewards and decisions are equal, numbers within rounding."""
    rollouts = sorted(path.relative_to(whole) for path in (whole / "rollouts").glob("phase*/*.jsonl"))
    assert rollouts == sorted(path.relative_to(made) for path in (made / "rollouts").glob("phase*/*.jsonl"))
    for path in rollouts:
        mine, theirs = ([json.loads(line) for line in (run / path).read_text().splitlines()] for run in (made, whole))
        for key in ("prompt_id", "group", "completion_ids", "rewards", "reward", "used"):
            assert [line[key] for line in mine] == [line[key] for line in theirs], f"{path}: {key}"
        assert [line["advantage"] for line in mine] == [line["advantage"] for line in theirs]
    for name in ("evals", "pool"):
        for path in (whole / name).glob("*.json*"):
            assert (made / name / path.name).read_bytes() == path.read_bytes(), path.name
    for mine, theirs in zip(metrics(made), metrics(whole), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            known = value if isinstance(value, str | None) else pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)
            assert mine[key] == known, f"{key} of step {theirs['step']}"
    for name, weight in weights(whole).items():
        worst = (weights(made)[name] - weight).abs().max() / weight.abs().max()
        assert worst < TOLERANCE, f"{name}: {worst:.2g}"


@pytest.mark.parametrize("flavour", sorted(FLAVOURS))
def test_two_ranks_train_what_one_process_trains(flavour: str, alone: dict[str, Path], on_two: dict[str, Path]) -> None:
    assert_same(on_two[flavour], alone[flavour])


@pytest.mark.parametrize("flavour", sorted(ON_FOUR))
def test_four_ranks_train_what_one_process_trains(
    flavour: str, alone: dict[str, Path], on_four: dict[str, Path]
) -> None:
    assert_same(on_four[flavour], alone[flavour])


def test_ctrl_c_on_one_rank_stops_all_and_other_numbers_of_ranks_go_on(
    runs: Runs, recipe_of: Callable[..., Recipe], folder: Path, alone: dict[str, Path]
) -> None:
    run_dir = folder / "kl-changing"
    interrupted = {"where": "line", "after": 5, "signal": "SIGINT", "to": 1}
    well(ranks := runs(2, [job(recipe_of("kl"), run_dir, trouble=interrupted)]))
    assert "Traceback" not in "".join(rank.err.read_text() for rank in ranks)
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())][-1] == "00000005"
    again = job(recipe_of("kl", shard=False), run_dir, trouble={**interrupted, "after": 2, "to": 3})
    well(runs(4, [again]))
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())][-1] == "00000007"
    assert len(metrics(run_dir)) == 7
    well(runs(1, [job(recipe_of("kl"), run_dir)]))
    assert_same(run_dir, alone["kl"])


@pytest.mark.parametrize("where, to", [("seal", 0), ("gather", 1)])
def test_a_kill_in_the_middle_of_a_checkpoint_loses_nothing(
    where: str, to: int, runs: Runs, recipe_of: Callable[..., Recipe], folder: Path, alone: dict[str, Path]
) -> None:
    run_dir = folder / f"kl-killed-{where}"
    trouble = {"where": where, "after": 3, "to": to}
    ranks = runs(2, [job(recipe_of("kl", timeout_s=20.0), run_dir, trouble=trouble)])
    assert [ranks[to].status, ranks[1 - to].status] == [-signal.SIGKILL, 1]
    assert (
        f"rank {to} of 2 no longer answers: last seen rank {to} in checkpoint of step" in ranks[1 - to].err.read_text()
    )
    assert len(list((run_dir / "checkpoints").glob("[0-9]*"))) == 2
    well(runs(2, [job(recipe_of("kl"), run_dir)]))
    assert_same(run_dir, alone["kl"])


def test_a_full_disk_on_rank_0_is_everyones_warning_and_nobody_waits(
    runs: Runs, recipe_of: Callable[..., Recipe], folder: Path, alone: dict[str, Path]
) -> None:
    run_dir = folder / "kl-full"
    well(ranks := runs(2, [job(recipe_of("kl"), run_dir, trouble={"where": "full", "after": 1})]))
    assert "no checkpoint of step 2: [Errno 28] No space left on device" in ranks[0].out.read_text()
    assert ranks[1].out.read_text() == ""
    assert_same(run_dir, alone["kl"])


def test_weights_of_many_ranks_are_in_the_layout_of_one(alone: dict[str, Path], on_two: dict[str, Path]) -> None:
    for flavour in ("kl", "lora"):
        mine, theirs = on_two[flavour] / "model", alone[flavour] / "model"
        assert sorted(path.name for path in mine.iterdir()) == sorted(path.name for path in theirs.iterdir())
        assert (mine / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
        assert weights(on_two[flavour]).keys() == weights(alone[flavour]).keys()
        loaded: Any = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float64, output_loading_info=True)
        model, report = loaded
        assert not report["missing_keys"] and not report["unexpected_keys"]
        state = model.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in weights(on_two[flavour]).items())


def test_ranks_that_read_other_data_are_refused(
    runs: Runs, recipe_of: Callable[..., Recipe], folder: Path, data_dir: Path
) -> None:
    recipe = dump(recipe_of("kl"))
    rows = (data_dir / "train.jsonl").read_text()
    (folder / "train-0.jsonl").write_text(rows)
    (folder / "train-1.jsonl").write_text(rows.replace('"answers": ["3"]', '"answers": ["33"]'))
    recipe["data"]["train"] = f"{folder}/train-RANK.jsonl"
    ranks = runs(2, [{"name": "other", "recipe": recipe, "run_dir": str(folder / "other")}])
    assert [rank.status for rank in ranks] == [1, 1]
    assert "ranks [1] read other data than rank 0: all nodes must see the same files" in "".join(
        rank.err.read_text() for rank in ranks
    )


def test_every_rank_scores_alike_and_asks_the_judge_its_own_cases(parts: list[dict[str, Any]]) -> None:
    assert parts[0]["rewards"] == parts[1]["rewards"] == parts[2]["rewards"]
    assert parts[0]["parts"] == parts[2]["parts"]
    judged = [one["judge"] for one in parts[0]["parts"]]
    assert judged == [None if i % 8 == 5 else float(i % 2 == 0) for i in range(12)]
    asked = [set(part["asked"]) for part in parts]
    assert set.union(*asked) == {str(i) for i in range(8)}
    assert sum(map(len, asked)) == 8, "a case, however often it comes, is one rank's"
    assert len([mine for mine in asked if mine]) > 1
    assert {part["metrics"]["judge/calls"] for part in parts} == {12.0}


def test_a_function_sees_the_whole_batch_on_rank_0(parts: list[dict[str, Any]]) -> None:
    assert [part["calls"] for part in parts] == [[12], [], []]
    assert [one["batch_relative"] for one in parts[1]["parts"]] == [i / 12 for i in range(12)]


def test_what_ranks_share_out_and_bring_together(parts: list[dict[str, Any]]) -> None:
    assert [part["rows"] for part in parts] == [[1, 2], [3, None], [0, None]], "rows of like cost take the same turn"
    assert parts[0]["share"] == [[0], [4], [1, 2, 3]], "the costliest first, each to who has least to do"
    assert all(part["merged"] == [[[float(i)] * (i + 1)] * 2 for i in range(4)] for part in parts)
    assert {part["total"] for part in parts} == {3.5}, "(3 + 4) / 2: a rank without rows counts for nothing"
    assert {part["first"] for part in parts} == {"rank 0"}
    assert all(part["any"] == [True, False] and part["every"] == [0, 1, 2] for part in parts)


def test_one_process_gets_back_what_it_hands_in() -> None:
    ranks, mine = Ranks(), {0: torch.ones(2, 1)}
    assert ranks.main and ranks.first(lambda: 3) == 3 and ranks.every("x") == ["x"]
    assert ranks.rows([1.0, 2.0]) == [0, 1], "in their own order"
    assert ranks.share([1.0, 2.0]) == [[0, 1]]
    assert ranks.merge_rows(mine, [1], torch.empty(2, 0))[0] is mine[0]
