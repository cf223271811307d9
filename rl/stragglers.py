"""Groups that a step doesn't wait for: stopped as far as they are, gone on with in the next step, by its weights.

A step asks for `batch_prompts` groups and for those that the step before left, and its sampling ends when all but
`rl.stragglers` of them are whole. So one long completion holds up nobody, at the price that its first tokens are of older
weights than its last: each part keeps the log-probs that it was sampled with, and `Rollout.spans` says which version sampled
which tokens. A phase's last step waits for all, so a phase trains on as many groups as without.

With v the version of a group's oldest token, step n trains it at age n - 1 - v, at most staleness + 1. A group that would be
older in the step to come is dropped, and its prompt sampled anew there, on top of the step's own. With staleness 0 that is
one that was late twice: completions that take longer than two steps' sampling are not learned from, which leans towards
short ones where `sampling/dropped_stale` isn't 0. What is gone on with after a hand-over is computed again from the prompt
on, since the servers drop their caches with the old weights.

What is unfinished lives in memory alone. Its prompts stand in the sampler's state, as owed to the next step: a run that is
stopped or killed samples them anew, so it loses no prompt and trains on none twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine import Completion, Sampling
from ..engine.generate import OnDone
from .generator import Sample, whole
from .policy import Policy
from .prompts import Prompt
from .rollouts import Rollout, RolloutGroup
from .sampler import PromptSampler

Spans = tuple[tuple[int, int], ...]
"""(version, the first token that it sampled), in the order of the tokens."""


@dataclass(frozen=True)
class Sampled:
    """A group on its way; `index` is its prompt's, `spans` are each completion's."""

    index: int
    completions: tuple[Completion, ...] = ()
    spans: tuple[Spans, ...] = ()

    @property
    def oldest(self) -> int | None:
        """The version of its oldest token; None where there is none yet."""
        return min((spans[0][0] for spans in self.spans if spans), default=None)

    def grown(self, completions: Sequence[Completion], version: int) -> Sampled:
        """After `version` went on with it."""
        before = self.completions or [None] * len(completions)
        spans = self.spans or [()] * len(completions)
        each = zip(before, completions, spans, strict=True)
        grown = tuple(
            _grown(told, 0 if old is None else len(old.ids), len(new.ids), version) for old, new, told in each
        )
        return Sampled(self.index, tuple(completions), grown)

    def told(self, group: RolloutGroup) -> RolloutGroup:
        """The group's rollouts with the versions that sampled them."""
        pairs = zip(group.rollouts, self.spans, strict=True)
        return RolloutGroup(group.prompt, tuple(_told(rollout, spans) for rollout, spans in pairs))


class Stragglers:
    """Of a phase's steps; all ranks make the same calls. `late`: what the last step left.

    `counts`: of the last step, for its metrics.
    """

    def __init__(self, spare: int, staleness: int) -> None:
        self.spare, self._oldest = spare, staleness + 1
        self.late: list[Sampled] = []
        self.counts: dict[str, float] = {}
        self._whole: list[Sampled] = []

    def draw(self, sampler: PromptSampler, count: int, saved: Sequence[Prompt], prompts: Sequence[Prompt]) -> list[int]:
        """The step's prompts: those owed to it, of which the first are the late groups', and `count` of its own.

        `saved`: the prompts of its groups that are there already; the others of them are owed to the next step.
        """
        drawn = [*sampler.owed(), *sampler.take(count)]
        assert [group.index for group in self.late] == drawn[: len(self.late)]
        self.counts = {}
        if not saved or not self.spare:
            return drawn
        there, left = list[int](), list[int]()
        for index in drawn:
            found = len(there) < len(saved) and prompts[index] == saved[len(there)]
            (there if found else left).append(index)
        sampler.owe(left)
        return there

    def sampling(self, policy: Policy, drawn: Sequence[int], version: int, *, wait: bool) -> Sample | None:
        """What samples the step's groups and keeps here what is not there yet; None: the policy itself, all of it."""
        if not self.spare:
            return None

        def sample(
            prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: int, on_done: OnDone
        ) -> list[list[Completion]]:
            assert policy.served is not None, "the recipe refuses stragglers of the local generator"
            before = [*self.late, *(Sampled(index) for index in drawn[len(self.late) :])]
            begun = [group.completions for group in self.late]
            spare = 0 if wait else self.spare
            made = policy.served.sample_most(prompts, begun, spare, group_size, sampling, seed, on_done)
            after = [old.grown(new, version) for old, new in zip(before, made, strict=True)]
            self._whole = [group for group in after if whole(group.completions)]
            self.late = [group for group in after if not whole(group.completions)]
            resumed = [old for old, new in zip(before, made, strict=True) if whole(new) and old.oldest is not None]
            self.counts = {"sampling/continued": len(resumed)}
            return [new if whole(new) else [] for new in made]

        return sample

    def told(self, made: Sequence[RolloutGroup], version: int, saved: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The step's groups with the versions that sampled them; `saved` ones keep theirs."""
        if saved:
            return [_as(group.sampled_by(version), old) for group, old in zip(made, saved, strict=True)]
        if not self.spare:
            return [group.sampled_by(version) for group in made]
        return [group.told(rollouts) for group, rollouts in zip(self._whole, made, strict=True)]

    def end(self, sampler: PromptSampler, step: int) -> None:
        """After a step's sampling: what would be too old in the next one is dropped, and all prompts of both are owed to it."""
        if not self.spare:
            return
        old = [group for group in self.late if group.oldest is not None and step - group.oldest > self._oldest]
        self.late = [group for group in self.late if group not in old]
        sampler.owe([group.index for group in [*self.late, *old]])
        self.counts = {
            "sampling/continued": 0, **self.counts, "sampling/late": len(self.late), "sampling/dropped_stale": len(old)
        }  # fmt: skip


def _grown(spans: Spans, before: int, after: int, version: int) -> Spans:
    if after == before or (spans and spans[-1][0] == version):
        return spans
    return (*spans, (version, before))


def _told(rollout: Rollout, spans: Spans) -> Rollout:
    return replace(rollout, version=spans[0][0], spans=spans if len(spans) > 1 else ())


def _as(group: RolloutGroup, old: RolloutGroup) -> RolloutGroup:
    """`old` dumps don't say by which version."""
    pairs = zip(group.rollouts, old.rollouts, strict=True)
    told = (new if r.version is None else replace(new, version=r.version, spans=r.spans) for new, r in pairs)
    return RolloutGroup(group.prompt, tuple(told))
