"""The scores of rows over a vocabulary, and what a softmax needs of them; backends make them, nothing here is [N, V].

    x = softcap(h W^T + a B^T + b),  softcap(x) = c tanh(x / c),  z = x / T

[a B^T] is a low-rank head's second product (LoRA: a = scale h A^T), computed beside W, never merged into it. W may be a
part of the vocabulary (a tile, or one rank's shard): then each part gives a `Partial`, and `merge` puts them together
in the order they are handed in, so that the result doesn't depend on who computed which part when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What z is made of. `temperature` is [N] in the result's dtype; `first` is the id of the weight's first row."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    temperature: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    low_hidden: Tensor | None = None
    low_weight: Tensor | None = None
    first: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of sums and results: fp64 if an input is, else fp32."""
        wide = torch.float64 in (self.hidden.dtype, self.weight.dtype)
        return torch.float64 if wide else torch.float32

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def rows(self, rows: Tensor | slice) -> Scores:
        low = None if self.low_hidden is None else self.low_hidden[rows]
        return replace(
            self,
            hidden=self.hidden[rows],
            targets=self.targets[rows],
            temperature=self.temperature[rows],
            low_hidden=low,
        )

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """The (left [N, k], right [V, k]) whose products left right^T are summed."""
        if self.low_hidden is None or self.low_weight is None:
            return [(self.hidden, self.weight)]
        return [(self.hidden, self.weight), (self.low_hidden, self.low_weight)]


class Partial(NamedTuple):
    """Of the z of one part of the vocabulary, each [N]: exact to merge, four numbers a row to send."""

    peak: Tensor
    """max z; -inf for a part without entries."""
    total: Tensor
    """sum of exp(z - peak)."""
    weighted: Tensor
    """sum of exp(z - peak) (z - peak)."""
    target: Tensor
    """z of the target, -inf where it lies in another part."""


class Stats(NamedTuple):
    """Of the whole vocabulary, each [N]. lse = peak + log_sum, kept apart: where the top z is large, their sum has
    already lost the digits that tell p from 1."""

    peak: Tensor
    log_sum: Tensor
    logp: Tensor
    entropy: Tensor

    def rows(self, rows: Tensor | slice) -> Stats:
        return Stats(*(x[rows] for x in self))


class Upstream(NamedTuple):
    """Gradients of the loss by logp, entropy and lse, each [N]."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor

    def rows(self, rows: Tensor | slice) -> Upstream:
        return Upstream(*(x[rows] for x in self))

    def live(self) -> Tensor:
        """Indices of the rows that have a gradient at all."""
        return ((self.logp != 0) | (self.entropy != 0) | (self.lse != 0)).nonzero().squeeze(1)


def merge(parts: Sequence[Partial]) -> Partial:
    """The parts of a vocabulary as one, added in their order."""
    if len(parts) == 1:
        return parts[0]
    peak = torch.stack([part.peak for part in parts]).amax(0)
    total, weighted = torch.zeros_like(peak), torch.zeros_like(peak)
    for part in parts:
        # a part whose entries are all -inf weighs nothing, and -inf - -inf must not arise
        shift = torch.where(part.peak == -torch.inf, 0.0, part.peak - peak)
        scale = torch.where(part.peak == -torch.inf, 0.0, shift.exp())
        total += part.total * scale
        weighted += (part.weighted + part.total * shift) * scale
    return Partial(peak, total, weighted, torch.stack([part.target for part in parts]).amax(0))


def finish(partial: Partial) -> Stats:
    """Log-probability and entropy of the merged whole."""
    log_sum = partial.total.log()
    # relative to the peak, so that a log-prob near zero keeps its digits
    logp = (partial.target - partial.peak) - log_sum
    return Stats(partial.peak, log_sum, logp, log_sum - partial.weighted / partial.total)
