"""KL estimators between policy and reference, per sampled token, with their slopes.

    d = clamp(ref - logp):  k1 = -d,  k2 = d^2 / 2,  k3 = e^d - 1 - d        (http://joschu.net/blog/kl-approx.html)

k1 is unbiased, k2 squared, k3 unbiased and never negative. All are means under the current policy; tokens came from
the old one. `corrected` weighs them by the ratio, gradient and all, so that their mean is unbiased off-policy too
(DeepSeek-V3.2, arXiv 2512.02556, "unbiased KL estimate"; TRL's use_bias_correction_kl).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .policy_kind import Tokens, clamp, within

KL_ESTIMATORS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    # d -> (k, dk / dd)
    "k1": lambda d: (-d, torch.full_like(d, -1.0)),
    "k2": lambda d: (d.square() / 2, d),
    "k3": lambda d: (torch.expm1(d) - d, torch.expm1(d)),
}


def kl_term(tokens: Tokens, ref: Tensor, estimator: str, *, corrected: bool) -> tuple[Tensor, Tensor]:
    """The estimate and its slope d/dlogp, both [N]."""
    d = ref - tokens.logp
    value, rise = KL_ESTIMATORS[estimator](clamp(d))
    slope = torch.where(within(d), -rise, 0.0)
    if not corrected:
        return value, slope
    ratio = tokens.ratio
    return ratio * value, ratio * (torch.where(tokens.moves, value, 0.0) + slope)
