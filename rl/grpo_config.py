"""The settings of one RL step: keys of the recipe's section [rl].

What a loss needs is checked by the loss's own tables, so a kind or an option that is added there can be set here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels import policy_loss
from ..kernels.policy_kind import Kind
from ..kernels.policy_loss import KINDS
from .advantages import SCALES
from .config import nearest
from .entropy import AdaptiveEntropy, Aepo, NegativeClip

_LOSS = (
    "clip_low", "clip_high", "kl_weight", "kl", "kl_bias_correction", "importance_cap", "importance_range", "importance_level",
    "importance_sequence_range", "off_policy_threshold",
)  # fmt: skip
"""Keys that go to the policy loss under the same name; `entropy_weight` goes there too, but may move on the way."""

FOREIGN_CAP = 2.0
"""Truncated importance sampling (TIS) at the bound that verl has too, for a generator that is another program."""


@dataclass(frozen=True)
class GrpoConfig:
    """One RL step.

    `dynamic_sampling` samples until `batch_prompts` groups have rewards that differ, in at most `max_batches` batches;
    surplus prompts come first in the next step. `overlong_buffer` tokens before the limit are penalised (0: off).

    The loss (`longreach.kernels.policy_loss`): `kind` is any of its kinds. `clip_low` and `clip_high` are the kind's own where
    they are left out; what else a kind takes stands in [rl.options] (`dual_clip`, `delta`, ...). `kl_bias_correction` makes
    the KL term unbiased after the first update. `importance_*` correct for a generator that differs from the trainer:
    weights up to `importance_cap`, none outside `importance_range` (by token or by sequence, as `importance_level` says),
    none for completions whose mean lies outside `importance_sequence_range`. Where none of them is set and the generator is
    another program, weights are capped at 2; `importance = "off"` corrects nothing. `off_policy_threshold` leaves out
    wrong completions that the policy has moved away from.

    `staleness` is how many steps older than the weights it trains a step's rollouts may be: they are sampled meanwhile, by
    another program (`overlap.py`); 0 is on-policy. `stragglers` is how many of a step's groups may be late: its sampling
    ends without them, and the next step's goes on with them, by newer weights (`stragglers.py`); 0 waits for all.

    `shared_prefix = false` computes a group's prompt once for each of its completions, as other trainers do: the same
    numbers at G times the work, for comparison.

    Entropy rules (`entropy.py`): `top_entropy_quantile` trains on that share of the most uncertain tokens (0.2: '80/20'),
    `negative_clip` spares the uncertain parts of wrong answers, `aepo` all of them while the entropy is high;
    `adaptive_entropy` moves the weight of the bonus, which `entropy_weight` is else.
    """

    kind: str = "grpo"
    group_size: int = 8
    batch_prompts: int = 32
    updates: int = 1
    clip_low: float | None = None
    clip_high: float | None = None
    options: dict[str, float] = field(default_factory=dict)
    kl_weight: float = 0.0
    kl: str = "k3"
    kl_bias_correction: bool = False
    entropy_weight: float = 0.0
    scale: str = "group"
    importance: str = "auto"
    importance_cap: float | None = None
    importance_range: tuple[float, ...] | None = None
    importance_level: str = "token"
    importance_sequence_range: tuple[float, ...] | None = None
    off_policy_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    negative_clip: NegativeClip | None = None
    aepo: Aepo | None = None
    adaptive_entropy: AdaptiveEntropy | None = None
    dynamic_sampling: bool = False
    max_batches: int = 10
    overlong_buffer: int = 0
    balanced_tasks: bool = False
    staleness: int = 0
    stragglers: int = 0
    micro_batch_tokens: int = 65536
    shared_prefix: bool = True

    def __post_init__(self) -> None:
        self._check_loss()
        self._check_entropy_rules()
        if self.scale not in SCALES:
            raise ValueError(f"rl.scale {self.scale!r} is not known: {nearest(self.scale, SCALES)}")
        if self.group_size < 2:
            raise ValueError(
                f"rl.group_size = {self.group_size}: advantages compare the completions of a group, use 2 or more"
            )
        if self.updates < 1 or self.batch_prompts % self.updates:
            raise ValueError(
                f"rl.batch_prompts = {self.batch_prompts} can't be shared by rl.updates = {self.updates}: make it a multiple"
            )
        if self.max_batches < 1:
            raise ValueError(f"rl.max_batches must be at least 1, not {self.max_batches}")
        if self.staleness < 0:
            raise ValueError(f"rl.staleness must be 0 (on-policy) or a number of steps, not {self.staleness}")
        if not 0 <= self.stragglers < self.batch_prompts:
            raise ValueError(
                f"rl.stragglers must be 0 (all groups are waited for) or fewer than rl.batch_prompts = {self.batch_prompts}, "
                f"not {self.stragglers}"
            )
        if self.stragglers and self.dynamic_sampling:
            raise ValueError(
                f"rl.stragglers = {self.stragglers}, but rl.dynamic_sampling must see all of a step's groups: leave out one of them"
            )
        if self.overlong_buffer < 0:
            raise ValueError(f"rl.overlong_buffer must be 0 or more, not {self.overlong_buffer}")

    def _check_loss(self) -> None:
        """The loss of no tokens at all: it refuses what it would refuse in the first step."""
        if self.importance not in ("auto", "off"):
            raise ValueError(f"rl.importance {self.importance!r} is not known: auto or off")
        if self.importance == "off" and self.corrected:
            raise ValueError(
                'rl.importance = "off", yet corrections are set (rl.importance_*): leave out one or the other'
            )
        none = torch.zeros(0)
        policy_loss(
            none, none, none, none.long(), kind=self.kind, normalizer=1.0, entropy=none, rollout_logp=none, ref_logp=none,
            entropy_weight=self.entropy_weight, **self.loss_options(foreign=True),
        )  # fmt: skip

    def _check_entropy_rules(self) -> None:
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(
                f"rl.top_entropy_quantile must lie in (0, 1], not {self.top_entropy_quantile}; 1 trains on every token"
            )
        rule = self.adaptive_entropy
        if rule and not rule.min <= self.entropy_weight <= rule.max:
            raise ValueError(
                f"rl.entropy_weight = {self.entropy_weight} is where rl.adaptive_entropy begins: it must lie within its "
                f"min = {rule.min} and max = {rule.max}"
            )

    @property
    def corrected(self) -> bool:
        """Whether the recipe itself sets a correction for the generator."""
        return any(x is not None for x in (self.importance_cap, self.importance_range, self.importance_sequence_range))

    def loss_options(self, *, foreign: bool = False) -> dict[str, Any]:
        """What the policy loss is to be told beside the weight of the entropy bonus: all that isn't left out.

        Args:
            foreign: another program samples, whose log-probs are its own.

        Raises:
            ValueError: a key of [rl.options] that has a place of its own.
        """
        for name in self.options:
            if name in _LOSS or name == "entropy_weight":
                raise ValueError(f"rl.options.{name} stands in [rl] itself: write rl.{name}")
        named = {name: getattr(self, name) for name in _LOSS}
        if foreign and self.importance == "auto" and not self.corrected:
            named["importance_cap"] = FOREIGN_CAP
        return {**{name: value for name, value in named.items() if value is not None}, **self.options}

    @property
    def loss(self) -> Kind:
        """What the loss's table says of the kind."""
        return KINDS[self.kind]

    @property
    def masks(self) -> bool:
        """Whether an entropy rule takes advantages away."""
        return self.top_entropy_quantile < 1 or self.negative_clip is not None or self.aepo is not None

    @property
    def dense(self) -> bool:
        """Whether completions have a gradient that have no advantage."""
        bonus = self.entropy_weight or self.adaptive_entropy is not None
        return bool(self.kl_weight or bonus or self.loss.penalises)
