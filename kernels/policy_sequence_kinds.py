"""Policy losses that reduce over a sequence before a token's gradient is known; a new one is an entry of `SEQUENCE_KINDS`.

l_t = clamp(logp_t - old_t), A the advantage, sg(x) a weight without gradient, sums and means over the kept tokens of a
sequence (weighted, where `keep` holds weights). A sequence's gradient needs all of its log-probs, unless the loss is
on-policy: every l_t is then zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .policy_kind import Kind, Term, Tokens, clamp, either
from .policy_options import number, positive
from .policy_token_kinds import RATIO_BOUND, clip_marks

LOG_WEIGHT_FLOOR = math.log(1e-8)
"""Least log of vespo's weights, as in TRL: that of a masked token is finite."""


def _clipped(ratio: Tensor, advantages: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """min(s A, clip(s) A), its slope d/d log s, and the metrics."""
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    marks = clip_marks(ratio, advantages, low, high)
    value = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    slope = torch.where(marks["clip_ratio/region_mean"], 0.0, ratio * advantages)
    return value, slope, {"ratio/sequence_mean": ratio, **marks}


def sequence_ratio(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """s = exp(mean_t l_t), min(s A, clip(s, 1 - low, 1 + high) A): GSPO (arXiv 2507.18071 eq. 5 and 7)."""
    ratio = tokens.sequence_mean(tokens.log_ratio).exp()
    value, slope, marks = _clipped(ratio, tokens.advantages, options)
    # d log s / dlogp_t = keep_t / count, which the share holds
    return Term(value, torch.where(tokens.moves, slope, 0.0), marks)


def sequence_ratio_per_token(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """s_t = sg(s) pi_t / sg(pi_t), min(s_t A_t, clip(s_t) A_t): GSPO-token (arXiv 2507.18071 eq. 13 and 14).

    GSPO's value and gradient where a sequence has one advantage; here tokens may have their own.
    """
    ratio = tokens.sequence_mean(tokens.log_ratio).exp()
    return Term(*_clipped(ratio, tokens.advantages, options))


def geometric_mean(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """A exp(mean_t l'_t), l' = min(l, high) where A > 0, max(l, -low) where A < 0: GMPO (arXiv 2507.20673)."""
    log_ratio, advantages = tokens.log_ratio, tokens.advantages
    low, high = -options["clip_low"], options["clip_high"]
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    value = advantages * tokens.sequence_mean(bounded).exp()
    marks = clip_marks(log_ratio, advantages, low, high)
    live = tokens.moves & ~marks["clip_ratio/region_mean"]
    return Term(value, torch.where(live, value, 0.0), marks)


def gamma_weight(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """sg(phi(w)) A logp, phi(w) = e^lambda w^k e^(-lambda w), w = prod_t c_t r_t: VESPO (arXiv 2602.10693), as in TRL.

    k and lambda are `k_pos`, `lambda_pos` where A >= 0, else `k_neg`, `lambda_neg`; phi(1) = 1. c_t is the correction
    between generator and trainer, which enters here instead of multiplying the loss.
    """
    log_weight, not_wrong = tokens.log_ratio, tokens.advantages >= 0
    k = either(not_wrong, options["k_pos"], options["k_neg"], like=log_weight)
    decay = either(not_wrong, options["lambda_pos"], options["lambda_neg"], like=log_weight)
    if tokens.log_importance is not None:
        log_weight = log_weight + tokens.log_importance.clamp(min=LOG_WEIGHT_FLOOR)
    log_weight = clamp(tokens.sequence_sum(log_weight)).clamp(min=LOG_WEIGHT_FLOOR)
    phi = (decay + k * log_weight - decay * log_weight.exp()).exp()
    slope = phi * tokens.advantages
    return Term(slope * tokens.logp, slope, {"vespo/phi_seq_mean": phi})


def tapered_sequence(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """A logp, and where A < 0 sg(min(exp(sum_t l_t), 1)) A logp: TOPR (arXiv 2503.14286), ratios of whole sequences."""
    taper = tokens.sequence_sum(tokens.log_ratio).clamp(max=0).exp()
    slope = torch.where(tokens.advantages < 0, taper, 1.0) * tokens.advantages
    return Term(slope * tokens.logp, slope, {})


def mirror_descent(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """A sum_t logp_t - tau / 2 (sum_t l_t)^2: Kimi k1.5 (arXiv 2501.12599 section 2.3.2), log-probs of whole sequences."""
    pull = options["tau"] * tokens.sequence_sum(tokens.log_ratio)
    value = tokens.advantages * tokens.logp - pull * tokens.log_ratio / 2
    return Term(value, tokens.advantages - torch.where(tokens.moves, pull, 0.0), {})


def _narrow(low: float, high: float) -> dict[str, Any]:
    return {"clip_low": number(low, most=1, why=RATIO_BOUND), "clip_high": number(high)}


SEQUENCE_KINDS: dict[str, Kind] = {
    "gspo": Kind(
        sequence_ratio, "sequences", per_sequence=True, options=_narrow(3e-4, 4e-4), reduces=True, whole_sequence=True
    ),
    "gspo_token": Kind(
        sequence_ratio_per_token, "sequences", per_sequence=True, options=_narrow(3e-4, 4e-4), reduces=True
    ),
    # arXiv 2602.05261: gspo's sequences weighted by their lengths, so that none is favoured for being short
    "luspo": Kind(
        sequence_ratio, "sequences", per_sequence=False, options=_narrow(2e-3, 2.5e-3), reduces=True,
        whole_sequence=True,
    ),
    # bounds of log-ratios, so the lower one may pass 1
    "gmpo": Kind(
        geometric_mean, "sequences", per_sequence=True, options={"clip_low": number(0.4), "clip_high": number(0.4)},
        reduces=True, whole_sequence=True,
    ),
    "vespo": Kind(
        gamma_weight, "tokens", per_sequence=False, reduces=True, folds_importance=True,
        options={
            "k_pos": number(2.0), "lambda_pos": positive(3.0), "k_neg": number(3.0), "lambda_neg": positive(2.0),
        },
    ),
    "topr": Kind(tapered_sequence, "sequences", per_sequence=False, reduces=True),
    # the paper prints no tau
    "kimi": Kind(
        mirror_descent, "sequences", per_sequence=False, options={"tau": number(0.1)}, reduces=True,
        whole_sequence=True, penalises=True,
    ),
}  # fmt: skip
