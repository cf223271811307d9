"""The RL step: sample -> reward -> advantages -> old log-probs -> updates.

A step takes `batch_prompts` groups of `group_size` completions and makes `updates` optimizer updates, each on its share of
the groups. Normalizers are counted over a whole update before it is cut into micro-batches, so the update is the same to
rounding however it is cut. Completions that can't have a gradient (zero advantage, no KL, no entropy bonus) are counted by
the normalizer and never computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine import Group, Sampling, pack_groups
from ..engine.optimizer import apply_update
from ..kernels import Mean, policy_loss
from ..kernels.policy_loss import KL_ESTIMATORS
from .advantages import SCALES, group_advantages, overlong_penalty, reward_spread
from .config import nearest
from .console import Console
from .policy import Policy
from .prompts import Prompt
from .rewards import Reward
from .rollouts import Rollout, RolloutGroup, roll_out
from .run import Stopwatch
from .sampler import PromptSampler
from .seeds import derive
from .step_metrics import cost, mean_of, rollout_metrics

KINDS = ("grpo", "dapo", "dr_grpo", "bnpo")


@dataclass(frozen=True)
class GrpoConfig:
    """One RL step.

    `dynamic_sampling` samples until `batch_prompts` groups have rewards that differ, in at most `max_batches` batches;
    surplus prompts come first in the next step. `overlong_buffer` tokens before the limit are penalised (0: off).
    `importance_cap` corrects for a generator that differs from the trainer (truncated importance sampling).
    """

    kind: str = "grpo"
    group_size: int = 8
    batch_prompts: int = 32
    updates: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    kl: str = "k3"
    entropy_weight: float = 0.0
    scale: str = "group"
    importance_cap: float | None = None
    dynamic_sampling: bool = False
    max_batches: int = 10
    overlong_buffer: int = 0
    balanced_tasks: bool = False
    micro_batch_tokens: int = 65536

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rl.kind {self.kind!r} is not a known loss: {nearest(self.kind, KINDS)}")
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
        if self.kl not in KL_ESTIMATORS:
            raise ValueError(f"rl.kl {self.kl!r} is not a known estimator: {nearest(self.kl, KL_ESTIMATORS)}")
        if self.clip_low > 1.0:
            raise ValueError(f"rl.clip_low = {self.clip_low}: ratios are positive, so it is at most 1")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(
                f"rl.importance_cap must be positive, not {self.importance_cap}; leave it out to switch it off"
            )
        for name in ("clip_low", "clip_high", "kl_weight", "entropy_weight", "overlong_buffer"):
            if getattr(self, name) < 0:
                raise ValueError(f"rl.{name} must be 0 or more, not {getattr(self, name)}")


@dataclass
class Sample:
    """A rollout on its way through the updates; `old_logp` None: the update's own log-probs are the old ones."""

    rollout: Rollout
    ids: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None

    @property
    def advantage(self) -> float:
        assert self.rollout.advantage is not None
        return self.rollout.advantage


Minibatch = list[tuple[Prompt, list[Sample]]]


