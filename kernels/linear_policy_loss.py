"""A policy loss straight from hidden states: policy_loss(linear_logprob(...)) in one pass over the vocabulary.

Where the gradient (g, h) of a token depends on its own log-prob and entropy alone, a chunk of rows is done with at once:

    scores, kept for the chunk -> log-probs, entropies -> (g, h) -> dx in place -> dh = dx W, dW += dx^T h

6 N D V operations instead of the 8 of a forward and a backward that computes the scores again. Rows whose gradient is
zero whatever their log-prob is (zero advantage, no regulariser) are computed forward alone, 2 D V each, for the metrics;
rows that aren't kept are not computed. Losses that reduce over a sequence first take two passes: 2 N D V forward and
6 f N D V backward, f being the share of rows with a gradient. So do calls without gradients (2 N D V in all).

Gradients are made in the forward, since that is when the scores are there, and wait in the widest form they have: dW is
multiplied by the upstream gradient before its one rounding, dh (rounded when its chunk was done) after.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear_logprob import LogProbs, LowRank, backend_of, check, choose, linear_logprob, low_rank, scores_of
from .policy_loss import Mean, PolicyLoss
from .policy_loss import of_objective as policy_loss_of
from .policy_objective import Evaluation, Objective, check_shapes, prepare
from .scores import Scores, Upstream, finish
from .sums import Sums, Wanted


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    *,
    kind: str,
    normalizer: float | Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    lora: LowRank | None = None,
    backend: str = "auto",
    rollout_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    keep: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """Loss and metrics of N completion tokens; differentiable (once) in hidden, weight, bias and the adapter.

    hidden [N, D], weight [V, D], targets [N] and the keywords up to `backend` are those of `linear_logprob`; all others
    those of `policy_loss`, whose value, metrics and gradients this has (the entropy metric always among them). Rows that
    `keep` leaves out may hold anything, targets included. Raises ValueError for whatever either of the two refuses.
    """
    if keep is not None and keep.shape == targets.shape:
        targets = torch.where(keep != 0, targets, 0)  # what isn't kept may be marked by any number
    check(hidden, weight, targets, bias, temperature, softcap, lora)
    others = {"old_logp": old_logp, "advantages": advantages, "sequence_ids": sequence_ids}
    check_shapes("targets", targets, {**others, "rollout_logp": rollout_logp, "ref_logp": ref_logp, "keep": keep})
    objective = prepare(
        old_logp, advantages, sequence_ids, kind=kind, normalizer=normalizer, with_entropy=True,
        rollout_logp=rollout_logp, ref_logp=ref_logp, keep=keep,
        dtype=torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32, **options,
    )  # fmt: skip
    chosen = choose(backend, hidden, weight)
    leaves = [hidden, weight, bias, *(() if lora is None else lora[:2])]
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    if not (wanted and one_pass(objective, chosen, hidden.dtype)):
        how = {"bias": bias, "temperature": temperature, "softcap": softcap, "lora": lora, "backend": chosen}
        return _two_passes(objective, hidden, weight, targets, how)
    metrics: dict[str, Mean] = {}
    with torch.autocast(hidden.device.type, enabled=False):
        low_hidden, low_weight = low_rank(hidden, weight, lora, chosen)
        scores = scores_of(hidden, weight, targets, bias, temperature, softcap, low_hidden, low_weight)
        module = backend_of(chosen, hidden, weight)
        loss = _OnePass.apply(hidden, weight, bias, low_hidden, low_weight, scores, objective, module, metrics)
    return PolicyLoss(loss, metrics)  # pyright: ignore[reportArgumentType]


def one_pass(objective: Objective, backend: str, dtype: torch.dtype) -> bool:
    """Whether a loss can be had in one pass over the vocabulary: by rows, in a dtype that holds a chunk's gradients.

    fp16 needs them scaled, by a power of two that is the same for all chunks and so known only after the last.
    """
    if backend == "reference" or not objective.token_level:
        return False
    return not (backend == "triton" and dtype == torch.float16)


def _two_passes(
    objective: Objective, hidden: Tensor, weight: Tensor, targets: Tensor, how: dict[str, Any]
) -> PolicyLoss:
    kept = (~objective.ignored).nonzero().squeeze(1)
    if len(kept) == len(targets):
        made = linear_logprob(hidden, weight, targets, **how)
        return policy_loss_of(objective, made.logp, made.entropy)
    heat = how["temperature"]
    how = {**how, "temperature": heat[kept] if isinstance(heat, Tensor) else heat}
    some = linear_logprob(hidden.index_select(0, kept), weight, targets[kept], **how)
    spread = LogProbs(*(x.new_zeros(len(targets)).index_copy(0, kept, x) for x in some))
    return policy_loss_of(objective, spread.logp, spread.entropy)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
        scores: Scores,
        objective: Objective,
        backend: ModuleType,
        metrics: dict[str, Mean],
    ) -> Tensor:
        del hidden, weight, bias, low_hidden, low_weight  # `scores` holds them; they are arguments for autograd's sake
        needs = ctx.needs_input_grad
        total = _Total(metrics)
        dead = (objective.dead & ~objective.ignored).nonzero().squeeze(1)
        _values(scores.rows(dead), objective.select(dead), backend, total)
        live = (~objective.dead).nonzero().squeeze(1)
        ctx.live, ctx.n = live, len(scores)
        ctx.sums = _gradients(scores, objective, live, backend, total, Wanted(*needs[:5]))
        return total.loss(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        if ctx.sums is None:
            raise RuntimeError("linear_policy_loss gives its gradients once: call it again for another backward")
        made, ctx.sums = ctx.sums.gradients(upstream, rows=ctx.live, n=ctx.n), None
        return made.hidden, made.weight, made.bias, made.low_hidden, made.low_weight, None, None, None, None


class _Total:
    """Loss and metrics summed over chunks."""

    def __init__(self, metrics: dict[str, Mean]) -> None:
        self.sum: Tensor | None = None
        self.metrics = metrics

    def add(self, part: Evaluation) -> None:
        self.sum = part.loss if self.sum is None else self.sum + part.loss
        for name, mean in part.metrics.items():
            self.metrics[name] = self.metrics[name] + mean if name in self.metrics else mean

    def loss(self, scores: Scores) -> Tensor:
        return scores.temperature.new_zeros(()) if self.sum is None else self.sum


def _values(scores: Scores, objective: Objective, backend: ModuleType, total: _Total) -> None:
    """Adds loss and metrics of rows without a gradient; also where there are none, so that no metric is missing."""
    stats = finish(backend.partial(scores))
    total.add(objective.evaluate(stats.logp, stats.entropy))


def _gradients(
    scores: Scores, objective: Objective, live: Tensor, backend: ModuleType, total: _Total, wanted: Wanted
) -> Sums:
    """The gradients of the rows `live`, chunk after chunk, each chunk's scores made once."""
    step = backend.chunk_rows(scores)
    everything = slice(0, scores.vocab)
    sums = Sums(len(live), scores, wanted, left_whole=False, right_whole=len(live) > step)
    for i in range(0, len(live), step):
        rows = live[i : i + step]
        part = scores.rows(rows)
        partial, kept = backend.keep(part)
        stats = finish(partial)
        made = objective.select(rows).evaluate(stats.logp, stats.entropy)
        total.add(made)
        nothing = torch.zeros_like(made.g)
        upstream = Upstream(made.g, nothing if made.h is None else made.h, nothing)
        dx = backend.kept_gradient(part, kept, stats, upstream)
        sums.add(dx, part, slice(i, i + len(rows)), everything)
        del dx, kept
    return sums
