"""One rank of many: the formulas against the trace of its real step, and the trace against real ranks.

Sequence parallelism and FSDP2 run as they are, on a fake process group and at full shape. Widths are those of real models,
layers are few.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from longreach.engine.model import LoraConfig
from longreach.engine.planner_cut import shares
from longreach.engine.planner_memory import Setting, training_memory
from longreach.engine.planner_ranks import one_of
from longreach.engine.planner_shape import KNOWN, ModelShape, Row, config_of
from longreach.engine.planner_time import rank_work, ring_bytes, sharded_bytes, ulysses_bytes, update_work
from longreach.engine.planner_trace import trace_step
from longreach.engine.planner_tracer import Traced

MEMORY_BOUND, FLOPS_BOUND, SENT_BOUND = 0.10, 0.02, 0.01
Q8 = replace(KNOWN["Qwen/Qwen3-8B"], layers=2)
Q32 = replace(KNOWN["Qwen/Qwen3-32B"], layers=3)
LLAMA = replace(KNOWN["meta-llama/Llama-3.1-8B"], layers=2)
TIED = replace(KNOWN["Qwen/Qwen3-4B"], layers=3)
BF16, AUTOCAST = (
    Setting(dtype="bfloat16", gradient_checkpointing=True),
    Setting(autocast=True, gradient_checkpointing=True),
)
LORA = replace(BF16, lora=LoraConfig(rank=16))
LONG, PAPER = Row(1, 120_000, 8, 2000), Row(1, 60_000, 8, 1250)


def whole(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, shard=False, **changes)


RING: dict[str, Any] = {"schedule": "ring"}
GATHER: dict[str, Any] = {"schedule": "all-gather"}
CASES: dict[str, tuple[ModelShape, Setting, Row]] = {
    "ring of 2": (Q8, whole(BF16, gpus=2, ring=2, **RING), LONG),
    "ring of 2, all kept": (Q8, whole(BF16, gpus=2, ring=2, gradient_checkpointing=False, **RING), LONG),
    "ring of 4, adapters": (Q8, whole(LORA, gpus=4, ring=4, **RING), LONG),
    "ring of 8, autocast": (LLAMA, whole(AUTOCAST, gpus=8, ring=8, **RING), LONG),
    "ring of 8, three completions": (Q8, whole(BF16, gpus=8, ring=8, **RING), Row(1, 60_000, 3, 6000)),
    "ring of 2, offloaded, tiles": (
        Q8, whole(LORA, gpus=2, ring=2, offload_activations=True, tile_tokens=8192, **RING), LONG,
    ),
    "ring of 8, tiles": (Q8, whole(BF16, gpus=8, ring=8, tile_tokens=4096, **RING), LONG),
    "all-gather of 4": (LLAMA, whole(BF16, gpus=4, ring=4, **GATHER), LONG),
    "all-gather of 8": (Q8, whole(BF16, gpus=8, ring=8, **GATHER), LONG),
    "all-gather of 8, unshared": (Q8, whole(LORA, gpus=8, ring=8, **GATHER), Row(1, 20_000, 4, 1000, shared=False)),
    "ulysses of 2": (Q8, whole(LORA, gpus=2, ulysses=2), LONG),
    "ulysses of 4": (TIED, whole(AUTOCAST, gpus=4, ulysses=4), LONG),
    "ulysses of 8": (LLAMA, whole(BF16, gpus=8, ulysses=8), LONG),
    "ulysses of 16, heads repeated": (Q8, whole(BF16, gpus=16, ulysses=16), LONG),
    "ring of 4, ulysses of 2": (Q8, whole(BF16, gpus=8, ring=4, ulysses=2, **RING), LONG),
    "32B on 32": (Q32, replace(AUTOCAST, gpus=32), PAPER),
    "32B on 32, ring of 4": (Q32, replace(AUTOCAST, gpus=32, ring=4, **RING), PAPER),
    "32B on 32, ulysses of 8, offloaded": (
        Q32, replace(AUTOCAST, gpus=32, ulysses=8, offload_activations=True), PAPER,
    ),
    "8B on 8, adapters": (Q8, replace(LORA, gpus=8), Row(1, 8000, 4, 1000)),
    "8B on 8, short": (Q8, replace(AUTOCAST, gpus=8), Row(1, 100, 4, 100)),
    "8B on 8, all kept": (Q8, replace(AUTOCAST, gpus=8, gradient_checkpointing=False), Row(1, 4000, 4, 1000)),
    "adapters, short": (Q8, replace(LORA, gpus=8), Row(1, 100, 4, 100)),
    "bf16": (Q8, replace(BF16, gpus=8), Row(2, 4000, 2, 500)),
    "tied": (TIED, replace(AUTOCAST, gpus=4), Row(1, 8000, 4, 1000)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_formulas_follow_the_fullest_rank(name: str) -> None:
    """The first ring rank has the longest completion, its last Ulysses rank most of its rows for the vocabulary."""
    shape, setting, row = CASES[name]
    made = trace_step(config_of(shape), setting, row, rank=setting.ulysses - 1)
    memory = training_memory(shape, setting, row)
    formula = memory.total - memory.parts["optimizer"]
    assert formula == pytest.approx(made.peak, rel=MEMORY_BOUND), memory.moments
    work = update_work(shape, setting, row)
    busiest = max(rank_work(row, work, share).flops for share in shares(shape, setting, row))
    assert busiest == pytest.approx(made.flops, rel=FLOPS_BOUND)
    assert memory.host == made.host
    check_sent(shape, setting, row, made)


def check_sent(shape: ModelShape, setting: Setting, row: Row, made: Traced) -> None:
    """What a rank hands to others is what the formulas of its time say; a ring's ranks differ."""
    ring, heads = ring_bytes(shape, setting, row, True), ulysses_bytes(shape, setting, row, True)
    sent, exchanged = made.sent.get("send", 0), made.sent.get("alltoall_base_", 0)
    if setting.schedule == "all-gather" and setting.ring > 1:
        sent, exchanged = exchanged - round(heads), round(heads)
    if row.size % setting.ring:
        assert 0.5 * ring < sent <= ring
    else:
        assert sent == pytest.approx(ring, rel=SENT_BOUND)
    assert exchanged == pytest.approx(heads, rel=SENT_BOUND, abs=1e6)  # and twelve bytes a completion token
    shards = made.sent.get("_allgather_base_", 0) + made.sent.get("_reduce_scatter_base_", 0)
    assert shards == pytest.approx(sharded_bytes(shape, setting, True), rel=SENT_BOUND)


