"""Variable-length segments of a packed row, laid out as a few dense rectangles.

A packed row holds many short segments. One attention call each would cost more in launches than in arithmetic, so
`plan` puts segments of nearly equal length into one rectangle [B, L] (right-padded) that a dense kernel computes at once:

- causal: padded keys stand behind every real query, so the causal mask already hides them;
- full: every key of a rectangle must be real, so only segments of equal key length share one; queries may be padded;
- a padded slot repeats the last token of its own segment, so nothing leaks between segments, not even a NaN. Its
  result is dropped, and in the backward its lse is +inf: its probabilities, hence its gradients, are exactly zero.

What it gives up: up to `SLACK` padded rows per short segment; long segments are padded never, only put side by side.
Plans are numpy, so that a remembered one belongs to no device, no inference mode and no fake-tensor mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PADDABLE, SLACK = 128, 4
"""Segments up to PADDABLE tokens are padded by up to SLACK: more padding, or a gather of longer ones, costs more
than the calls it saves (CPU time of forward and backward, 8 heads of 32, 128 completions of 5 to 24 tokens)."""


@dataclass(frozen=True)
class Side:
    """Where the B x L slots of one rectangle come from: tokens start..start + B * L as they lie, or a gather."""

    count: int
    length: int
    start: int
    source: np.ndarray | None = None
    """[B * L] token of each slot; None when the segments are neighbours of equal length (no copy is made)."""
    slots: np.ndarray | None = None
    """[n] slots that hold a token of their own, in the order of `tokens`; None with `source`."""
    tokens: np.ndarray | None = None

    def take(self, x: Tensor, fill: float | None = None) -> Tensor:
        """[T, ...] -> [B, L, ...]; padded slots repeat a token of their segment, or hold `fill`."""
        if self.source is None:
            rows = x[self.start : self.start + self.count * self.length]
        elif fill is None:
            rows = x.contiguous().index_select(0, _index(self.source, x.device))
        else:
            rows = x.new_full((self.count * self.length, *x.shape[1:]), fill)
            self._move(rows, self.slots, x, self.tokens)
        return rows.unflatten(0, (self.count, self.length))

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write [B, L, ...] back into [T, ...], dropping what padded slots hold."""
        if self.source is None:
            target[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length)).copy_(
                values
            )
        else:
            self._move(target, self.tokens, values.flatten(0, 1), self.slots)

    @staticmethod
    def _move(target: Tensor, to: np.ndarray | None, source: Tensor, at: np.ndarray | None) -> None:
        assert to is not None and at is not None
        picked = source.index_select(0, _index(at, source.device)).to(target.dtype)
        target.index_copy_(0, _index(to, target.device), picked)


@dataclass(frozen=True)
class Rectangle:
    """The query and key sides of one dense call."""

    q: Side
    k: Side


def assemble(
    parts: list[tuple[Side, Tensor]], shape: torch.Size, dtype: torch.dtype, like: Tensor, fill: float
) -> Tensor:
    """One [T, ...] tensor of the rectangles' results; rows that no rectangle holds get `fill`.

    A lone rectangle that is the whole row comes back as the view it is.
    """
    if len(parts) == 1 and parts[0][0].source is None and parts[0][0].count * parts[0][0].length == shape[0]:
        return parts[0][1].flatten(0, 1).to(dtype)
    covered = sum(side.count * side.length if side.tokens is None else len(side.tokens) for side, _ in parts)
    target = like.new_empty(shape, dtype=dtype) if covered == shape[0] else like.new_full(shape, fill, dtype=dtype)
    for side, values in parts:
        side.put(target, values)
    return target


def _index(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _side(bounds: tuple[int, ...], members: list[int]) -> Side:
    starts = np.array([bounds[i] for i in members], dtype=np.int64)
    lengths = np.array([bounds[i + 1] - bounds[i] for i in members], dtype=np.int64)
    longest = int(lengths.max())
    if (lengths == longest).all() and (np.diff(starts) == longest).all():
        return Side(len(members), longest, int(starts[0]))
    within = np.arange(longest, dtype=np.int64)
    source = starts[:, None] + np.minimum(within, lengths[:, None] - 1)
    slots = np.flatnonzero(within < lengths[:, None])
    source = source.reshape(-1)
    return Side(len(members), longest, int(starts[0]), source, slots, source[slots])


@lru_cache(maxsize=64)
def plan(bounds_q: tuple[int, ...], bounds_k: tuple[int, ...], causal: bool) -> tuple[Rectangle, ...]:
    """Rectangles that cover every segment with at least one query and one key (the others have nothing to compute).

    `bounds` are cumulative lengths from 0, one more than there are segments. Remembered, since every layer of a
    model asks for the same plan twice.
    """
    lengths = [
        (bounds_k[i + 1] - bounds_k[i], bounds_q[i + 1] - bounds_q[i], i)
        for i in range(len(bounds_q) - 1)
        if bounds_q[i + 1] > bounds_q[i] and bounds_k[i + 1] > bounds_k[i]
    ]
    groups: list[list[int]] = []
    widest = (0, 0)
    for length_k, length_q, i in sorted(lengths, key=lambda entry: (-entry[0], -entry[1], entry[2])):
        near = widest[1] - length_q <= (SLACK if widest[1] <= PADDABLE else 0)
        if not groups or not near or (not causal and length_k != widest[0]):
            groups.append([])
            widest = (length_k, length_q)
        groups[-1].append(i)
    rectangles = []
    for group in groups:
        side = _side(bounds_q, sorted(group))
        rectangles.append(Rectangle(side, side if causal else _side(bounds_k, sorted(group))))
    return tuple(rectangles)
