"""Liger's fused modules in a trace: formulas against stand-ins, and those against Liger's own functions."""

from __future__ import annotations

import importlib
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longreach.engine.liger import Kernels, liger_kernels
from longreach.engine.model import LoraConfig
from longreach.engine.planner_liger import traced_kernels
from longreach.engine.planner_memory import Setting, training_memory
from longreach.engine.planner_shape import KNOWN, Row, config_of
from longreach.engine.planner_time import update_work
from longreach.engine.planner_trace import trace_step

ROW = Row(1, 60_000, 8, 2000)
MODELS = {
    "qwen3-8b": replace(KNOWN["Qwen/Qwen3-8B"], layers=2),
    "llama-3.1-8b": replace(KNOWN["meta-llama/Llama-3.1-8B"], layers=2),
}
BF16, AUTOCAST = Setting(dtype="bfloat16", liger=True), Setting(autocast=True, liger=True)
LORA = replace(BF16, lora=LoraConfig(rank=16))
SETTINGS = {
    "bf16": BF16,
    "bf16, checkpointed": replace(BF16, gradient_checkpointing=True),
    "autocast, checkpointed": replace(AUTOCAST, gradient_checkpointing=True),
    "lora": LORA,
    "lora, tiles": replace(LORA, gradient_checkpointing=True, tile_tokens=8192),
}


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("model", list(MODELS))
def test_formulas_follow_the_trace(model: str, setting: str) -> None:
    shape, how = MODELS[model], SETTINGS[setting]
    made, memory = trace_step(config_of(shape), how, ROW), training_memory(shape, how, ROW)
    assert memory.total - memory.parts["optimizer"] == pytest.approx(made.peak, rel=0.10), memory.moments
    assert update_work(shape, how, ROW).flops == pytest.approx(made.flops, rel=0.02)
    plain = trace_step(config_of(shape), replace(how, liger=False), ROW).peak
    assert made.peak <= plain if how.tile_tokens else made.peak < 0.97 * plain  # what is tiled already is small


ROWS, WIDTH, INNER, HEADS, HEAD = 512, 64, 160, 4, 32


class Count(TorchDispatchMode):
    """The most bytes that were alive of what is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves(args):
            if isinstance(x, Tensor):
                self.known.setdefault(x.untyped_storage()._cdata, 0)  # what was there before
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        self.peak = max(self.peak, self.alive)
        return result

    def gone(self, key: int) -> None:
        self.alive -= self.known.pop(key)


def held(run: Callable[[], tuple[Tensor, ...]]) -> tuple[int, int]:
    """(what a forward leaves behind, the most until its backward is done)"""
    with Count() as count:
        made = run()
        left = count.alive
        torch.autograd.backward(made, [torch.ones_like(x) for x in made])
    return left, count.peak


def norm(kernels: Kernels, trained: bool) -> tuple[int, int]:
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    module = types.SimpleNamespace(
        weight=nn.Parameter(torch.ones(WIDTH), requires_grad=trained),
        variance_epsilon=1e-6, offset=0.0, casting_mode="llama", in_place=True, row_mode=None,
    )  # fmt: skip
    return held(lambda: (kernels.norm(module, x),))


def mlp(kernels: Kernels) -> tuple[int, int]:
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    module = types.SimpleNamespace(
        gate_proj=nn.Linear(WIDTH, INNER, bias=False),
        up_proj=nn.Linear(WIDTH, INNER, bias=False),
        down_proj=nn.Linear(INNER, WIDTH, bias=False),
    )
    return held(lambda: (kernels.mlp(module, x),))


def rope(kernels: Kernels) -> tuple[int, int]:
    q, k = (torch.randn(1, ROWS, n, HEAD, requires_grad=True) for n in (HEADS, HEADS // 2))
    cos, sin = torch.randn(1, ROWS, HEAD), torch.randn(1, ROWS, HEAD)
    return held(lambda: kernels.rope((q * 1).transpose(1, 2), (k * 1).transpose(1, 2), cos, sin))


class Unstarted:
    """A Triton kernel that is launched and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def test_stand_ins_hold_what_ligers_own_functions_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's code without its kernels: what a forward leaves, and the most until its backward is done."""
    pytest.importorskip("liger_kernel")
    for module in ("rms_norm", "swiglu", "rope"):
        loaded = importlib.import_module(f"liger_kernel.ops.{module}")
        for name in [name for name, value in vars(loaded).items() if isinstance(value, triton.JITFunction)]:
            monkeypatch.setattr(loaded, name, Unstarted())
    own, stood_in = (
        [norm(kernels, True), norm(kernels, False), mlp(kernels), rope(kernels)]
        for kernels in (liger_kernels(), traced_kernels())
    )
    sums = 4 * WIDTH  # of a trained norm's gradient, a row for each multiprocessor
    assert (stood_in[0][0], stood_in[0][1]) == (own[0][0], pytest.approx(own[0][1], abs=sums))
    assert stood_in[1:] == own[1:]
