"""Policy losses on per-token scalars: plain torch, no vocabulary in sight.

    r_t = exp(logp_t - old_t),  objective_t = min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)
    token_t = -w_t objective_t + kl_weight kl_t - entropy_weight H_t
    loss = sum over tokens of token_t / (count of its sequence, or 1) / normalizer

w_t is the truncated importance weight between trainer and generator (1 without one). The normalizer always comes from
the caller and is the whole step's, so micro-batches add up: the sum of their losses, gradients and metrics is the
whole batch's, as long as no sequence is split between calls.

A kind is an entry of `KINDS`: its token objective beside its paper, how tokens are summed, its own options. A new one
touches nothing else.

Log-ratios are clamped to +-LOG_RATIO_LIMIT before exp (as verl does): beyond it a ratio means a broken run, its
gradient is zero, and neither inf nor NaN can arise from it. Maths in fp32 (fp64 for fp64 log-probs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


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


class PolicyLoss(NamedTuple):
    """The loss (0-d, differentiable) and its metrics by TRL's names, to be added over micro-batches with `+`."""

    loss: Tensor
    metrics: dict[str, Mean]


@dataclass(frozen=True)
class Tokens:
    """What a kind sees: detached but for log_ratio; masked tokens hold neutral values."""

    log_ratio: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Kind:
    """One policy loss: its objective per token (to be maximised), its sum over tokens, its own options' defaults."""

    objective: Callable[[Tokens, Mapping[str, Any]], Tensor]
    per_sequence: bool
    """Divide each token by its sequence's count, so that every sequence weighs the same."""
    options: Mapping[str, Any]


