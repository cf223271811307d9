"""Attention as one contract: forward gives (out, lse), backward takes them back, and both may be merged, global ones.

    forward(q, k, v)                    -> out = softmax(scale q k^T) v,  lse = log sum exp(scale q k^T), natural log
    merge(out_a, lse_a, out_b, lse_b)   -> the same over the union of two key sets
    backward(dout, q, k, v, out, lse)   -> this key set's share of the gradients of the merged softmax

Packing, shared prefixes and rings are written on these three; what a device has to offer stands behind them. No mask
is ever made. Grouped keys are read in place: k and v keep their K heads, and so do dk and dv.

Backends
    reference   one segment after the other, its scores in full: the oracle of the tests, any dtype and device
    blockwise   plain torch, online softmax over blocks, memory linear in T, any dtype and device
    cpu         torch's fused CPU operator, one call per rectangle of similar segments (see `segments`)
    triton      our kernels (`attention_triton`): NVIDIA GPUs, unrounded partial results, deterministic
    gluon       our experimental kernels for Hopper (`experimental/attention_gluon`), which no GPU has run: by name alone
    flash       torch's FlashAttention-2 operator: bf16 and fp16, rounds partial results
    cudnn       torch's cuDNN operator: as flash, head dimensions up to 128
    flash-attn, fa3, fa4   FlashAttention-2, 3 and 4 where their packages are installed (`attention_flash`): as flash,
                but with a deterministic backward
    auto        what was fastest on this kind of GPU (`attention_choice`); on a CPU cpu; fp64: reference while small,
                else blockwise. The choice is logged once, by the logger longreach.attention

All but flash and cudnn sum in a fixed order, or do so when `deterministic` asks for it, so that two runs are bitwise
equal; `deterministic` refuses those two (auto passes them over). Sums are fp32 (fp64 for fp64 inputs); asking for an fp32 `out_dtype` or `grad_dtype` of bf16 inputs
gives unrounded partials. Autocast is ignored.
Not differentiable by autograd: callers wrap forward and backward in one autograd function of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from . import attention_cuda, attention_flash
from . import attention_dense as dense
from .attention_choice import BACKENDS as BACKENDS
from .attention_choice import ROW_BACKENDS, choose, compute_dtype, gluon_backend, triton_backend
from .segments import Rectangle, Side, assemble, plan

Lengths = Tensor | Sequence[int]

_FORWARD = {
    "reference": dense.reference_forward,
    "blockwise": dense.blockwise_forward,
    "cpu": dense.cpu_forward,
    "cudnn": attention_cuda.cudnn_forward,
}
_BACKWARD = {
    "reference": dense.reference_backward,
    "blockwise": dense.blockwise_backward,
    "cpu": dense.cpu_backward,
    "cudnn": attention_cuda.cudnn_backward,
}
_ROW_FORWARD = {
    "flash": attention_cuda.flash_forward,
    "triton": lambda *arguments: triton_backend().forward(*arguments),
    "gluon": lambda *arguments: gluon_backend().forward(*arguments),
    **{name: partial(attention_flash.forward, name) for name in attention_flash.PACKAGES},
}
_ROW_BACKWARD = {
    "flash": attention_cuda.flash_backward,
    "triton": lambda *arguments: triton_backend().backward(*arguments, deterministic=True),  # it always is
    "gluon": lambda *arguments: gluon_backend().backward(*arguments, deterministic=True),
    **{name: partial(attention_flash.backward, name) for name in attention_flash.PACKAGES},
}


@dataclass(frozen=True)
class _Call:
    """One checked call: bounds of the segments, and its scale."""

    bounds_q: tuple[int, ...]
    bounds_k: tuple[int, ...]
    causal: bool
    scale: float

    @property
    def largest(self) -> int:
        """Scores of the largest segment, one head."""
        return max((b - a) * (d - c) for a, b, c, d in self.segments)

    @property
    def segments(self) -> list[tuple[int, int, int, int]]:
        """(first query, last query + 1, first key, last key + 1) of each segment."""
        return [(*q, *k) for q, k in zip(pairwise(self.bounds_q), pairwise(self.bounds_k), strict=True)]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of q [T, H, E] over k, v [S, K, E], segment by segment -> (out [T, H, E], lse [H, T]).

    `cu_seqlens_*` are cumulative lengths from 0 (n + 1 entries; lists or CPU tensors spare a device a sync): query
    segment i sees key segment i and no other. Left out, a side is one segment; causal, the keys follow the queries.
    Segments may be empty; a query without keys gets out = 0 and lse = -inf. `scale` is 1 / sqrt(E) unless given,
    `out_dtype` q's dtype; lse is fp32 (fp64 for fp64). Raises ValueError for shapes that don't fit, for causal
    segments of unequal length, and for a backend that can't do the call (it names one that can).
    """
    call = _check(q, k, v, causal, scale, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    name = choose(backend, "forward", q, call.largest, deterministic)
    out_dtype = out_dtype or q.dtype
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if name in ROW_BACKENDS:
            return _ROW_FORWARD[name](q, k, v, call.bounds_q, call.bounds_k, causal, call.scale, out_dtype)
        dtype = compute_dtype(name, q, out_dtype)
        outs, lses = [], []
        for rect in _plan(call, name):
            b_q, b_k, b_v = (side.take(x).to(dtype) for side, x in ((rect.q, q), (rect.k, k), (rect.k, v)))
            b_out, b_lse = _FORWARD[name](b_q, b_k, b_v, causal, call.scale)
            outs.append((rect.q, b_out))
            lses.append((rect.q, b_lse))
        lse_dtype = dense.accumulation_dtype(q.dtype)
        lse_TH = assemble(lses, q.shape[:2], lse_dtype, q, -math.inf)
        return assemble(outs, q.shape, out_dtype, q, 0.0), lse_TH.t().contiguous()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    grad_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq [T, H, E], dk, dv [S, K, E]) for the keys of this call, given dout, out [T, H, E] and lse [H, T].

    out and lse may come from `merge`: each part's backward is then called with the same merged pair, and the parts'
    gradients add up. Ask for `grad_dtype=torch.float32` where such a sum follows (default: q's dtype). Other
    arguments and errors as in `forward`.
    """
    call = _check(q, k, v, causal, scale, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    if dout.shape != q.shape or out.shape != q.shape or lse.shape != (q.shape[1], q.shape[0]):
        raise ValueError(
            f"dout {tuple(dout.shape)} and out {tuple(out.shape)} must have q's shape {tuple(q.shape)}, "
            f"and lse {tuple(lse.shape)} must be [H, T] = {(q.shape[1], q.shape[0])}"
        )
    name = choose(backend, "backward", q, call.largest, deterministic)
    grad_dtype = grad_dtype or q.dtype
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if name in ROW_BACKENDS:
            tensors, bounds = (dout, q, k, v, out, lse), (call.bounds_q, call.bounds_k)
            options = {"deterministic": deterministic} if name in attention_flash.PACKAGES else {}
            return _ROW_BACKWARD[name](*tensors, *bounds, causal, call.scale, grad_dtype, **options)
        return _by_rectangles(call, name, dout, q, k, v, out, lse, grad_dtype)


def _by_rectangles(
    call: _Call,
    name: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(name, q, torch.promote_types(grad_dtype, out.dtype))
    lse_TH = lse.t().to(dense.accumulation_dtype(dtype))
    dqs, dks, dvs = [], [], []
    for rect in _plan(call, name):
        b_do, b_q, b_out = (rect.q.take(x).to(dtype) for x in (dout, q, out))
        b_k, b_v = (rect.k.take(x).to(dtype) for x in (k, v))
        b_lse = rect.q.take(lse_TH, fill=math.inf)
        dq, dk, dv = _BACKWARD[name](b_do, b_q, b_k, b_v, b_out, b_lse, call.causal, call.scale)
        dqs.append((rect.q, dq))
        dks.append((rect.k, dk))
        dvs.append((rect.k, dv))
    parts = ((dqs, q), (dks, k), (dvs, v))
    dq, dk, dv = (assemble(grads, x.shape, grad_dtype, x, 0.0) for grads, x in parts)
    return dq, dk, dv


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join the attention of the same queries over two disjoint key sets: out [T, H, E], lse [H, T].

    out = sum_i exp(lse_i - lse) out_i with lse = log(exp lse_a + exp lse_b). A side without keys (lse = -inf) is left
    out exactly: the other side returns bit for bit, whatever the empty one's out holds. Sums in lse's dtype and
    returns the wider of the two dtypes of out.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros_like(out_a, dtype=lse.dtype)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        # NaN, hence not > 0, where both sides are empty
        weight = (part_lse - lse).exp().t().unsqueeze(-1)
        out = out + torch.where(weight > 0, part * weight, 0)
    return out.to(torch.promote_types(out_a.dtype, out_b.dtype)), lse


def _plan(call: _Call, name: str) -> tuple[Rectangle, ...]:
    if name != "reference":
        return plan(call.bounds_q, call.bounds_k, call.causal)
    # the oracle shares no layout with what it judges: each segment alone
    return tuple(Rectangle(Side(1, b - a, a), Side(1, d - c, c)) for a, b, c, d in call.segments if b > a and d > c)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    cu_seqlens: tuple[Lengths | None, Lengths | None],
    max_seqlens: tuple[int | None, int | None],
) -> _Call:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention needs q [T, H, E] and k, v [S, K, E]; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device) or not q.is_floating_point():
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share one floating dtype and one device; got {found}")
    bounds_q = _bounds(cu_seqlens[0], q.shape[0], max_seqlens[0], "q")
    follows = causal and cu_seqlens[1] is None and k.shape[0] == q.shape[0]
    bounds_k = bounds_q if follows else _bounds(cu_seqlens[1], k.shape[0], max_seqlens[1], "k")
    if len(bounds_q) != len(bounds_k):
        raise ValueError(
            f"{len(bounds_q) - 1} query segments against {len(bounds_k) - 1} key segments: give one for one"
        )
    if causal and bounds_q != bounds_k:
        raise ValueError(
            "causal attention needs equal query and key lengths in each segment; use causal=False for others"
        )
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    return _Call(bounds_q, bounds_k, causal, scale)


def _bounds(lengths: Lengths | None, total: int, longest: int | None, side: str) -> tuple[int, ...]:
    if lengths is None:
        bounds = (0, total)
    else:
        bounds = tuple(lengths.tolist() if isinstance(lengths, Tensor) else lengths)
    steps = [after - before for before, after in pairwise(bounds)]
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != total or any(step < 0 for step in steps):
        raise ValueError(f"cu_seqlens_{side} must rise from 0 to the {total} tokens of {side}; got {bounds[:8]}...")
    if longest is not None and any(step > longest for step in steps):
        raise ValueError(
            f"max_seqlen_{side} is {longest}, but a segment has {max(steps)} tokens: raise it or leave it out"
        )
    return bounds
