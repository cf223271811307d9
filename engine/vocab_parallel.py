"""Log-probs of a head whose vocabulary is shared out over ranks; no rank ever holds another's weights or scores.

Each rank makes four numbers a row from its own entries (peak, total, weighted sum, the target's score). They travel in
one packed collective a chunk, 16 bytes a row and rank, while the next chunk is computed, and every rank merges them in
rank order: the results are the same bits on all of them. In the backward a rank's weight gradient is its own, and the
gradient of the hidden rows, which all ranks share, is summed in fp32 before it is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import LogProbs, LowRank
from ..kernels.linear_logprob import backend_of, backward, check, choose, low_rank, scores_of
from ..kernels.scores import Partial, Scores, Stats, Upstream, finish, merge
from ..kernels.sums import Wanted

CHUNK_ROWS = 8192
"""Rows of one collective: 128 KiB a rank, sent while the next are computed."""


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    lora: LowRank | None = None,
    backend: str = "auto",
) -> LogProbs:
    """`longreach.kernels.linear_logprob` of a head whose rows are shared out over the ranks of `group`, in rank order.

    Every rank hands in the same hidden [N, D], targets [N] (ids of the whole vocabulary) and temperature, and its own
    part of weight [V_rank, D] and bias [V_rank] as plain tensors (`DTensor.to_local()`); of an adapter `down` is whole
    and `up` its part. Each gets the whole result, and the gradients of what it handed in: those of hidden and
    `lora.down` are whole on every rank (not to be summed again), those of the parts its own.

    Raises ValueError as `linear_logprob`, for the reference backend, and where ranks differ in N.
    """
    name, problem = "", None
    try:
        name = _check(hidden, weight, targets, bias, temperature, softcap, lora, backend)
    except ValueError as error:
        problem = error  # raised after the others have heard of it: they would wait for this rank for ever
    mine = torch.tensor([weight.shape[0], hidden.shape[0], int(problem is None)], device=hidden.device)
    counts, work = _share(mine, group)
    work.wait()
    if problem is not None:
        raise problem
    if not counts[:, 2].all():
        raise ValueError(f"ranks {(counts[:, 2] == 0).nonzero().flatten().tolist()} of the group refused their input")
    if len(set(counts[:, 1].tolist())) > 1:
        raise ValueError(f"the ranks hand in {counts[:, 1].tolist()} rows: all must hand in the same")
    _check_targets(targets, int(counts[:, 0].sum()))
    first = int(counts[: dist.get_rank(group), 0].sum())
    with torch.autocast(hidden.device.type, enabled=False):
        low = low_rank(hidden, weight, lora, name)
        made = _VocabParallel.apply(
            hidden, weight, bias, *low, targets, temperature, softcap, first, name, group
        )  # fmt: skip
    return LogProbs(*made)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float | Tensor,
    softcap: float | None, lora: LowRank | None, backend: str,
) -> str:  # fmt: skip
    """The backend's name."""
    check(hidden, weight, torch.zeros_like(targets), bias, temperature, softcap, lora)
    name = choose(backend, hidden, weight)
    if name == "reference":
        raise ValueError("the reference backend holds all scores and knows no shards: use auto, chunked or triton")
    return name


def _check_targets(targets: Tensor, vocab: int) -> None:
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ValueError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, outside the whole vocabulary of {vocab}"
        )


def _share(mine: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """[ranks, ...]: every rank's tensor, and the work to wait for before it is there."""
    world = dist.get_world_size(group)
    made = mine.new_empty(world * mine.shape[0], *mine.shape[1:])
    work = dist.all_gather_into_tensor(made, mine, group=group, async_op=True)
    return made.view(world, *mine.shape), work


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        softcap: float | None,
        first: int,
        name: str,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = scores_of(hidden, weight, targets, bias, temperature, softcap, low_hidden, low_weight, first)
        stats = _merged_stats(scores, name, group)
        ctx.save_for_backward(hidden, weight, bias, low_hidden, low_weight, targets, scores.temperature, *stats)
        ctx.softcap, ctx.first, ctx.name, ctx.group = softcap, first, name, group
        return stats.logp, stats.entropy, stats.peak + stats.log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        hidden, weight, bias, low_hidden, low_weight, targets, heat, *stats = ctx.saved_tensors
        scores = Scores(hidden, weight, targets, heat, bias, ctx.softcap, low_hidden, low_weight, ctx.first)
        needs = ctx.needs_input_grad
        wanted = Wanted(*needs[:5])
        with torch.autocast(hidden.device.type, enabled=False):
            module = backend_of(ctx.name, hidden, weight)
            made = backward(module, scores, Stats(*stats), Upstream(*upstream), wanted, wide_left=True)
        dhidden, dlow = (
            _summed(x, like, ctx.group) for x, like in ((made.hidden, hidden), (made.low_hidden, low_hidden))
        )
        return dhidden, made.weight, made.bias, dlow, made.low_weight, *(None,) * 6


def _merged_stats(scores: Scores, name: str, group: dist.ProcessGroup) -> Stats:
    """Of the whole vocabulary: chunk by chunk, a chunk's collective under way while the next is computed."""
    module = backend_of(name, scores.hidden, scores.weight)
    under_way = []
    for i in range(0, max(len(scores), 1), CHUNK_ROWS):
        mine = torch.stack(module.partial(scores.rows(slice(i, i + CHUNK_ROWS))))
        under_way.append((mine, *_share(mine, group)))  # kept alive while it is sent
    merged = []
    for _, made, work in under_way:
        work.wait()
        merged.append(torch.stack(merge([Partial(*part.unbind()) for part in made.unbind()])))
    return finish(Partial(*torch.cat(merged, 1).unbind()))


def _summed(mine: Tensor | None, like: Tensor | None, group: dist.ProcessGroup) -> Tensor | None:
    if mine is None or like is None:
        return None
    dist.all_reduce(mine, group=group)
    return mine.to(like.dtype)
