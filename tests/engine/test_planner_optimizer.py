"""Bytes that optimizers hold: AdamW's by a trace, sharded too, torchao's by what it makes of small weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longreach.engine.mesh import ParallelConfig, make_mesh
from longreach.engine.model import LoraConfig
from longreach.engine.optimizer import OptimizerConfig, make_optimizer
from longreach.engine.planner_memory import OFFLOADED_STATE, OPTIMIZER_BYTES, Setting, state_parts
from longreach.engine.planner_ranks import one_of
from longreach.engine.planner_shape import KNOWN, config_of
from longreach.engine.planner_trace import _model as make_model
from longreach.engine.planner_tracer import trace
from longreach.engine.sharding import place

SHAPE = replace(KNOWN["Qwen/Qwen3-8B"], layers=2)
CONFIG = OptimizerConfig()


def update(model: Any) -> torch.optim.Optimizer:
    optimizer = make_optimizer(model, CONFIG)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=16)])
def test_an_update_holds_what_the_formula_says(ranks: int, lora: LoraConfig | None) -> None:
    """Weights, gradients and both averages of a rank, and nothing for a moment beside them."""
    setting = Setting(dtype="bfloat16" if lora else "float32", lora=lora, gpus=ranks)

    def sharded(model: Any) -> Callable[[Any], object]:
        if mesh is not None:
            place(model, mesh, compute=None, device=torch.device("cpu"))
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            update(model)  # what DTensor finds out once for each operator and shape
        return update

    with one_of(ranks, ranks - 1):
        mesh = make_mesh(ParallelConfig(), "cpu") if ranks > 1 else None
        made = trace(lambda: make_model(config_of(SHAPE), setting), update, prepare=sharded)
    assert made.peak == pytest.approx(sum(state_parts(SHAPE, setting).values()), rel=0.002)


def weights() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.randn(256, 128)), nn.Parameter(torch.randn(64, 512))])


def tensors_of(value: Any) -> list[Tensor]:
    """The plain tensors that a state is made of."""
    if hasattr(value, "__tensor_flatten__"):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [value] if isinstance(value, Tensor) else []


def test_averages_of_8_bits() -> None:
    """torchao's own: a byte of each average, a scale for 256 of them, and a table of 1 KB that no size depends on."""
    pytest.importorskip("torchao")
    model = weights()
    optimizer = make_optimizer(model, replace(CONFIG, kind="adamw-8bit"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    held = [x for state in optimizer.state.values() for value in state.values() for x in tensors_of(value)]
    tables = 2 * 256 * 4 * len(optimizer.state)
    counted = sum(x.nbytes for x in held if x.numel() > 1) - tables
    assert counted == OPTIMIZER_BYTES["adamw-8bit"] * sum(p.numel() for p in model.parameters())


@pytest.mark.usefixtures("on_the_cpu")
def test_an_offloaded_update_leaves_the_gpu_its_gradients() -> None:
    """On the host a copy, its gradient and two averages; on the GPU no average, but the gradients until the update."""
    from longreach.engine.torchao_optimizer import OffloadedAdamW

    model = weights()
    optimizer = OffloadedAdamW([{"params": list(model.parameters()), "weight_decay": 0.0}], {"lr": 0.1})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    hosts = list(optimizer.param_d2h_map.values())
    averages = [x for one in optimizer.optim_dict.values() for state in one.state.values() for x in state.values()]
    held = [*hosts, *(host.grad for host in hosts), *(x for x in averages if x.numel() > 1)]
    n = sum(p.numel() for p in model.parameters())
    assert sum(x.nbytes for x in held) == OFFLOADED_STATE * n
    on_gpu = state_parts(SHAPE, Setting(optimizer="adamw-offload"))
    assert (before, on_gpu["gradients"], on_gpu["optimizer"]) == (4 * n, 4 * SHAPE.parameters, 0.0)
