"""The cheapest setting that fits is that, and every reason given for another one is true."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreach.engine.model import LoraConfig
from longreach.engine.planner import Load
from longreach.engine.planner_hardware import GPUS
from longreach.engine.planner_memory import Setting
from longreach.engine.planner_search import candidates, changes, cheapest, layouts, propose, try_setting
from longreach.engine.planner_shape import KNOWN, Row

SHAPE = KNOWN["Qwen/Qwen3-8B"]
LORA = Setting(dtype="bfloat16", lora=LoraConfig(rank=32), gradient_checkpointing=True)
FULL = Setting(autocast=True)


def load(prompt: int, completion: int = 4000, prompts: int = 16) -> Load:
    row = Row(1, prompt, 8, completion)
    return Load(
        "phase1", 10, row, prompts, prompts=prompts, size=8, prompt=prompt, completion=completion, batch_tokens=1 << 18
    )


@pytest.mark.parametrize("own, gpus, prompt", [(LORA, 1, 120_000), (LORA, 4, 60_000), (FULL, 8, 60_000)])
def test_nothing_that_fits_is_cheaper(own: Setting, gpus: int, prompt: int) -> None:
    own, loads = replace(own, gpus=gpus), [load(prompt)]
    best = cheapest(SHAPE, own, GPUS["h100-80"], loads)
    assert best is not None and best.fits
    others = [try_setting(SHAPE, setting, GPUS["h100-80"], loads) for setting in candidates(SHAPE, own)]
    assert min(tried.seconds for tried in others if tried.fits) > best.seconds / 1.02
    assert sum(tried.fits for tried in others) not in (0, len(others))


def test_the_target_on_one_80_gb_gpu() -> None:
    made = propose(SHAPE, LORA, GPUS["h100-80"], [load(120_000)])
    assert not made.own.fits and made.best is not None
    assert made.changes == ("--model.offload-activations true", "--model.tile-tokens 8192")
    reasons = dict(made.others)
    assert not reasons["activations kept on the GPU"].fits
    assert "saved activations" in reasons["activations kept on the GPU"].problem
    assert "peak in a layer" in reasons["MLPs of all tokens at once"].problem


def test_a_recipe_that_fits_is_left_alone() -> None:
    made = propose(SHAPE, LORA, GPUS["h200"], [load(60_000)])
    assert made.own.fits and made.changes == ()


def test_adapters_and_other_optimizers_come_last() -> None:
    """An 8B's AdamW can't be on 110 GB; with 8-bit averages it can; on 40 GB adapters alone; on 12 GB not even they."""
    short = [load(2000, 500, 4)]
    smaller = propose(SHAPE, FULL, replace(GPUS["h200"], memory=110e9), short)
    assert smaller.best is not None and smaller.best.setting.lora is None
    assert smaller.best.setting.optimizer != "adamw"
    adapters = propose(SHAPE, FULL, replace(GPUS["rtx-4090"], memory=40e9, host_memory=40e9), short)
    assert adapters.best is not None and adapters.best.setting.lora is not None
    assert any("--model.lora.rank" in change for change in adapters.changes)
    assert propose(SHAPE, FULL, replace(GPUS["rtx-4090"], memory=12e9), short).best is None


def test_layouts_divide_gpus_and_heads() -> None:
    found = layouts(SHAPE, 12)
    assert found[0] == (1, 1) and (12, 1) in found and (3, 4) in found
    assert all(12 % (ring * ulysses) == 0 and 32 % ulysses == 0 for ring, ulysses in found)
    assert (1, 12) not in found


def test_changes_are_command_line_keys() -> None:
    best = replace(
        FULL, gpus=8, ring=2, ulysses=4, gradient_checkpointing=True, tile_tokens=4096, optimizer="adamw-8bit"
    )
    assert changes(replace(FULL, gpus=8), best) == (
        "--parallel.ring 2", "--parallel.ulysses 4", "--model.gradient-checkpointing true", "--model.tile-tokens 4096",
        "--optimizer.kind adamw-8bit",
    )  # fmt: skip
