"""Every kind of policy loss from a recipe's keys to the gradient: its normalizer, its options, its corrections, and any cut.

What a kind computes is tested beside it; here it must be given what it asks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.engine import Group, Sampling
from longreach.kernels import policy_loss
from longreach.kernels.policy_loss import KINDS
from longreach.kernels.policy_objective import COMMON_OPTIONS
from longreach.rl.config import build
from longreach.rl.console import Console
from longreach.rl.grpo import GrpoTrainer, Minibatch, Sample
from longreach.rl.grpo_config import FOREIGN_CAP, GrpoConfig
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.rollouts import RolloutGroup

Groups = list[RolloutGroup]
Make = Callable[..., Any]
SAMPLING = Sampling(8, temperature=0.7)
ADVANTAGES: list[list[float | None]] = [[1.0, -0.5, None], [0.0, 0.75, -0.75], [None, None, None], [0.25, -1.5, 1.25]]
COMMON: dict[str, Any] = {
    "kl_weight": 0.3, "kl": "k2", "kl_bias_correction": True, "entropy_weight": 0.05, "importance_cap": 1.2,
    "importance_range": (0.7, 2.0), "importance_sequence_range": (0.5, 1.5), "importance_level": "token",
    "off_policy_threshold": 0.1,
}  # fmt: skip


@pytest.fixture
def groups(make_prompts: Make, make_groups: Make) -> Groups:
    return make_groups(make_prompts(5, 30, 11, 6), ADVANTAGES)


def prepared(trainer: GrpoTrainer, groups: Groups) -> Minibatch:
    """All completions in one update, with old, reference and rollout log-probs some way from the policy's."""
    (minibatch,) = trainer.minibatches(groups)
    draw = torch.Generator().manual_seed(3)
    for prompt, samples in minibatch:
        for s in samples:
            with torch.no_grad():
                row = trainer.policy.logprobs([_group(prompt, s)], SAMPLING.temperature).logp
            noise = 0.4 * torch.randn(3, len(row), generator=draw)
            s.old_logp, s.ref_logp = row + noise[0], row + noise[1]
            s.rollout = replace(s.rollout, logprobs=tuple((row + noise[0] + noise[2] + 0.1).tolist()))
    return minibatch


def _group(prompt: Prompt, sample: Sample) -> Group:
    return Group(torch.tensor(prompt.ids), [sample.ids])


