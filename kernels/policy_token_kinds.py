"""Policy losses whose gradient of a token depends on that token alone; a new one is an entry of `TOKEN_KINDS`.

r = exp(clamp(logp - old)), A the advantage, sg(x) a weight without gradient. Each function gives (value, slope) of an
objective to be maximised: d r / dlogp = r inside the clamp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .policy_kind import Kind, Term, Tokens, either
from .policy_options import number, positive

RATIO_BOUND = "ratios are positive"
Objective = Callable[[Tokens, Mapping[str, Any]], Term]


def clip_marks(ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """TRL's names: where a bound takes the gradient away."""
    below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    return {"clip_ratio/low_mean": below, "clip_ratio/high_mean": above, "clip_ratio/region_mean": below | above}


def clipped(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv 1707.06347 eq. 7), two bounds from DAPO (2503.14476 eq. 8).

    `dual_clip` c: where A < 0, at least c A (arXiv 1912.09729). `delta`: min(r, delta) A in the first place
    (INTELLECT-2, arXiv 2505.07291; TRL's option). Above 1 + clip_high the two are the same bound.
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    delta, dual = options["delta"], options["dual_clip"]
    free = ratio * advantages if delta is None else ratio.clamp(max=delta) * advantages
    bounded = ratio.clamp(low, high) * advantages
    value = torch.minimum(free, bounded)
    inside = (ratio >= low) & (ratio <= high)
    live = torch.where(free <= bounded, ratio <= (torch.inf if delta is None else delta), inside)
    if dual is not None:
        held = (advantages < 0) & (value < dual * advantages)
        value, live = torch.where(held, dual * advantages, value), live & ~held
    marks = clip_marks(ratio, advantages, low, high)
    if delta is not None or dual is not None:
        marks["clip_ratio/dual_mean"] = (advantages < 0) & ~live & (ratio >= low)
    return Term(value, torch.where(live & tokens.moves, ratio * advantages, 0.0), marks)


def gradient_preserving(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """clipped, but a token that a bound holds keeps a gradient of the bound's size (CE-GPPO, arXiv 2509.20712).

    beta_low (1 - low) r / sg(r) A below the lower bound where A < 0, beta_high (1 + high) r / sg(r) A above the upper one
    where A > 0. GPPO (arXiv 2508.07629) has both betas 1. `dual_clip` as in `clipped`, without gradient.
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    marks = clip_marks(ratio, advantages, low, high)
    factor = torch.where(marks["clip_ratio/low_mean"], options["beta_low"] * low, ratio)
    factor = torch.where(marks["clip_ratio/high_mean"], options["beta_high"] * high, factor)
    value, live = factor * advantages, tokens.moves
    dual = options["dual_clip"]
    if dual is not None:
        held = marks["clip_ratio/dual_mean"] = (advantages < 0) & (ratio > dual)
        value, live = torch.where(held, dual * advantages, value), live & ~held
    return Term(value, torch.where(live, factor * advantages, 0.0), marks)


def soft_gate(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """4 / tau sigmoid(tau (r - 1)) A, tau = temperature_pos where A > 0, else temperature_neg (SAPO, arXiv 2511.20347)."""
    ratio, advantages = tokens.ratio, tokens.advantages
    tau = either(advantages > 0, options["temperature_pos"], options["temperature_neg"], like=ratio)
    gate = torch.sigmoid(tau * (ratio - 1))
    slope = 4 * gate * (1 - gate) * ratio * advantages
    return Term(4 / tau * gate * advantages, torch.where(tokens.moves, slope, 0.0), {})


def clipped_weight(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """sg(clip(r, 1 - low, 1 + high)) A logp: every token keeps a gradient (CISPO, MiniMax-M1, arXiv 2506.13585)."""
    ratio, advantages = tokens.ratio, tokens.advantages
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    slope = ratio.clamp(low, high) * advantages
    marks = {
        "cispo_clip_ratio": (ratio > high) & (advantages > 0),
        "clip_ratio/region_mean": (ratio < low) | (ratio > high),
    }
    return Term(slope * tokens.logp, slope, marks)


def tapered(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """A logp, and where A < 0 sg(min(r, 1)) A logp: `topr` of arXiv 2503.14286 with each token's own ratio (as ROLL)."""
    slope = torch.where(tokens.advantages < 0, tokens.ratio.clamp(max=1), 1.0) * tokens.advantages
    return Term(slope * tokens.logp, slope, {})


def reinforce(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """A logp: REINFORCE without a ratio, GPG's loss (arXiv 2504.02546)."""
    return Term(tokens.advantages * tokens.logp, tokens.advantages, {})


def direct_reward(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """A logp - beta / 2 (log r)^2: DRO (arXiv 2405.19107) on each token, as verl has it."""
    pull = options["beta"] * tokens.log_ratio
    value = tokens.advantages * tokens.logp - pull * tokens.log_ratio / 2
    return Term(value, tokens.advantages - torch.where(tokens.moves, pull, 0.0), {})


def divergence_tv(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """sg(min(r, ratio_cap)) A logp while |p - p_old| is small in A's direction (DPPO-Binary-TV, arXiv 2602.04879)."""
    shift = probability(tokens.logp) - probability(tokens.old)
    return _trusted(tokens, options, shift > options["divergence_high"], -shift > options["divergence_low"])


def divergence_kl(tokens: Tokens, options: Mapping[str, Any]) -> Term:
    """As `dppo_tv` with the KL divergence of (p_old, 1 - p_old) from (p, 1 - p) (DPPO-Binary-KL, arXiv 2602.04879)."""
    p, p_old = probability(tokens.logp), probability(tokens.old)
    rest, rest_old = (-torch.expm1(x.clamp(max=0)) + 1e-8 for x in (tokens.logp, tokens.old))
    divergence = p_old * (tokens.old - tokens.logp) + (1 - p_old) * (rest_old / rest).log()
    far_up = (divergence > options["divergence_high"]) & (p > p_old)
    far_down = (divergence > options["divergence_low"]) & (p < p_old)
    return _trusted(tokens, options, far_up, far_down)


def probability(logp: Tensor) -> Tensor:
    """exp(logp), at most 1: rounding may lift a log-prob above zero."""
    return logp.clamp(max=0).exp()


def _trusted(tokens: Tokens, options: Mapping[str, Any], far_up: Tensor, far_down: Tensor) -> Term:
    """Tokens whose probability already moved too far in the advantage's direction leave value and gradient."""
    high, low = far_up & (tokens.advantages > 0), far_down & (tokens.advantages < 0)
    weight = tokens.ratio.clamp(max=options["ratio_cap"]) * tokens.advantages
    slope = torch.where(high | low, 0.0, weight)
    marks = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    return Term(slope * tokens.logp, slope, marks)


CLIP = {
    "clip_low": number(0.2, most=1, why=RATIO_BOUND),
    "clip_high": number(0.2),
    "dual_clip": positive(None, above=1),
    "delta": positive(None),
}


def _preserving(beta_low: float, beta_high: float) -> Kind:
    own = {"beta_low": number(beta_low), "beta_high": number(beta_high)}
    bounds = {name: CLIP[name] for name in ("clip_low", "clip_high", "dual_clip")}
    return Kind(gradient_preserving, "tokens", per_sequence=False, options={**bounds, **own})


def _trust_region(objective: Objective, threshold: float) -> Kind:
    bounds = {name: number(threshold) for name in ("divergence_low", "divergence_high")}
    # the authors' script sums tokens and divides by a constant length, as dr_grpo; verl's default is dapo's mean
    return Kind(objective, "sequences_x_limit", per_sequence=False, options={**bounds, "ratio_cap": positive(20.0)})


TOKEN_KINDS: dict[str, Kind] = {
    # arXiv 2402.03300 eq. 3: 1/sequences sum_i 1/|o_i| sum_t
    "grpo": Kind(clipped, "sequences", per_sequence=True, options=CLIP),
    # arXiv 2503.14476 eq. 8: 1/(sum_i |o_i|) sum_i sum_t
    "dapo": Kind(clipped, "tokens", per_sequence=False, options=CLIP),
    # arXiv 2503.20783 section 3.2: no length in the denominator
    "dr_grpo": Kind(clipped, "sequences_x_limit", per_sequence=False, options=CLIP),
    # as dapo with TRL's local count: the one kind that depends on the batching
    "bnpo": Kind(clipped, "local_tokens", per_sequence=False, options=CLIP),
    "gppo": _preserving(1.0, 1.0),
    # the betas of the authors' code
    "ce_gppo": _preserving(0.75, 1.0),
    "sapo": Kind(
        soft_gate, "sequences", per_sequence=True,
        options={"temperature_pos": positive(1.0), "temperature_neg": positive(1.05)},
    ),
    # no lower bound, as in the paper; a weight of at most 5, as TRL recommends (ScaleRL, arXiv 2510.13786)
    "cispo": Kind(
        clipped_weight, "tokens", per_sequence=False,
        options={"clip_low": number(1.0, most=1, why=RATIO_BOUND), "clip_high": number(4.0)},
    ),
    "topr_token": Kind(tapered, "sequences", per_sequence=False),
    "reinforce": Kind(reinforce, "tokens", per_sequence=False),
    "dro": Kind(direct_reward, "tokens", per_sequence=False, options={"beta": number(0.1)}, penalises=True),
    "dppo_tv": _trust_region(divergence_tv, 0.15),
    "dppo_kl": _trust_region(divergence_kl, 0.05),
}  # fmt: skip
