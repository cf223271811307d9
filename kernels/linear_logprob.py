"""Log-probabilities and entropies straight from hidden states: no [N, V] tensor, forward or backward.

    x = softcap(h W^T + b),  softcap(x) = c tanh(x / c),  z = x / T
    lse = log sum_j exp z_j,  logp = z_target - lse,  entropy = lse - sum_j p_j z_j,  p = exp(z - lse)

    dz_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy) + l p_j       with g, h, l the upstream gradients
    dx = dz / T (1 - (x / c)^2),  dh = dx W,  dW = dx^T h,  db = sum dx

Natural log; hidden [N, D], weight [V, D], targets [N]. 2 N D V operations forward and 6 f N D V backward (the
recomputed scores included; 4 with a frozen head), f being the share of rows with a gradient: the others are left out.
Scores and sums are fp32 (fp64 for fp64 inputs) and dW is rounded once.

The backward makes dx in blocks and multiplies each twice. Which factor's gradient is summed over blocks, in fp32 beside
the result, is chosen by size: V D sums with rows outermost, n D sums with the vocabulary outermost, none where only
one of the two gradients is wanted. Blocks and their order are fixed, no atomics: run to run the bits are the same.

Backends: `triton` (linear_logprob_triton.py: fused on NVIDIA GPUs), `chunked` (linear_logprob_torch.py: plain torch),
`reference` (below: holds [N, V], any dtype). `auto` is triton for CUDA tensors of one half-precision or fp32 dtype,
else chunked.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from . import linear_logprob_torch
from .gpu import on_gpu, pretended, unsuited
from .scores import Scores, Stats, Upstream, finish
from .sums import Gradients, Sums, Wanted, blocks

BACKENDS = ("auto", "reference", "chunked", "triton")


class LogProbs(NamedTuple):
    """Of z, natural log, each [N] in fp32 (fp64 for fp64 inputs); all three are differentiable."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class LowRank(NamedTuple):
    """A LoRA adapter of the head: W + scale up down, with down [r, D] and up [V, r]; never merged."""

    down: Tensor
    up: Tensor
    scale: float = 1.0


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    lora: LowRank | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of each target, entropy and lse of softmax(softcap(hidden weight^T + bias) / temperature).

    hidden [N, D] and weight [V, D] floating, targets [N] integers in [0, V), bias [V], temperature a float or [N] (no
    gradient flows into it), lora an adapter on the weight. Gradients go to hidden, weight, bias and the adapter in
    their own dtypes. N = 0 is legal. Autocast is ignored: a head in fp32 is computed in fp32. Deterministic; the Triton
    backend gives a row the same bits whatever other rows there are (without an adapter). Raises ValueError for shapes that don't fit,
    targets outside the vocabulary, temperature or softcap <= 0, a backend that is unknown or can't take these tensors,
    and a sharded (DTensor) input.
    """
    check(hidden, weight, targets, bias, temperature, softcap, lora)
    chosen = choose(backend, hidden, weight)
    if chosen == "reference":
        return _reference(hidden, weight, targets, bias, temperature, softcap, lora)
    with torch.autocast(hidden.device.type, enabled=False):
        low = low_rank(hidden, weight, lora, chosen)
        return LogProbs(*_TwoPass.apply(hidden, weight, targets, bias, temperature, softcap, *low, chosen))


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    lora: LowRank | None = None,
) -> LogProbs:
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden.to(dtype) @ weight.to(dtype).t()
        if lora is not None:
            x = x + (hidden.to(dtype) @ lora.down.to(dtype).t() * lora.scale) @ lora.up.to(dtype).t()
        x = x if bias is None else x + bias.to(dtype)
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        z = x / (temperature.to(dtype).unsqueeze(1) if isinstance(temperature, Tensor) else temperature)
        logps = z.log_softmax(-1)
        logp = logps.gather(1, targets.long().unsqueeze(1)).squeeze(1)
        return LogProbs(logp, -torch.xlogy(logps.exp(), logps.exp()).sum(-1), z.logsumexp(-1))


def low_rank(hidden: Tensor, weight: Tensor, lora: LowRank | None, backend: str) -> tuple[Tensor | None, Tensor | None]:
    """a = scale h A^T [N, r] and B [V, r] of the scores' second product; differentiable.

    Triton's product takes factors of one dtype, so there they are rounded to the weight's, as under autocast.
    """
    if lora is None:
        return None, None
    rounded = backend == "triton"
    wide = torch.promote_types(hidden.dtype, lora.down.dtype)
    wide = wide if rounded else torch.promote_types(wide, torch.float32)
    low, up = (hidden.to(wide) @ lora.down.to(wide).t()) * lora.scale, lora.up
    if not rounded:
        return low, up
    # rows of multiples of 16 bytes, or a small rank would cost the whole product its descriptors
    odd = -up.shape[1] % 8
    return pad(low.to(weight.dtype), (0, odd)), pad(up.to(weight.dtype), (0, odd))


def scores_of(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    low_hidden: Tensor | None = None,
    low_weight: Tensor | None = None,
    first: int = 0,
) -> Scores:
    """The arguments of `linear_logprob` as `Scores`, detached."""
    wide = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    if isinstance(temperature, Tensor):
        heat = temperature.detach().to(wide)
    else:
        heat = torch.full((hidden.shape[0],), temperature, dtype=wide, device=hidden.device)
    detached = (None if x is None else x.detach() for x in (hidden, weight, targets, bias, low_hidden, low_weight))
    hidden, weight, targets, bias, low_hidden, low_weight = detached  # pyright: ignore[reportAssignmentType]
    return Scores(hidden, weight, targets, heat, bias, softcap, low_hidden, low_weight, first)


def backend_of(name: str, hidden: Tensor, weight: Tensor) -> ModuleType:
    """The module that computes these scores: partial, keep, gradient, kept_gradient, block, chunk_rows."""
    if choose(name, hidden, weight) == "triton":
        if pretended(hidden):
            from . import linear_logprob_traced

            return linear_logprob_traced
        from . import linear_logprob_triton  # needs Triton, which only this backend does

        return linear_logprob_triton
    return linear_logprob_torch


def choose(name: str, hidden: Tensor, weight: Tensor) -> str:
    """The backend `name` stands for. ValueError if it is unknown or can't take these tensors."""
    if name not in BACKENDS:
        raise ValueError(f"unknown linear_logprob backend {name!r}: choose from {', '.join(BACKENDS)}")
    if name in ("reference", "chunked") or (name == "auto" and not on_gpu(hidden)):
        return "chunked" if name == "auto" else name
    reason = unsuited(hidden, weight)
    if reason is None:
        return "triton"
    if name == "triton":
        raise ValueError(f"linear_logprob's triton backend can't run here: {reason}; backend='chunked' can")
    return "chunked"


