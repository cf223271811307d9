"""The Triton backend of `linear_logprob` without its kernels: its buffers and its operations, for tensors without memory.

Chosen in its place while a GPU is pretended (`gpu.pretending`): a trace then sees what the GPU would hold and do. Sizes of
chunks and blocks are the Triton backend's own; `spend` tells a trace of products whose results
never reach memory.
What it gives up: values, and the kernels' own scratch, which is registers and shared memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import linear_logprob_triton as triton_backend
from .gpu import tiles
from .scores import Partial, Scores, Stats, Upstream
from .spend import spend

chunk_rows, block = triton_backend.chunk_rows, triton_backend.block
PART = 128
"""Entries whose partial result is written out: a Hopper tile's half."""
ROW_TERMS = 7
"""fp32 numbers a row that the gradient's kernels read."""


def unit(scores: Scores, upstream: Upstream) -> None:
    """None: fp16, whose gradients would be scaled, isn't traced."""
    del scores, upstream


def partial(scores: Scores) -> Partial:
    """As `linear_logprob_triton.partial`: [N] results, and the parts' before they are merged."""
    n = len(scores)
    merged = _empty(scores, 3, n)
    target = _empty(scores, n)
    for i in range(0, n, triton_backend.PARTIAL_ROWS):
        parts = _parts(scores.rows(slice(i, i + triton_backend.PARTIAL_ROWS)))
        del parts
    return Partial(merged[0], merged[1], merged[2], target)


def keep(scores: Scores) -> tuple[Partial, tuple[Tensor, Tensor]]:
    """As `linear_logprob_triton.keep`: exponentials [n, V] in the inputs' dtype."""
    n = len(scores)
    target = _empty(scores, n)
    kept = _matrix(scores, scores.vocab)
    parts = _parts(scores)
    merged = _empty(scores, 3, n)
    return Partial(merged[0], merged[1], merged[2], target), (kept, parts)


def gradient(scores: Scores, stats: Stats, upstream: Upstream, start: int, stop: int) -> Tensor:
    """As `linear_logprob_triton.gradient`: dL/dx [n, stop - start]."""
    del stats, upstream
    dx = _matrix(scores, stop - start)
    terms = _empty(scores, ROW_TERMS, len(scores))
    _count(scores, stop - start)
    del terms
    return dx


def kept_gradient(scores: Scores, kept: tuple[Tensor, Tensor], stats: Stats, upstream: Upstream) -> Tensor:
    """As `linear_logprob_triton.kept_gradient`: dL/dx [n, V], in place of what `keep` kept."""
    del stats, upstream
    terms = _empty(scores, ROW_TERMS, len(scores))
    del terms
    return kept[0]


def _parts(scores: Scores) -> Tensor:
    _count(scores, scores.vocab)
    return _empty(scores, tiles(scores.vocab, PART), 3, len(scores))


def _count(scores: Scores, columns: int) -> None:
    spend(sum(2 * len(scores) * left.shape[1] * columns for left, _ in scores.products()))


def _empty(scores: Scores, *shape: int) -> Tensor:
    return scores.hidden.new_empty(shape, dtype=torch.float32)


def _matrix(scores: Scores, columns: int) -> Tensor:
    align = 128 // scores.hidden.element_size()
    return scores.hidden.new_empty(len(scores), tiles(columns, align) * align)[:, :columns]
