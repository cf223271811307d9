"""Corrections for a generator whose log-probs differ from the trainer's: weights between old and rollout log-probs.

    rho_t = exp(clamp(old_t - rollout_t));  at level "sequence" rho is the product over the sequence, its log clamped too

One naming scheme, `importance_*`; each multiplies the policy term (never KL or entropy) and carries no gradient:

| method | options | weight |
| --- | --- | --- |
| TIS, truncated (verl, TRL's *_truncate) | importance_cap=c | min(rho, c) |
| MIS, masked (TRL's *_mask) | importance_range=(a, b) | rho inside [a, b], else 0 |
| IcePop (Ring-1T, arXiv 2510.18855) | importance_range=(0.5, 5) | as MIS, level token |
| sequence mask (NeMo-RL's and OpenRLHF's seq-mask-tis) | importance_sequence_range=(0.999, 1.002) | 1 or 0, see below |

The sequence mask drops a sequence whose geometric mean of rho_t lies outside.
`importance_level` is "token" or "sequence". They combine: the range looks at rho before the cap, the sequence mask
alone leaves the weight at 1, and importance_cap=inf is plain importance sampling.

How far the two are apart is measured whether it is corrected or not, token by token: the mean and the greatest of
|old - rollout|, the KL divergence of old from rollout by Schulman's k3 (exp(d) - 1 - d of d = old - rollout, every term of
which is positive), and the first two moments of rho, of which (mean rho)^2 / mean rho^2 is the effective share of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .policy_kind import clamp
from .policy_options import choice, interval, positive
from .policy_sequences import Sequences

OPTIONS = {
    "importance_cap": positive(None),
    "importance_range": interval(),
    "importance_level": choice("token", ("token", "sequence"), "importance_level"),
    "importance_sequence_range": interval(),
}


class Importance(NamedTuple):
    """`weight` [N] for the policy term (None: nothing corrects it), and what the metrics average."""

    weight: Tensor | None
    marks: dict[str, Tensor]


def corrects(settings: Mapping[str, Any]) -> bool:
    """Whether any correction is on; without one rollout log-probs are for the metrics alone."""
    return any(
        settings[name] is not None for name in ("importance_cap", "importance_range", "importance_sequence_range")
    )


def needs_sequences(settings: Mapping[str, Any]) -> bool:
    """Whether the weight of a token depends on its whole sequence."""
    return settings["importance_level"] == "sequence" or settings["importance_sequence_range"] is not None


def importance(old: Tensor, rollout: Tensor, settings: Mapping[str, Any], sequences: Sequences | None) -> Importance:
    """The weights of the module's table; metrics `sampling/importance_sampling_ratio/*` with the share each one affects.

    `sampling/sampling_logp_difference/*`, `sampling/k3_kl` and `sampling/ratio/*` are of the tokens as they are, uncorrected.
    """
    log_rho = token_log_rho = clamp(old - rollout)
    if settings["importance_level"] == "sequence":
        assert sequences is not None
        log_rho = clamp(sequences.sum(token_log_rho))
    rho = weight = log_rho.exp()
    shares = {}
    cap, span, sequence_span = (
        settings[name] for name in ("importance_cap", "importance_range", "importance_sequence_range")
    )
    if cap is not None:
        weight, shares["capped_mean"] = weight.clamp(max=cap), rho > cap
    if span is not None:
        outside = (rho < span[0]) | (rho > span[1])
        weight, shares["masked_mean"] = torch.where(outside, 0.0, weight), outside
    marks = {"mean": weight, **shares}
    if cap is None and span is None:
        weight = torch.ones_like(rho)
    if sequence_span is not None:
        assert sequences is not None
        middle = sequences.mean(token_log_rho).exp()
        outside = (middle < sequence_span[0]) | (middle > sequence_span[1])
        weight, marks["sequence_masked_mean"] = torch.where(outside, 0.0, weight), outside
    named = {f"sampling/importance_sampling_ratio/{name}": mark for name, mark in marks.items()}
    return Importance(weight if corrects(settings) else None, named | _mismatch(token_log_rho))


def _mismatch(log_rho: Tensor) -> dict[str, Tensor]:
    gap, rho = log_rho.abs(), log_rho.exp()
    return {
        "sampling/sampling_logp_difference/mean": gap,
        "sampling/sampling_logp_difference/max": gap,
        "sampling/k3_kl": torch.expm1(log_rho) - log_rho,
        "sampling/ratio/mean": rho,
        "sampling/ratio/mean_square": rho.square(),
    }
