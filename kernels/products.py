"""Matrix products that are summed and kept in a wider dtype than their factors', without widened copies where possible.

cuBLAS sums half-precision products in fp32 and can hand the sum out unrounded; other devices get their factors widened,
which is why callers on a CPU hand in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gpu import on_gpu

TILE = 8192
"""Rows of a half-precision factor that are widened at once where they have to be."""


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left [n, k] right [k, m] in `dtype`, summed there."""
    if _unrounded(left, right, dtype):
        return torch.mm(left, right, out_dtype=dtype)
    if left.dtype == right.dtype == dtype:
        return left @ right
    total = torch.zeros(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    add_product(total, left, right)
    return total


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [n, m] += left [n, k] right [k, m], in the dtype of `total`."""
    if _unrounded(left, right, total.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        for i in range(0, right.shape[0], TILE):
            part = slice(i, i + TILE)
            total.addmm_(left[:, part].to(total.dtype), right[part].to(total.dtype))


def _unrounded(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    half = left.dtype in (torch.bfloat16, torch.float16)
    return on_gpu(left) and half and left.dtype == right.dtype and dtype == torch.float32
