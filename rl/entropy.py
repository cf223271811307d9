"""Entropy rules: which tokens of an update keep their advantage, and how much the entropy bonus weighs.

Three rules take the advantage (not the place in the denominator) of some tokens away, as a factor 0 on the token's
objective: the '80/20' mask, QwenLong-L1.5's negative-gradient clipping, and its AEPO. A fourth moves the weight of the
entropy bonus. Tokens whose advantage is gone have no gradient; completions without any left aren't computed.

The masks look at entropies (nats, at the sampling temperature) of the policy as it was when the step began: known before
the update, hence the same (to rounding) however it is cut into micro-batches. QwenLong-L1.5 makes one update a step, so
there is no other policy; TRL and verl, which look at the entropies of the update itself, differ from the second update on.
KL and entropy terms see every token (TRL's bonus leaves out what its top-entropy mask does). What it costs is said in `GrpoTrainer.attach_logprobs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import nearest

LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class NegativeClip:
    """Negative-gradient clipping (arXiv 2512.12967, eq. 8-10): what is uncertain in a wrong answer isn't punished.

    `level` "token" spares tokens whose entropy lies above `threshold`, "sequence" completions whose mean entropy does.
    The paper prints no threshold; its entropies lie between 0.1 and 0.25 nats.
    """

    level: str
    threshold: float

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"rl.negative_clip.level {self.level!r} is not known: {nearest(self.level, LEVELS)}")
        if self.threshold < 0:
            raise ValueError(f"rl.negative_clip.threshold must be 0 or more, not {self.threshold}: entropies are")


@dataclass(frozen=True)
class Aepo:
    """Adaptive entropy-controlled policy optimization (arXiv 2512.12967, section 4.4), as its authors put it right later.

    When the batch entropy rises above `high`, completions with a negative advantage are masked, until it falls below
    `low`. The paper prints neither bound.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"rl.aepo needs 0 <= low <= high, not low = {self.low} and high = {self.high}")


@dataclass(frozen=True)
class AdaptiveEntropy:
    """A bonus that holds the entropy up (Skywork-OR1, arXiv 2505.22312; the names and defaults are TRL's).

    After an update its mean token entropy is compared with `target`: at or below it the weight rises by `delta`, above it
    falls by `delta`, within [`min`, `max`]. The bonus is given only while the last entropy was at or below the target.
    The weight begins at `rl.entropy_weight`. A target of 0.2 acts only on a collapse: set it near the first steps' entropy.
    """

    target: float = 0.2
    delta: float = 0.005
    min: float = 0.0
    max: float = 1.0

    def __post_init__(self) -> None:
        if self.target <= 0 or self.delta <= 0:
            raise ValueError(
                f"rl.adaptive_entropy: target and delta must be positive, not {self.target} and {self.delta}"
            )
        if not 0 <= self.min < self.max:
            raise ValueError(f"rl.adaptive_entropy needs 0 <= min < max, not min = {self.min} and max = {self.max}")


def top_threshold(entropy: Tensor, share: float) -> float:
    """The entropy that the `share` most uncertain of N tokens reach: the (1 - share) quantile (arXiv 2506.01939).

    Of the two neighbours of that quantile the upper one, which selects the same tokens as TRL's interpolated
    `top_entropy_quantile` and has no limit on N. -inf for share 1 and for no tokens.
    """
    if share >= 1 or not len(entropy):
        return -math.inf
    rank = math.ceil((1 - share) * (len(entropy) - 1) - 1e-9)  # 1 - 0.7 is a little more than 0.3
    return float(entropy.float().kthvalue(rank + 1).values)


def spared(entropy: Tensor, advantage: float, rule: NegativeClip) -> Tensor:
    """Bool [R]: tokens of one completion that `rule` clips, 1 - I(i, t) of eq. 9."""
    if advantage >= 0 or not len(entropy):
        return torch.zeros_like(entropy, dtype=torch.bool)
    if rule.level == "token":
        return entropy > rule.threshold
    return (entropy.double().mean() > rule.threshold).expand(len(entropy))


def batch_entropy(entropies: Sequence[Tensor]) -> float:
    """The mean over completions of their mean token entropy (arXiv 2512.12967, eq. 11); NaN of nothing."""
    means = [entropy.double().mean() for entropy in entropies if len(entropy)]
    return float(torch.stack(means).mean()) if means else math.nan


def aepo_masks(masking: bool, entropy: float, rule: Aepo) -> bool:
    """Whether this step masks, given whether the last one did. An unknown entropy (NaN) changes nothing."""
    return not entropy < rule.low if masking else entropy > rule.high


def adapted(weight: float, entropy: float, rule: AdaptiveEntropy) -> float:
    """The bonus's weight after an update of mean token entropy `entropy`."""
    return min(weight + rule.delta, rule.max) if entropy <= rule.target else max(weight - rule.delta, rule.min)


@dataclass(frozen=True)
class Masks:
    """The three masking rules of an update; `negatives`: AEPO masks in this step."""

    top: float = 1.0
    clip: NegativeClip | None = None
    negatives: bool = False

    def kept(self, entropies: Sequence[Tensor], advantages: Sequence[float]) -> list[Tensor]:
        """Bool [R] per completion of one update: tokens whose advantage stays. All completions must be there."""
        bound = top_threshold(torch.cat(list(entropies)), self.top) if entropies else -math.inf
        made = []
        for entropy, advantage in zip(entropies, advantages, strict=True):
            kept = entropy.float() >= bound
            if self.clip:
                kept &= ~spared(entropy, advantage, self.clip)
            made.append(kept & (not (self.negatives and advantage < 0)))
        return made


class EntropyControl:
    """What the rules remember from update to update: the bonus's weight, the last entropy, whether AEPO masks."""

    def __init__(self, weight: float, adaptive: AdaptiveEntropy | None = None, aepo: Aepo | None = None) -> None:
        self.adaptive, self.aepo = adaptive, aepo
        self._weight, self._masking = weight, False
        self._last: float | None = None

    @property
    def weight(self) -> float:
        """The entropy bonus of the next update. Before the first one the entropy isn't known, and the bonus is given."""
        healthy = self.adaptive and self._last is not None and self._last > self.adaptive.target
        return 0.0 if healthy else self._weight

    def observe(self, entropy: float) -> None:
        """To be told the mean token entropy of each update."""
        if self.adaptive and not math.isnan(entropy):
            self._weight, self._last = adapted(self._weight, entropy, self.adaptive), entropy

    def begin(self, entropy: float) -> bool:
        """To be told the batch entropy at the start of each step; gives whether AEPO masks in it."""
        if self.aepo:
            self._masking = aepo_masks(self._masking, entropy, self.aepo)
        return self._masking

    def state(self) -> dict[str, Any]:
        return {"weight": self._weight, "last": self._last, "masking": self._masking}

    def load(self, state: Mapping[str, Any]) -> None:
        self._weight, self._last, self._masking = state["weight"], state["last"], state["masking"]
