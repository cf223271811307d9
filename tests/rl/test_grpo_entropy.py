"""The entropy rules in the RL step: against an fp64 statement, passes counted, and over a resume."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from longreach.engine import Sampling
from longreach.rl.entropy import AdaptiveEntropy, Aepo, NegativeClip
from longreach.rl.grpo import GrpoTrainer
from longreach.rl.grpo_config import GrpoConfig
from longreach.rl.policy import Policy
from longreach.rl.rollouts import RolloutGroup

Groups = list[RolloutGroup]
Make = Callable[..., Any]
SAMPLING = Sampling(8, temperature=0.7)
ADVANTAGES: list[list[float | None]] = [[1.0, -0.5, None], [0.0, 0.75, -0.75], [None, None, None], [0.25, -1.5, 1.25]]


@pytest.fixture
def groups(make_prompts: Make, make_groups: Make) -> Groups:
    return make_groups(make_prompts(5, 30, 11, 6), ADVANTAGES)


@pytest.fixture(scope="module")
def exact_loaded(tiny_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64, attn_implementation="eager")


@pytest.fixture
def exact(exact_loaded: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(exact_loaded)


def alone(model: PreTrainedModel, groups: Groups) -> list[tuple[float, Tensor, Tensor]]:
    """(advantage, log-probs, entropies) of each completion with a verdict, each in a forward of its own."""
    made = []
    for group, rollout in ((g, r) for g in groups for r in g.rollouts if r.advantage is not None):
        prompt, ids = torch.tensor(group.prompt.ids), torch.tensor(rollout.completion_ids)
        logits = model(input_ids=torch.cat([prompt, ids])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp = (logits / SAMPLING.temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        made.append((rollout.advantage, logp.gather(1, ids[:, None])[:, 0], entropy.detach()))
    return made


def between(values: list[float], below: int) -> float:
    """Halfway between two neighbours in order, so that rounding can't move a value over it."""
    ordered = sorted(values)
    return (ordered[below - 1] + ordered[below]) / 2


@pytest.fixture
def rules(exact: PreTrainedModel, groups: Groups) -> dict[str, dict[str, Any]]:
    """The same rules as recipe keys, with bounds that separate this model's entropies."""
    known = alone(exact, groups)
    tokens = [e for a, _, entropy in known if a < 0 for e in entropy.tolist()]
    means = [entropy.mean().item() for a, _, entropy in known if a < 0]
    batch = sum(entropy.mean().item() for _, _, entropy in known) / len(known)
    token = {"negative_clip": NegativeClip("token", between(tokens, len(tokens) // 2))}
    return {
        "none": {},
        "top": {"top_entropy_quantile": 0.4},
        "token": token,
        "sequence": {"negative_clip": NegativeClip("sequence", between(means, 1))},
        "aepo": {"aepo": Aepo(low=0.0, high=0.99 * batch)},
        "calm": {"aepo": Aepo(low=0.0, high=1.01 * batch)},
        "both": {"top_entropy_quantile": 0.7, **token},
    }


def stated_masks(rule: str, keys: dict[str, Any], known: list[tuple[float, Tensor, Tensor]]) -> list[list[bool]]:
    """Which tokens keep their advantage, token by token."""
    ordered = sorted(e for _, _, entropy in known for e in entropy.tolist())
    count = {"top": 0.4, "both": 0.7}.get(rule, 1.0) * len(ordered)
    bound = ordered[-round(count)] if count < len(ordered) else 0.0
    clip, made = keys.get("negative_clip"), []
    for advantage, _, entropy in known:
        kept = [e >= bound for e in entropy.tolist()]
        for t, e in enumerate(entropy.tolist()):
            level = entropy.mean().item() if rule == "sequence" else e
            if advantage < 0 and (rule == "aepo" or (clip is not None and level > clip.threshold)):
                kept[t] = False
        made.append(kept)
    return made


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
@pytest.mark.parametrize("rule", ["none", "top", "token", "sequence", "aepo", "calm", "both"])
def test_a_rule_puts_a_factor_before_each_token_and_leaves_the_denominators(
    rule: str, kind: str, rules: Any, policy: Policy, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    """On-policy the gradient of a token's objective is A grad log p (arXiv 2512.12967, eq. 8): all tokens are counted."""
    known = alone(exact, groups)
    kept = stated_masks(rule, rules[rule], known)
    flat = list(itertools.chain(*kept))
    assert all(flat) == (rule in ("none", "calm"))
    assert any(flat)
    stated, tokens = torch.zeros((), dtype=torch.float64), len(flat)
    for (advantage, logp, _), mask in zip(known, kept, strict=True):
        share = 1 / len(logp) / len(known) if kind == "grpo" else 1 / tokens
        stated = stated - (advantage * logp * torch.tensor(mask)).sum() * share
    stated.backward()
    for budget in (37, 10**6):  # a group cut in two; all in one row
        policy.model.zero_grad()
        config = GrpoConfig(kind=kind, micro_batch_tokens=budget, **rules[rule])
        trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
        minibatches = trainer.minibatches(groups)
        trainer.attach_logprobs(minibatches)
        trainer.gradient(minibatches[0], {})
        assert (gradients(policy.model) - gradients(exact)).norm() < 2e-5 * gradients(exact).norm()


@pytest.mark.parametrize(
    "rule, passed, computed",
    [("none", 0, 7), ("top", 8, None), ("token", 7, None), ("sequence", 7, 5), ("aepo", 8, 4), ("calm", 8, 7)],
)
def test_what_is_passed_before_the_update_and_what_is_left_to_compute(
    rule: str, passed: int, computed: int | None, rules: Any, policy: Policy, groups: Groups, make_trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """8 completions have a verdict, 7 an advantage, 3 a negative one. Sequence clipping takes the two upper of those."""
    trainer: GrpoTrainer = make_trainer(policy, GrpoConfig(**rules[rule]), sampling=SAMPLING)
    seen: list[int] = []

    def spied(original: Any) -> Any:
        return lambda row, *a, **k: (seen.append(sum(len(g.completions) for g in row)), original(row, *a, **k))[1]

    monkeypatch.setattr(policy, "logprobs", spied(policy.logprobs))
    monkeypatch.setattr(policy, "loss", spied(policy.loss))
    metrics, _ = trainer.step(1, 0.0, groups)
    assert seen[: len(seen) - 1] == ([passed] if passed else [])
    if computed is not None:
        assert seen[-1] == computed
    assert ("entropy_mask/share" in metrics) == (rule != "none")
    assert ("aepo/masking" in metrics) == (rule in ("aepo", "calm"))


def test_the_metrics_of_the_rules(
    rules: Any, policy: Policy, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    known = alone(exact, groups)
    lengths = {a: sum(len(e) for b, _, e in known if (b > 0) - (b < 0) == a) for a in (-1, 0, 1)}
    for rule, share in (("aepo", lengths[-1] / (lengths[-1] + lengths[1])), ("calm", 0.0)):
        metrics, _ = make_trainer(policy, GrpoConfig(**rules[rule]), sampling=SAMPLING).step(1, 0.0, groups)
        batch = sum(entropy.mean().item() for _, _, entropy in known) / len(known)
        assert metrics["aepo/entropy"] == pytest.approx(batch, rel=1e-5)
        assert metrics["aepo/masking"] == (rule == "aepo")
        assert metrics["entropy_mask/share"] == pytest.approx(share)


def test_a_kl_term_still_sees_what_a_rule_took_the_advantage_from(
    rules: Any, policy: Policy, groups: Groups, make_policy: Make, make_trainer: Make
) -> None:
    config = GrpoConfig(kl_weight=0.1, **rules["aepo"])
    trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING, reference=make_policy())
    minibatches = trainer.minibatches(groups)
    trainer.attach_logprobs(minibatches)
    assert all(s.ref_logp is not None for _, samples in minibatches[0] for s in samples)
    assert sum(len(samples) for _, samples in trainer.computed(minibatches[0])) == 8


def test_later_updates_look_at_the_policy_before_the_step(
    policy: Policy, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    """Their threshold is their own, their entropies those that the old log-probs come with."""
    config = GrpoConfig(updates=2, batch_prompts=4, top_entropy_quantile=0.4)
    trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
    minibatches = trainer.minibatches(groups)
    trainer.attach_logprobs(minibatches)
    for minibatch, part in zip(minibatches, (groups[:2], groups[2:]), strict=True):
        known = alone(exact, part)
        kept = [s.kept.tolist() for _, samples in minibatch for s in samples if s.kept is not None]
        assert kept == stated_masks("top", {}, known)
    assert all(s.old_logp is None for _, samples in minibatches[0] for s in samples), "the first is on-policy"
    assert all(s.old_logp is not None for _, samples in minibatches[1] for s in samples)


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_adaptive_weight_is_the_bonus_of_each_update(make_policy: Make, groups: Groups, make_trainer: Make) -> None:
    """A target out of reach: 0.1 in the first step, then 0.1 more each; the same steps with the weight set by hand."""
    adaptive = GrpoConfig(entropy_weight=0.1, adaptive_entropy=AdaptiveEntropy(target=99.0, delta=0.1))
    trainer: GrpoTrainer = make_trainer(make_policy(), adaptive, sampling=SAMPLING)
    by_hand = make_policy()
    for step, weight in enumerate((0.1, 0.2, 0.1 + 0.1 + 0.1), 1):
        metrics, _ = trainer.step(step, 0.3, groups)
        assert metrics["entropy_coef"] == weight
        plain, _ = make_trainer(by_hand, GrpoConfig(entropy_weight=weight), sampling=SAMPLING).step(step, 0.3, groups)
        assert "entropy_coef" not in plain
        assert torch.equal(weights(trainer.policy.model), weights(by_hand.model))


def test_a_healthy_entropy_gets_no_bonus_but_is_measured_over_the_same_completions(
    policy: Policy, groups: Groups, make_trainer: Make
) -> None:
    config = GrpoConfig(entropy_weight=0.1, adaptive_entropy=AdaptiveEntropy(target=0.01, delta=0.025))
    trainer: GrpoTrainer = make_trainer(policy, config, sampling=SAMPLING)
    made = [trainer.step(step, 0.0, groups)[0] for step in (1, 2)]
    assert [metrics["entropy_coef"] for metrics in made] == [0.1, 0.0]
    assert made[0]["entropy"] == pytest.approx(made[1]["entropy"], rel=1e-6)
    assert made[0]["loss"] - made[1]["loss"] < -0.1
    assert trainer.entropy.state()["weight"] == pytest.approx(0.05)


def test_a_trainer_that_takes_over_the_state_goes_on_bitwise(
    make_policy: Make, exact: PreTrainedModel, groups: Groups, make_trainer: Make
) -> None:
    """The entropy lies between AEPO's bounds throughout, so whether it masks is a matter of memory alone."""
    batch = sum(entropy.mean().item() for _, _, entropy in alone(exact, groups)) / 8
    config = GrpoConfig(
        updates=2, batch_prompts=4, top_entropy_quantile=0.8, aepo=Aepo(0.5 * batch, 1.5 * batch), entropy_weight=1e-3,
        adaptive_entropy=AdaptiveEntropy(target=99.0, delta=1e-3),
    )  # fmt: skip
    whole: GrpoTrainer = make_trainer(make_policy(), config, sampling=SAMPLING)
    whole.entropy.load({"weight": 1e-3, "last": None, "masking": True})
    first, _ = whole.step(1, 0.5, groups)
    saved, state = copy.deepcopy(whole.policy.model), json.dumps(whole.entropy.state())
    second, _ = whole.step(2, 0.5, groups)
    assert (first["aepo/masking"], second["aepo/masking"]) == (1.0, 1.0)
    for remembers in (True, False):
        resumed: GrpoTrainer = make_trainer(make_policy(), config, sampling=SAMPLING)
        resumed.policy.model.load_state_dict(saved.state_dict())
        if remembers:
            resumed.entropy.load(json.loads(state))
        again, _ = resumed.step(2, 0.5, groups)
        assert torch.equal(weights(resumed.policy.model), weights(whole.policy.model)) == remembers
        assert (again["entropy_coef"] == second["entropy_coef"]) == remembers