class _TwoPass(torch.autograd.Function):
    """The backward computes the scores again instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperature: float | Tensor,
        softcap: float | None,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
        name: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = scores_of(hidden, weight, targets, bias, temperature, softcap, low_hidden, low_weight)
        stats = finish(backend_of(name, hidden, weight).partial(scores))
        ctx.save_for_backward(hidden, weight, targets, bias, scores.temperature, low_hidden, low_weight, *stats)
        ctx.softcap, ctx.name = softcap, name
        return stats.logp, stats.entropy, stats.peak + stats.log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        hidden, weight, targets, bias, heat, low_hidden, low_weight, *stats = ctx.saved_tensors
        scores = Scores(hidden, weight, targets, heat, bias, ctx.softcap, low_hidden, low_weight)
        needs = ctx.needs_input_grad
        wanted = Wanted(needs[0], needs[1], needs[3], needs[6], needs[7])
        with torch.autocast(hidden.device.type, enabled=False):
            backend = backend_of(ctx.name, hidden, weight)
            made = backward(backend, scores, Stats(*stats), Upstream(*upstream), wanted)
        return made.hidden, made.weight, None, made.bias, None, None, made.low_hidden, made.low_weight, None


def backward(
    backend: ModuleType, scores: Scores, stats: Stats, upstream: Upstream, wanted: Wanted, *, wide_left: bool = False
) -> Gradients:
    """All that `wanted` names; rows without an upstream gradient aren't computed and get zero. `wide_left` leaves the
    hidden side unrounded, for sums over ranks."""
    live = upstream.live()
    some = len(live) < len(scores)
    n, scores_live = len(scores), scores.rows(live) if some else scores
    if some:
        stats, upstream = stats.rows(live), upstream.rows(live)
    # whole sums are kept for one side at most, the smaller; with one side frozen, for none
    rows_first = not wanted.right or (wanted.left and scores.vocab < len(live))
    made = blocks(len(live), scores.vocab, *backend.block(scores_live, rows_first), rows_first=rows_first)
    unit = backend.unit(scores_live, upstream)
    upstream = upstream if unit is None else Upstream(*(x / unit for x in upstream))
    sums = Sums(
        len(live),
        scores_live,
        wanted,
        left_whole=made.left_whole,
        right_whole=made.right_whole,
        unit=unit,
        wide_left=wide_left,
    )
    for rows, columns in made.slices:
        part = scores_live.rows(rows)
        dx = backend.gradient(part, stats.rows(rows), upstream.rows(rows), columns.start, columns.stop)
        sums.add(dx, part, rows, columns)
        del dx
    return sums.gradients(rows=live, n=n)


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    lora: LowRank | None,
) -> None:
    """ValueError for whatever `linear_logprob` can't take, whatever the backend."""
    low = {} if lora is None else {"lora.down": lora.down, "lora.up": lora.up}
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias, **low}.items():
        if hasattr(tensor, "placements"):
            raise ValueError(
                f"{name} is a DTensor: its shards would be taken for the whole. Gather it first (full_tensor()), run "
                "inside the module whose parameters FSDP has gathered, or shard the vocabulary with "
                "engine.vocab_parallel_logprob"
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
    if lora is not None and (
        lora.down.dim() != 2 or lora.down.shape[1] != hidden.shape[1] or lora.up.shape != (vocab, lora.down.shape[0])
    ):
        raise ValueError(
            f"lora must be down [r, D = {hidden.shape[1]}] and up [V = {vocab}, r]; got {tuple(lora.down.shape)} and "
            f"{tuple(lora.up.shape)}"
        )
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
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}; leave it out for none")
