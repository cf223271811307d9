"""Sampled, scored completions: the seam between generating and training, dumped as JSON lines and read back unchanged.

A step can be trained from the dump alone: floats survive JSON exactly, and prompts are found by id in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..engine import Completion, Sampling
from .generator import Sample
from .judge_base import JudgeFailing
from .policy import Policy
from .prompts import Prompt, render
from .rewards import Reward, Scored
from .run import Stopwatch
from .scoring import Ended, Scoring


@dataclass(frozen=True)
class Rollout:
    """One completion. `logprobs` are of the distribution sampled from; adding `kept_logmass` gives full-vocabulary ones
    (empty: the generator doesn't know it).

    `group` counts the groups of a step. `rule_reason` is the rule's own code (`rules.REASONS`) and `extracted` the answer it read,
    also where a judge overruled it and `reason` says so. `reward` None: no verdict. `advantage` None: not trained on (no verdict, or its group was left out as `used` says).
    `version` of the policy sampled all its tokens: the number of steps that its weights had made. Where several did, `spans` are
    (version, the first token that it sampled), and `version` is that of the first token.
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
    version: int | None = None
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def versions(self) -> list[tuple[int, int]]:
        """(version, how many tokens it sampled); nothing where that is not known."""
        if self.version is None:
            return []
        spans = self.spans or ((self.version, 0),)
        ends = [*(first for _, first in spans[1:]), len(self.completion_ids)]
        return [(version, end - first) for (version, first), end in zip(spans, ends, strict=True)]

    def dump(self) -> dict[str, Any]:
        return dict(vars(self))  # not asdict, which copies every number of long completions one by one

    @staticmethod
    def load(line: Mapping[str, Any]) -> Rollout:
        sequences = {key: tuple(line[key]) for key in ("completion_ids", "logprobs", "kept_logmass")}
        spans = tuple((version, first) for version, first in line.get("spans", ()))
        return Rollout(**{**line, **sequences, "spans": spans})


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
        light = {"completion_ids": (), "completion": "", "logprobs": (), "kept_logmass": (), "spans": ()}
        plain = (
            replace(r, reward=None if r.reward is None else r.reward - (r.rewards.get("overlong") or 0.0), **light)
            for r in self.rollouts
        )
        return RolloutGroup(self.prompt, tuple(plain))

    def sampled_by(self, version: int) -> RolloutGroup:
        """With the version of the policy that sampled it."""
        return RolloutGroup(self.prompt, tuple(replace(r, version=version) for r in self.rollouts))

    def with_advantages(self, advantages: Sequence[float | None]) -> RolloutGroup:
        pairs = zip(self.rollouts, advantages, strict=True)
        return RolloutGroup(self.prompt, tuple(replace(r, advantage=a, used=True) for r, a in pairs))


class Unjudged(ValueError):
    """Completions that the judge failed to score: `groups` holds them without rewards, to be scored another time."""

    def __init__(self, text: str, groups: list[RolloutGroup]) -> None:
        super().__init__(text)
        self.groups = groups

    def __reduce__(self) -> tuple[Any, ...]:
        return Unjudged, (str(self), self.groups)


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
    on_done: Callable[[int], object] = lambda count: None,
    saved: Sequence[RolloutGroup] = (),
    sample: Sample | None = None,
) -> list[RolloutGroup]:
    """Samples and scores G completions of each prompt. Training, the difficulty pass and evaluation all call this.

    Rules and judge work while other completions are still being generated. `on_done` is told how many have just ended;
    `saved` are groups of the same prompts from an `Unjudged`, which are scored and not sampled again. `sample` (None: the policy)
    may leave groups empty, which are left out.

    Raises:
        Unjudged: the judge is no use; what was sampled is in it.
    """
    watch = watch or Stopwatch()
    texts: dict[int, str] = {}
    with reward.scoring(group_size) as scoring:

        def ended(prompt: int, place: int, completion: Completion) -> None:
            index = prompt * group_size + place
            texts[index] = policy.text(completion)
            scoring.add(index, Ended(prompts[prompt].example, texts[index], completion.finish_reason))
            on_done(1)

        with watch("gen"):
            ask = sample or policy.sample
            sampled = _completions(saved, prompts) or ask(prompts, group_size, sampling, seed, ended)
        flat = {i * group_size + place: one for i, group in enumerate(sampled) for place, one in enumerate(group)}
        ranks, told = policy.ranks, frozenset().union(*policy.ranks.every(frozenset(texts)))
        for index, completion in flat.items():
            group, place = divmod(index, group_size)
            if index not in told and group % ranks.size == ranks.rank:
                ended(group, place, completion)
            elif index not in texts:  # another rank hands it in
                texts[index] = policy.text(completion)
                on_done(1)
        with watch("reward"):
            scored, failing = _score(reward, scoring, policy, prompts, flat, texts, group_size)
    _note_times(watch, scoring, judged=reward.judge is not None)
    lines = [
        _rollout(prompts[i // group_size], one, texts[i], scored[i], stage=stage, step=step, group=first_group + n // group_size)
        for n, (i, one) in enumerate(flat.items())
    ]  # fmt: skip
    there = [prompt for prompt, group in zip(prompts, sampled, strict=True) if group]
    groups = [RolloutGroup(p, tuple(lines[n * group_size :][:group_size])) for n, p in enumerate(there)]
    if failing is not None:
        raise Unjudged(str(failing), groups) from failing
    return groups


def _note_times(watch: Stopwatch, scoring: Scoring[Any], *, judged: bool) -> None:
    """When rules and judge were at work, and how long the judge was waited for."""
    watch.timed("rules", scoring.rule_spans)
    watch.timed("judge", scoring.judge_spans)
    if judged:
        watch.add("reward/judge_wait", scoring.waited)
        watch.add("reward/judge_time", scoring.judge_seconds)


def _score(
    reward: Reward, scoring: Scoring[Any], policy: Policy, prompts: Sequence[Prompt], flat: Mapping[int, Completion],
    texts: Mapping[int, str], group_size: int,
) -> tuple[dict[int, Scored], JudgeFailing | None]:  # fmt: skip
    """The scores by index; none of them, and why, where the judge is no use."""
    each = [index // group_size for index in flat]
    rendered = [render(prompt.example, policy.tokenizer) for prompt in prompts]
    try:
        scored = reward.finish(
            scoring,
            [prompts[number].example for number in each],
            [rendered[number] for number in each],
            [texts[index] for index in flat],
            [list(completion.ids) for completion in flat.values()],
        )
    except JudgeFailing as failing:
        return dict.fromkeys(flat, Scored(None, {}, "judge_failed")), failing
    return dict(zip(flat, scored, strict=True)), None


def _completions(saved: Sequence[RolloutGroup], prompts: Sequence[Prompt]) -> list[list[Completion]]:
    if not saved:
        return []
    if [group.prompt for group in saved] != list(prompts):
        raise ValueError("saved completions are of other prompts than this step's: remove unjudged.jsonl from the run")
    return [
        [Completion(r.completion_ids, r.logprobs, r.kept_logmass, r.finish_reason) for r in group.rollouts]
        for group in saved
    ]


def _rollout(
    prompt: Prompt, completion: Completion, text: str, score: Scored, *, stage: str, step: int, group: int
) -> Rollout:
    return Rollout(
        stage=stage, step=step, group=group, prompt_id=prompt.example.id, benchmark=prompt.example.benchmark,
        prompt_length=len(prompt.ids), completion_ids=completion.ids, completion=text, logprobs=completion.logprobs,
        kept_logmass=completion.kept_logmass, finish_reason=completion.finish_reason, rewards=score.parts,
        reward=score.reward, reason=score.reason, rule_reason=score.rule.reason if score.rule else None,
        extracted=score.rule.extracted if score.rule else None,
    )  # fmt: skip


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