def gradient(trainer: GrpoTrainer, minibatch: Minibatch) -> Tensor:
    trainer.policy.model.zero_grad()
    trainer.gradient(minibatch, {})
    return torch.cat([p.grad.double().flatten() for p in trainer.policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_divided_by_what_its_table_says(
    kind: str, policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    """8 completions have a verdict; at most 8 tokens each."""
    tokens = sum(len(r.completion_ids) for g in groups for r in g.rollouts if r.advantage is not None)
    counts = {"sequences": 8, "tokens": tokens, "local_tokens": tokens, "sequences_x_limit": 64}
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(kind=kind), sampling=SAMPLING)
    assert len(set(counts.values())) == 3
    assert trainer.normalizer(trainer.minibatches(groups)[0]) == counts[KINDS[kind].normalizer]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("common", [False, True])
def test_each_kind_gets_its_inputs_whole_however_the_update_is_cut(
    kind: str, common: bool, policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    """Against the loss of all completions at once, put together here from forwards of one completion each."""
    config = GrpoConfig(kind=kind, **(COMMON if common else {}))
    trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
    minibatch = prepared(trainer, groups)
    sequences = [(prompt, s) for prompt, samples in minibatch for s in samples]
    made = [policy.logprobs([_group(prompt, s)], SAMPLING.temperature) for prompt, s in sequences]
    lengths = [len(s.ids) for _, s in sequences]
    rollout = [torch.tensor(s.rollout.logprobs) + torch.tensor(s.rollout.kept_logmass) for _, s in sequences]
    stated = policy_loss(
        torch.cat([m.logp for m in made]),
        torch.cat([s.old_logp for _, s in sequences if s.old_logp is not None]),
        torch.cat([torch.full((n,), s.advantage) for n, (_, s) in zip(lengths, sequences, strict=True)]),
        torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]),
        kind=kind,
        normalizer=trainer.normalizer(minibatch),
        entropy=torch.cat([m.entropy for m in made]),
        rollout_logp=torch.cat(rollout),
        ref_logp=torch.cat([s.ref_logp for _, s in sequences if s.ref_logp is not None]),
        **(COMMON if common else {}),
    )
    policy.model.zero_grad()
    stated.loss.backward()
    expected = torch.cat([p.grad.double().flatten() for p in policy.model.parameters() if p.grad is not None])
    assert expected.norm() > 0
    for budget in (37, 10**6):
        cut: GrpoTrainer = make_trainer(
            policy, GrpoConfig(kind=kind, micro_batch_tokens=budget, **(COMMON if common else {})), sampling=SAMPLING
        )
        # fp32 through two layers, ratios of a whole sequence among it
        assert (gradient(cut, minibatch) - expected).norm() < 5e-5 * expected.norm()


# Two values of each option between which these tokens lie; else its default and half of that
VALUES: dict[str, tuple[float | None, float]] = {
    "clip_low": (0.0, 0.9), "clip_high": (0.0, 9.0), "dual_clip": (None, 1.1), "delta": (None, 1.1), "ratio_cap": (20.0, 0.9),
    "divergence_low": (1.0, 1e-6), "divergence_high": (1.0, 1e-6),
}  # fmt: skip


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in KINDS for name in KINDS[kind].options])
def test_each_option_of_each_kind_can_be_set_and_changes_the_gradient(
    kind: str, name: str, policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    default = KINDS[kind].options[name].default
    made, minibatch = [], None
    for value in VALUES.get(name, (default, (default or 0) / 2)):
        keys = {name: value} if name in ("clip_low", "clip_high") else {"options": {name: value}}
        config = build(GrpoConfig, {"kind": kind, **({} if value is None else keys)})
        trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
        minibatch = minibatch or prepared(trainer, groups)
        made.append(gradient(trainer, minibatch))
    assert (made[0] - made[1]).norm() > 1e-4 * made[0].norm()


def test_every_option_of_all_kinds_has_a_key() -> None:
    keys = GrpoConfig(**COMMON).loss_options().keys() | {"entropy_weight"}
    assert keys == COMMON_OPTIONS.keys() == COMMON.keys()


def test_kinds_that_pull_compute_completions_without_an_advantage_too(
    policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    pulls = {kind for kind in KINDS if KINDS[kind].penalises}
    assert {"dro", "kimi"} <= pulls
    for kind in ("dapo", *pulls):
        trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(kind=kind), sampling=SAMPLING)
        computed = trainer.computed(trainer.minibatches(groups)[0])
        assert sum(len(samples) for _, samples in computed) == (8 if kind in pulls else 7)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"kind": "gpso"}, "rl: unknown policy loss 'gpso': did you mean 'gspo'?"),
        ({"kind": "reinforce", "clip_low": 0.2}, "rl: unknown option 'clip_low' of policy loss 'reinforce'"),
        ({"kind": "sapo", "options": {"dual_clip": 3.0}}, "unknown option 'dual_clip' of policy loss 'sapo'"),
        ({"options": {"dualclip": 3.0}}, "unknown option 'dualclip' of policy loss 'grpo': did you mean 'dual_clip'?"),
        ({"options": {"dual_clip": 0.9}}, "dual_clip must be above 1, got 0.9"),
        ({"options": {"dual_clip": "3"}}, "'rl.options.dual_clip' must be a finite number, not '3'"),
        ({"options": {"clip_low": 0.1}}, "rl.options.clip_low stands in [rl] itself: write rl.clip_low"),
        ({"options": {"entropy_weight": 0.1}}, "rl.options.entropy_weight stands in [rl] itself"),
        ({"importance_range": [2.0]}, "importance_range must be a pair (low, high), got (2.0,)"),
        ({"importance_range": [2.0, 1.0]}, "importance_range needs 0 <= low < high, got (2.0, 1.0)"),
        ({"importance": "of"}, "rl.importance 'of' is not known: auto or off"),
        ({"importance": "off", "importance_cap": 2.0}, "leave out one or the other"),
        ({"importance_level": "group"}, "unknown importance_level 'group'"),
        ({"kind": "vespo", "importance_cap": 2.0, "importance_level": "sequence"}, "use 'token'"),
        ({"off_policy_threshold": 0.0}, "off_policy_threshold must be positive, got 0.0"),
        ({"top_entropy_quantile": 0.0}, "rl.top_entropy_quantile must lie in (0, 1], not 0.0"),
        ({"top_entropy_quantile": 1.1}, "rl.top_entropy_quantile must lie in (0, 1], not 1.1"),
        (
            {"negative_clip": {"level": "tokens", "threshold": 1.0}},
            "level 'tokens' is not known: did you mean 'token'?",
        ),
        ({"negative_clip": {"level": "token", "threshold": -1.0}}, "rl.negative_clip.threshold must be 0 or more"),
        ({"negative_clip": {"level": "token"}}, "'rl.negative_clip.threshold' is missing"),
        ({"aepo": {"low": 0.3, "high": 0.2}}, "rl.aepo needs 0 <= low <= high, not low = 0.3 and high = 0.2"),
        ({"adaptive_entropy": {"target": 0.0}}, "rl.adaptive_entropy: target and delta must be positive"),
        ({"adaptive_entropy": {"delta": -1.0}}, "rl.adaptive_entropy: target and delta must be positive"),
        ({"adaptive_entropy": {"min": 1.0}}, "rl.adaptive_entropy needs 0 <= min < max"),
        ({"adaptive_entropy": {"min": 0.1}}, "rl.entropy_weight = 0.0 is where rl.adaptive_entropy begins"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_name(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        build(GrpoConfig, keys, "rl")


def test_a_generator_that_is_another_program_is_corrected_unless_the_recipe_says_how() -> None:
    assert GrpoConfig().loss_options(foreign=True)["importance_cap"] == FOREIGN_CAP
    assert "importance_cap" not in GrpoConfig().loss_options()
    assert "importance_cap" not in GrpoConfig(importance="off").loss_options(foreign=True)
    masked = GrpoConfig(importance_sequence_range=(0.5, 1.5)).loss_options(foreign=True)
    assert masked == {**GrpoConfig(importance_sequence_range=(0.5, 1.5)).loss_options()}
    assert "importance_cap" not in masked


class Listening(Console):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.heard: list[str] = []

    def warn(self, text: str) -> None:
        self.heard.append(text)


def test_without_the_kept_mass_nothing_is_corrected_and_one_warning_says_so(
    policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    """A server that samples with top_p < 1 and doesn't tell what it cut off: old log-probs alone, as if no correction were set."""
    console = Listening()
    corrected: GrpoTrainer = make_trainer(policy, GrpoConfig(**COMMON), sampling=SAMPLING)
    others = {name: value for name, value in COMMON.items() if not name.startswith("importance_")}
    plain: GrpoTrainer = make_trainer(policy, GrpoConfig(**others), sampling=SAMPLING)
    minibatch = prepared(corrected, groups)
    known = gradient(corrected, minibatch)
    for _, samples in minibatch:
        for s in samples[:1]:  # one of an update is enough
            s.rollout = replace(s.rollout, kept_logmass=())
    corrected.console = console
    found = gradient(corrected, minibatch)
    corrected.console = console
    gradient(corrected, minibatch)
    assert torch.equal(found, gradient(plain, minibatch)) and not torch.equal(found, known)
    assert len(console.heard) == 1
    assert "importance_cap, importance_range, importance_sequence_range are off" in console.heard[0]
    metrics: dict[str, Any] = {}
    corrected.gradient(minibatch, metrics)
    assert not any("importance_sampling" in name for name in metrics), "no ratio of two measures is reported"


def test_without_a_correction_nothing_is_warned_of(policy: Policy, groups: Groups, make_trainer: Make) -> None:
    console = Listening()
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(), sampling=SAMPLING)
    trainer.console = console
    minibatch = prepared(trainer, groups)
    for _, samples in minibatch:
        for s in samples:
            s.rollout = replace(s.rollout, kept_logmass=())
    gradient(trainer, minibatch)
    assert console.heard == []
