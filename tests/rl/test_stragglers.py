"""Groups that a step doesn't wait for: who trains on them when, which version sampled which tokens, what is too old, what a stop leaves.

The generator is a stand-in for a server: a copy of the policy that samples with the engine's own `generate`, stops the groups that
a test calls slow, and gets new weights only when they are handed over. Servers are in `serving/test_stopping.py`.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine import Completion, Group, Sampling
from longreach.engine.generate import OnDone
from longreach.rl.generator import UNFINISHED, LocalGenerator
from longreach.rl.grpo import GrpoConfig, GrpoTrainer
from longreach.rl.judge_base import JudgeFailing
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.recipe import load_recipe
from longreach.rl.rollouts import Rollout, RolloutGroup, Unjudged
from longreach.rl.sampler import PromptSampler
from longreach.rl.stragglers import Sampled, Stragglers
from longreach.rl.train import Stopped, train

training = importlib.import_module("longreach.rl.train")  # as an attribute of the package it is the function
Make = Callable[..., Any]
SAMPLING = Sampling(8, temperature=1.0)


class Slow:
    """`times`: how often the group of a prompt is late yet, by id; a late one's first completion ends all the same.

    `given`: the policy's weights by version, `most`: how many groups each call of `sample_most` was to wait for.
    """

    def __init__(self, policy: Policy, times: dict[str, int]) -> None:
        self.policy, self.times, self.copy = policy, times, copy.copy(policy)
        self.copy.model, self.copy.served = copy.deepcopy(policy.model), None
        self.version, self.most = policy.version, list[int]()
        self.given = {policy.version: copy.deepcopy(policy.model)}

    def start(self, window: int) -> None: ...
    def close(self) -> None: ...
    def call_off(self) -> None: ...
    def rest(self) -> None: ...
    def health(self) -> dict[str, str]:
        return {}

    @property
    def versions(self) -> Mapping[str, int | None]:
        return {"elsewhere": self.version}

    def metrics(self) -> dict[str, float]:
        return {}

    def refresh(self) -> None:
        if self.version != self.policy.version:
            self.copy.model.load_state_dict(self.policy.model.state_dict())
            self.version = self.policy.version
            self.given[self.version] = copy.deepcopy(self.policy.model)

    def beside(self, policy: Policy) -> Slow:
        return copy.copy(self)  # shares the copy, which the other one refreshes

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: int, on_done: OnDone
    ) -> list[list[Completion]]:
        self.refresh()
        return LocalGenerator(self.copy).sample(prompts, group_size, sampling, seed, on_done)

    def sample_most(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[Completion]], spare: int, group_size: int,
        sampling: Sampling, seed: int, on_done: OnDone,
    ) -> list[list[Completion]]:  # fmt: skip
        self.refresh()
        self.most.append(len(prompts) - spare)
        made, late = [], 0
        for place, prompt in enumerate(prompts):
            old = begun[place] if place < len(begun) else ()
            old = old or [Completion((), (), (), UNFINISHED)] * group_size
            group = [self.further(prompt, one, sampling, 1000 * seed + 10 * place + i) for i, one in enumerate(old)]
            if late < spare and self.times.get(prompt.example.id, 0):
                late += 1
                self.times[prompt.example.id] -= 1
                group[1:] = [cut(before, after) for before, after in zip(old[1:], group[1:], strict=True)]
            else:
                for i, one in enumerate(group):
                    on_done(place, i, one)
            made.append(group)
        return made

    def further(self, prompt: Prompt, old: Completion, sampling: Sampling, seed: int) -> Completion:
        if old.finish_reason != UNFINISHED:
            return old
        longer = Prompt(prompt.example, prompt.ids + old.ids)
        left = replace(sampling, max_completion=sampling.max_completion - len(old.ids))
        [[new]] = LocalGenerator(self.copy).sample([longer], 1, left, seed % 2**31, lambda *_: None)
        return Completion(
            old.ids + new.ids, old.logprobs + new.logprobs, old.kept_logmass + new.kept_logmass, new.finish_reason
        )


def cut(old: Completion, new: Completion) -> Completion:
    """Half of what was added."""
    n = (len(old.ids) + len(new.ids)) // 2
    return Completion(new.ids[:n], new.logprobs[:n], new.kept_logmass[:n], UNFINISHED)


ORDER = [f"p{i}" for i in PromptSampler(range(12), {}, seed=0).take(12)]


@pytest.fixture
def make_run(make_policy: Make, make_prompts: Make, scripted: Make, make_trainer: Make) -> Make:
    """A trainer over twelve prompts, four a step, and its server; `times` by a prompt's place in the order of the steps."""

    def make(times: Mapping[int, int], **options: Any) -> tuple[GrpoTrainer, Slow]:
        prompts = make_prompts(*[5 + i % 4 for i in range(12)])
        policy = make_policy()
        policy.served = Slow(policy, {ORDER[place]: count for place, count in times.items()})
        config = GrpoConfig(batch_prompts=4, group_size=3, **{"stragglers": 2, **options})
        reward = scripted(lambda example, place: [1.0, 0.0, 0.25][place])
        return make_trainer(policy, config, prompts, reward=reward, sampling=SAMPLING), policy.served

    return make


