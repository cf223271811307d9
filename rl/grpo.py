"""The RL step: sample -> reward -> advantages -> old log-probs -> updates.

A step takes `batch_prompts` groups of `group_size` completions and makes `updates` optimizer updates, each on its share of
the groups. Normalizers are counted over a whole update before it is cut into micro-batches, so the update is the same to
rounding however it is cut. Completions that can't have a gradient (zero advantage, no KL, no entropy bonus) are counted by
the normalizer and never computed; the entropy rules can make it so (`entropy.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine import Group, Sampling, pack_groups
from ..kernels import Mean
from .advantages import group_advantages, overlong_penalty, reward_spread
from .console import Console
from .entropy import EntropyControl, Masks, batch_entropy
from .grpo_config import GrpoConfig
from .overlap import Overlap
from .policy import Policy
from .prompts import Prompt
from .rewards import Reward
from .rollouts import Rollout, RolloutGroup, Unjudged, roll_out
from .run import Stopwatch
from .sampler import PromptSampler
from .seeds import derive
from .step_metrics import add_means, cost, mask_metrics, mean_of, mismatch_metrics, rollout_metrics, staleness
from .stragglers import Stragglers


@dataclass
class Sample:
    """A rollout on its way through the updates; `old_logp` None: the update's own log-probs are the old ones.

    `entropy` is known only where an entropy rule asked for it, `kept` [R] says which tokens keep their advantage (None: all).
    """

    rollout: Rollout
    ids: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    entropy: Tensor | None = None
    kept: Tensor | None = None

    @property
    def advantage(self) -> float:
        assert self.rollout.advantage is not None
        return self.rollout.advantage

    @property
    def learns(self) -> bool:
        """Whether any of its tokens has an advantage."""
        return self.advantage != 0 and (self.kept is None or bool(self.kept.any()))


_LOSS = "loss"
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
        self.entropy = EntropyControl(config.entropy_weight, config.adaptive_entropy, config.aepo)
        self.stragglers = Stragglers(config.stragglers, config.staleness)
        self._overlap: Overlap | None = None
        self._last = 0

    def step(
        self, step: int, learning_rate: float, replay: list[RolloutGroup] | None = None,
        saved: Sequence[RolloutGroup] = (), watch: Stopwatch | None = None,
    ) -> tuple[dict[str, float], list[RolloutGroup]]:  # fmt: skip
        """One RL step; gives its metrics and every group sampled, trained on or not.

        `replay` trains on saved groups instead; `saved`: see `collect`.
        """
        watch = watch or Stopwatch()
        watch.note = lambda name: self.policy.ranks.note(name, step)
        counts: dict[str, float] = {}
        with watch("step"):
            if replay is None:
                sampled, counts = self.sampled(step, watch, saved)
                groups = self.advantages(sampled)
            else:
                groups = replay
            minibatches = self.minibatches([group for group in groups if group.rollouts[0].used])
            masked = self.attach_logprobs(minibatches, watch)
            with watch("update_actor"):
                metrics = {**masked, **self.update_all(minibatches, learning_rate)}
        costs = cost(groups, watch, self.policy.model.device)
        asked = {**self.policy.generation_metrics(), **self.reward.metrics()}
        return {**rollout_metrics(groups), **staleness(groups, step), **counts, **asked, **metrics, **costs}, groups

    @contextmanager
    def overlapping(
        self, first: int, last: int, saved: Callable[[int], list[RolloutGroup]]
    ) -> Iterator[Callable[[int], AbstractContextManager[object]]]:
        """A block in which steps `first` to `last` are sampled while earlier ones train, `staleness` ahead at most.

        Gives what makes a block in which nothing is sampled, for evaluations between steps. `saved` are the groups that an
        `Unjudged` left of a step. Where `staleness` is 0 nothing overlaps. Step `last` waits for all of its groups.
        """
        self._last = last
        if not self.config.staleness or last < first:
            yield lambda step: nullcontext()
            return
        with Overlap(self, staleness=self.config.staleness, first=first, last=last, saved=saved) as self._overlap:
            try:
                yield self._overlap.alone
            finally:
                self._overlap = None

    def sampled(
        self, step: int, watch: Stopwatch, saved: Sequence[RolloutGroup]
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """The step's groups, sampled now or while earlier steps trained, and what was counted of those that were late."""
        if self._overlap is None:
            if self.policy.served is not None:
                with watch("update_weights"):
                    self.policy.served.refresh()
            groups = self.collect(step, watch, saved)
            self.policy.rest()
            return groups, self.stragglers.counts
        with watch("wait_for_rollouts"):
            found = self._overlap.take(step).made
        watch.join(found.seconds, found.spans)
        self.sampler.load(found.sampler)
        return found.groups, found.counts

    def hand_over(self, step: int, watch: Stopwatch) -> None:
        """After the step's updates: who samples ahead goes on with its weights. All ranks call it."""
        if self._overlap is not None:
            with watch("update_weights"):
                self._overlap.hand_over(step)

    def collect(
        self, step: int, watch: Stopwatch, saved: Sequence[RolloutGroup] = (), version: int | None = None
    ) -> list[RolloutGroup]:
        """Sampled and scored groups; with dynamic sampling, until enough of them have rewards that differ.

        `saved` are the groups of the same step that an `Unjudged` left: they are scored, and not sampled again. `version` is
        the policy's (None: the one that the step before made). Late groups stay in `stragglers` for the next step.
        """
        config, groups, chosen = self.config, list[RolloutGroup](), []
        version = step - 1 if version is None else version
        for batch in range(config.max_batches if config.dynamic_sampling else 1):
            left = saved[len(groups) : len(groups) + config.batch_prompts] if config.dynamic_sampling else saved
            drawn = self.stragglers.draw(self.sampler, config.batch_prompts, [g.prompt for g in left], self.prompts)
            chosen += drawn
            with self.console.progress(f"{self.stage}: sampling", len(drawn) * config.group_size) as advance:
                try:
                    made = roll_out(
                        self.policy, self.reward, [self.prompts[i] for i in drawn], config.group_size, self.sampling,
                        seed=derive(self.seed, "rollout", self.stage, step, batch), stage=self.stage, step=step,
                        first_group=len(groups), watch=watch, on_done=advance, saved=left,
                        sample=self.stragglers.sampling(self.policy, drawn, version, wait=step >= self._last),
                    )  # fmt: skip
                except Unjudged as error:
                    told = self.stragglers.told(error.groups, version, left)
                    raise Unjudged(str(error), groups + told) from error
            groups += self.stragglers.told(made, version, left)
            self.stragglers.end(self.sampler, step)
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

    def attach_logprobs(self, minibatches: list[Minibatch], watch: Stopwatch | None = None) -> dict[str, float]:
        """What the updates need of the policy before them, and of the reference; gives what the entropy rules did.

        Old log-probs for every update but the first, which is on-policy; reference ones only if the KL term has weight.
        A masking rule costs a pass without gradient over the first update's completions (the others pass anyhow), and AEPO
        and the top-entropy mask, which look at whole batches, one over those of zero advantage. It saves the updates' own
        passes over completions whose advantages it takes away.
        """
        watch = watch or Stopwatch()
        with watch("old_log_prob"):
            for index, minibatch in enumerate(minibatches):
                if index or self.config.masks:
                    for sample, logp, entropy in self._logprobs(self.policy, self.probed(minibatch)):
                        sample.old_logp = logp if index else None
                        sample.entropy = entropy if self.config.masks else None
            metrics = self.mask(minibatches) if self.config.masks else {}
        if self.config.kl_weight:
            assert self.reference is not None, "a KL term compares with a reference"
            with watch("ref"):
                for minibatch in minibatches:
                    for sample, logp, _ in self._logprobs(self.reference, self.computed(minibatch)):
                        sample.ref_logp = logp
        return metrics

    def mask(self, minibatches: list[Minibatch]) -> dict[str, float]:
        """Takes from each update the advantages that the entropy rules take away; gives what that did to the step."""
        updates = [[s for _, samples in m for s in samples if s.entropy is not None] for m in minibatches]
        batch = batch_entropy([s.entropy for samples in updates for s in samples if s.entropy is not None])
        rules = Masks(self.config.top_entropy_quantile, self.config.negative_clip, self.entropy.begin(batch))
        for samples in updates:
            entropies = [s.entropy for s in samples if s.entropy is not None]
            for sample, kept in zip(samples, rules.kept(entropies, [s.advantage for s in samples]), strict=True):
                sample.kept = kept
        pairs = [(s.kept, s.advantage) for samples in updates for s in samples if s.kept is not None]
        return mask_metrics(pairs, batch if self.config.aepo else None, rules.negatives)

    def probed(self, minibatch: Minibatch) -> Minibatch:
        """What is passed before the updates: all that a rule over whole batches counts, else what can have a gradient."""
        if self.config.aepo or self.config.top_entropy_quantile < 1:
            return [(prompt, samples) for prompt, samples in minibatch if samples]
        return self.computed(minibatch)

    def computed(self, minibatch: Minibatch) -> Minibatch:
        """What can have a gradient: all of it if other terms than the advantages' have one, else where one is left."""
        if self.config.dense:
            return [(prompt, samples) for prompt, samples in minibatch if samples]
        kept = [(prompt, [s for s in samples if s.learns]) for prompt, samples in minibatch]
        return [(prompt, samples) for prompt, samples in kept if samples]

    @torch.no_grad()
    def _logprobs(self, policy: Policy, minibatch: Minibatch) -> list[tuple[Sample, Tensor, Tensor]]:
        """Each sample with its log-probs and entropies."""
        rows, ranks, model = self.rows(minibatch), self.policy.ranks, self.policy.model
        mine: dict[int, Tensor] = {}
        for turn in ranks.rows([tokens for _, _, tokens in rows]):
            if turn is None:
                policy.idle()
                continue
            made = policy.logprobs(rows[turn][0], self.sampling.temperature, self.budget)
            mine[turn] = torch.stack([made.logp, made.entropy])
        lengths = [[len(s.ids) for s in samples] for _, samples, _ in rows]
        like = torch.empty((2, 0), dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
        merged = ranks.merge_rows(mine, [sum(each) for each in lengths], like)
        return [
            (sample, pair[0], pair[1])
            for (_, samples, _), each, result in zip(rows, lengths, merged, strict=True)
            for sample, pair in zip(samples, result.split(each, dim=-1), strict=True)
        ]

    def update_all(self, minibatches: list[Minibatch], learning_rate: float) -> dict[str, float]:
        totals: dict[str, Mean] = {}
        losses, norms, weights = [], [], []
        for minibatch in minibatches:
            if not any(samples for _, samples in minibatch):
                continue  # nothing was learned from: weight decay and momentum alone must not move the weights
            weights.append(self.entropy.weight)
            mine: dict[str, Mean] = {}
            loss = torch.tensor(self.gradient(minibatch, mine), dtype=torch.float64)
            means = self.policy.ranks.total({**mine, _LOSS: Mean(loss, torch.ones_like(loss))})
            losses.append(float(means.pop(_LOSS).total))
            norms.append(self.policy.update(self.optimizer, learning_rate, self.grad_clip))
            if "entropy" in means:
                self.entropy.observe(means["entropy"].value)
            add_means(totals, means)
        metrics = mismatch_metrics({name: mean.value for name, mean in totals.items()})
        return {
            **metrics,
            **({"entropy_coef": mean_of(weights)} if self.config.adaptive_entropy else {}),
            "loss": mean_of(losses),
            "grad_norm": mean_of(norms),
            "learning_rate": learning_rate,
            "updates": len(losses),
        }

    def gradient(self, minibatch: Minibatch, totals: dict[str, Mean]) -> float:
        """Accumulates the gradient of one update over this data rank's micro-batches; gives their loss, adds to the metrics."""
        config, total = self.config, 0.0
        normalizer, rows = self.normalizer(minibatch), self.rows(self.computed(minibatch))
        options, known = config.loss_options(foreign=self.policy.foreign), rollout_known(minibatch)
        if not known:
            options = self.uncorrected(options)
        for turn in self.policy.ranks.rows([tokens for _, _, tokens in rows]):
            if turn is None:
                self.policy.idle()
                continue
            row, samples, _ = rows[turn]
            inputs = _loss_inputs(samples, self.policy.model.device, known)
            result = self.policy.loss(
                row, self.sampling.temperature, **inputs, kind=config.kind, normalizer=normalizer,
                budget=self.budget, entropy_weight=self.entropy.weight, **options,
            )  # fmt: skip
            result.loss.backward()
            total += result.loss.item()
            add_means(totals, result.metrics)
        return total

    def uncorrected(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The loss's options where the generator's log-probs are of another measure than the trainer's: none that compares them."""
        left = {name: value for name, value in options.items() if not name.startswith("importance_")}
        lost = sorted(options.keys() - left.keys() - {"importance_level"})
        if lost:
            self.console.warn_once(
                "the generator doesn't say how much top_p and top_k cut off, so its log-probs can't be compared with the trainer's: "
                f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} off, and training runs on old log-probs (top_p = 1 and "
                "top_k = 0 would bring them back)"
            )
        return left

    @property
    def budget(self) -> int | None:
        """Tokens above which a group is computed in three phases; None where ranks must run the same forwards."""
        return None if self.policy.in_step else self.config.micro_batch_tokens

    def rows(self, minibatch: Minibatch) -> list[tuple[Sequence[Group], list[Sample], int]]:
        """Micro-batches: packed rows within the budget, their samples in row order, and their tokens."""
        if not self.config.shared_prefix:
            minibatch = [(prompt, [sample]) for prompt, samples in minibatch for sample in samples]
        groups = [Group(torch.tensor(prompt.ids), [s.ids for s in samples]) for prompt, samples in minibatch]
        packed = pack_groups(groups, self.config.micro_batch_tokens, three_phases=self.budget is not None)
        return [(row.groups, [minibatch[g][1][c] for g, c in row.members], row.tokens) for row in packed]

    def normalizer(self, minibatch: Minibatch) -> float:
        """What the loss of one update is divided by, counted over all its completions (design: one global number)."""
        sequences = sum(len(samples) for _, samples in minibatch)
        tokens = sum(len(s.ids) for _, samples in minibatch for s in samples)
        counted = {
            "sequences": sequences,
            "tokens": tokens,
            "local_tokens": tokens,
            "sequences_x_limit": sequences * self.sampling.max_completion,
        }
        return float(max(1, counted[self.config.loss.normalizer]))


def rollout_known(minibatch: Minibatch) -> bool:
    """Whether the generator's log-probs can be brought to the full vocabulary, in all of an update."""
    return all(s.rollout.kept_logmass for _, samples in minibatch for s in samples)


def _loss_inputs(samples: list[Sample], device: torch.device, rollout: bool) -> dict[str, Tensor | None]:
    """What the loss of a micro-batch takes beside the current log-probs, [N] each; it rounds to its own precision."""
    lengths = torch.tensor([len(s.ids) for s in samples], device=device)
    advantages = torch.tensor([s.advantage for s in samples], device=device, dtype=torch.float64)
    advantages = advantages.repeat_interleave(lengths)
    old = [s.old_logp for s in samples if s.old_logp is not None]
    ref = [s.ref_logp for s in samples if s.ref_logp is not None]
    kept = [s.kept for s in samples if s.kept is not None]
    return {
        "old_logp": torch.cat(old) if old else None,
        "advantages": torch.where(torch.cat(kept), advantages, 0.0) if kept else advantages,
        "rollout_logp": _sampled(samples, device) if rollout else None,
        "ref_logp": torch.cat(ref) if ref else None,
    }


def _sampled(samples: list[Sample], device: torch.device) -> Tensor:
    """The generator's log-probs over the full vocabulary [N]."""
    pairs = (zip(s.rollout.logprobs, s.rollout.kept_logmass, strict=True) for s in samples)
    return torch.tensor([x + y for each in pairs for x, y in each], device=device, dtype=torch.float64)


def _differing(groups: Sequence[RolloutGroup]) -> list[int]:
    """Indices of the groups whose rewards differ: only they have a gradient."""
    return [i for i, group in enumerate(groups) if reward_spread(group.rewards) > 0]
