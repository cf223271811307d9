"""From recipes to plans: every shipped recipe, what phases ask for, and what train does with the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longreach.engine.planner_hardware import GPUS
from longreach.engine.planner_shape import KNOWN, Row
from longreach.rl import plan as planning
from longreach.rl.console import Console
from longreach.rl.plan import check_fits, fullest_row, loads_of, loss_passes, make_plan, setting_of
from longreach.rl.plan_sweep import load_at, sweep, sweep_figure, sweep_text
from longreach.rl.plan_text import plan_text, table
from longreach.rl.recipe import Recipe, load_recipe, shipped

Make = Callable[..., Recipe]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_has_a_plan_without_a_hub(name: str) -> None:
    recipe = load_recipe(name)
    made = make_plan(recipe, GPUS["h200"], 32, serve=4)
    assert [load.name for load in made.loads] == [
        *(["sft"] if recipe.sft else []),
        *(f"phase{i + 1}" for i in range(len(recipe.phases))),
    ]
    assert made.proposal.best is not None, made.proposal.others
    text = plan_text(made)
    for words in ("weights", "saved activations", "peak in a layer", "update", "tokens/s", "GPU-hours", "bound by"):
        assert words in text


BARE = [("model.offload_activations", "false"), ("model.tile_tokens", "0")]


def test_the_one_gpu_recipe_fits_one_80_gb_gpu_as_it_is_and_not_without_what_it_sets() -> None:
    assert make_plan(load_recipe("one-gpu-8b-lora"), GPUS["h100-80"], 1).proposal.own.fits
    made = make_plan(load_recipe("one-gpu-8b-lora", BARE), GPUS["h100-80"], 1)
    assert not made.proposal.own.fits
    assert made.proposal.changes == ("--model.offload-activations true", "--model.tile-tokens 8192")
    text = plan_text(made)
    assert "the recipe as it is: doesn't fit: phase1: update needs" in text
    assert "activations kept on the GPU: phase3: update needs" in text
    assert "an epoch over data.limit = 1,600 prompts" in text


def test_rows_are_as_full_as_the_recipe_lets_them_be() -> None:
    assert fullest_row(152_000, 120_000, 8, 4000, 16) == (Row(1, 120_000, 8, 4000), 1)
    assert fullest_row(152_000, 20_000, 8, 4000, 16) == (Row(2, 20_000, 8, 4000), 1)
    assert fullest_row(152_000, 1000, 8, 100, 16) == (Row(16, 1000, 8, 100), 1)  # no more groups than an update has
    assert fullest_row(140_000, 120_000, 8, 10_000, 4) == (Row(1, 120_000, 2, 10_000), 4)


def test_what_a_phase_asks_for() -> None:
    recipe = load_recipe("qwenlong-l1-14b")
    sft, first, second = loads_of(recipe)
    assert sft.row.tokens <= recipe.sft.micro_batch_tokens and not sft.prompts  # type: ignore[union-attr]
    assert (second.prompt, second.completion, second.size, second.prompts) == (60_000, 10_000, 8, 128)
    assert second.rows == 128 and second.forward_rows == 96  # all updates but the first of four
    assert first.row.groups == 1 and first.row.tokens <= recipe.rl.micro_batch_tokens
    with_reference = loads_of(replace(recipe, rl=replace(recipe.rl, kl_weight=0.01)))[2]
    assert with_reference.forward_rows == 96 + 128
    assert setting_of(replace(recipe, rl=replace(recipe.rl, kl_weight=0.01)), 1).reference


def test_losses_over_sequences_look_twice() -> None:
    recipe = load_recipe("qwenlong-l1-14b")
    assert loss_passes(recipe.rl) == 6
    assert loss_passes(replace(recipe.rl, kind="gspo", clip_low=None, clip_high=None)) == 8
    assert loss_passes(replace(recipe.rl, kind="gspo", clip_low=None, clip_high=None, updates=1)) == 6


def test_train_stops_on_what_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("one-gpu-8b-lora", BARE)
    small = replace(GPUS["h100-80"], name="test GPU", host_memory=64e9)
    monkeypatch.setattr(planning, "this_device", lambda _: (small, "a test GPU"))
    with pytest.raises(ValueError, match=r"can't fit on a test GPU: phase1.*--model.offload-activations true.*--force"):
        check_fits(recipe, Console(quiet=True), force=False)
    check_fits(recipe, Console(quiet=True), force=True)
    tiny = replace(small, memory=2e9)
    monkeypatch.setattr(planning, "this_device", lambda _: (tiny, "a test GPU"))
    with pytest.raises(ValueError, match="nothing that the planner knows would"):
        check_fits(recipe, Console(quiet=True), force=False)


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_what_runs_on_a_laptop_is_let_through(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_fits(load_recipe(name, [("model.device", "cpu")]), Console(), force=False)
    assert "on the CPU (its memory is the machine's" in capsys.readouterr().out


def test_a_model_without_a_plan_may_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    transformers.MixtralConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=1
    ).save_pretrained(tmp_path)
    check_fits(load_recipe("smoke", [("model.path", str(tmp_path))]), Console(), force=False)
    assert "no plan: mixtral has 8 experts" in capsys.readouterr().out


def test_sweeps_find_more_gpus_for_longer_prompts(tmp_path: Path) -> None:
    made = make_plan(load_recipe("one-gpu-8b-lora"), GPUS["h100-80"], 1)
    points = sweep(made, contexts=(32_000, 120_000, 1_000_000), gpus=(1, 8, 64))
    at = {(point.context, point.gpus): point for point in points}
    assert at[120_000, 1].best is not None and at[1_000_000, 1].best is None
    far = at[1_000_000, 8].best
    assert far is not None and far.setting.serve == 8
    assert at[120_000, 64].seconds < at[120_000, 8].seconds < at[120_000, 1].seconds
    assert at[32_000, 1].saved < at[120_000, 1].saved < at[1_000_000, 8].saved < 8
    text = sweep_text(made, points)
    assert "1000K" in text and "*" in text and "-" in text
    picture = sweep_figure(made, points, tmp_path / "sweep.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_a_swept_load_holds_one_group_a_row() -> None:
    made = make_plan(load_recipe("qwenlong-l1-14b"), GPUS["h200"], 8)
    load = load_at(made, 500_000)
    assert load.row == Row(1, 500_000, 8, 10_000) and load.rows == 128 and load.forward_rows == 96


def test_a_recipe_without_phases_has_nothing_to_sweep(make_recipe: Make) -> None:
    made = make_plan(make_recipe(phases=(), retrospective=None), GPUS["h200"], 1)
    with pytest.raises(ValueError, match="sweeps the last of"):
        sweep(made)


def test_a_folder_stands_in_for_a_model_that_cannot_be_reached(tiny_dir: Path) -> None:
    recipe = load_recipe("smoke", [("model.path", "/nowhere/model")])
    with pytest.raises(ValueError, match="--model-config DIR"):
        make_plan(recipe, GPUS["h200"], 1)
    assert make_plan(recipe, GPUS["h200"], 1, model_config=str(tiny_dir)).shape.hidden == 32
    assert make_plan(load_recipe("one-gpu-8b-lora"), GPUS["h200"], 1).shape is KNOWN["Qwen/Qwen3-8B"]


@pytest.mark.parametrize("gpus, serve", [(0, 0), (-1, 0), (1, -1)])
def test_numbers_that_cannot_be(gpus: int, serve: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        make_plan(load_recipe("smoke"), GPUS["h200"], gpus, serve=serve)


def test_tables_leave_out_what_is_empty() -> None:
    made: Any = table(["a", "b", "c"], [["x", "-", "1"], ["yy", "-", "20"]])
    assert made.splitlines() == ["  a    c", "  x    1", "  yy  20"]
