"""The trace is anchored: torch's own MemTracker and FlopCounterMode see the same, and so did a real run.

What was really allocated is in tests/bench/test_plan.py, beside the tool that counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from longreach.engine import Group
from longreach.engine.model import LoraConfig
from longreach.engine.planner_memory import Setting
from longreach.engine.planner_operators import attention_pairs
from longreach.engine.planner_shape import ModelShape, Row, config_of
from longreach.engine.planner_trace import _model as make_model
from longreach.engine.planner_trace import trace_step
from longreach.engine.planner_tracer import StepTrace, _as_fake, trace
from longreach.kernels import attention, linear_policy_loss
from longreach.kernels.gpu import HOPPER, pretending

SHAPE = ModelShape(2, 64, 160, 4, 2, 16, 1000, qk_norm=True)
ROW = Row(2, 48, 3, 10)


def lengths(row: Row) -> list[Group]:
    return [
        Group(torch.zeros(row.prompt, dtype=torch.long), [torch.zeros(row.completion, dtype=torch.long)] * row.size)
        for _ in range(row.groups)
    ]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_torchs_own_trackers_see_the_same(checkpointed: bool) -> None:
    """On plain transformers code: where both know every operator, both must agree to the last byte and operation."""
    from longreach.engine.completions import decode

    class Plain:
        def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
            q, k, v = q_THE, k_TKE, v_TKE
            wide = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = torch.bmm(q.transpose(0, 1), wide.permute(1, 2, 0)) * scale
            values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            return torch.bmm(scores.softmax(-1), values.transpose(0, 1)).transpose(0, 1)

    setting = Setting(gradient_checkpointing=checkpointed)
    with torch.device("meta"):
        model = make_model(config_of(SHAPE), setting)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        _as_fake(model)
    tracker, counter = MemTracker(), FlopCounterMode(display=False)
    tracker.track_external(model)
    with fake, tracker, counter, StepTrace(model) as ours:
        decode(model, torch.zeros(300, dtype=torch.long), torch.arange(300), Plain()).float().sum().backward()
    [(_, theirs)] = tracker.get_tracker_snapshot("peak").items()
    assert ours.made.peak == pytest.approx(theirs["Total"], rel=2e-3)  # MemTracker rounds storages up to 512 bytes
    assert ours.made.flops == counter.get_total_flops()
    assert ours.made.peak > 3 * sum(p.numel() * 4 for p in model.parameters())  # not the weights alone


def test_nothing_is_left_behind() -> None:
    """A tracker that misses releases would show memory that grows with the number of steps."""
    setting = Setting(dtype="bfloat16", gradient_checkpointing=True)
    once, twice = trace_step(config_of(SHAPE), setting, ROW), _twice(setting)
    assert twice.peak == pytest.approx(once.peak, rel=1e-3)
    assert twice.flops == 2 * once.flops


def _twice(setting: Setting) -> Any:
    from longreach.engine import completion_policy_loss

    def step(model: Any) -> None:
        for _ in range(2):
            completion_policy_loss(
                model,
                lengths(ROW),
                None,
                torch.ones(ROW.loss_rows),
                kind="grpo",
                normalizer=1.0,  # type: ignore[arg-type]
            ).loss.backward()

    with pretending(HOPPER):
        return trace(lambda: make_model(config_of(SHAPE), setting), step)


@pytest.mark.parametrize(
    "queries, keys, causal, pairs",
    [
        ([0, 5], [0, 5], True, 15),
        ([0, 5], [0, 7], False, 35),
        ([0, 2, 5], [0, 3, 4], False, 2 * 3 + 3 * 1),
        ([0, 2, 2, 3], [0, 2, 2, 3], True, 3 + 0 + 1),
    ],
)
def test_attention_counts_the_pairs_it_computes(
    queries: Sequence[int], keys: Sequence[int], causal: bool, pairs: int
) -> None:
    assert attention_pairs(queries, keys, causal) == pairs


def traced(run: Callable[[Any], object], *shapes: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Any:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tensors = nn.ParameterList(nn.Parameter(torch.empty(*shape, dtype=dtype)) for shape in shapes)

    def step(holder: Any) -> object:
        return run([p.detach() for p in holder.tensors])

    with pretending(HOPPER):
        return trace(Holder, step)


def test_attention_under_fake_tensors() -> None:
    """Shapes of out and lse, dtypes as a GPU's `auto` has them, and operations of exactly the pairs."""
    seen: list[Any] = []

    def run(tensors: list[Tensor]) -> None:
        q, k, v = tensors
        out, lse = attention.forward(q, k, v, causal=False, cu_seqlens_q=[0, 6, 10], cu_seqlens_k=[0, 4, 12])
        grads = attention.backward(
            torch.ones_like(out), q, k, v, out, lse, causal=False, cu_seqlens_q=[0, 6, 10], cu_seqlens_k=[0, 4, 12],
            grad_dtype=torch.float32,
        )  # fmt: skip
        seen.extend([out, lse, *grads])

    made = traced(run, (10, 4, 16), (12, 2, 16), (12, 2, 16))
    assert [tuple(x.shape) for x in seen] == [(10, 4, 16), (4, 10), (10, 4, 16), (12, 2, 16), (12, 2, 16)]
    assert [x.dtype for x in seen] == [torch.bfloat16, *[torch.float32] * 4]
    pairs = 6 * 4 + 4 * 8
    assert made.flops == (4 + 10) * pairs * 4 * 16


