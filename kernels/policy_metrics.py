"""Means that can be added over micro-batches, the form of every metric of a policy loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


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


def means(marks: Mapping[str, Tensor], weight: Tensor) -> dict[str, Mean]:
    """The weighted mean of each mark [N]; a mask gives the share of tokens that it marks."""
    count = weight.sum()
    return {name: Mean((mark.to(weight.dtype) * weight).sum(), count) for name, mark in marks.items()}
