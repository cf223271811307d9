"""A small Triton matmul, c = a b^T: what the checks' own tests check, break and compile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE: dict[str, Any] = {"ROWS": 32, "COLS": 32, "DEPTH": 16}


@triton.jit
def matmul_kernel(
    p_a, p_b, p_c, n_rows, n_cols, depth, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_row, m_col = o_row < n_rows, o_col < n_cols
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, depth, DEPTH):
        o_depth = start + tl.arange(0, DEPTH)
        m_depth = o_depth < depth
        b_a = tl.load(
            p_a + o_row[:, None].to(tl.int64) * depth + o_depth[None, :], m_row[:, None] & m_depth[None, :], 0.0
        )
        b_b = tl.load(
            p_b + o_col[None, :].to(tl.int64) * depth + o_depth[:, None], m_col[None, :] & m_depth[:, None], 0.0
        )
        total = tl.dot(b_a, b_b, total, input_precision="ieee")
    p_out = p_c + o_row[:, None].to(tl.int64) * n_cols + o_col[None, :]
    tl.store(p_out, total, m_row[:, None] & m_col[None, :])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[N, D] and [V, D] to [N, V] in fp32."""
    (n_rows, depth), n_cols = a.shape, b.shape[0]
    out = torch.empty(n_rows, n_cols)
    grid = (triton.cdiv(n_rows, TILE["ROWS"]), triton.cdiv(n_cols, TILE["COLS"]))
    matmul_kernel[grid](a, b, out, n_rows, n_cols, depth, **TILE)
    return out
