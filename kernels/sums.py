"""Gradients of the two sides of scores x = left right^T, summed over blocks of dx and rounded once.

A block dx [r, c] adds dx right[c] to rows r of the left side's gradient and dx^T left[r] to rows c of the right side's.
Going through blocks in one order, one side is finished before the next of its rows begins (its sum is as large as a
block), the other comes back to each of its rows (its sum is as large as itself). Wide sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .products import add_product, product
from .scores import Scores


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool = False
    low_hidden: bool = False
    low_weight: bool = False

    @property
    def left(self) -> bool:
        return self.hidden or self.low_hidden

    @property
    def right(self) -> bool:
        return self.weight or self.low_weight


class Gradients(NamedTuple):
    """In the dtype of what they belong to; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low_hidden: Tensor | None
    low_weight: Tensor | None


class Blocks(NamedTuple):
    """Row and vocabulary slices of dx in the order they are made."""

    slices: list[tuple[slice, slice]]
    left_whole: bool
    """The left side's rows come back: their sum is kept whole."""
    right_whole: bool


def blocks(n: int, vocab: int, rows: int, columns: int, *, rows_first: bool) -> Blocks:
    """Blocks of at most rows x columns, rows outermost or the vocabulary."""
    r = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
    c = [slice(j, min(j + columns, vocab)) for j in range(0, vocab, columns)]
    slices = [(i, j) for i in r for j in c] if rows_first else [(i, j) for j in c for i in r]
    return Blocks(slices, not rows_first and len(c) > 1, rows_first and len(r) > 1)


class Sum:
    """One gradient [n, k] of `dtype`: its rows are added to in blocks, in `wide`."""

    def __init__(
        self, n: int, like: Tensor, dtype: torch.dtype, wide: torch.dtype, *, whole: bool, unit: Tensor | None
    ) -> None:
        self.n, self.dtype, self.wide, self.whole, self.unit = n, dtype, wide, whole, unit
        self.shape, self.device = (n, like.shape[1]), like.device
        # whole: the wide sum itself. Else the result, made when a first block of rows is rounded into it.
        self.made = torch.zeros(self.shape, dtype=wide, device=self.device) if whole else None
        self.rows: slice | None = None
        self.total: Tensor | None = None

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """made[rows] += left right."""
        if self.made is not None and self.whole:
            add_product(self.made[rows], left, right)
        elif self.rows == rows and self.total is not None:
            add_product(self.total, left, right)
        else:
            self._flush()
            self.rows, self.total = rows, product(left, right, self.wide)

    def _flush(self) -> None:
        """Rounds the block of rows at hand into the result."""
        if self.rows is None or self.total is None:
            return
        if self.made is None:
            self.made = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        self.made[self.rows] = (self.total if self.unit is None else self.total.mul_(self.unit)).to(self.dtype)
        self.rows = self.total = None

    def result(self, scale: Tensor | None = None) -> Tensor:
        """The gradient, times `scale` (0-d): before it is rounded where the wide sum of all of it is still there."""
        if not self.whole and self.made is None and self.rows == slice(0, self.n) and self.total is not None:
            self.made, self.rows, self.whole = self.total, None, True
        self._flush()
        if self.made is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for factor in (scale, self.unit if self.whole else None):
            if factor is not None:
                self.made *= factor.to(self.made.dtype)
        return self.made.to(self.dtype)


class Sums:
    """The gradients of `Scores`, from blocks of dx in `unit`s (a 0-d power of two, so that fp16 holds small ones)."""

    def __init__(
        self,
        n: int,
        scores: Scores,
        wanted: Wanted,
        *,
        left_whole: bool,
        right_whole: bool,
        unit: Tensor | None = None,
        wide_left: bool = False,
    ) -> None:
        """For `n` rows of `scores`, of which only widths and dtypes are read; `wide_left` isn't rounded at the end."""
        vocab, wide = scores.vocab, scores.dtype

        def left(like: Tensor | None, on: bool) -> Sum | None:
            if like is None or not on:
                return None
            return Sum(n, like, wide if wide_left else like.dtype, wide, whole=left_whole, unit=unit)

        def right(like: Tensor | None, on: bool) -> Sum | None:
            return None if like is None or not on else Sum(vocab, like, like.dtype, wide, whole=right_whole, unit=unit)

        self.hidden, self.low_hidden = left(scores.hidden, wanted.hidden), left(scores.low_hidden, wanted.low_hidden)
        self.weight, self.low_weight = right(scores.weight, wanted.weight), right(scores.low_weight, wanted.low_weight)
        self.unit, self.bias = unit, None
        if wanted.bias and scores.bias is not None:
            self.bias = torch.zeros(vocab, dtype=wide, device=scores.hidden.device)
            self.bias_dtype = scores.bias.dtype

    def add(self, dx: Tensor, scores: Scores, rows: slice, columns: slice) -> None:
        """The block dx of `rows` and `columns`; `scores` are those of its rows alone."""
        if self.bias is not None:
            self.bias[columns] += dx.sum(0, dtype=self.bias.dtype)
        sides = ((self.hidden, self.weight), (self.low_hidden, self.low_weight))
        for (left, right), (into_left, into_right) in zip(scores.products(), sides, strict=False):
            if into_left is not None:
                into_left.add(rows, dx, right[columns])
            if into_right is not None:
                into_right.add(columns, dx.t(), left)

    def gradients(self, scale: Tensor | None = None, *, rows: Tensor, n: int) -> Gradients:
        """What was wanted, times `scale` (0-d); the rows of the left side are the `rows` of n, the others zero."""
        sums = (self.hidden, self.weight, self.low_hidden, self.low_weight)
        hidden, weight, low_hidden, low_weight = (None if x is None else x.result(scale) for x in sums)
        bias = self.bias
        if bias is not None:
            for factor in (scale, self.unit):
                bias = bias if factor is None else bias * factor.to(bias.dtype)
            bias = bias.to(self.bias_dtype)
        return Gradients(_spread(hidden, rows, n), weight, bias, _spread(low_hidden, rows, n), low_weight)


def _spread(made: Tensor | None, rows: Tensor, n: int) -> Tensor | None:
    if made is None or len(rows) == n:
        return made
    return made.new_zeros(n, made.shape[1]).index_copy_(0, rows, made)
