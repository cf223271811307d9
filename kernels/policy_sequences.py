"""Sums and means over the sequence of each token, weighted by what is kept, in a fixed order on every device."""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """N tokens in sequence order: equal neighbouring ids are one sequence, `weight` [N] is what is kept of each token.

    Sums run in fp64 and without atomics: a mean log-ratio is compared with bounds as narrow as 3e-4, after up to 50K
    terms, and must come out the same in every run.
    """

    def __init__(self, ids: Tensor, weight: Tensor) -> None:
        _, self.index, self.lengths = torch.unique_consecutive(ids, return_inverse=True, return_counts=True)
        self.weight = weight
        total = self.sum(torch.ones_like(weight))
        self.counts = torch.where(total > 0, total, 1.0)
        """Kept weight of each token's whole sequence; 1 where nothing of it is kept (its tokens weigh 0)."""

    def sum(self, x: Tensor) -> Tensor:
        """[N]: for each token the weighted sum of x over its sequence."""
        # unsafe: the lengths are counted above; checking them again would make the device wait
        sums = torch.segment_reduce((x * self.weight).double(), "sum", lengths=self.lengths, unsafe=True)
        return sums[self.index].to(self.weight.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """[N]: for each token the weighted mean of x over its sequence; 0 where nothing of it is kept."""
        return self.sum(x) / self.counts
