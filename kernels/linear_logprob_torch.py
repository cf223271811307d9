"""Scores in plain torch, tile by tile: the backend of CPUs, and of GPUs without Triton.

ROWS rows meet TILE entries at a time, so three buffers of that size are the workspace whatever N and V are, and a
half-precision weight is widened a tile at a time. What it gives up: the scores cross memory several times, which a
fused kernel avoids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import product
from .scores import Partial, Scores, Stats, Upstream, merge

ROWS, TILE = 512, 8192
"""16 MiB of fp32 a buffer: small beside a core's share of memory bandwidth, large enough for efficient products."""
KEPT_BYTES = 256 << 20
"""Budget of a one-pass chunk's scores, which are kept for all V entries."""


def block(scores: Scores, rows_first: bool) -> tuple[int, int]:
    """Rows and entries whose gradients are made at once."""
    del scores, rows_first
    return ROWS, TILE


def chunk_rows(scores: Scores) -> int:
    """Rows of one one-pass chunk."""
    return max(1, KEPT_BYTES // (scores.vocab * scores.dtype.itemsize))


def unit(scores: Scores, upstream: Upstream) -> None:
    """None: dx is made in the result's dtype and needs no scaling."""
    del scores, upstream


def partial(scores: Scores) -> Partial:
    """Partial results of all rows over the weight's entries."""
    made = [_partial(scores.rows(slice(i, i + ROWS))) for i in range(0, len(scores), ROWS)]
    if not made:
        empty = scores.temperature.new_zeros(0)
        return Partial(empty, empty, empty, empty)
    return Partial(*(torch.cat(column) for column in zip(*made, strict=True)))


def _partial(scores: Scores) -> Partial:
    parts = []
    for i in range(0, scores.vocab, TILE):
        z = _scores(scores, i, i + TILE)
        target = _target(scores, z, i)
        peak = z.amax(1)
        z.sub_(_finite(peak).unsqueeze(1))
        p = z.exp()
        parts.append(Partial(peak, p.sum(1), _weighted(p, z).sum(1), target))
        del z, p
    return merge(parts)


def gradient(scores: Scores, stats: Stats, upstream: Upstream, start: int, stop: int) -> Tensor:
    """dL/dx [n, stop - start] of the weight's entries start..stop, in the result's dtype."""
    z = _scores(scores, start, stop)
    return _gradient(scores, stats, upstream, z, start)


def keep(scores: Scores) -> tuple[Partial, Tensor]:
    """Partial results, and what `kept_gradient` makes the gradient from: here z itself, [n, V]."""
    z = torch.empty(len(scores), scores.vocab, dtype=scores.dtype, device=scores.hidden.device)
    parts = []
    for i in range(0, scores.vocab, TILE):
        tile = z[:, i : i + TILE]
        tile.copy_(_scores(scores, i, i + TILE))
        target = _target(scores, tile, i)
        peak = tile.amax(1)
        shifted = tile - _finite(peak).unsqueeze(1)
        p = shifted.exp()
        parts.append(Partial(peak, p.sum(1), _weighted(p, shifted).sum(1), target))
    return merge(parts), z


def kept_gradient(scores: Scores, kept: Tensor, stats: Stats, upstream: Upstream) -> Tensor:
    """dL/dx [n, V], in place of what `keep` kept."""
    for i in range(0, scores.vocab, TILE):
        _gradient(scores, stats, upstream, kept[:, i : i + TILE], i)
    return kept


def _scores(scores: Scores, start: int, stop: int) -> Tensor:
    """z [n, entries start..stop]."""
    made = None
    for left, right in scores.products():
        term = product(left, right[start:stop].t(), scores.dtype)
        made = term if made is None else made.add_(term)
    assert made is not None
    if scores.bias is not None:
        made.add_(scores.bias[start:stop].to(scores.dtype))
    if scores.softcap is not None:
        made.div_(scores.softcap).tanh_().mul_(scores.softcap)
    return made.div_(scores.temperature.unsqueeze(1))


def _target(scores: Scores, z: Tensor, start: int) -> Tensor:
    """z of the targets, -inf where they aren't among these entries."""
    local, inside = _local(scores, start, z.shape[1])
    return torch.where(inside, z.gather(1, local.unsqueeze(1)).squeeze(1), -torch.inf)


def _local(scores: Scores, start: int, count: int) -> tuple[Tensor, Tensor]:
    local = scores.targets.long() - (scores.first + start)
    return local.clamp(0, count - 1), (local >= 0) & (local < count)


def _finite(peak: Tensor) -> Tensor:
    """Entries that a bias of -inf bars may fill a tile: relative to 0 they stay -inf, relative to -inf they were NaN."""
    return torch.where(peak == -torch.inf, 0.0, peak)


def _weighted(p: Tensor, z: Tensor) -> Tensor:
    """p z, 0 where p is: 0 x -inf is NaN; in place of z."""
    return z.masked_fill_(p == 0, 0.0).mul_(p)


def _gradient(scores: Scores, stats: Stats, upstream: Upstream, z: Tensor, start: int) -> Tensor:
    """dL/dx in place of z: dz_j = p_j (l - g - h (log p_j + entropy)) + g [j is the target], then dx = dz slope / T."""
    heat = scores.temperature.unsqueeze(1)
    squash = None if scores.softcap is None else (z * heat).div_(scores.softcap).square_().neg_().add_(1)
    g, h, l_up = (x.unsqueeze(1) for x in upstream)
    z.sub_(stats.peak.unsqueeze(1)).sub_(stats.log_sum.unsqueeze(1))
    p = z.exp()
    z.add_(stats.entropy.unsqueeze(1)).mul_(-h).add_(l_up - g).masked_fill_(p == 0, 0.0).mul_(p)
    local, inside = _local(scores, start, z.shape[1])
    # at the target g (1 - p) is taken from its log-prob: 1 - p of a p near 1 would cancel
    p_target = stats.logp.exp()
    at_target = p_target * (upstream.lse - upstream.entropy * (stats.logp + stats.entropy))
    at_target = torch.where(p_target > 0, at_target, 0.0) - upstream.logp * torch.special.expm1(stats.logp)
    at_target = torch.where(inside, at_target, z.gather(1, local.unsqueeze(1)).squeeze(1))
    z.scatter_(1, local.unsqueeze(1), at_target.unsqueeze(1))
    z.div_(heat)
    return z if squash is None else z.mul_(squash)