Step = tuple[dict[str, float], list[RolloutGroup]]


def steps(trainer: GrpoTrainer, last: int = 3, first: int = 1, until: int | None = None) -> list[Step]:
    made = []
    with trainer.overlapping(first, last, lambda step: []):
        for step in range(first, (until or last) + 1):
            made.append(trainer.step(step, 0.3))
            trainer.hand_over(step, training.Stopwatch())
    return made


def places(groups: Sequence[RolloutGroup]) -> list[int]:
    return [ORDER.index(group.prompt.example.id) for group in groups]


def checked(served: Slow, groups: Sequence[RolloutGroup], policy: Policy) -> None:
    """Each token's log-prob is that of the version that is said to have sampled it, and of no other version."""
    for group in groups:
        for rollout in group.rollouts:
            first = 0
            for version, count in rollout.versions:
                one = copy.copy(policy)
                one.model, one.served = served.given[version], None
                ids = [torch.tensor(rollout.completion_ids)]
                with torch.no_grad():
                    found = one.logprobs([Group(torch.tensor(group.prompt.ids), ids)], 1.0).logp
                part = slice(first, first + count)
                assert torch.allclose(found[part].float(), torch.tensor(rollout.logprobs[part]), atol=1e-4)
                first += count
            assert first == len(rollout.completion_ids) == len(rollout.logprobs)


def test_a_late_group_joins_the_next_step_and_knows_which_version_sampled_what(make_run: Make) -> None:
    trainer, served = make_run({1: 1, 5: 1})
    made = steps(trainer)
    assert [places(groups) for _, groups in made] == [[0, 2, 3], [1, 4, 6, 7], [5, 8, 9, 10, 11]]
    assert served.most == [2, 3, 5], "all but two, and in the phase's last step all"
    keys = ("late", "continued", "dropped_stale", "staleness/max")
    counted = [[metrics[f"sampling/{key}"] for key in keys] for metrics, _ in made]
    assert counted == [[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 1]]
    for step, (_, groups) in enumerate(made, 1):
        checked(served, groups, trainer.policy)
        for group in groups:
            ended, *others = group.rollouts
            before = places([group])[0] in (1, 5)
            assert (ended.version, ended.spans) == (step - 1 - before, ()), "it had ended before"
            for rollout in others:
                if before and len(rollout.completion_ids) > 1:
                    (v0, start), (v1, first) = rollout.spans
                    assert (v0, start, v1) == (step - 2, 0, step - 1) == (rollout.version, 0, step - 1)
                    assert 0 < first < len(rollout.completion_ids)
                else:
                    assert rollout.spans == () and rollout.version == step - 1
    assert any(r.spans for _, groups in made for group in groups for r in group.rollouts)


def test_the_mean_age_is_over_tokens(make_run: Make) -> None:
    metrics, groups = steps(make_run({1: 1})[0])[1]
    tokens = sum(len(r.completion_ids) for group in groups for r in group.rollouts)
    old = sum(count for group in groups for r in group.rollouts for version, count in r.versions if version == 0)
    assert 0 < old < tokens and metrics["sampling/staleness/mean"] == pytest.approx(old / tokens)


def test_one_that_would_be_too_old_is_dropped_and_its_prompt_sampled_anew(make_run: Make) -> None:
    trainer, served = make_run({1: 2})
    made = steps(trainer)
    assert [places(groups) for _, groups in made] == [[0, 2, 3], [4, 5, 6, 7], [1, 8, 9, 10, 11]]
    assert [metrics["sampling/dropped_stale"] for metrics, _ in made] == [0, 1, 0]
    assert [metrics["sampling/continued"] for metrics, _ in made] == [0, 0, 0]
    assert {(r.version, r.spans) for r in made[2][1][0].rollouts} == {(2, ())}
    checked(served, made[2][1], trainer.policy)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("oldest", [0, 4])