def _clipped(tokens: Tokens, options: Mapping[str, Any]) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv 1707.06347 eq. 7), two bounds from DAPO (2503.14476 eq. 8)."""
    ratio = tokens.log_ratio.exp()
    clipped = ratio.clamp(1 - options["clip_low"], 1 + options["clip_high"])
    return torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)


_CLIP = {"clip_low": 0.2, "clip_high": 0.2}

KINDS: dict[str, Kind] = {
    # arXiv 2402.03300 eq. 3: 1/sequences sum_i 1/|o_i| sum_t; normalizer = sequences of the step
    "grpo": Kind(_clipped, per_sequence=True, options=_CLIP),
    # arXiv 2503.14476 eq. 8: 1/(sum_i |o_i|) sum_i sum_t; normalizer = tokens of the step
    "dapo": Kind(_clipped, per_sequence=False, options=_CLIP),
    # arXiv 2503.20783 section 3.2: no length in the denominator; normalizer = sequences x longest allowed completion
    "dr_grpo": Kind(_clipped, per_sequence=False, options=_CLIP),
    # as dapo with TRL's local count; normalizer = tokens of this rank's mini-batch, so it depends on the batching
    "bnpo": Kind(_clipped, per_sequence=False, options=_CLIP),
}

KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    # of d = ref - logp, http://joschu.net/blog/kl-approx.html: unbiased; squared; unbiased and never negative
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(d) - d,
}

COMMON_OPTIONS: dict[str, Any] = {
    "kl_weight": 0.0,
    "kl": "k3",
    "entropy_weight": 0.0,
    "importance_cap": None,
}


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
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
    """Loss and metrics of N completion tokens in sequence order; differentiable in logp and entropy.

    All inputs are [N]. `sequence_ids` are integers that never fall; equal neighbours are one sequence. `normalizer`
    (> 0) is what `KINDS` says of the kind, counted over the whole step: it is the only division, never divide again.
    `keep` (bool, or float weights) leaves tokens out: they contribute nothing, whatever they hold, and don't count in
    their sequence's length (as TRL's mask). N = 0 gives a differentiable zero.

    Options of every kind: `kl_weight` with `kl` k1, k2 or k3 (needs ref_logp), `entropy_weight` (a bonus, needs
    entropy), `importance_cap` (truncated importance sampling, weight min(exp(old - rollout), cap) without gradient,
    needs rollout_logp); of the clipped kinds `clip_low`, `clip_high`. Metrics, weighted by `keep`: clip_ratio/*,
    ratio/mean, and where their input is given entropy, kl and sampling/importance_sampling_ratio/mean (capped). Raises
    ValueError for unknown kinds and options, missing inputs, shapes that don't fit, ids that fall, bad numbers.
    """
    spec, settings = _settings(kind, options)
    extras = {"entropy": entropy, "rollout_logp": rollout_logp, "ref_logp": ref_logp, "keep": keep}
    _check(logp, {"old_logp": old_logp, "advantages": advantages, "sequence_ids": sequence_ids, **extras})
    _check_settings(settings, sequence_ids, normalizer, extras)
    weight = torch.ones_like(logp, dtype=_dtype(logp)) if keep is None else keep.detach().to(_dtype(logp))
    kept = weight != 0

    def only_kept(x: Tensor) -> Tensor:
        # where, not a product: a masked token may hold anything, and 0 x inf is NaN in value and gradient
        return torch.where(kept, x, 0.0).to(weight.dtype)

    logp = only_kept(logp)
    old = only_kept(old_logp.detach())
    tokens = Tokens(_clamp(logp - old), only_kept(advantages.detach()))
    loss_tokens = -spec.objective(tokens, settings)
    metrics = _ratio_metrics(tokens, settings, weight)
    if rollout_logp is not None:
        cap = settings["importance_cap"]
        importance = _clamp(old - only_kept(rollout_logp.detach())).exp().clamp(max=cap or torch.inf)
        loss_tokens = loss_tokens * importance if cap else loss_tokens
        metrics["sampling/importance_sampling_ratio/mean"] = _mean(importance, weight)
    if ref_logp is not None:
        kl = KL_ESTIMATORS[settings["kl"]](_clamp(only_kept(ref_logp.detach()) - logp))
        if settings["kl_weight"]:
            loss_tokens = loss_tokens + settings["kl_weight"] * kl
        metrics["kl"] = _mean(kl, weight)
    if entropy is not None:
        bonus = only_kept(entropy)
        if settings["entropy_weight"]:
            loss_tokens = loss_tokens - settings["entropy_weight"] * bonus
        metrics["entropy"] = _mean(bonus, weight)
    share = weight / _sequence_counts(weight, sequence_ids) if spec.per_sequence else weight
    return PolicyLoss((loss_tokens * share).sum() / normalizer, metrics)


def _dtype(logp: Tensor) -> torch.dtype:
    return torch.float64 if logp.dtype == torch.float64 else torch.float32


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _sequence_counts(weight: Tensor, sequence_ids: Tensor) -> Tensor:
    """For each token the kept weight of its whole sequence, 1 where nothing of it is kept (its tokens weigh 0)."""
    _, index = torch.unique_consecutive(sequence_ids, return_inverse=True)
    sums = weight.new_zeros(len(index)).index_add_(0, index, weight)
    return torch.where(sums > 0, sums, 1.0)[index]


def _mean(values: Tensor, weight: Tensor) -> Mean:
    return Mean((values.detach() * weight).sum(), weight.sum())


def _ratio_metrics(tokens: Tokens, settings: Mapping[str, Any], weight: Tensor) -> dict[str, Mean]:
    ratio, advantages = tokens.log_ratio.detach().exp(), tokens.advantages
    metrics = {"ratio/mean": _mean(ratio, weight)}
    if "clip_low" in settings:
        # as TRL: clipped is where the bound takes the gradient away
        low = (ratio < 1 - settings["clip_low"]) & (advantages < 0)
        high = (ratio > 1 + settings["clip_high"]) & (advantages > 0)
        clipped = {"low": low, "high": high, "region": low | high}
        metrics |= {f"clip_ratio/{name}_mean": _mean(mask.to(weight.dtype), weight) for name, mask in clipped.items()}
    return metrics


def _settings(kind: str, options: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    if kind not in KINDS:
        raise ValueError(f"unknown policy loss {kind!r}{_nearest(kind, KINDS)}")
    known = {**COMMON_OPTIONS, **KINDS[kind].options}
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r} of policy loss {kind!r}{_nearest(name, known)}")
    return KINDS[kind], {**known, **options}


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    match = get_close_matches(name, known, n=1, cutoff=0.3)
    return f": did you mean {match[0]!r}?" if match else f": choose from {', '.join(known)}"


def _check(logp: Tensor, others: Mapping[str, Tensor | None]) -> None:
    if logp.dim() != 1:
        raise ValueError(f"logp must be [N], one row per completion token; got {tuple(logp.shape)}")
    for name, x in others.items():
        if x is not None and x.shape != logp.shape:
            raise ValueError(f"{name} must have logp's shape {tuple(logp.shape)}, got {tuple(x.shape)}")


def _check_settings(
    settings: Mapping[str, Any], sequence_ids: Tensor, normalizer: float | Tensor, extras: Mapping[str, Tensor | None]
) -> None:
    if not float(normalizer) > 0:
        raise ValueError(f"normalizer must be positive, got {float(normalizer)}: skip a step without completions")
    if bool((sequence_ids[1:] < sequence_ids[:-1]).any()):
        raise ValueError("sequence_ids must never fall: hand tokens in sequence order")
    needs = {"kl_weight": "ref_logp", "entropy_weight": "entropy", "importance_cap": "rollout_logp"}
    for name, needed in needs.items():
        if settings[name] and extras[needed] is None:
            raise ValueError(f"{name}={settings[name]} needs {needed}: hand it in, or leave {name} out")
    if settings["kl"] not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {settings['kl']!r}{_nearest(settings['kl'], KL_ESTIMATORS)}")
    cap = settings["importance_cap"]
    if cap is not None and not cap > 0:
        raise ValueError(f"importance_cap must be positive, got {cap}; None switches it off")
    for name in ("kl_weight", "entropy_weight", "clip_low", "clip_high"):
        if settings.get(name, 0) < 0:
            raise ValueError(f"{name} must not be negative, got {settings[name]}")
    if settings.get("clip_low", 0) > 1:
        raise ValueError(f"clip_low must be at most 1 (ratios are positive), got {settings['clip_low']}")
