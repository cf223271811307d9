"""Liger's RMSNorm, RoPE and SwiGLU without their kernels: the buffers that they make and keep, for a trace without memory.

By the source of liger-kernel 0.8 (`ops/rms_norm.py`, `ops/swiglu.py`, `ops/rope.py`), as `liger` puts them into a model:

    norm    its result and one fp32 number a row; keeps its input; the gradient is written over the result's
    SwiGLU  silu(a) b; keeps a and b, and writes their gradients over them
    RoPE    turns q and k where they lie, and their gradients likewise; copies only what isn't laid out token by token

A trained norm's gradient has a row of fp32 sums for each multiprocessor, which is left out: 2 MB. What it gives up: values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .liger import Kernels


def traced_kernels() -> Kernels:
    """In the place of `liger.liger_kernels()`."""
    return Kernels(_norm, _mlp, _rope)


def _norm(module: Any, x: Tensor) -> Tensor:
    return _Norm.apply(x, module.weight)


def _mlp(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x)))


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _Rope.apply(q, k, cos, sin)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        per_row = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, per_row)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        _, weight, _ = ctx.saved_tensors
        return dy.contiguous().view_as(dy), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        return torch.empty_like(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        grads[0].contiguous()
        a, b = ctx.saved_tensors
        return a.view_as(a), b.view_as(b)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = _by_token(q), _by_token(k)
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return q, k

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = grads
        return _by_token(dq), _by_token(dk), None, None


def _by_token(x: Tensor) -> Tensor:
    """[B, H, T, E], laid out token by token."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
