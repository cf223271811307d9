"""One rank of many: the formulas against the trace of its real step, and the trace against real ranks.

Sequence parallelism and FSDP2 run as they are, on a fake process group and at full shape. Widths are those of real models,
layers are few.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from longreach.engine.model import LoraConfig
from longreach.engine.planner_memory import Setting, training_memory
from longreach.engine.planner_ranks import one_of
from longreach.engine.planner_shape import KNOWN, ModelShape, Row, config_of
from longreach.engine.planner_time import ring_bytes, ulysses_bytes, update_work
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


def whole(setting: Setting, **changes: int) -> Setting:
    return replace(setting, shard=False, **changes)  # type: ignore[arg-type]


SEQUENCE: dict[str, tuple[ModelShape, Setting, Row]] = {
    "ring of 2": (Q8, whole(BF16, gpus=2, ring=2), LONG),
    "ring of 4, adapters": (Q8, whole(LORA, gpus=4, ring=4), LONG),
    "ring of 8, autocast": (LLAMA, whole(AUTOCAST, gpus=8, ring=8), LONG),
}
SHARDED: dict[str, tuple[ModelShape, Setting, Row]] = {
    "32B on 32": (Q32, replace(AUTOCAST, gpus=32), PAPER),
    "32B on 32, ring of 4": (Q32, replace(AUTOCAST, gpus=32, ring=4), PAPER),
    "8B on 8, adapters": (Q8, replace(LORA, gpus=8), Row(1, 8000, 4, 1000)),
    "8B on 8, short": (Q8, replace(AUTOCAST, gpus=8), Row(1, 100, 4, 100)),
    "adapters, short": (Q8, replace(LORA, gpus=8), Row(1, 100, 4, 100)),
    "bf16": (Q8, replace(BF16, gpus=8), Row(2, 4000, 2, 500)),
    "tied": (TIED, replace(AUTOCAST, gpus=4), Row(1, 8000, 4, 1000)),
}


@pytest.mark.parametrize("name", [*SEQUENCE, *SHARDED])
def test_formulas_follow_a_rank(name: str) -> None:
    shape, setting, row = {**SEQUENCE, **SHARDED}[name]
    made = trace_step(config_of(shape), setting, row)
    memory = training_memory(shape, setting, row)
    formula = memory.total - memory.parts["optimizer"]
    assert formula == pytest.approx(made.peak, rel=MEMORY_BOUND), memory.moments
    assert update_work(shape, setting, row).flops / setting.sp == pytest.approx(made.flops, rel=FLOPS_BOUND)
    check_sent(shape, setting, row, made)


def check_sent(shape: ModelShape, setting: Setting, row: Row, made: Traced) -> None:
    """What a rank hands to its ring is what the formula of its time says."""
    assert made.sent.get("send", 0) == pytest.approx(ring_bytes(shape, setting, row, True), rel=SENT_BOUND)
    if setting.ulysses > 1:
        sent = made.sent["alltoall_base_"]
        assert sent == pytest.approx(ulysses_bytes(shape, setting, row, True), rel=SENT_BOUND)


def test_a_rank_among_real_ones_has_no_fake_ones() -> None:
    with one_of(4, 3):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 4)
        with pytest.raises(ValueError, match="a process of its own"), one_of(2, 0):
            pass
    assert not dist.is_initialized()