def test_the_loss_under_fake_tensors() -> None:
    """6 N D V in one pass, and the gradients' shapes."""
    n, d, v = 40, 16, 300
    seen: list[Any] = []

    def run(tensors: list[Tensor]) -> None:
        hidden, weight = (x.requires_grad_() for x in tensors)
        ids = torch.zeros(n, dtype=torch.long)
        made = linear_policy_loss(hidden, weight, ids, None, torch.ones(n), ids, kind="grpo", normalizer=1.0)
        seen.extend(torch.autograd.grad(made.loss, [hidden, weight]))

    made = traced(run, (n, d), (v, d))
    assert [tuple(x.shape) for x in seen] == [(n, d), (v, d)]
    assert made.flops == 6 * n * d * v


def test_a_pretended_gpu_is_only_for_tensors_without_memory() -> None:
    from longreach.kernels.gpu import on_gpu

    x = torch.zeros(3)
    with pretending(HOPPER):
        assert not on_gpu(x)
        with FakeTensorMode():
            fake = torch.zeros(3)
        assert on_gpu(fake)
    assert not on_gpu(fake)


def test_adapters_are_traced_too() -> None:
    setting = Setting(dtype="bfloat16", lora=LoraConfig(rank=4), gradient_checkpointing=True)
    frozen = trace_step(config_of(SHAPE), setting, ROW)
    full = trace_step(config_of(SHAPE), Setting(dtype="bfloat16", gradient_checkpointing=True), ROW)
    assert 0 < frozen.flops < full.flops


@pytest.mark.parametrize("setting", [Setting(gpus=2, ring=2, schedule="ring-flash-attn")])
def test_what_has_no_trace_says_so(setting: Setting) -> None:
    with pytest.raises(ValueError, match="ring-flash-attn's kernels can't be traced"):
        trace_step(config_of(SHAPE), setting, ROW)


@pytest.mark.slow
def test_an_8b_layer_stack_at_120k_is_traced_in_seconds() -> None:
    import time

    from longreach.engine.planner_shape import KNOWN

    start = time.process_time()
    setting = Setting(dtype="bfloat16", lora=LoraConfig(rank=32), gradient_checkpointing=True)
    made = trace_step(config_of(KNOWN["Qwen/Qwen3-8B"]), setting, Row(1, 120_000, 8, 4000))
    assert made.peak > 100e9
    assert time.process_time() - start < 60
