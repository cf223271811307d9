"""Operations and hidden memory of operators, as a trace counts them: attention by the pairs it computes.

Half a square when causal, and no segment's queries meet another's keys. What an operator takes for itself is invisible to
a trace of shapes; for FlashAttention's backward it is added from its source (`SCRATCH`): several GB at 120K tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels import spend as _spend  # registers the operator

del _spend
aten = torch.ops.aten


def attention_pairs(queries: Sequence[int], keys: Sequence[int], causal: bool) -> int:
    """Pairs of a query and a key that cumulative lengths name; causal: without the half above the diagonal."""
    pairs = 0
    for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
        pairs += (b - a) * (b - a + 1) // 2 if causal else (b - a) * (d - c)
    return pairs


def _bounds(cumulative: Tensor) -> list[int]:
    with _disable_current_modes():  # a real tensor: lengths always are
        return cumulative.tolist()


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *others: Any, **_: Any) -> int:
    del k, v
    causal = others[3]
    return 4 * attention_pairs(_bounds(cu_q), _bounds(cu_k), causal) * q.shape[1] * q.shape[2]


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *others: Any,
    **_: Any,
) -> int:  # fmt: skip
    del dout, k, v, out, lse
    causal = others[3]
    return 10 * attention_pairs(_bounds(cu_q), _bounds(cu_k), causal) * q.shape[1] * q.shape[2]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    del v, dropout
    batch, heads, rows, width = q.shape
    pairs = rows * (rows + 1) // 2 if causal else rows * k.shape[2]
    return 4 * batch * heads * width * pairs


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float, causal: bool, **_: Any
) -> int:
    del out, lse
    return _cpu_forward(q, k, v, dropout, causal) * 10 // 4


def _spent(flops: int, *_: Any, **__: Any) -> int:
    return flops


def _product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _added_product(total: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    del total
    return _product(left, right)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.longreach.spend: _spent,
    aten._flash_attention_forward: _flash_forward,
    aten._flash_attention_backward: _flash_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
    aten.mm: _product,  # torch's own formulas don't know the overloads with a wider result
    aten.addmm: _added_product,
    aten.addmm_: _added_product,  # nor the one in place at all
}
"""Operations of attention: 4 E a pair and head forward, 10 E backward, where scores are computed again."""


def _flash_scratch(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any) -> int:
    """FlashAttention-2's own buffers in a backward over segments: fp32 sums of dq, one fp32 a row and head, and with
    grouped keys dk and dv for every query head before they are added up."""
    del dout, v, out, lse
    (tokens, heads, width), (keys, key_heads) = q.shape, k.shape[:2]
    sums = 4 * tokens * heads * (width + 1)
    return sums + (2 * keys * heads * width * q.element_size() if heads != key_heads else 0)


SCRATCH: dict[Any, Callable[..., int]] = {aten._flash_attention_backward: _flash_scratch}
"""Bytes that an operator takes from torch's allocator for itself while it runs."""
