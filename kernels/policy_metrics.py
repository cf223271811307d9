"""Means and peaks that can be added over micro-batches, the form of every metric of a policy loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PEAK = "/max"
"""How the name of a mark ends whose greatest value counts, and not its mean."""


@dataclass(frozen=True)
class Mean:
    """A mean that can be added over micro-batches: detached 0-d tensors `total` and `count`."""

    total: Tensor
    count: Tensor

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """total / count; NaN when nothing was counted."""
        return float(self.total / self.count)


@dataclass(frozen=True)
class Peak(Mean):
    """A greatest value, in `total`; two of them add to the greater. `count` says whether there is one at all."""

    def __add__(self, other: Mean) -> Mean:
        return Peak(torch.fmax(self.total, other.total), torch.maximum(self.count, other.count))

    @property
    def value(self) -> float:
        """NaN when nothing was counted."""
        return float(self.total)


def means(marks: Mapping[str, Tensor], weight: Tensor) -> dict[str, Mean]:
    """The weighted mean of each mark [N], or its peak where the name says so; a mask gives the share that it marks."""
    count = weight.sum()
    return {
        name: _peak(mark, weight) if name.endswith(PEAK) else Mean((mark.to(weight.dtype) * weight).sum(), count)
        for name, mark in marks.items()
    }


def _peak(mark: Tensor, weight: Tensor) -> Peak:
    """Of what has a weight at all; without a look at the numbers from the host."""
    counted = weight > 0
    low = mark.new_full((1,), -torch.inf)
    top = torch.cat([torch.where(counted, mark, low), low]).amax()
    return Peak(torch.where(top > low[0], top, torch.nan), counted.any().to(weight.dtype))
