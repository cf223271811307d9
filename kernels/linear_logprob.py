"""Log-probabilities and entropies straight from hidden states; the logits of a row exist for one chunk at a time.

    x = softcap(h W^T + b),  softcap(x) = c tanh(x / c),  z = x / T
    lse = log sum_j exp z_j,  logp = z_target - lse,  entropy = lse - sum_j p_j z_j,  p = exp(z - lse)

    dz_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy) + l p_j       with g, h, l the upstream gradients
    dx = dz / T (1 - (x / c)^2),  dh = dx W,  dW = dx^T h,  db = sum dx

Natural log; hidden [N, D], weight [V, D], targets [N]. 2 N D V operations forward and 6 f N D V backward (the
recomputed scores included), f being the share of rows with a gradient: rows whose upstream gradients are all zero are
left out. Scores and sums are fp32 (fp64 for fp64 inputs) and dW is rounded once. At most CHUNK_BYTES of scores and
their like are alive, whatever N is; the weight is read once per chunk and pass. What it gives up: the scores cross
memory several times, which a fused kernel avoids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKENDS = ("auto", "reference", "chunked")
CHUNK_BYTES = 64 << 20
"""Budget of one chunk's [rows, V] buffers: large enough that the products stay efficient at 256 rows of 32K entries."""
CHUNK_BUFFERS = 3
"""Scores, probabilities, and in the backward of a soft-cap its slope."""
TILE = 8192
"""Vocabulary entries whose half-precision weights are widened at once on a CPU."""


class LogProbs(NamedTuple):
    """Of z, natural log, each [N] in fp32 (fp64 for fp64 inputs); all three are differentiable."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of each target, entropy and lse of softmax(softcap(hidden weight^T + bias) / temperature).

    hidden [N, D] and weight [V, D] floating, targets [N] integers in [0, V), bias [V], temperature a float or [N] (no
    gradient flows into it). Gradients go to hidden, weight and bias in their own dtypes. N = 0 is legal. Deterministic:
    chunks follow one another in a fixed order. Raises ValueError for shapes that don't fit, targets outside the
    vocabulary, temperature or softcap <= 0, an unknown backend, and a sharded (DTensor) input.
    """
    _check(hidden, weight, targets, bias, temperature, softcap, backend)
    if backend == "reference":
        return _reference(hidden, weight, targets, bias, temperature, softcap)
    return LogProbs(*_Chunked.apply(hidden, weight, targets, bias, temperature, softcap))


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> LogProbs:
    dtype = _dtype(hidden, weight)
    x = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        x = x + bias.to(dtype)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    z = x / (temperature.to(dtype).unsqueeze(1) if isinstance(temperature, Tensor) else temperature)
    logps = z.log_softmax(-1)
    logp = logps.gather(1, targets.long().unsqueeze(1)).squeeze(1)
    return LogProbs(logp, -(logps.exp() * logps).sum(-1), z.logsumexp(-1))


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def _rows_per_chunk(vocab: int, dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (CHUNK_BUFFERS * vocab * dtype.itemsize))


