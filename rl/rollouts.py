"""Sampled, scored completions: the seam between generating and training, dumped as JSON lines and read back unchanged.

A step can be trained from the dump alone: floats survive JSON exactly, and prompts are found by id in the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..engine import Sampling
from .policy import OnDone, Policy
from .prompts import Prompt, render
from .rewards import Reward
from .run import Stopwatch


@dataclass(frozen=True)
class Rollout:
    """One completion. `logprobs` are of the distribution sampled from; adding `kept_logmass` gives full-vocabulary ones.

    `group` counts the groups of a step. `rule_reason` is the rule's own code (`rules.REASONS`) and `extracted` the answer it read,
    also where a judge overruled it and `reason` says so. `reward` None: no verdict. `advantage` None: not trained on (no verdict, or its group was left out as `used` says).
    """

    stage: str
    step: int
    group: int
    prompt_id: str
    benchmark: str
    prompt_length: int
    completion_ids: tuple[int, ...]
    completion: str
    logprobs: tuple[float, ...]
    kept_logmass: tuple[float, ...]
    finish_reason: str
    rewards: Mapping[str, float | None]
    reward: float | None
    reason: str
    rule_reason: str | None = None
    extracted: str | None = None
    advantage: float | None = None
    used: bool = False

    def dump(self) -> dict[str, Any]:
        return dict(vars(self))  # not asdict, which copies every number of long completions one by one

    @staticmethod
    def load(line: Mapping[str, Any]) -> Rollout:
        sequences = {key: tuple(line[key]) for key in ("completion_ids", "logprobs", "kept_logmass")}
        return Rollout(**{**line, **sequences})


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> list[float | None]:
        return [rollout.reward for rollout in self.rollouts]

    def bare(self) -> RolloutGroup:
        """What difficulty is judged by: rewards as they were before the length penalty, without the tokens.

        A phase's completions would fill tens of gigabytes.
        """
        light: dict[str, Any] = {"completion_ids": (), "completion": "", "logprobs": (), "kept_logmass": ()}
        plain = (
            replace(r, reward=None if r.reward is None else r.reward - (r.rewards.get("overlong") or 0.0), **light)
            for r in self.rollouts
        )
        return RolloutGroup(self.prompt, tuple(plain))

    def with_advantages(self, advantages: Sequence[float | None]) -> RolloutGroup:
        pairs = zip(self.rollouts, advantages, strict=True)
        return RolloutGroup(self.prompt, tuple(replace(r, advantage=a, used=True) for r, a in pairs))


def roll_out(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[Prompt],
    group_size: int,
    sampling: Sampling,
    *,
    seed: int,
    stage: str,
    step: int,
    first_group: int = 0,
    watch: Stopwatch | None = None,
    on_done: OnDone = lambda count: None,
) -> list[RolloutGroup]:
    """Samples and scores G completions of each prompt. Training, the difficulty pass and evaluation all call this."""
    watch = watch or Stopwatch()
    with watch("gen"):
        sampled = policy.sample(prompts, group_size, sampling, seed, on_done)
    flat = [(prompt, completion) for prompt, group in zip(prompts, sampled, strict=True) for completion in group]
    texts = [policy.text(completion) for _, completion in flat]
    with watch("reward"):
        scored = reward.score(
            [prompt.example for prompt, _ in flat],
            [text for prompt in prompts for text in [render(prompt.example, policy.tokenizer)] * group_size],
            texts,
            [list(completion.ids) for _, completion in flat],
            [completion.finish_reason for _, completion in flat],
        )
    rollouts = [
        Rollout(
            stage=stage, step=step, group=first_group + index // group_size, prompt_id=prompt.example.id, benchmark=prompt.example.benchmark, prompt_length=len(prompt.ids),
            completion_ids=completion.ids, completion=text, logprobs=completion.logprobs, kept_logmass=completion.kept_logmass,
            finish_reason=completion.finish_reason, rewards=score.parts, reward=score.reward, reason=score.reason,
            rule_reason=score.rule.reason if score.rule else None, extracted=score.rule.extracted if score.rule else None,
        )
        for index, ((prompt, completion), text, score) in enumerate(zip(flat, texts, scored, strict=True))
    ]  # fmt: skip
    return [
        RolloutGroup(prompt, tuple(rollouts[i * group_size : (i + 1) * group_size])) for i, prompt in enumerate(prompts)
    ]


def regroup(lines: Iterable[Mapping[str, Any]], prompts: Mapping[str, Prompt]) -> list[RolloutGroup]:
    """Groups from dumped lines, in their order.

    Raises:
        ValueError: a line names a prompt that the data doesn't have.
    """
    groups: dict[int, list[Rollout]] = {}
    for line in lines:
        rollout = Rollout.load(line)
        if rollout.prompt_id not in prompts:
            raise ValueError(
                f"saved rollouts name the prompt {rollout.prompt_id!r}, which the data doesn't have: replay with the recipe and data they were made with"
            )
        groups.setdefault(rollout.group, []).append(rollout)
    return [RolloutGroup(prompts[rollouts[0].prompt_id], tuple(rollouts)) for rollouts in groups.values()]
