"""Partial results of one layer's attention on one rank, put together as the keys come by.

Forward: each call's (out, lse) is merged into the rank's sums. Backward: each call is handed the merged pair and adds to
the gradient of the queries, and to that of the keys it saw. Sums and partial results are fp32 (fp64 for fp64), whatever
the model computes in, so the error does not grow with the number of parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import attention
from .blocks import Call


@dataclass(frozen=True)
class Kernel:
    """What the calls of a layer share: the scale of its scores, and a backend for each pass."""

    scale: float
    forward: str
    backward: str


def wide(dtype: torch.dtype) -> torch.dtype:
    """What partial results are held in."""
    return torch.promote_types(dtype, torch.float32)


class Merged:
    """Attention of all of a rank's queries over the keys seen so far."""

    def __init__(self, q: Tensor, kernel: Kernel) -> None:
        self.q, self.kernel = q, kernel
        self.out = torch.zeros_like(q, dtype=wide(q.dtype))
        self.lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=self.out.dtype, device=q.device)

    def begin(self, calls: list[Call], k: Tensor, v: Tensor) -> None:
        """The first calls: no two of them have a query in common."""
        for call in calls:
            self.out[call.queries], self.lse[:, call.queries] = self._part(call, k, v)

    def add(self, calls: list[Call], k: Tensor, v: Tensor) -> None:
        for call in calls:
            part = self._part(call, k, v)
            seen = self.out[call.queries], self.lse[:, call.queries]
            out, lse = attention.merge(*seen, *part)
            self.out[call.queries], self.lse[:, call.queries] = out, lse

    def _part(self, call: Call, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention.forward(
            self.q[call.queries], k[call.keys], v[call.keys], **call.arguments(),
            scale=self.kernel.scale, backend=self.kernel.forward, out_dtype=self.out.dtype,
        )  # fmt: skip


class Gradients:
    """Gradients of all of a rank's queries, and of keys and values where they stand, dkv [S, 2, K, E]."""

    def __init__(self, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, kernel: Kernel) -> None:
        self.dout, self.q, self.out, self.lse, self.kernel = dout, q, out, lse, kernel
        self.dq = torch.zeros_like(q, dtype=wide(q.dtype))

    def add(self, calls: list[Call], k: Tensor, v: Tensor, dkv: Tensor) -> None:
        for call in calls:
            at = call.queries
            dq, dk, dv = attention.backward(
                self.dout[at], self.q[at], k[call.keys], v[call.keys], self.out[at], self.lse[:, at],
                **call.arguments(), scale=self.kernel.scale, backend=self.kernel.backward, grad_dtype=self.dq.dtype,
            )  # fmt: skip
            self.dq[at] += dq
            dkv[call.keys, 0] += dk
            dkv[call.keys, 1] += dv

    def keys(self, rows: int, k: Tensor) -> Tensor:
        """Zeros for the gradients of so many keys and values."""
        return k.new_zeros(rows, 2, *k.shape[1:], dtype=self.dq.dtype)
