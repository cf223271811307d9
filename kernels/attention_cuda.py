"""torch's own CUDA attention behind the contract of `attention`: FlashAttention-2 (`flash`) and cuDNN (`cudnn`).

Both take bf16 and fp16, sum in fp32, and round out and gradients to the inputs' dtype: partial results that are merged or
added carry that rounding, which `triton` doesn't have. Both backwards take any out and lse (delta is made from the out that
is handed in), so merged ones may be passed. `flash` takes a whole row of segments; `cudnn` a rectangle of equal segments.
Neither makes a mask; grouped keys are read in place.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .gpu import OLDEST, capability, on_gpu

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
CUDNN_LARGEST_HEAD = 128
"""cuDNN's backward takes up to 128 on every GPU that it takes."""

Bounds = tuple[int, ...]
Gradients = tuple[Tensor, Tensor, Tensor]


def unsuited(q: Tensor, largest_head: int = LARGEST_HEAD) -> str | None:
    """Why these operators can't take such tensors, None if they can."""
    if not on_gpu(q):
        return f"the tensors are on {q.device.type}"
    if q.dtype not in HALF:
        return f"{q.dtype} is not one of bfloat16, float16"
    if q.shape[-1] > largest_head or q.shape[-1] % 8:
        return f"a head dimension of {q.shape[-1]} is not a multiple of 8 up to {largest_head}"
    if capability(q.device) < OLDEST:
        return f"compute capability {capability(q.device)} is below {OLDEST}"
    return None


def unsuited_cudnn(q: Tensor) -> str | None:
    return unsuited(q, CUDNN_LARGEST_HEAD)


@lru_cache(maxsize=256)
def _cumulative(bounds: Bounds, device: torch.device) -> Tensor:
    """[segments + 1] int32. Remembered: every layer asks for the same, and copying waits for the device."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _longest(bounds: Bounds) -> int:
    return max(b - a for a, b in pairwise(bounds))


def spans(bounds_q: Bounds, bounds_k: Bounds, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Cumulative lengths and the longest segment of both sides, as every flash-attention takes them."""
    return (
        _cumulative(bounds_q, device),
        _cumulative(bounds_k, device),
        _longest(bounds_q),
        _longest(bounds_k),
    )


def without_keys(bounds_q: Bounds, bounds_k: Bounds) -> list[slice]:
    """Queries whose segment has no keys; the operator gives them lse = +inf."""
    spans = zip(pairwise(bounds_q), pairwise(bounds_k), strict=True)
    return [slice(a, b) for (a, b), (c, d) in spans if b > a and c == d]


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Bounds,
    bounds_k: Bounds,
    causal: bool,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out [T, H, E], rounded to q's dtype whatever `out_dtype` says, and lse [H, T] in fp32."""
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, *spans(bounds_q, bounds_k, q.device), 0.0, causal, False, scale=scale
    )
    for rows in without_keys(bounds_q, bounds_k):
        out[rows], lse[:, rows] = 0.0, -torch.inf
    return out.to(out_dtype), lse


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds_q: Bounds, bounds_k: Bounds,
    causal: bool, scale: float, grad_dtype: torch.dtype,
) -> Gradients:  # fmt: skip
    """dq, dk, dv, rounded to q's dtype; not bitwise repeatable (dq is summed by atomics)."""
    nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there isn't
    lse = lse.float().masked_fill(lse == -torch.inf, torch.inf).contiguous()
    grads = aten._flash_attention_backward(
        dout.to(q.dtype), q, k, v, out.to(q.dtype), lse, *spans(bounds_q, bounds_k, q.device), 0.0, causal,
        nothing, nothing, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (grad.to(grad_dtype) for grad in grads)
    return dq, dk, dv


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, L, H, E], k, v [B, S, K, E] -> out [B, L, H, E], lse [B, L, H] in fp32."""
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, k, v), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(lse.shape[:3]).transpose(1, 2)


def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    b_dout, b_q, b_k, b_v, b_out = _heads_first(dout, q, k, v, out)
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        b_dout, b_q, b_k, b_v, b_out, lse.transpose(1, 2).unsqueeze(-1).contiguous(), nothing, nothing, None, None, None,
        q.shape[1], k.shape[1], 0.0, causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv
