"""How a token is drawn from logits, and what is reported about it.

Temperature first, then top_k, then top_p on what top_k left: the order of transformers and vLLM. top_p keeps the
smallest set of most probable tokens whose mass reaches it. Everything is computed in fp64, so that a uniform number
picks the same token wherever the logits are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep the whole vocabulary."""

    max_completion: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_completion < 1:
            raise ValueError(f"max_completion must be at least 1 token, not {self.max_completion}")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, not {self.top_k}")


class Drawn(NamedTuple):
    """One token a row, each [B]: the token, its log-prob under the kept distribution, log of the kept mass."""

    tokens: Tensor
    logprobs: Tensor
    kept_logmass: Tensor


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Drawn:
    """Draws one token a row by inverting the cumulative distribution.

    Args:
        logits: [B, V]; uniform: [B] in [0, 1).

    Returns:
        fp64 numbers. `logprobs + kept_logmass` is the full-vocabulary log-prob at `temperature`. Greedy keeps one
        token: its log-prob is 0, and its log-mass is that at temperature 1.

    Raises:
        FloatingPointError: a row of logits has NaN or +inf.
    """
    uniform = uniform.to(logits.device)
    logp = (logits.double() / (sampling.temperature or 1.0)).log_softmax(-1)
    if bool(torch.isnan(logp[:, 0]).any()):  # such a row is NaN throughout
        raise FloatingPointError("the model's logits aren't finite: its weights or its precision have gone wrong")
    if sampling.temperature == 0.0:
        tokens = logits.argmax(-1)
        logmass = logp.gather(1, tokens[:, None])[:, 0]
        return Drawn(tokens, torch.zeros_like(logmass), logmass)
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        tokens = _invert(logp.exp(), uniform)
        return Drawn(tokens, logp.gather(1, tokens[:, None])[:, 0], torch.zeros_like(logp[:, 0]))
    ranked, order = logp.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ranked, order = ranked[:, : sampling.top_k], order[:, : sampling.top_k]
    probs = ranked.softmax(-1)
    kept = probs.cumsum(-1) - probs < sampling.top_p  # the first always: nothing stands before it
    kept_logmass = ranked.masked_fill(~kept, -torch.inf).logsumexp(-1)
    rank = _invert(probs * kept, uniform)[:, None]
    return Drawn(order.gather(1, rank)[:, 0], ranked.gather(1, rank)[:, 0] - kept_logmass, kept_logmass)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index where the cumulative weight passes `uniform` of the total: never one of weight zero. [B, V], [B] -> [B].

    In fp64 the product of the total and a number below 1 is below the total, so there always is such an index.
    """
    cumulative = weights.cumsum(-1)
    return torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
