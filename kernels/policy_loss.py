"""Policy losses on per-token scalars: plain torch, no vocabulary in sight.

    loss = sum_t share_t (-c_t objective_t + kl_weight kl_t - entropy_weight H_t)
    share_t = keep_t / (count of its sequence, or 1) / normalizer

The objective is the kind's (`policy_token_kinds.py`, `policy_sequence_kinds.py`), c_t corrects for a generator that
differs from the trainer (`policy_corrections.py`), kl_t estimates the divergence from a reference (`policy_kl.py`). The
normalizer always comes from the caller and is the whole step's, so micro-batches add up: the sum of their losses,
gradients and metrics is the whole batch's, as long as no sequence is split between calls.

Gradients are the closed forms of `policy_objective.py`, which the fused kernel uses too. Log-ratios are clamped to
+-LOG_RATIO_LIMIT, so neither inf nor NaN can arise from them. Maths in fp32 (fp64 for fp64 log-probs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .policy_kind import LOG_RATIO_LIMIT
from .policy_kinds import KINDS
from .policy_kl import KL_ESTIMATORS
from .policy_metrics import Mean
from .policy_objective import Objective, check_shapes, prepare

__all__ = ["KINDS", "KL_ESTIMATORS", "LOG_RATIO_LIMIT", "Mean", "PolicyLoss", "policy_loss"]


class PolicyLoss(NamedTuple):
    """The loss (0-d, differentiable) and its metrics by TRL's names, to be added over micro-batches with `+`."""

    loss: Tensor
    metrics: dict[str, Mean]


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    *,
    kind: str,
    normalizer: float | Tensor,
    entropy: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    keep: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """Loss and metrics of N completion tokens in sequence order; differentiable (once) in logp and entropy.

    All inputs are [N]. `sequence_ids` are integers that never fall; equal neighbours are one sequence. `normalizer`
    (> 0) is what `KINDS[kind].normalizer` counts, over the whole step: it is the only division, never divide again.
    `old_logp` None means on-policy: old is logp without gradient. `keep` (bool, or float weights) leaves tokens out:
    they contribute nothing, whatever they hold, and don't count in their sequence's length (as TRL's mask). N = 0 gives
    a differentiable zero.

    Options of every kind: `kl_weight` with `kl` k1, k2 or k3 and `kl_bias_correction` (needs ref_logp),
    `entropy_weight` (a bonus, needs entropy), `importance_cap`, `importance_range`, `importance_level` and
    `importance_sequence_range` (`policy_corrections.py`; need rollout_logp), `off_policy_threshold` (DeepSeek-V3.2:
    drops the policy term of a sequence whose advantage is negative and whose mean of sampled - logp is above it; sampled
    is rollout_logp, else old_logp). A kind's own: `KINDS[kind].options`. Metrics, weighted by `keep`: ratio/mean, the kind's
    (clip_ratio/* where it clips), and where their input is given entropy, kl and sampling/*. Raises ValueError for
    unknown kinds and options, missing inputs, shapes that don't fit, ids that fall, bad numbers.
    """
    others = {"old_logp": old_logp, "advantages": advantages, "sequence_ids": sequence_ids, "entropy": entropy}
    check_shapes("logp", logp, {**others, "rollout_logp": rollout_logp, "ref_logp": ref_logp, "keep": keep})
    objective = prepare(
        old_logp, advantages, sequence_ids, kind=kind, normalizer=normalizer, with_entropy=entropy is not None,
        rollout_logp=rollout_logp, ref_logp=ref_logp, keep=keep,
        dtype=torch.float64 if logp.dtype == torch.float64 else torch.float32, **options,
    )  # fmt: skip
    return of_objective(objective, logp, entropy)


def of_objective(objective: Objective, logp: Tensor, entropy: Tensor | None) -> PolicyLoss:
    """`policy_loss` of an objective that is prepared already."""
    loss, g, h, metrics = objective.evaluate(logp.detach(), None if entropy is None else entropy.detach())
    return PolicyLoss(_Gradients.apply(logp, entropy, loss, g, h), metrics)  # pyright: ignore[reportArgumentType]


class _Gradients(torch.autograd.Function):
    """Hands a loss whose gradients are known to autograd."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, entropy: Tensor | None, loss: Tensor, g: Tensor, h: Tensor | None) -> Tensor:
        ctx.save_for_backward(g, h)
        ctx.dtypes = logp.dtype, None if entropy is None else entropy.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        g, h = ctx.saved_tensors
        of_logp, of_entropy = ctx.dtypes
        return (upstream * g).to(of_logp), None if h is None else (upstream * h).to(of_entropy), None, None, None
