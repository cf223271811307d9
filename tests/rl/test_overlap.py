"""Steps sampled while earlier ones train: by which weights, from which prompts, and what a run that stops leaves behind.

The generator is a stand-in for a server: a copy of the policy that samples with the engine's own `generate`, in whatever thread it
is asked, and gets new weights only when they are handed over.
"""

from __future__ import annotations

import copy
import importlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.engine import Completion, Group, Sampling
from longreach.engine.generate import OnDone
from longreach.rl.generator import Generator, LocalGenerator
from longreach.rl.grpo import GrpoConfig, GrpoTrainer
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.recipe import Recipe, load_recipe
from longreach.rl.run import Stopwatch
from longreach.rl.sampler import PromptSampler
from longreach.rl.train import Stopped, train

training = importlib.import_module("longreach.rl.train")  # as an attribute of the package it is the function
Make = Callable[..., Any]
SAMPLING = Sampling(6, temperature=1.0)


class Elsewhere:
    """`given`: (version, weights) as they were handed over, `threads`: who asked for completions, and of which version."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.copy = policy, copy.copy(policy)
        self.copy.model, self.copy.served = copy.deepcopy(policy.model), None
        self.version, self.given = policy.version, [flat(policy)]
        self.threads: list[tuple[str, int]] = []
        self.off = threading.Event()

    def start(self, window: int) -> None: ...
    def close(self) -> None: ...
    def rest(self) -> None: ...
    def health(self) -> dict[str, str]:
        return {}

    @property
    def versions(self) -> Mapping[str, int | None]:
        return {"elsewhere": self.version}

    def metrics(self) -> dict[str, float]:
        return {}

    def refresh(self) -> None:
        if self.version == self.policy.version:
            return
        self.copy.model.load_state_dict(self.policy.model.state_dict())
        self.version = self.policy.version
        self.given.append(flat(self.policy))

    def beside(self, policy: Policy) -> Generator:
        return Beside(self, policy)  # type: ignore[return-value]

    def call_off(self) -> None:
        self.off.set()

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: int, on_done: OnDone
    ) -> list[list[Completion]]:
        self.refresh()
        return self.made(prompts, group_size, sampling, seed, on_done)

    def sample_most(self, *_: Any, **__: Any) -> list[list[Completion]]:
        raise AssertionError("no stragglers here")

    def made(self, *arguments: Any) -> list[list[Completion]]:
        self.threads.append((threading.current_thread().name, self.version))
        return LocalGenerator(self.copy).sample(*arguments)


class Beside(Elsewhere):
    """As a thread sees it: it can't hand weights over, and finds those of its policy's version."""

    def __init__(self, whole: Elsewhere, policy: Policy) -> None:
        self.whole, self.policy, self.off = whole, policy, threading.Event()

    def sample(self, *arguments: Any) -> list[list[Completion]]:  # type: ignore[override]
        assert self.policy.version == self.whole.version, "asked for a version that was not handed over"
        if self.off.is_set():
            raise ValueError("sampling was called off")
        return self.whole.made(*arguments)


def flat(policy: Policy) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


@pytest.fixture
def make_run(make_policy: Make, make_prompts: Make, scripted: Make, make_trainer: Make) -> Make:
    def make(**options: Any) -> tuple[GrpoTrainer, Elsewhere]:
        prompts = make_prompts(*[5 + i % 4 for i in range(12)])
        policy = make_policy()
        policy.served = Elsewhere(policy)
        config = GrpoConfig(batch_prompts=4, group_size=3, **options)
        reward = scripted(lambda example, place: [1.0, 0.0, 0.25][place])
        return make_trainer(policy, config, prompts, reward=reward, sampling=SAMPLING), policy.served

    return make


def steps(trainer: GrpoTrainer, count: int, first: int = 1) -> list[tuple[dict[str, float], Any]]:
    made = []
    with trainer.overlapping(first, first + count - 1, lambda step: []):
        for step in range(first, first + count):
            made.append(trainer.step(step, 0.3))
            trainer.hand_over(step, Stopwatch())
    return made


@pytest.mark.parametrize("staleness", [1, 2])
def test_each_step_trains_on_what_one_version_within_the_bound_sampled(make_run: Make, staleness: int) -> None:
    trainer, served = make_run(staleness=staleness)
    made = steps(trainer, 5)
    ages = [metrics["sampling/staleness/max"] for metrics, _ in made]
    assert ages[0] == 0 and 1 <= max(ages) <= staleness
    assert {name.split("_")[0] for name, _ in served.threads} == {"ahead"}
    for step, (metrics, groups) in enumerate(made, 1):
        versions = {r.version for group in groups for r in group.rollouts}
        assert versions == {step - 1 - ages[step - 1]}
        assert metrics["sampling/staleness/mean"] == ages[step - 1]
        again = copy.copy(trainer.policy)
        again.model, again.served = copy.deepcopy(trainer.policy.model), None
        torch.nn.utils.vector_to_parameters(served.given[int(versions.pop())], again.model.parameters())
        group = groups[0]
        ids = [torch.tensor(r.completion_ids) for r in group.rollouts]
        with torch.no_grad():
            found = again.logprobs([Group(torch.tensor(group.prompt.ids), ids)], 1.0).logp
        told = torch.tensor([x for r in group.rollouts for x in r.logprobs])
        assert torch.allclose(found.float(), told, atol=1e-4), f"step {step} was not sampled by its version"


def test_older_rollouts_are_corrected_and_the_metrics_show_it(make_run: Make) -> None:
    on_policy, stale = (steps(make_run(staleness=s)[0], 3)[-1][0] for s in (0, 1))
    assert on_policy["sampling/staleness/max"] == 0 < stale["sampling/staleness/max"]
    assert on_policy["sampling/effective_sample_size"] == pytest.approx(1.0, abs=1e-3)
    assert stale["sampling/effective_sample_size"] < 0.999
    assert "sampling/importance_sampling_ratio/capped_mean" in stale
    assert "timing_s/wait_for_rollouts" in stale and "timing_s/gen" in stale


def test_prompts_come_in_the_order_of_a_run_that_waits(make_run: Make) -> None:
    drawn = []
    for staleness in (0, 2):
        trainer, _ = make_run(staleness=staleness, dynamic_sampling=True)
        made = steps(trainer, 3)
        drawn.append([[group.prompt.example.id for group in groups] for _, groups in made])
        drawn.append(trainer.sampler.state())
    assert drawn[:2] == drawn[2:]


def test_the_state_of_the_prompts_is_the_step_s_and_not_the_thread_s(make_run: Make) -> None:
    trainer, _ = make_run(staleness=2)
    plain = PromptSampler(range(12), {}, seed=0)
    with trainer.overlapping(1, 5, lambda step: []):
        trainer.step(1, 0.3)
        trainer.hand_over(1, Stopwatch())
        plain.take(4)
        assert trainer.sampler.state() == plain.state()


def test_an_evaluation_between_steps_has_the_generator_for_itself(make_run: Make) -> None:
    trainer, served = make_run(staleness=2)
    with trainer.overlapping(1, 5, lambda step: []) as alone:
        trainer.step(1, 0.3)
        trainer.hand_over(1, Stopwatch())
        with alone(1):
            before = len(served.threads)
            trainer.policy.sample(trainer.prompts[:2], 1, SAMPLING, 0)
            assert [name for name, _ in served.threads[before:]] == ["MainThread"]
        trainer.step(2, 0.3)


def test_what_goes_wrong_ahead_ends_its_own_step(make_run: Make) -> None:
    trainer, served = make_run(staleness=1)
    made = served.made

    def broken(*arguments: Any) -> list[list[Completion]]:
        if len(served.threads) == 1:
            raise OSError("the server is gone")
        return made(*arguments)

    served.made = broken
    with trainer.overlapping(1, 3, lambda step: []):
        trainer.step(1, 0.3)
        trainer.hand_over(1, Stopwatch())
        with pytest.raises(OSError, match="the server is gone"):
            trainer.step(2, 0.3)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in where a recipe asks for a server."""

    @contextmanager
    def generating(policy: Policy, *_: Any, **__: Any) -> Iterator[None]:
        policy.served = Elsewhere(policy)  # type: ignore[assignment]
        yield
        policy.served = None

    monkeypatch.setattr(training, "generating", generating)


def smoke(staleness: int) -> Recipe:
    recipe = load_recipe("smoke", [("generator.kind", "vllm"), ("run.threads", "1"), ("eval.every", "2")])
    return replace(recipe, rl=replace(recipe.rl, staleness=staleness))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_a_run_that_was_stopped_trains_on_no_prompt_twice_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(smoke(1), whole)
    stop = training.Run._stop_if_interrupted

    def stop_once(run: Any) -> None:
        run.interrupted |= run.progress.stage_step == 1 and stages[run.progress.stage] == "phase1"
        stop(run)

    stages = [s.name if s.kind == "phase" else "" for s in training.stages_of(smoke(1))]
    monkeypatch.setattr(training.Run, "_stop_if_interrupted", stop_once)
    with pytest.raises(Stopped):
        train(smoke(1), parts)
    monkeypatch.setattr(training.Run, "_stop_if_interrupted", stop)
    train(smoke(1), parts)
    for folder in (whole, parts):
        phases = [line for line in metrics(folder) if line["stage"] != "sft"]
        assert [line["step"] for line in phases] == list(range(17, 23))
        assert max(line["sampling/staleness/max"] for line in phases) == 1
    prompts = [
        [json.loads(line)["prompt_id"] for path in sorted((folder / "rollouts").glob("phase*/*.jsonl")) for line in path.open()]
        for folder in (whole, parts)
    ]  # fmt: skip
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ([("generator.kind", "local")], "another program"),
        ([("phases.0.top_p", "0.95")], "cuts the distribution"),
        ([("generator.sync.sleep", "1")], "gives the servers' GPU to the trainer meanwhile"),
    ],
)
def test_what_can_t_overlap_is_refused(changes: list[tuple[str, str]], message: str) -> None:
    given = {"generator.kind": "vllm", "rl.staleness": "1", **dict(changes)}
    with pytest.raises(ValueError, match=message):
        load_recipe("smoke", list(given.items()))