def test_the_bound(staleness: int, oldest: int) -> None:
    """Trained in the next step, its oldest token is one more step old than a whole group's may be, and no more."""
    done, partly = Completion((1,), (0.0,), (0.0,), "stop"), Completion((1,), (0.0,), (0.0,), UNFINISHED)
    group = Sampled(7).grown([done, Completion((), (), (), UNFINISHED)], oldest).grown([done, partly], oldest + 1)
    assert group.spans == (((oldest, 0),), ((oldest + 1, 0),)) and group.oldest == oldest
    for step in range(oldest + 1, oldest + 9):
        left, sampler = Stragglers(2, staleness), PromptSampler(range(12), {}, seed=0)
        left.late = [group, Sampled(3, (partly,), ((),))]
        left.end(sampler, step)
        age = (step + 1) - 1 - oldest
        kept = age <= staleness + 1
        assert [one.index for one in left.late] == ([7, 3] if kept else [3]), "what has no token is of no age"
        assert left.counts["sampling/dropped_stale"] == (not kept)
        assert sampler.owed() == ([7, 3] if kept else [3, 7])


@pytest.mark.parametrize("staleness", [1, 2])
def test_late_groups_of_steps_that_are_sampled_ahead(make_run: Make, staleness: int) -> None:
    trainer, served = make_run({1: 1, 5: 2, 6: 1}, staleness=staleness)
    made = steps(trainer)
    assert sorted(place for _, groups in made for place in places(groups)) == list(range(12))
    assert max(metrics["sampling/staleness/max"] for metrics, _ in made) <= staleness + 1
    assert sum(metrics["sampling/late"] for metrics, _ in made) >= 3
    for step, (_, groups) in enumerate(made, 1):
        checked(served, groups, trainer.policy)
        ages = [step - 1 - version for group in groups for r in group.rollouts for version, _ in r.versions]
        assert min(ages) >= 0 and max(ages) <= staleness + 1


