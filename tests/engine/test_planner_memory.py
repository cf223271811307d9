"""The formulas against the trace of the real step: peak memory within 10 %, operations within 2 %, over a grid.

Widths are those of real models, layers are few (each costs the same), rows are as a phase packs them: one group and
several, a prompt much longer than its completions and much shorter, shared and repeated.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreach.engine import planner_memory
from longreach.engine.model import LoraConfig
from longreach.engine.planner_memory import (
    Setting,
    forward_memory,
    generation_memory,
    state_parts,
    training_memory,
)
from longreach.engine.planner_shape import KNOWN, ModelShape, Row, config_of, shape_of
from longreach.engine.planner_time import update_work
from longreach.engine.planner_trace import trace_step

MEMORY_BOUND, FLOPS_BOUND = 0.10, 0.02
MODELS = {
    "qwen3-8b": replace(KNOWN["Qwen/Qwen3-8B"], layers=2),
    "qwen3-4b, tied": replace(KNOWN["Qwen/Qwen3-4B"], layers=3),
    "qwen2.5-14b": replace(KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"], layers=2),
    "llama-3.1-8b": replace(KNOWN["meta-llama/Llama-3.1-8B"], layers=3),
    "heads as keys": ModelShape(2, 2048, 5632, 16, 16, 128, 32000),
}
BF16, AUTOCAST = Setting(dtype="bfloat16"), Setting(autocast=True)
SETTINGS = {
    "bf16": BF16,
    "bf16, checkpointed": replace(BF16, gradient_checkpointing=True),
    "autocast": AUTOCAST,
    "autocast, checkpointed": replace(AUTOCAST, gradient_checkpointing=True),
    "lora": replace(BF16, lora=LoraConfig(rank=16)),
    "lora, checkpointed": replace(BF16, lora=LoraConfig(rank=64), gradient_checkpointing=True),
    "lora, tiles": replace(BF16, lora=LoraConfig(rank=32), gradient_checkpointing=True, tile_tokens=4096),
    "autocast, tiles": replace(AUTOCAST, gradient_checkpointing=True, tile_tokens=8192),
    "lora on q and v": replace(BF16, lora=LoraConfig(targets=("q_proj", "v_proj")), gradient_checkpointing=True),
}
ROWS = {
    "one long prompt": Row(1, 60_000, 8, 2000),
    "three groups": Row(3, 8000, 4, 1000),
    "long completions": Row(1, 1000, 8, 4000),
    "repeated prompts": Row(1, 8000, 4, 1000, shared=False),
    "one completion": Row(1, 20_000, 1, 500),
}
EVERY = [
    (m, s, r)
    for i, m in enumerate(MODELS)
    for j, s in enumerate(SETTINGS)
    for k, r in enumerate(ROWS)
    if (i + j + k) % 5 == 0
]
"""A fifth of the full grid, in which every pair of a model and a setting, and of a setting and a row, stands."""


@pytest.mark.parametrize("model, setting, row", EVERY)
def test_formulas_follow_the_trace(model: str, setting: str, row: str) -> None:
    shape, how, packed = MODELS[model], SETTINGS[setting], ROWS[row]
    made = trace_step(config_of(shape), how, packed)
    memory = training_memory(shape, how, packed)
    formula = memory.total - memory.parts["optimizer"]
    assert formula == pytest.approx(made.peak, rel=MEMORY_BOUND), memory.parts
    assert update_work(shape, how, packed).flops == pytest.approx(made.flops, rel=FLOPS_BOUND)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_shapes_read_back(name: str) -> None:
    shape = KNOWN[name]
    assert shape_of(config_of(shape)) == shape


def test_every_part_of_the_state() -> None:
    """16 bytes a parameter for fp32 AdamW; adapters have all but the weights for themselves alone."""
    shape = KNOWN["Qwen/Qwen3-8B"]
    n = shape.parameters
    assert state_parts(shape, Setting()) == {"weights": 4.0 * n, "gradients": 4.0 * n, "optimizer": 8.0 * n}
    lora = LoraConfig(rank=8)
    small = shape.adapter_parameters(lora)
    made = state_parts(shape, Setting(dtype="bfloat16", lora=lora))
    assert made == {"weights": 2.0 * n + 4.0 * small, "gradients": 4.0 * small, "optimizer": 8.0 * small}
    assert n == pytest.approx(8.19e9, rel=1e-3)  # as published
    assert KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"].parameters == pytest.approx(32.76e9, rel=1e-3)


def test_sharding_leaves_a_share_of_the_state() -> None:
    shape = KNOWN["Qwen/Qwen3-14B"]
    whole, shared = state_parts(shape, AUTOCAST), state_parts(shape, replace(AUTOCAST, gpus=16))
    for part in whole:
        assert shared[part] == pytest.approx(whole[part] / 16)
    unsharded = state_parts(shape, replace(AUTOCAST, gpus=16, shard=False))
    assert unsharded == whole


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "tile_tokens": 4096},
        {"gradient_checkpointing": True, "offload_activations": True},
        {"gpus": 8, "ulysses": 8},
        {"gpus": 8, "ring": 8},
        {"optimizer": "adamw-8bit"},
        {"optimizer": "adamw-offload"},
        {"liger": True},
        {"gpus": 8},
    ],
)
def test_everything_that_saves_memory_saves_some(change: dict[str, object]) -> None:
    shape, row = KNOWN["Qwen/Qwen3-8B"], Row(1, 60_000, 8, 2000)
    before = {k: v for k, v in change.items() if k == "gradient_checkpointing" and len(change) > 1}
    plain = training_memory(shape, replace(AUTOCAST, **before), row)  # type: ignore[arg-type]
    saved = training_memory(shape, replace(AUTOCAST, **change), row)  # type: ignore[arg-type]
    assert saved.total < plain.total


def test_offloaded_inputs_and_states_stand_on_the_host() -> None:
    shape, row = KNOWN["Qwen/Qwen3-8B"], Row(1, 120_000, 8, 4000)
    setting = replace(BF16, gradient_checkpointing=True, offload_activations=True)
    made = training_memory(shape, setting, row)
    assert made.host == 36 * 2 * 4096 * row.tokens
    assert (
        training_memory(shape, replace(setting, optimizer="adamw-offload"), row).host
        == made.host + 16 * shape.parameters
    )


def test_no_prompt_row_meets_the_vocabulary() -> None:
    shape = KNOWN["Qwen/Qwen3-8B"]
    short, long = (update_work(shape, BF16, Row(1, prompt, 8, 1000)).vocabulary for prompt in (1000, 100_000))
    assert short == long == 6.0 * 8000 * shape.hidden * shape.vocab


def test_log_probs_hold_less_than_an_update() -> None:
    shape, row = KNOWN["Qwen/Qwen3-8B"], Row(1, 60_000, 8, 2000)
    setting = replace(BF16, gradient_checkpointing=True)
    assert forward_memory(shape, setting, row).total < training_memory(shape, setting, row).total


def test_a_generator_of_its_own_where_weights_are_sharded() -> None:
    shape = KNOWN["Qwen/Qwen3-8B"]
    one = generation_memory(shape, AUTOCAST, 100_000, 60_000)
    many = generation_memory(shape, replace(AUTOCAST, gpus=8), 100_000, 60_000)
    served = generation_memory(shape, replace(AUTOCAST, gpus=8, serve=4), 100_000, 60_000)
    assert one.parts["generator weights"] == 0
    edges = 2 * shape.head_parameters  # embeddings and head are gathered as they are stored
    assert many.parts["generator weights"] == 2 * shape.layers * shape.layer_matrices + 4 * edges
    assert served.parts["generator weights"] == 2 * shape.parameters / 4
    keys = 2 * 36 * 1024 * 2 * 100_000
    assert many.parts["generator keys and values"] == keys == 4 * served.parts["generator keys and values"]


def test_the_loss_has_the_budget_that_its_kernels_have() -> None:
    triton_backend = pytest.importorskip("longreach.kernels.linear_logprob_triton")
    assert planner_memory.KEPT_BYTES == triton_backend.KEPT_BYTES