def _tiles(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of the vocabulary: whole where the weight is used as it is, tiles where it is widened on the way."""
    step = weight.shape[0] if weight.dtype == dtype else TILE
    return [slice(i, min(i + step, weight.shape[0])) for i in range(0, weight.shape[0], step)]


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[n, V] = hidden weight^T + bias, summed and kept in `dtype`."""
    if weight.is_cuda and hidden.dtype == weight.dtype != dtype:
        # cuBLAS sums in fp32 and needs no widened copies for it
        scores = torch.mm(hidden, weight.t(), out_dtype=dtype)
    else:
        parts = [hidden.to(dtype) @ weight[tile].to(dtype).t() for tile in _tiles(weight, dtype)]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return scores if bias is None else scores.add_(bias.to(dtype))


def _transform(scores: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
    """z of the module's formula, in place."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.div_(temperature)


class _Chunked(torch.autograd.Function):
    """Chunks of rows; the backward computes a chunk's scores again instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperature: float | Tensor,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, n = _dtype(hidden, weight), hidden.shape[0]
        if isinstance(temperature, Tensor):
            heat = temperature.detach().to(dtype)
        else:
            heat = torch.full((n,), temperature, dtype=dtype, device=hidden.device)
        peak, log_sum, logp, entropy = (torch.empty(n, dtype=dtype, device=hidden.device) for _ in range(4))
        step = _rows_per_chunk(weight.shape[0], dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, n, step):
                rows = slice(i, min(i + step, n))
                z = _transform(_scores(hidden[rows], weight, bias, dtype), heat[rows].unsqueeze(1), softcap)
                peak[rows] = z.amax(1)
                z.sub_(peak[rows].unsqueeze(1))
                # relative to the peak, so that a log-prob near zero keeps its digits
                target = z.gather(1, targets[rows].long().unsqueeze(1)).squeeze(1)
                p = z.exp()
                total = p.sum(1)
                log_sum[rows] = total.log()
                logp[rows] = target - log_sum[rows]
                entropy[rows] = log_sum[rows] - p.mul_(z).sum(1) / total
                del z, p
        ctx.save_for_backward(hidden, weight, targets, bias, heat, peak, log_sum, entropy)
        ctx.softcap = softcap
        return logp, entropy, peak + log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        hidden, weight, _, bias, *_ = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        dtype = _dtype(hidden, weight)
        dhidden = torch.zeros_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        live = torch.stack([gradient != 0 for gradient in upstream]).any(0).nonzero().squeeze(1)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in live.split(_rows_per_chunk(weight.shape[0], dtype)):
                h = hidden[rows]
                dx = _score_gradient(ctx, rows, h, [gradient[rows] for gradient in upstream])
                if dbias is not None:
                    dbias += dx.sum(0)
                if dhidden is not None:
                    dhidden[rows] = _into_hidden(dx, weight).to(hidden.dtype)
                if dweight is not None:
                    # in the promoted dtype on every device: the sum over chunks is rounded once, at the end
                    dweight.addmm_(dx.t(), h.to(dtype))
                del dx
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None,
            None if dbias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def _score_gradient(ctx: Any, rows: Tensor, h: Tensor, upstream: list[Tensor]) -> Tensor:
    """dx [n, V] of the module's formula for some rows, with two buffers of that size."""
    hidden, weight, targets, bias, heat, peak, log_sum, entropy = ctx.saved_tensors
    dtype = _dtype(hidden, weight)
    b_heat = heat[rows].unsqueeze(1)
    z = _transform(_scores(h, weight, bias, dtype), b_heat, ctx.softcap)
    squash = None if ctx.softcap is None else (z * b_heat).div_(ctx.softcap).square_().neg_().add_(1)
    z.sub_(peak[rows].unsqueeze(1)).sub_(log_sum[rows].unsqueeze(1))
    g, h_up, l_up = (gradient.unsqueeze(1) for gradient in upstream)
    p = z.exp()
    # dz = p (l - g - h (log p + entropy)) + g 1[target]
    dz = z.add_(entropy[rows].unsqueeze(1)).mul_(-h_up).add_(l_up - g).mul_(p)
    dz.scatter_add_(1, targets[rows].long().unsqueeze(1), g)
    dz.div_(b_heat)
    return dz if squash is None else dz.mul_(squash)


def _into_hidden(dx: Tensor, weight: Tensor) -> Tensor:
    """dx W [n, D], summed over the vocabulary in dx's dtype."""
    tiles = _tiles(weight, dx.dtype)
    total = dx[:, tiles[0]] @ weight[tiles[0]].to(dx.dtype)
    for tile in tiles[1:]:
        total.addmm_(dx[:, tile], weight[tile].to(dx.dtype))
    return total


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    backend: str,
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown linear_logprob backend {backend!r}: choose from {', '.join(BACKENDS)}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if hasattr(tensor, "placements"):
            raise ValueError(
                f"{name} is a DTensor: its shards would be taken for the whole. Gather it first (full_tensor()) or "
                "run inside the module whose parameters FSDP has gathered"
            )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"linear_logprob needs hidden [N, D] and weight [V, D]; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    n, vocab = hidden.shape[0], weight.shape[0]
    if targets.shape != (n,) or targets.is_floating_point():
        raise ValueError(f"targets must be {n} integers; got {tuple(targets.shape)} of {targets.dtype}")
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias must be [V] = [{vocab}]; got {tuple(bias.shape)}")
    if n and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ValueError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, outside the vocabulary of {vocab}: "
            "drop ignored rows before the call instead of marking them"
        )
    if isinstance(temperature, Tensor):
        if temperature.shape != (n,) or not bool((temperature > 0).all()):
            raise ValueError(f"temperature must be a positive float or {n} positive values, one a row")
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy scores are those of temperature=1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; leave it out for none")
