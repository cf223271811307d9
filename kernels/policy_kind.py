"""What a policy loss is made of: what it sees of its tokens, what it gives back, and how its tokens are summed.

A kind's objective J is to be maximised. It is given as value_t and slope_t for each token, such that

    J = sum_t share_t value_t,   dJ / dlogp_t = share_t slope_t,   share_t = keep_t / (count of its sequence, or 1) / normalizer

so that a quantity of a whole sequence appears in the value of each of its tokens, and slopes are closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .policy_options import Option
from .policy_sequences import Sequences

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-this before exp (as verl does): beyond it a ratio means a broken run. A gradient that flows
through a clamped log-ratio is zero; a log-prob under a stop-gradient weight (cispo and its like) keeps its gradient."""

Normalizer = Literal["sequences", "tokens", "local_tokens", "sequences_x_limit"]


def clamp(log_ratio: Tensor) -> Tensor:
    """Clamped to +-LOG_RATIO_LIMIT."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def within(log_ratio: Tensor) -> Tensor:
    """Where `clamp` lets a gradient through."""
    return log_ratio.abs() <= LOG_RATIO_LIMIT


def either(mask: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One number or the other, in the dtype of `like` (torch.where would give the default dtype's rounding of them)."""
    return torch.full_like(like, no).masked_fill(mask, yes)


@dataclass(frozen=True)
class Tokens:
    """What a kind sees of N tokens, all [N] and detached; tokens left out hold zeros.

    `log_ratio` = clamp(logp - old) and `moves` says where that clamp lets a gradient through. On-policy, old is logp and
    every log-ratio is exactly zero. `advantages` are the sequence's mean where the kind says so.
    """

    logp: Tensor
    old: Tensor
    log_ratio: Tensor
    moves: Tensor
    advantages: Tensor
    log_importance: Tensor | None
    """Only for kinds that fold the generator/trainer correction into their weight: its log, one per token."""
    sequences: Sequences | None
    """None: on-policy, and only some rows may be here."""

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()

    def sequence_sum(self, x: Tensor) -> Tensor:
        """[N]: sum over each token's sequence of a quantity that is zero wherever the log-ratio is."""
        # on-policy that is zero whichever rows are here, so that sequence kinds go through in chunks as well
        return torch.zeros_like(x) if self.sequences is None else self.sequences.sum(x)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """As `sequence_sum`, divided by the sequence's count."""
        return torch.zeros_like(x) if self.sequences is None else self.sequences.mean(x)


class Term(NamedTuple):
    """value and slope [N] of the module's formula; `marks` [N] are averaged into the metrics of their names."""

    value: Tensor
    slope: Tensor
    marks: dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One policy loss: its objective, how its tokens are summed, its own options."""

    objective: Callable[[Tokens, Mapping[str, Any]], Term]
    normalizer: Normalizer
    """What the caller counts over the whole step and hands in as `normalizer`: its completions, its completion tokens,
    those tokens of this rank's mini-batch alone, or completions x longest allowed completion."""
    per_sequence: bool
    """Divide each token by its sequence's count, so that every sequence weighs the same."""
    options: Mapping[str, Option] = field(default_factory=dict)
    reduces: bool = False
    """Needs a sum over the sequence of current log-probs before any token's gradient is known."""
    whole_sequence: bool = False
    """Its gradient flows through a quantity of the whole sequence, so that advantage and generator/trainer correction
    count as the sequence's means: the loss is the same, and its gradient is then a product."""
    penalises: bool = False
    """Has a gradient where the advantage is zero: it pulls log-ratios towards zero."""
    folds_importance: bool = False
    """Takes the generator/trainer correction into its own weight instead of being multiplied by it."""
