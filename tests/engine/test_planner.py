"""Whole steps: published cases with the answer they report, and how a plan's parts hang together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreach.engine.model import LoraConfig
from longreach.engine.planner import Load, plan_step
from longreach.engine.planner_hardware import GPUS
from longreach.engine.planner_memory import Setting, training_memory
from longreach.engine.planner_shape import KNOWN, Row

FULL = Setting(autocast=True, gradient_checkpointing=True)
LORA = Setting(dtype="bfloat16", lora=LoraConfig(rank=32), gradient_checkpointing=True)
ALL_OF_IT = {"offload_activations": True, "tile_tokens": 8192}
LLAMA, QWEN8, QWEN4 = (KNOWN[n] for n in ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-4B"))
R1_32B = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"]


def step(row: Row, **changes: object) -> Load:
    load = Load("phase", 1, row, 1, prompts=row.groups, size=row.size, prompt=row.prompt, completion=row.completion)
    return replace(load, batch_tokens=row.tokens, **changes)  # type: ignore[arg-type]


def training(row: Row) -> Load:
    """Without generation: what supervised training asks for."""
    return Load("sft", 1, row, 1)


PUBLISHED = [
    # Unsloth: Qwen3-8B GRPO with adapters and a generator, 110K tokens on one 80 GB H100 (4-bit weights there, bf16 here)
    ("unsloth 8B 110K", QWEN8, replace(LORA, **ALL_OF_IT), "h100-80", Row(1, 106_000, 1, 4000), True),
    # this project's own target: 120K with eight completions of 4K on 80 GB
    ("8B 120K + 8 x 4K", QWEN8, replace(LORA, **ALL_OF_IT), "h100-80", Row(1, 120_000, 8, 4000), True),
    ("the same without tiles", QWEN8, replace(LORA, offload_activations=True), "h100-80", Row(1, 120_000, 8, 4000), False),
    ("the same without offloading", QWEN8, replace(LORA, tile_tokens=8192), "h100-80", Row(1, 120_000, 8, 4000), False),
    ("8B 120K on an H200 in bf16", QWEN8, LORA, "h200", Row(1, 120_000, 8, 4000), True),
    # QwenLong-L1-32B: all weights, 32 A100-80G, 60K + 10K, Ulysses 8, a generator over 4 GPUs
    ("qwenlong 32B", R1_32B, replace(FULL, gpus=32, ulysses=8, serve=4), "a100-80", Row(1, 60_000, 1, 10_000), True),
    ("qwenlong 32B on 8", R1_32B, replace(FULL, gpus=8, ulysses=8, serve=4), "a100-80", Row(1, 60_000, 1, 10_000), False),
    # prime-rl: RL with adapters on Qwen3-4B at 65K on one H100
    ("prime-rl 4B 65K", QWEN4, LORA, "h100-80", Row(1, 61_000, 1, 4000), True),
    # ALST trains all weights of an 8B on one H100 only with the optimizer on the host
    ("8B full, AdamW, one GPU", LLAMA, FULL, "h100-80", Row(1, 4000, 1, 1000), False),
    ("8B with nothing computed again", QWEN8, replace(LORA, gradient_checkpointing=False), "h200", Row(1, 120_000, 8, 4000), False),
]  # fmt: skip


@pytest.mark.parametrize("gpus, fits", [(8, True), (1, False)])
def test_trl_trains_qwen3_8b_at_300k_on_eight(gpus: int, fits: bool) -> None:
    """Supervised, with context parallelism over 8 H100."""
    setting = replace(FULL, gpus=gpus, ring=gpus)
    assert plan_step(QWEN8, setting, GPUS["h100-80"], training(Row(1, 296_000, 1, 4000))).fits is fits


@pytest.mark.parametrize("case", PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_published_cases_have_the_answer_that_was_reported(case: tuple) -> None:  # type: ignore[type-arg]
    _, shape, setting, gpu, row, fits = case
    made = plan_step(shape, setting, GPUS[gpu], step(row))
    assert made.fits is fits, (made.problems, made.peak)
    assert bool(made.problems) is not fits


ALST = [
    # Llama-8B with the optimizer on the host, as DeepSpeed's ALST recipes report; K tokens
    ("h200", 1, {"liger": True}, 300),
    ("h200", 1, {"liger": True, "offload_activations": True}, 650),
    ("h200", 1, {"liger": True, **ALL_OF_IT}, 1200),
    ("h100-80", 1, {"liger": True, **ALL_OF_IT}, 500),
    ("h100-80", 8, {"liger": True}, 1100),
    ("h100-80", 8, {"liger": True, "tile_tokens": 8192}, 1200),
    ("h100-80", 8, {"liger": True, "offload_activations": True}, 2400),
    ("h100-80", 8, {"liger": True, **ALL_OF_IT}, 3800),
]


@pytest.mark.parametrize("gpu, gpus, features, reported", ALST)
def test_longest_contexts_are_near_those_reported(
    gpu: str, gpus: int, features: dict[str, object], reported: int
) -> None:
    """Another implementation's limits, not this one's: a factor of two either way would be a wrong formula.

    Where attention decides (everything tiled and offloaded) ours reaches less: it sums partial gradients in fp32. Theirs
    moves weights' gradients out as the backward makes them; ours keeps them, to be clipped, so they are left out here.
    """
    setting = Setting(dtype="bfloat16", optimizer="adamw-offload", gradient_checkpointing=True, gpus=gpus, ulysses=gpus)
    setting = replace(setting, **features)  # type: ignore[arg-type]

    def needed(share: float) -> float:
        made = training_memory(LLAMA, setting, Row(1, 1, 1, int(share * reported * 1000)))
        return made.total - made.parts["gradients"]

    assert needed(0.6) < GPUS[gpu].usable < needed(1.25)


def test_a_plan_says_what_it_lacks_and_where() -> None:
    made = plan_step(QWEN8, LORA, GPUS["h100-80"], step(Row(1, 120_000, 8, 4000)))
    [problem] = made.problems
    assert "update needs 122.5 GB of 75.2 (a layer's backward; most of it peak in a layer: 59.8)" in problem
    on_host = plan_step(QWEN8, replace(LORA, **ALL_OF_IT), GPUS["rtx-4090"], step(Row(1, 400_000, 8, 4000)))
    assert any("host memory" in problem for problem in on_host.problems)


@pytest.mark.parametrize(
    "setting, words",
    [
        (replace(FULL, gpus=6, ulysses=4), "6 GPUs can't be shared out over ring x ulysses = 4"),
        (replace(FULL, gpus=12, ulysses=12), "ulysses = 12 doesn't divide the 32 query heads"),
        (replace(FULL, gpus=4, serve=8), "4 GPUs can't be shared out over generators of 8"),
    ],
)
def test_layouts_that_cannot_be(setting: Setting, words: str) -> None:
    assert words in " ".join(plan_step(QWEN8, setting, GPUS["h200"], step(Row(1, 1000, 2, 100))).problems)


def test_sharing_a_prompt_is_worth_what_the_flop_model_says() -> None:
    """5.8 times at P = 120K, R = 4K, G = 8; 6.7 at 2K; 4.2 at 10K (research, linear layers and attention)."""
    for completion, saved in ((2000, 6.7), (4000, 5.8), (10_000, 4.2)):
        made = plan_step(QWEN8, LORA, GPUS["h200"], step(Row(1, 120_000, 8, completion)))
        assert made.dense_flops / made.flops == pytest.approx(saved, rel=0.03)


def test_ranks_share_the_work() -> None:
    load = step(Row(1, 60_000, 8, 2000), rows=8, prompts=8)
    one, data, sequence = (
        plan_step(QWEN8, replace(LORA, gpus=n, ulysses=u, shard=False), GPUS["h200"], load)
        for n, u in ((1, 1), (8, 1), (8, 8))
    )
    assert data.times["update"].seconds == pytest.approx(one.times["update"].seconds / 8)
    shared, alone = sequence.times["update"].seconds, one.times["update"].seconds / 8
    assert alone < shared < 1.25 * alone  # attention whose sums have one order, and the vocabulary once more
    assert sequence.memory["update"].total < data.memory["update"].total
    assert sequence.times["update"].communication > 0 == data.times["update"].communication
    assert data.tokens_per_second > 7 * one.tokens_per_second


def test_rows_without_gradients_cost_their_part() -> None:
    load = step(Row(1, 60_000, 8, 2000))
    plain, probed = (plan_step(QWEN8, LORA, GPUS["h200"], replace(load, forward_rows=n)) for n in (0, 2))
    assert "log-probs" not in plain.times
    assert 0 < probed.times["log-probs"].total < 2 * probed.times["update"].total