class GrpoTrainer:
    """Everything a phase's steps share. `reference` is asked only if `kl_weight` isn't 0, and may else be None."""

    def __init__(
        self, config: GrpoConfig, policy: Policy, reward: Reward, optimizer: torch.optim.Optimizer, *, stage: str,
        sampling: Sampling, prompts: Sequence[Prompt], sampler: PromptSampler, seed: int, grad_clip: float,
        reference: Policy | None = None, console: Console | None = None,
    ) -> None:  # fmt: skip
        self.config, self.policy, self.reward, self.optimizer = config, policy, reward, optimizer
        self.stage, self.sampling, self.prompts, self.sampler = stage, sampling, prompts, sampler
        self.seed, self.grad_clip, self.reference = seed, grad_clip, reference
        self.console = console or Console(quiet=True)

    def step(
        self, step: int, learning_rate: float, replay: list[RolloutGroup] | None = None
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """One RL step; gives its metrics and every group sampled, trained on or not. `replay` trains on saved groups instead."""
        watch, start = Stopwatch(), time.perf_counter()
        groups = self.collect(step, watch) if replay is None else replay
        groups = self.advantages(groups) if replay is None else groups
        minibatches = self.minibatches([group for group in groups if group.rollouts[0].used])
        with watch("old_log_prob"):
            self.attach_logprobs(minibatches)
        with watch("update_actor"):
            metrics = self.update_all(minibatches, learning_rate)
        watch.seconds["timing_s/step"] = time.perf_counter() - start
        costs = cost(groups, watch, self.policy.model.device)
        return {**rollout_metrics(groups), **self.reward.metrics(), **metrics, **costs}, groups

    def collect(self, step: int, watch: Stopwatch) -> list[RolloutGroup]:
        """Sampled and scored groups; with dynamic sampling, until enough of them have rewards that differ."""
        config, groups, chosen = self.config, [], []
        for batch in range(config.max_batches if config.dynamic_sampling else 1):
            drawn = self.sampler.take(config.batch_prompts)
            chosen += drawn
            with self.console.progress(f"{self.stage}: sampling", config.batch_prompts * config.group_size) as advance:
                groups += roll_out(
                    self.policy, self.reward, [self.prompts[i] for i in drawn], config.group_size, self.sampling,
                    seed=derive(self.seed, "rollout", self.stage, step, batch), stage=self.stage, step=step,
                    first_group=len(groups), watch=watch, on_done=advance,
                )  # fmt: skip
            if len(_differing(groups)) >= config.batch_prompts:
                break
        if config.dynamic_sampling:
            self.sampler.give_back([chosen[i] for i in _differing(groups)[config.batch_prompts :]])
        return groups

    def advantages(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """Overlong penalty, then group-relative advantages for the groups that are trained on."""
        config = self.config
        shaped = [self._shape(group) for group in groups]
        differing = set(_differing(groups)[: config.batch_prompts])
        used = [not config.dynamic_sampling or i in differing for i in range(len(groups))]
        chosen = [group for group, use in zip(shaped, used, strict=True) if use]
        values = iter(
            group_advantages([g.rewards for g in chosen], [g.prompt.example.benchmark for g in chosen], config.scale)
        )
        return [group.with_advantages(next(values)) if use else group for group, use in zip(shaped, used, strict=True)]

    def _shape(self, group: RolloutGroup) -> RolloutGroup:
        limit, buffer = self.sampling.max_completion, self.config.overlong_buffer
        if not buffer:
            return group
        shaped = []
        for rollout in group.rollouts:
            penalty = overlong_penalty(len(rollout.completion_ids), limit=limit, buffer=buffer)
            reward = None if rollout.reward is None else rollout.reward + penalty
            shaped.append(replace(rollout, reward=reward, rewards={**rollout.rewards, "overlong": penalty}))
        return RolloutGroup(group.prompt, tuple(shaped))

    def minibatches(self, groups: list[RolloutGroup]) -> list[Minibatch]:
        """The groups shared out over the updates, completions without a verdict left out."""
        updates = self.config.updates
        shares = [groups[i * len(groups) // updates : (i + 1) * len(groups) // updates] for i in range(updates)]
        return [
            [
                (
                    group.prompt,
                    [Sample(r, torch.tensor(r.completion_ids)) for r in group.rollouts if r.advantage is not None],
                )
                for group in share
            ]
            for share in shares
        ]

    def attach_logprobs(self, minibatches: list[Minibatch]) -> None:
        """Old log-probs of every update but the first, which is on-policy; reference ones only if the KL term has weight."""
        for index, minibatch in enumerate(minibatches):
            if index:
                for sample, logp in self._logprobs(self.policy, self.computed(minibatch)):
                    sample.old_logp = logp
            if self.config.kl_weight:
                assert self.reference is not None, "a KL term compares with a reference"
                for sample, logp in self._logprobs(self.reference, self.computed(minibatch)):
                    sample.ref_logp = logp

    def computed(self, minibatch: Minibatch) -> Minibatch:
        """What can have a gradient: all of it with a KL term or an entropy bonus, else non-zero advantages alone."""
        if self.config.kl_weight or self.config.entropy_weight:
            return [(prompt, samples) for prompt, samples in minibatch if samples]
        kept = [(prompt, [s for s in samples if s.advantage]) for prompt, samples in minibatch]
        return [(prompt, samples) for prompt, samples in kept if samples]

    @torch.no_grad()
    def _logprobs(self, policy: Policy, minibatch: Minibatch) -> list[tuple[Sample, Tensor]]:
        made: list[tuple[Sample, Tensor]] = []
        for row, samples in _rows(minibatch, self.config.micro_batch_tokens):
            logp = policy.logprobs(row, self.sampling.temperature).logp
            made += zip(samples, logp.split([len(s.ids) for s in samples]), strict=True)
        return made

    def update_all(self, minibatches: list[Minibatch], learning_rate: float) -> dict[str, float]:
        totals: dict[str, Mean] = {}
        losses, norms = [], []
        for minibatch in minibatches:
            if not any(samples for _, samples in minibatch):
                continue  # nothing was learned from: weight decay and momentum alone must not move the weights
            losses.append(self.gradient(minibatch, totals))
            norms.append(apply_update(self.optimizer, self.policy.model, learning_rate, self.grad_clip))
        metrics = {name: mean.value for name, mean in totals.items()}
        return {
            **metrics,
            "loss": mean_of(losses),
            "grad_norm": mean_of(norms),
            "learning_rate": learning_rate,
            "updates": len(losses),
        }

    def gradient(self, minibatch: Minibatch, totals: dict[str, Mean]) -> float:
        """Accumulates the gradient of one update over its micro-batches; gives the loss."""
        config, total = self.config, 0.0
        normalizer = self.normalizer(minibatch)
        for row, samples in _rows(self.computed(minibatch), config.micro_batch_tokens):
            made = self.policy.logprobs(row, self.sampling.temperature)
            result = policy_loss(
                made.logp, **self._loss_inputs(samples, made.logp), kind=config.kind, normalizer=normalizer, entropy=made.entropy,
                clip_low=config.clip_low, clip_high=config.clip_high, kl_weight=config.kl_weight, kl=config.kl,
                entropy_weight=config.entropy_weight, importance_cap=config.importance_cap,
            )  # fmt: skip
            result.loss.backward()
            total += result.loss.item()
            for name, mean in result.metrics.items():
                totals[name] = totals[name] + mean if name in totals else mean
        return total

    def _loss_inputs(self, samples: list[Sample], logp: Tensor) -> dict[str, Any]:
        device = logp.device
        lengths = torch.tensor([len(s.ids) for s in samples], device=device)
        old = [s.old_logp for s in samples if s.old_logp is not None]
        ref = [s.ref_logp for s in samples if s.ref_logp is not None]
        sampled = [x + y for s in samples for x, y in zip(s.rollout.logprobs, s.rollout.kept_logmass, strict=True)]
        return {
            "old_logp": torch.cat(old) if old else logp.detach(),
            "advantages": torch.tensor(
                [s.advantage for s in samples], device=device, dtype=logp.dtype
            ).repeat_interleave(lengths),
            "sequence_ids": torch.arange(len(samples), device=device).repeat_interleave(lengths),
            "rollout_logp": torch.tensor(sampled, device=device, dtype=logp.dtype),
            "ref_logp": torch.cat(ref) if ref else None,
        }

    def normalizer(self, minibatch: Minibatch) -> float:
        """What the loss of one update is divided by, counted over all its completions (design: one global number)."""
        sequences = sum(len(samples) for _, samples in minibatch)
        tokens = sum(len(s.ids) for _, samples in minibatch for s in samples)
        if self.config.kind == "grpo":
            return float(max(1, sequences))
        if self.config.kind == "dr_grpo":
            return float(max(1, sequences) * self.sampling.max_completion)
        return float(max(1, tokens))


def _rows(minibatch: Minibatch, budget: int) -> list[tuple[Sequence[Group], list[Sample]]]:
    """Micro-batches: packed rows within the budget, and their samples in row order."""
    groups = [Group(torch.tensor(prompt.ids), [s.ids for s in samples]) for prompt, samples in minibatch]
    return [(row.groups, [minibatch[g][1][c] for g, c in row.members]) for row in pack_groups(groups, budget)]


def _differing(groups: Sequence[RolloutGroup]) -> list[int]:
    """Indices of the groups whose rewards differ: only they have a gradient."""
    return [i for i, group in enumerate(groups) if reward_spread(group.rewards) > 0]
