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
    auto        cpu for fp32, bf16 and fp16 on a CPU; elsewhere blockwise; fp64: reference while small, else blockwise

Every backend sums in a fixed order, so two runs are bitwise equal and `deterministic` has nothing to change yet. Sums
are fp32 (fp64 for fp64 inputs); asking for an fp32 `out_dtype` or `grad_dtype` of bf16 inputs gives unrounded partials.
Not differentiable by autograd: callers wrap forward and backward in one autograd function of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from . import attention_dense as dense
from .segments import Rectangle, Side, assemble, plan

Lengths = Tensor | Sequence[int]

BACKENDS = ("auto", "reference", "blockwise", "cpu")
_FORWARD = {
    "reference": dense.reference_forward,
    "blockwise": dense.blockwise_forward,
    "cpu": dense.cpu_forward,
}
_BACKWARD = {
    "reference": dense.reference_backward,
    "blockwise": dense.blockwise_backward,
    "cpu": dense.cpu_backward,
}
SMALL_SCORES = 1 << 22
"""fp64 `auto` takes the reference up to this many scores in its largest segment, all heads counted."""


@dataclass(frozen=True)
class _Call:
    """One checked call: bounds of the segments, scale, and the backend that will do it."""

    bounds_q: tuple[int, ...]
    bounds_k: tuple[int, ...]
    causal: bool
    scale: float
    backend: str

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
    call = _check(q, k, v, causal, scale, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), backend)
    out_dtype = out_dtype or q.dtype
    # the fused operator rounds its result to its inputs' dtype: partials asked for in fp32 are computed in fp32
    dtype = torch.promote_types(q.dtype, out_dtype)
    with torch.no_grad():
        outs, lses = [], []
        for rect in _plan(call):
            b_q, b_k, b_v = (side.take(x).to(dtype) for side, x in ((rect.q, q), (rect.k, k), (rect.k, v)))
            b_out, b_lse = _FORWARD[call.backend](b_q, b_k, b_v, causal, call.scale)
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
    call = _check(q, k, v, causal, scale, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), backend)
    if dout.shape != q.shape or out.shape != q.shape or lse.shape != (q.shape[1], q.shape[0]):
        raise ValueError(
            f"dout {tuple(dout.shape)} and out {tuple(out.shape)} must have q's shape {tuple(q.shape)}, "
            f"and lse {tuple(lse.shape)} must be [H, T] = {(q.shape[1], q.shape[0])}"
        )
    grad_dtype = grad_dtype or q.dtype
    dtype = torch.promote_types(torch.promote_types(q.dtype, grad_dtype), out.dtype)
    with torch.no_grad():
        lse_TH = lse.t().to(dense.accumulation_dtype(dtype))
        dqs, dks, dvs = [], [], []
        for rect in _plan(call):
            b_do, b_q, b_out = (rect.q.take(x).to(dtype) for x in (dout, q, out))
            b_k, b_v = (rect.k.take(x).to(dtype) for x in (k, v))
            b_lse = rect.q.take(lse_TH, fill=math.inf)
            dq, dk, dv = _BACKWARD[call.backend](b_do, b_q, b_k, b_v, b_out, b_lse, causal, call.scale)
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


def _plan(call: _Call) -> tuple[Rectangle, ...]:
    if call.backend != "reference":
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
    backend: str,
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
    call = _Call(bounds_q, bounds_k, causal, scale, backend)
    return replace(call, backend=_choose(call, q))


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


def _choose(call: _Call, q: Tensor) -> str:
    backend, on_cpu = call.backend, q.device.type == "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if backend == "cpu" and not on_cpu:
        raise ValueError(f"attention backend 'cpu' needs CPU tensors, got {q.device}: use 'blockwise' or 'auto'")
    if backend != "auto":
        return backend
    if q.dtype != torch.float64:
        return "cpu" if on_cpu else "blockwise"
    largest = max((b - a) * (d - c) for a, b, c, d in call.segments)
    return "reference" if largest * q.shape[1] <= SMALL_SCORES else "blockwise"