def test_what_one_version_went_on_with_is_whole() -> None:
    partly, more = Completion((1,), (0.0,), (0.0,), UNFINISHED), Completion((1, 2), (0.0,) * 2, (0.0,) * 2, "stop")
    grown = Sampled(0).grown([partly], 3).grown([more], 3)
    assert grown.spans == (((3, 0),),)
    assert Sampled(0).grown([partly], 3).grown([partly], 4).grown([more], 5).spans == (((3, 0), (5, 1)),)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_is_stopped_gives_the_prompts_of_late_groups_back(make_run: Make, staleness: int) -> None:
    first, _ = make_run({1: 1, 2: 1}, staleness=staleness)
    before = steps(first, until=1)
    state = json.loads(json.dumps(first.sampler.state()))
    assert [f"p{i}" for i in state["owed"]] == [ORDER[1], ORDER[2]]
    again, _ = make_run({}, staleness=staleness)
    again.sampler.load(state)
    after = steps(again, first=2)
    trained = [place for _, groups in [*before, *after] for place in places(groups)]
    assert trained == [0, 3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert all(r.spans == () for _, groups in after for group in groups for r in group.rollouts), "sampled anew"
    assert again.sampler.state()["owed"] == []


def test_completions_that_wait_for_a_judge_keep_their_versions(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 has a group that goes on from step 1, and one that is late itself, which the run that scores the others owes."""
    trainer, served = make_run({1: 1, 5: 1})
    steps(trainer, until=1)
    state, finish = trainer.sampler.state(), trainer.reward.finish

    def failing(*_: Any, **__: Any) -> Any:
        raise JudgeFailing("no judge")

    monkeypatch.setattr(trainer.reward, "finish", failing)
    with pytest.raises(Unjudged) as raised:
        trainer.collect(2, training.Stopwatch())
    monkeypatch.setattr(trainer.reward, "finish", finish)
    lines = [r.dump() for group in raised.value.groups for r in group.rollouts]
    saved = training.regroup(json.loads(json.dumps(lines)), {p.example.id: p for p in trainer.prompts})
    assert places(saved) == [1, 4, 6, 7]
    checked(served, saved, trainer.policy)

    again, _ = make_run({})
    again.sampler.load(state)
    with again.overlapping(2, 3, lambda step: []):
        metrics, groups = again.step(2, 0.3, saved=saved)
        assert places(groups) == [1, 4, 6, 7]
        told = [
            [(r.version, r.spans, r.completion_ids) for group in each for r in group.rollouts]
            for each in (saved, groups)
        ]
        assert told[0] == told[1] and any(spans for _, spans, _ in told[0])
        assert metrics["sampling/staleness/max"] == 1
        assert places(again.step(3, 0.3)[1]) == [5, 8, 9, 10, 11]


def test_spans_are_dumped_and_read_and_older_dumps_have_none(make_run: Make) -> None:
    _, groups = steps(make_run({1: 1})[0])[1]
    for rollout in (r for group in groups for r in group.rollouts):
        line = json.loads(json.dumps(rollout.dump()))
        assert Rollout.load(line) == rollout
        del line["spans"]
        assert Rollout.load(line) == replace(rollout, spans=())
    assert replace(groups[0].rollouts[0], version=None, spans=()).versions == []


def test_without_stragglers_nobody_is_late_and_nothing_is_counted(make_run: Make) -> None:
    trainer, served = make_run({1: 1}, stragglers=0)
    made = steps(trainer)
    assert [len(groups) for _, groups in made] == [4, 4, 4] and served.most == []
    assert not {"sampling/late", "sampling/continued", "sampling/dropped_stale"} & made[0][0].keys()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[Slow]:
    """The stand-in where a recipe asks for a server: every third prompt is late, once in a run's life."""
    made: list[Slow] = []

    @contextmanager
    def generating(policy: Policy, *_: Any, **__: Any) -> Iterator[None]:
        policy.served = Slow(policy, {f"train-{i}": 1 for i in range(0, 12, 3)})
        made.append(policy.served)
        yield
        policy.served = None

    monkeypatch.setattr(training, "generating", generating)
    return made


def trained(folder: Path) -> dict[str, Counter[str]]:
    """The prompts of each phase's rollouts, and how often."""
    return {
        phase.name: Counter(json.loads(line)["prompt_id"] for path in phase.glob("*.jsonl") for line in path.open())
        for phase in (folder / "rollouts").glob("phase*")
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_whole_run_one_that_is_stopped_and_one_that_replays(
    staleness: int, tmp_path: Path, make_recipe: Make, elsewhere: list[Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two phases, evaluations between steps, the difficulty pass: only the steps of phases don't wait."""
    recipe = make_recipe(
        generator__kind="vllm", rl__stragglers=1, rl__staleness=staleness, phases__0__steps=4, phases__1__steps=2,
        eval__every=2, sft=None,
    )  # fmt: skip
    whole, parts, replayed = tmp_path / "whole", tmp_path / "parts", tmp_path / "replayed"
    train(recipe, whole)
    assert len(elsewhere[0].most) == 6, "evaluation and difficulty pass wait for all"
    told = lines(whole)
    assert sum(line["sampling/late"] for line in told) > 0 < sum(line["sampling/continued"] for line in told)
    assert max(line["sampling/staleness/max"] for line in told) <= staleness + 1
    assert {phase: sum(count.values()) for phase, count in trained(whole).items()} == {"phase1": 24, "phase2": 12}

    stop = training.Run._stop_if_interrupted
    left = [1, 3]

    def stop_twice(run: Any) -> None:
        run.interrupted |= bool(left) and run.progress.step == left[0] and bool(left.pop(0))
        stop(run)

    monkeypatch.setattr(training.Run, "_stop_if_interrupted", stop_twice)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(recipe, parts)
    train(recipe, parts)
    assert (
        not left and trained(parts)["phase1"] == trained(whole)["phase1"]
    )  # what goes on to phase2 hangs on the weights
    assert trained(parts)["phase2"].total() == 12

    train(recipe, replayed, replay=whole)
    keys = ("loss", "grad_norm", "reward", "sampling/staleness/max", "sampling/staleness/mean")
    assert [[line[key] for key in keys] for line in lines(replayed)] == [[line[key] for key in keys] for line in told]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"generator.kind": "local"}, 'another program must do: set generator.kind = "vllm", or stragglers = 0'),
        ({"phases.0.top_p": "0.95"}, "cuts the distribution"),
        ({"rl.dynamic_sampling": "true"}, "must see all of a step's groups"),
        ({"rl.stragglers": "4"}, "fewer than rl.batch_prompts = 4, not 4"),
        ({"rl.stragglers": "-1"}, "not -1"),
    ],
)
def test_what_can_t_be_is_refused(changes: dict[str, str], message: str) -> None:
    given = {"generator.kind": "vllm", "rl.stragglers": "1", **changes}
    with pytest.raises(ValueError, match=message):
        load_recipe("smoke", list(given.items()))