def test_ranks_among_them_see_the_same() -> None:
    """All trace to the row's work together, and none needs more than the formula, which is of the fullest."""
    shape, row = Q8, Row(2, 9000, 3, 700)
    setting = whole(BF16, gpus=4, ring=2, ulysses=2, **RING)
    made = [trace_step(config_of(shape), setting, row, rank=rank) for rank in range(4)]
    assert sum(one.flops for one in made) == pytest.approx(update_work(shape, setting, row).flops, rel=1e-4)
    memory = training_memory(shape, setting, row)
    formula = memory.total - memory.parts["optimizer"]
    assert max(one.peak for one in made) == pytest.approx(formula, rel=MEMORY_BOUND)
    assert len({one.peak for one in made}) > 1


def test_a_rank_among_real_ones_has_no_fake_ones() -> None:
    with one_of(4, 3):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 4)
        with pytest.raises(ValueError, match="a process of its own"), one_of(2, 0):
            pass
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, setting, row",
    [
        ("Qwen/Qwen3-8B", whole(LORA, gpus=8, ring=8, **RING), Row(1, 120_000, 8, 4000)),
        ("Qwen/Qwen3-32B", replace(AUTOCAST, gpus=32, ulysses=8), Row(1, 60_000, 8, 1250)),
    ],
)
def test_whole_stacks(model: str, setting: Setting, row: Row) -> None:
    """All layers, not a few: an 8B over a ring of 8 at 120K, a 32B over 32 ranks at 60K and 10K."""
    shape = KNOWN[model]
    made = trace_step(config_of(shape), setting, row, rank=setting.ulysses - 1)
    memory = training_memory(shape, setting, row)
    assert memory.total - memory.parts["optimizer"] == pytest.approx(made.peak, rel=MEMORY_BOUND)
    check_sent(shape, setting, row, made)
