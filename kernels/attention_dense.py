"""Dense attention on rectangles: what a backend of `attention` supplies.

A backend is two functions on q [B, L, H, E] and k, v [B, S, K, E] (K divides H, query head h reads key head
h // (H / K), keys are never repeated):

    forward(q, k, v, causal, scale)                      -> out [B, L, H, E], lse [B, L, H]
    backward(dout, q, k, v, out, lse, causal, scale)     -> dq, dk, dv

    s = scale q k^T,  lse = log sum exp s,  p = exp(s - lse),  out = p v
    dv = p^T dout,  delta = sum_E dout * out,  ds = p * (dout v^T - delta),  dq = scale ds k,  dk = scale ds^T q

`out` and `lse` of the backward may be those of a larger softmax that these keys are a part of: p and delta are then
the larger one's, and the parts' gradients add up to its gradient. 4 L S H E operations forward and 10 backward, half
of it when causal; `blockwise` holds BLOCK_Q x BLOCK_K scores per head, `cpu` a tile of the fused operator's choosing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_Q, BLOCK_K = 256, 1024

Forward = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B, n, H, E] -> [B, n, K, g, E] in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).unflatten(2, (heads, -1))


def _all_scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[B, K, g, L, S]"""
    scores = torch.einsum("blkge,bske->bkgls", _grouped(q, k.shape[2]), k.to(accumulation_dtype(k.dtype))) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores


def reference_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Forward:
    scores = _all_scores(q, k, causal, scale)
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.einsum("bkgls,bske->blkge", (scores - lse).exp(), v.to(scores.dtype))
    return out.flatten(2, 3), lse.permute(0, 3, 1, 2, 4).flatten(2)


def reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    scores = _all_scores(q, k, causal, scale)
    heads, dtype = k.shape[2], scores.dtype
    query, grad = _grouped(q, heads), _grouped(dout, heads)
    p = (scores - _grouped(lse.unsqueeze(-1), heads).permute(0, 2, 3, 1, 4)).exp()
    delta = (grad * _grouped(out, heads)).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)
    ds = p * (torch.einsum("blkge,bske->bkgls", grad, v.to(dtype)) - delta) * scale
    dq = torch.einsum("bkgls,bske->blkge", ds, k.to(dtype)).flatten(2, 3)
    return dq, torch.einsum("bkgls,blkge->bske", ds, query), torch.einsum("bkgls,blkge->bske", p, grad)


def _fold(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, n, heads * g, E] -> [B * heads, g * n, E]: query heads that share a key head become rows of one matrix."""
    batch, width = x.shape[0], x.shape[3]
    return x.to(dtype).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).reshape(batch * heads, -1, width)


def _unfold(x: Tensor, batch: int, n: int) -> Tensor:
    """The inverse of `_fold`."""
    return x.view(batch, -1, x.shape[1] // n, n, x.shape[2]).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, rows: int, first_q: int, first_k: int, causal: bool, scale: float) -> Tensor:
    """Scores of one block, [B * K, g * rows, columns], with -inf where a key lies after its query."""
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if causal and first_k + k.shape[1] - 1 > first_q:
        o_q = torch.arange(first_q, first_q + rows, device=q.device)
        o_k = torch.arange(first_k, first_k + k.shape[1], device=q.device)
        hidden = (o_k > o_q[:, None]).repeat(q.shape[1] // rows, 1)
        scores.masked_fill_(hidden, -math.inf)
    return scores


def blockwise_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Forward:
    dtype, (batch, length, _, _), (span, heads) = accumulation_dtype(q.dtype), q.shape, k.shape[1:3]
    out = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    for i in range(0, length, BLOCK_Q):
        rows = min(BLOCK_Q, length - i)
        b_q = _fold(q[:, i : i + rows], heads, dtype)
        b_max = b_q.new_full((*b_q.shape[:2], 1), -math.inf)
        b_sum, b_out = torch.zeros_like(b_max), torch.zeros_like(b_q)
        # the first key is visible to every row, so b_max is finite from the first block on
        for j in range(0, min(span, i + rows) if causal else span, BLOCK_K):
            b_k, b_v = (_fold(x[:, j : j + BLOCK_K], heads, dtype) for x in (k, v))
            scores = _scores(b_q, b_k, rows, i, j, causal, scale)
            new_max = torch.maximum(b_max, scores.amax(-1, keepdim=True))
            rescale = torch.exp(b_max - new_max)
            p = scores.sub_(new_max).exp_()
            b_sum = b_sum * rescale + p.sum(-1, keepdim=True)
            b_out = torch.baddbmm(b_out.mul_(rescale), p, b_v)
            b_max = new_max
        out[:, i : i + rows] = _unfold(b_out / b_sum, batch, rows)
        lse[:, i : i + rows] = _unfold(b_max + b_sum.log(), batch, rows).squeeze(-1)
    return out, lse


def blockwise_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    dtype, (batch, length, _, _), (span, heads) = accumulation_dtype(q.dtype), q.shape, k.shape[1:3]
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    dq = torch.zeros_like(q, dtype=dtype)
    dk, dv = torch.empty_like(k, dtype=dtype), torch.empty_like(v, dtype=dtype)
    for j in range(0, span, BLOCK_K):
        b_k, b_v = (_fold(x[:, j : j + BLOCK_K], heads, dtype) for x in (k, v))
        b_dk, b_dv = torch.zeros_like(b_k), torch.zeros_like(b_v)
        # causal: queries before this key block see none of it
        for i in range(j if causal else 0, length, BLOCK_Q):
            rows = min(BLOCK_Q, length - i)
            b_q, b_do = (_fold(x[:, i : i + rows], heads, dtype) for x in (q, dout))
            b_lse = _fold(lse[:, i : i + rows].unsqueeze(-1), heads, dtype)
            b_delta = _fold(delta[:, i : i + rows], heads, dtype)
            p = _scores(b_q, b_k, rows, i, j, causal, scale).sub_(b_lse).exp_()
            b_dv.baddbmm_(p.transpose(1, 2), b_do)
            ds = torch.bmm(b_do, b_v.transpose(1, 2)).sub_(b_delta).mul_(p)
            b_dk.baddbmm_(ds.transpose(1, 2), b_q, alpha=scale)
            dq[:, i : i + rows] += _unfold(torch.bmm(ds, b_k).mul_(scale), batch, rows)
        columns = b_k.shape[1]
        dk[:, j : j + columns] = _unfold(b_dk, batch, columns)
        dv[:, j : j + columns] = _unfold(b_dv, batch, columns)
    return dq, dk, dv


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L, H, E] -> [B, H, L, E] view; the fused operator reads the last dimension as contiguous."""
    x = x.to(dtype).transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Forward:
    query, key, value = (_heads_first(x, q.dtype) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    tensors = [_heads_first(x, q.dtype) for x in (dout, q, k, v, out)]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse.transpose(1, 2), 0.0, causal, scale=scale
    )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv
