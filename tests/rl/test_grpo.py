"""The RL step against an independent statement in fp64: transformers' own forward, one sequence at a time, plain formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from longreach.engine import Sampling
from longreach.rl.grpo import GrpoTrainer, Minibatch
from longreach.rl.grpo_config import GrpoConfig
from longreach.rl.policy import Policy
from longreach.rl.rollouts import RolloutGroup

KINDS = ("grpo", "dapo", "dr_grpo", "bnpo")  # those of the recipe's papers; the others are in test_grpo_losses.py
TEMPERATURE = 0.7
SAMPLING = Sampling(8, temperature=TEMPERATURE)
LENGTHS = (5, 30, 11, 6)
ADVANTAGES: list[list[float | None]] = [[1.0, -0.5, None], [0.0, 0.75, -0.75], [None, None, None], [0.25, -1.5, 1.25]]
Groups = list[RolloutGroup]
Make = Callable[..., Any]


@pytest.fixture
def groups(make_prompts: Make, make_groups: Make) -> Groups:
    return make_groups(make_prompts(*LENGTHS), ADVANTAGES)


@pytest.fixture(scope="module")
def exact_loaded(tiny_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64, attn_implementation="eager")


@pytest.fixture
def exact(exact_loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in fp64, with transformers' own attention."""
    return copy.deepcopy(exact_loaded)


def logits_of(model: PreTrainedModel, prompt: Sequence[int], ids: Tensor) -> Tensor:
    row = torch.cat([torch.tensor(prompt), ids])
    return model(input_ids=row[None], use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE


def logp_of(model: PreTrainedModel, prompt: Sequence[int], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens and entropies, [R] each."""
    logp = logits_of(model, prompt, ids).log_softmax(-1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def stated_loss(model: PreTrainedModel, minibatch: Minibatch, config: GrpoConfig) -> Tensor:
    """The loss of one update, sequence by sequence; a KL term is k3 = exp(d) - d - 1, d = reference - policy."""
    sequences = [(prompt, s) for prompt, samples in minibatch for s in samples]
    tokens = sum(len(s.ids) for _, s in sequences)
    total = torch.zeros((), dtype=torch.float64)
    for prompt, s in sequences:
        logp, entropy = logp_of(model, prompt.ids, s.ids)
        old = logp.detach() if s.old_logp is None else s.old_logp.double()
        ratio = (logp - old).exp()
        low, high = (0.2 if bound is None else bound for bound in (config.clip_low, config.clip_high))
        clipped = ratio.clamp(1 - low, 1 + high)
        token = -torch.minimum(ratio * s.advantage, clipped * s.advantage)
        if config.importance_cap is not None:
            sampled = torch.tensor(s.rollout.logprobs, dtype=torch.float64)
            full = sampled + torch.tensor(s.rollout.kept_logmass, dtype=torch.float64)
            token = token * (old - full).exp().clamp(max=config.importance_cap)
        if config.kl_weight:
            assert s.ref_logp is not None
            d = s.ref_logp.double() - logp
            token = token + config.kl_weight * (d.exp() - d - 1)
        token = token - config.entropy_weight * entropy
        total = total + token.sum() / (len(s.ids) if config.kind == "grpo" else 1)
    count = {"grpo": len(sequences), "dr_grpo": len(sequences) * SAMPLING.max_completion}.get(config.kind, tokens)
    return total / count


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def off_policy(minibatch: Minibatch, exact: PreTrainedModel) -> Minibatch:
    """Gives every sample old and reference log-probs some way from the policy's, so that ratios are clipped on both sides."""
    draw = torch.Generator().manual_seed(3)
    for prompt, samples in minibatch:
        for s in samples:
            logp = logp_of(exact, prompt.ids, s.ids)[0].detach()
            s.old_logp = (logp + 0.4 * torch.randn(len(logp), generator=draw)).float()
            s.ref_logp = (logp + 0.4 * torch.randn(len(logp), generator=draw)).float()
    return minibatch


def assert_close(ours: Tensor, stated: Tensor, bound: float = 2e-5) -> None:
    """Relative in the norm. fp32 gives about 1e-6 through two layers; a wrong term or count is off by a per cent or more."""
    assert stated.norm() > 0
    assert ((ours - stated).norm() / stated.norm()).item() < bound


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip_low": 0.1, "clip_high": 0.3},
    "kl": {"kl_weight": 0.3},
    "entropy": {"entropy_weight": 0.05},
    "importance": {"importance_cap": 1.2},
    "all": {"kl_weight": 0.3, "entropy_weight": 0.05, "importance_cap": 1.2, "clip_high": 0.28},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_of_an_update_is_the_stated_one(
    kind: str, options: str, policy: Policy, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    config = GrpoConfig(kind=kind, micro_batch_tokens=48, **OPTIONS[options])
    trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
    minibatch = off_policy(trainer.minibatches(groups)[0], exact)
    loss = trainer.gradient(minibatch, {})
    stated = stated_loss(exact, minibatch, config)
    stated.backward()
    assert loss == pytest.approx(stated.item(), rel=2e-5, abs=1e-6)
    assert_close(gradients(policy.model), gradients(exact))


def test_the_options_above_each_change_the_gradient(
    exact: PreTrainedModel, policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    """Else the comparison with the statement would prove nothing about them."""
    made = []
    for options in OPTIONS.values():
        trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(**options), sampling=SAMPLING)
        trainer.gradient(off_policy(trainer.minibatches(groups)[0], exact), {})
        made.append(gradients(policy.model))
        policy.model.zero_grad()
    for i, one in enumerate(made):
        for other in made[:i]:
            assert (one - other).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_micro_batches_do_not_change_the_update(
    kind: str, options: str, policy: Policy, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    """Budgets: a group split in two, one group a row, several, all in one. The sums differ in fp32 rounding alone."""
    made = []
    rows = []
    for budget in (37, 50, 4 * 50, 10**6):
        config = GrpoConfig(kind=kind, micro_batch_tokens=budget, **OPTIONS[options])
        trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
        minibatch = off_policy(trainer.minibatches(groups)[0], exact)
        rows.append(count_calls(policy, lambda t=trainer, m=minibatch: t.gradient(m, {})))
        made.append(gradients(policy.model))
        policy.model.zero_grad()
    assert rows[0] > rows[1] > rows[-1] == 1
    for other in made[:-1]:
        assert_close(other, made[-1], bound=5e-6)


@pytest.mark.parametrize("options", ["plain", "all"])
def test_a_prompt_for_each_completion_makes_the_same_update(
    options: str, policy: Policy, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    made, tokens = [], []
    for shared in (True, False):
        config = GrpoConfig(shared_prefix=shared, **OPTIONS[options])
        trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
        minibatch = off_policy(trainer.minibatches(groups)[0], exact)
        computed = trainer.computed(minibatch)
        tokens.append(count_tokens(policy, lambda t=trainer, m=minibatch: t.gradient(m, {})))
        once = sum(len(prompt.ids) * (1 if shared else len(samples)) for prompt, samples in computed)
        assert tokens[-1] == once + sum(len(s.ids) for _, samples in computed for s in samples)
        made.append(gradients(policy.model))
        policy.model.zero_grad()
    assert tokens[0] < tokens[1]
    assert_close(*made, bound=5e-6)


def count_tokens(policy: Policy, work: Callable[[], object]) -> int:
    """Tokens of all rows that the policy is asked for a loss of."""
    tokens = []
    original = policy.loss

    def counted(groups: Any, *arguments: Any, **inputs: Any) -> Any:
        tokens.append(sum(group.tokens for group in groups))
        return original(groups, *arguments, **inputs)

    policy.loss = counted
    work()
    del policy.loss
    return sum(tokens)


def count_calls(policy: Policy, work: Callable[[], object]) -> int:
    """How often the policy is asked for log-probs or a loss of them."""
    asked = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **inputs: (asked.append(1), original(*arguments, **inputs))[1]

    policy.logprobs, policy.loss = counted(policy.logprobs), counted(policy.loss)
    work()
    del policy.logprobs, policy.loss
    return len(asked)


def test_completions_with_zero_advantage_count_but_are_not_computed(
    policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(), sampling=SAMPLING)
    minibatch = trainer.minibatches(groups)[0]
    assert trainer.normalizer(minibatch) == 8, "a verdict of average quality counts, a missing verdict doesn't"
    computed = [s.rollout.advantage for _, samples in trainer.computed(minibatch) for s in samples]
    assert computed == [1.0, -0.5, 0.75, -0.75, 0.25, -1.5, 1.25]
    for config in (GrpoConfig(kl_weight=0.1), GrpoConfig(entropy_weight=0.1)):
        full: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
        assert sum(len(samples) for _, samples in full.computed(minibatch)) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_completions_without_verdict_are_as_if_they_were_not_there(
    kind: str, policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(kind=kind), sampling=SAMPLING)
    without = [replace(g, rollouts=tuple(r for r in g.rollouts if r.advantage is not None)) for g in groups]
    made = []
    for some in (groups, [g for g in without if g.rollouts]):
        minibatch = trainer.minibatches(some)[0]
        made.append((trainer.normalizer(minibatch), trainer.gradient(minibatch, {}), gradients(policy.model)))
        policy.model.zero_grad()
    assert made[0][:2] == made[1][:2]
    assert torch.equal(made[0][2], made[1][2])


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_are_not_used_do_not_change_the_update(
    kind: str, make_policy: Make, groups: Groups, make_trainer: Make
) -> None:
    unused = [replace(g, rollouts=tuple(replace(r, used=False, advantage=None) for r in g.rollouts)) for g in groups]
    made = []
    for some in (groups, [unused[0], groups[0], unused[1], *groups[1:], unused[3]]):
        policy = make_policy()
        make_trainer(policy, GrpoConfig(kind=kind), sampling=SAMPLING).step(1, 0.1, some)
        made.append(weights(policy.model))
    assert torch.equal(made[0], made[1])


def sgd_steps(model: PreTrainedModel, minibatches: list[Minibatch], config: GrpoConfig, rate: float) -> None:
    """Updates one after the other; ratios are taken against the log-probs of the weights before the first."""
    for minibatch in minibatches:
        for prompt, samples in minibatch:
            for s in samples:
                s.old_logp = logp_of(model, prompt.ids, s.ids)[0].detach()
    for minibatch in minibatches:
        model.zero_grad()
        stated_loss(model, minibatch, config).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * (torch.zeros_like(p) if p.grad is None else p.grad)


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
def test_four_updates_compare_with_the_policy_before_the_step(
    kind: str, make_policy: Make, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    """With a rate so large that ratios leave the clip range; on-policy ratios in each update would end elsewhere."""
    config, rate = GrpoConfig(kind=kind, updates=4, batch_prompts=4, clip_high=0.28), 0.3
    policy = make_policy()
    trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
    used = [groups[0], groups[1], groups[3], groups[0]]
    start = weights(exact)
    metrics, _ = trainer.step(1, rate, used)
    sgd_steps(exact, trainer.minibatches(used), config, rate)
    assert_close(weights(policy.model) - start, weights(exact) - start)
    assert metrics["updates"] == 4
    assert metrics["clip_ratio/region_mean"] > 0.02
    assert metrics["ratio/mean"] != pytest.approx(1.0, abs=1e-3)


def test_old_log_probs_are_those_before_the_step_and_skipped_for_the_first_update(
    policy: Policy, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    config = GrpoConfig(updates=2, batch_prompts=4)
    trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
    minibatches = trainer.minibatches(groups)
    trainer.attach_logprobs(minibatches)
    assert all(s.old_logp is None for _, samples in minibatches[0] for s in samples)
    later = [(prompt, s) for prompt, samples in minibatches[1] for s in samples]
    assert len(later) == 3
    for prompt, s in later:
        assert s.old_logp is not None and not s.old_logp.requires_grad
        torch.testing.assert_close(s.old_logp.double(), logp_of(exact, prompt.ids, s.ids)[0], atol=2e-5, rtol=0)


def test_a_single_update_is_on_policy_and_asks_for_log_probs_once(
    policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(), sampling=SAMPLING)
    assert count_calls(policy, lambda: trainer.step(1, 0.01, groups)) == 1
    two: GrpoTrainer = make_trainer(policy, GrpoConfig(updates=2, batch_prompts=4), sampling=SAMPLING)
    assert count_calls(policy, lambda: two.step(1, 0.01, groups)) == 3, "two updates, and old log-probs for the second"


class SpyReference:
    """Stands in for the reference model."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.calls, self.graphs = policy, 0, 0

    def logprobs(self, *arguments: Any) -> Any:
        self.calls += 1
        made = self.policy.logprobs(*arguments)
        self.graphs += made.logp.requires_grad
        return made


@pytest.mark.parametrize("weight, calls", [(0.0, 0), (0.1, 2)])
def test_the_reference_is_run_only_for_a_kl_term(
    weight: float, calls: int, make_policy: Make, groups: Groups, make_trainer: Make
) -> None:
    policy, spy = make_policy(), SpyReference(make_policy())
    config = GrpoConfig(updates=2, batch_prompts=4, kl_weight=weight)
    metrics, _ = make_trainer(policy, config, sampling=SAMPLING, reference=spy).step(1, 0.5, groups)
    assert (spy.calls, spy.graphs) == (calls, 0)
    assert ("kl" in metrics) == bool(weight)
    if weight:
        assert metrics["kl"] > 1e-4, "the second update is some way from the reference already"


def test_an_update_without_a_single_verdict_leaves_weights_alone(
    policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    """Else weight decay and momentum would move them with nothing learned."""
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(), sampling=SAMPLING)
    trainer.optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.5)
    start = weights(policy.model)
    metrics, _ = trainer.step(1, 0.1, [groups[2]])
    assert torch.equal(weights(policy.model), start)
    assert metrics["updates"] == 0
    assert metrics["sampling/no_verdict"] == 3


def test_updates_share_the_groups_in_order(policy: Policy, groups: Groups, make_trainer: Make) -> None:
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(updates=3, batch_prompts=6), sampling=SAMPLING)
    shares = trainer.minibatches([groups[i] for i in (0, 1, 3, 1, 0, 3, 1)])
    names = [[prompt.example.id for prompt, _ in share] for share in shares]
    assert names == [["p0", "p1"], ["p3", "p1"], ["p0", "p3", "p1"]]
