"""The RL step's prompts and rewards: what is drawn, used and given back, the length penalty, and a step trained from its dump."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.engine import Sampling
from longreach.rl.grpo import GrpoConfig, GrpoTrainer
from longreach.rl.policy import Policy
from longreach.rl.rollouts import RolloutGroup, regroup
from longreach.rl.sampler import PromptSampler
from longreach.rl.step_metrics import mismatch_metrics

Groups = list[RolloutGroup]
Make = Callable[..., Any]
SAMPLING = Sampling(8, temperature=0.7)


@pytest.fixture
def groups(make_prompts: Make, make_groups: Make) -> Groups:
    return make_groups(make_prompts(5, 30), [[1.0, -0.5, None], [0.0, 0.75, -0.75]])


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def sampling_trainer(policy: Policy, make_prompts: Make, scripted: Make, make_trainer: Make) -> Make:
    """Prompts p0..p11; those whose number is in `flat` have equal rewards, `silent` ones no verdict at all."""

    def make(
        config: GrpoConfig, flat: Sequence[int] = (), silent: Sequence[int] = (), state: Any = None
    ) -> GrpoTrainer:
        prompts = make_prompts(*[4 + i % 3 for i in range(12)])

        def rule(example: Any, place: int) -> float | None:
            number = int(example.id[1:])
            return None if number in silent else 0.5 if number in flat else float(place % 2)

        sampler = PromptSampler(range(12), {i: prompts[i].example.benchmark for i in range(12)}, seed=5)
        if state is not None:
            sampler.load(state)
        return make_trainer(policy, config, prompts, reward=scripted(rule), sampling=Sampling(4), sampler=sampler)

    return make


def drawn(groups: Groups) -> list[str]:
    return [group.prompt.example.id for group in groups]


def used(groups: Groups) -> list[str]:
    return [group.prompt.example.id for group in groups if group.rollouts[0].used]


def test_without_dynamic_sampling_a_step_takes_its_batch_as_it_comes(sampling_trainer: Make) -> None:
    trainer = sampling_trainer(GrpoConfig(batch_prompts=4, group_size=2), flat=range(12))
    _, groups = trainer.step(1, 0.0)
    assert drawn(groups) == used(groups)
    assert len(groups) == 4
    assert all(r.advantage == 0.0 for g in groups for r in g.rollouts)


def test_dynamic_sampling_fills_the_batch_and_returns_the_surplus_once(sampling_trainer: Make) -> None:
    config = GrpoConfig(batch_prompts=4, group_size=2, dynamic_sampling=True)
    order = [f"p{i}" for i in PromptSampler(range(12), {}, seed=5).take(12)]
    flat = [int(name[1:]) for name in (order[0], order[2], order[3])]  # one of the first four is left: a second batch
    trainer = sampling_trainer(config, flat=flat)
    metrics, groups = trainer.step(1, 0.0)
    assert drawn(groups) == order[:8]
    assert used(groups) == [order[1], *order[4:7]]
    assert metrics["sampling/groups"] == 8
    assert metrics["frac_reward_zero_std"] == 3 / 8
    assert all(r.advantage is None for g in groups if not g.rollouts[0].used for r in g.rollouts)
    assert [r.group for g in groups for r in g.rollouts] == [i for i in range(8) for _ in range(2)]
    _, following = trainer.step(2, 0.0)
    assert drawn(following) == [order[7], *order[8:11]], "the surplus prompt first, and once"
    _, third = trainer.step(3, 0.0)
    assert drawn(third)[0] == order[11]


def test_surplus_prompts_return_once_over_a_resume_too(sampling_trainer: Make) -> None:
    config = GrpoConfig(batch_prompts=4, group_size=2, dynamic_sampling=True)
    order = PromptSampler(range(12), {}, seed=5).take(12)
    trainer = sampling_trainer(config, flat=[order[0]])
    trainer.step(1, 0.0)
    resumed = sampling_trainer(config, flat=[order[0]], state=trainer.sampler.state())
    for number in (2, 3, 4):
        _, whole = trainer.step(number, 0.0)
        _, again = resumed.step(number, 0.0)
        assert [r.dump() for g in again for r in g.rollouts] == [r.dump() for g in whole for r in g.rollouts]


def test_dynamic_sampling_gives_up_after_its_batches_and_trains_on_what_there_is(sampling_trainer: Make) -> None:
    config = GrpoConfig(batch_prompts=4, group_size=2, dynamic_sampling=True, max_batches=2)
    order = PromptSampler(range(12), {}, seed=5).take(12)
    trainer = sampling_trainer(config, flat=order[:7])
    metrics, groups = trainer.step(1, 0.0)
    assert len(groups) == 8
    assert used(groups) == [f"p{order[7]}"]
    assert trainer.sampler.state()["queue"] == []
    assert metrics["updates"] == 1


def test_a_group_without_verdicts_is_neither_used_nor_returned(sampling_trainer: Make) -> None:
    config = GrpoConfig(batch_prompts=4, group_size=2, dynamic_sampling=True)
    order = PromptSampler(range(12), {}, seed=5).take(12)
    trainer = sampling_trainer(config, silent=order[:1])
    metrics, groups = trainer.step(1, 0.0)
    assert used(groups) == [f"p{i}" for i in order[1:5]]
    assert metrics["sampling/no_verdict"] == 2
    assert trainer.sampler.state()["queue"] == order[5:8]


def test_each_step_samples_anew_and_the_same_step_the_same(sampling_trainer: Make) -> None:
    config = GrpoConfig(batch_prompts=12, group_size=2)
    texts = []
    for number in (1, 2, 1):
        _, groups = sampling_trainer(config).step(number, 0.0)
        texts.append([r.completion_ids for g in groups for r in g.rollouts])
    assert texts[0] == texts[2] != texts[1]


def test_the_length_penalty_reaches_reward_and_advantage(policy: Policy, groups: Groups, make_trainer: Make) -> None:
    """max_completion 8, buffer 4: nothing up to 4 tokens, -1/4 at 5, -1 at 8."""
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(overlong_buffer=4, scale="none"), sampling=SAMPLING)
    lengths = (4, 5, 8)
    group = replace(
        groups[1],
        rollouts=tuple(
            replace(r, completion_ids=(9,) * n, reward=1.0, rewards={"rule": 1.0})
            for r, n in zip(groups[1].rollouts, lengths, strict=True)
        ),
    )
    (made,) = trainer.advantages([group])
    assert made.rewards == [1.0, 0.75, 0.0]
    assert [r.rewards for r in made.rollouts] == [{"rule": 1.0, "overlong": p} for p in (0.0, -0.25, -1.0)]
    mean = 1.75 / 3
    assert [r.advantage for r in made.rollouts] == pytest.approx([1 - mean, 0.75 - mean, -mean])
    plain: GrpoTrainer = make_trainer(policy, GrpoConfig(scale="none"), sampling=SAMPLING)
    assert [r.advantage for r in plain.advantages([group])[0].rollouts] == [0.0, 0.0, 0.0]


def test_dynamic_sampling_looks_at_rewards_before_the_penalty(
    policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    """As the released script does: a group all right or all wrong teaches nothing but brevity."""
    config = GrpoConfig(dynamic_sampling=True, overlong_buffer=4, batch_prompts=2)
    same = replace(
        groups[1],
        rollouts=tuple(
            replace(r, completion_ids=(9,) * n, reward=1.0, used=False)
            for r, n in zip(groups[1].rollouts, (3, 6, 8), strict=True)
        ),
    )
    (made,) = make_trainer(policy, config, sampling=SAMPLING).advantages([same])
    assert not made.rollouts[0].used


def test_a_missing_verdict_stays_missing_under_the_penalty(policy: Policy, groups: Groups, make_trainer: Make) -> None:
    silent = replace(groups[0], rollouts=tuple(replace(r, reward=None) for r in groups[0].rollouts))
    (made,) = make_trainer(policy, GrpoConfig(overlong_buffer=7), sampling=SAMPLING).advantages([silent])
    assert made.rewards == [None] * 3
    assert [r.advantage for r in made.rollouts] == [None] * 3


def test_a_replayed_step_is_the_step(sampling_trainer: Make, make_policy: Make) -> None:
    """Trained again from dumped lines alone: bitwise the same weights and the same numbers."""
    config = GrpoConfig(
        batch_prompts=4, group_size=2, updates=2, dynamic_sampling=True, overlong_buffer=2, importance_cap=1.1
    )
    trainer = sampling_trainer(config, flat=(1, 2), silent=(3,))
    first, groups = trainer.step(1, 0.5)
    lines = [r.dump() for g in groups for r in g.rollouts]
    other = sampling_trainer(config)
    other.policy = make_policy()
    other.optimizer = torch.optim.SGD(other.policy.model.parameters(), lr=0.0)
    again, _ = other.step(1, 0.5, regroup(lines, {p.example.id: p for p in other.prompts}))
    assert torch.equal(weights(other.policy.model), weights(trainer.policy.model))
    assert other.reward.asked == []
    measured = ("timing_s/", "perf/")
    assert {k: v for k, v in first.items() if not k.startswith(measured)} == {
        k: v for k, v in again.items() if not k.startswith(measured)
    }


def test_metrics_have_the_names_that_the_report_and_trl_know(sampling_trainer: Make) -> None:
    metrics, _ = sampling_trainer(GrpoConfig(batch_prompts=4, group_size=2), flat=(1,)).step(1, 0.1)
    assert set(metrics) >= {
        "loss", "grad_norm", "learning_rate", "entropy", "reward", "reward_std", "frac_reward_zero_std", "clip_ratio/low_mean",
        "clip_ratio/high_mean", "clip_ratio/region_mean", "completions/mean_length", "completions/min_length",
        "completions/max_length", "completions/clipped_ratio", "rewards/rule/mean", "perf/throughput", "timing_s/gen",
        "timing_s/reward", "timing_s/update_actor", "timing_s/step", "prompt_length/mean",
        "sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max", "sampling/k3_kl", "sampling/effective_sample_size",
    }  # fmt: skip
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["sampling/effective_sample_size"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["learning_rate"] == 0.1


def test_the_effective_share_of_samples() -> None:
    rho = [1.0, 3.0, 0.5]
    moments = {"sampling/ratio/mean": sum(rho) / 3, "sampling/ratio/mean_square": sum(x * x for x in rho) / 3}
    made = mismatch_metrics({"loss": 1.0, **moments})
    assert made == {"loss": 1.0, "sampling/effective_sample_size": pytest.approx(4.5**2 / (3 * 10.25))}
    assert mismatch_metrics({"loss": 1.0}) == {"loss": 1.0}
