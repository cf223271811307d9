"""The four functions that ring-flash-attn calls, with flash-attn's signatures, results and in-place gradients.

A causal mask is aligned to the last query and key. Sums are fp32 for half precision, as flash-attn's are, and results are
rounded to the inputs' dtype; lse is fp32, fp64 for fp64.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _probabilities(
    q: Tensor, k: Tensor, scale: float, causal: bool, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[H, T, S] and lse [H, T] of one sequence."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("the,she->hts", _wide(q), _wide(k).repeat_interleave(group, 1)) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1 + k.shape[0] - q.shape[0]).bool(), -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse.to(scores.dtype)
    return (scores - lse.unsqueeze(-1)).exp(), lse


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    p, lse = _probabilities(q, k, scale, causal)
    return torch.einsum("hts,she->the", p, _wide(v).repeat_interleave(q.shape[1] // k.shape[1], 1)).to(q.dtype), lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, into: tuple[Tensor, ...], scale: float,
    causal: bool,
) -> None:  # fmt: skip
    (p, _), group = _probabilities(q, k, scale, causal, lse), q.shape[1] // k.shape[1]
    keys, values = (_wide(x).repeat_interleave(group, 1) for x in (k, v))
    delta = (_wide(dout) * _wide(out)).sum(-1).t().unsqueeze(-1)
    ds = p * (torch.einsum("the,she->hts", _wide(dout), values) - delta) * scale
    dk, dv = torch.einsum("hts,the->she", ds, _wide(q)), torch.einsum("hts,the->she", p, _wide(dout))
    dq = torch.einsum("hts,she->the", ds, keys)
    for target, found in zip(into, (dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))), strict=True):
        target.copy_(found)


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Any = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    made = [
        _forward(q[a:b], k[c:d], v[c:d], softmax_scale, causal)
        for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    ]
    return torch.cat([out for out, _ in made]), torch.cat([lse for _, lse in made], 1), None, None


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Any = None, deterministic: bool = False, rng_state: Any = None,
) -> None:  # fmt: skip
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        _backward(
            dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b], softmax_lse[:, a:b], (dq[a:b], dk[c:d], dv[c:d]),
            softmax_scale, causal,
        )  # fmt: skip


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Any = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    made = [_forward(*parts, softmax_scale, causal) for parts in zip(q, k, v, strict=True)]
    return torch.stack([out for out, _ in made]), torch.stack([lse for _, lse in made]), None, None


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, rng_state: Any = None,
) -> None:  # fmt: skip
    for i in range(len(q)):
        _backward(dout[i], q[i], k[i], v[i], out[i], softmax_lse[i], (dq[i], dk[i], dv[i]), softmax_scale, causal)
