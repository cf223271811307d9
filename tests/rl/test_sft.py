"""Warm-up SFT: the gradient is that of the mean over examples of their mean token loss, and epochs leave nothing out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longreach.engine import Group
from longreach.engine.optimizer import make_optimizer
from longreach.rl import train
from longreach.rl.console import Console
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.recipe import Recipe
from longreach.rl.sft import SftConfig, sft_batch, sft_examples, sft_step, sft_steps
from longreach.rl.sources import read_prompts

CONFIG = SftConfig(data="d", upper=64, learning_rate=1.0, batch_size=5)


def make_groups(*sizes: tuple[int, int]) -> list[Group]:
    draw = torch.Generator().manual_seed(0)
    return [
        Group(torch.randint(10, 500, (p,), generator=draw), [torch.randint(10, 500, (r,), generator=draw)])
        for p, r in sizes
    ]


GROUPS = make_groups((5, 1), (9, 30), (3, 7), (20, 2), (4, 12))


def step(policy: Policy, config: SftConfig, rate: float = 1.0) -> dict[str, float]:
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    return sft_step(policy, optimizer, GROUPS, config, learning_rate=rate, grad_clip=0.0)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def test_the_update_is_the_mean_over_examples_of_their_mean_token_loss(tiny_dir: Path, make_policy: Any) -> None:
    """QwenLong-L1, equation 11, on transformers' own forward in fp64, one example at a time."""
    exact = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64, attn_implementation="eager")
    losses, entropies = [], []
    for group in GROUPS:
        (response,) = group.completions
        row = torch.cat([group.prompt_ids, response])
        logits = exact(input_ids=row[None], use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, response))
        logp = logits.log_softmax(-1)
        entropies += (-(logp.exp() * logp).sum(-1)).tolist()
    loss = torch.stack(losses).mean()
    loss.backward()
    policy = make_policy()
    start = flat(policy.model)
    metrics = step(policy, CONFIG)
    stated = -torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    moved = flat(policy.model) - start
    assert (
        (moved - stated).norm() / stated.norm()
    ).item() < 2e-5  # fp32; equal weight per token is off by tens of per cent
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert metrics["num_tokens"] == sum(group.tokens for group in GROUPS)
    assert metrics["grad_norm"] == pytest.approx(stated.norm().item(), rel=1e-5)


def test_packing_does_not_change_the_update(make_policy: Any) -> None:
    made = []
    for budget in (64, 70, 10_000):
        policy = make_policy()
        start = flat(policy.model)
        step(policy, replace(CONFIG, micro_batch_tokens=budget))
        made.append(flat(policy.model) - start)
    for other in made[1:]:
        assert ((other - made[0]).norm() / made[0].norm()).item() < 5e-6


@pytest.mark.parametrize("count, size, steps", [(10, 5, 2), (11, 5, 3), (4, 5, 1), (1, 1, 1)])
def test_every_epoch_holds_each_example_once(count: int, size: int, steps: int) -> None:
    config = replace(CONFIG, batch_size=size, epochs=3)
    groups = make_groups(*[(3, 1)] * count)
    names = {id(group): i for i, group in enumerate(groups)}
    assert sft_steps(count, config) == 3 * steps
    batches = [[names[id(g)] for g in sft_batch(groups, config, 0, step)] for step in range(3 * steps)]
    epochs = [[i for batch in batches[e * steps : (e + 1) * steps] for i in batch] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert all(len(batch) <= size for batch in batches)
    assert Counter(map(len, batches))[size] >= 3 * (count // size)
    if count > 4:
        assert epochs[0] != epochs[1], "each epoch has an order of its own"


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    config = replace(CONFIG, batch_size=2)
    assert [id(g) for g in sft_batch(GROUPS, config, 7, 1)] == [id(g) for g in sft_batch(GROUPS, config, 7, 1)]
    orders = {tuple(id(g) for step in range(3) for g in sft_batch(GROUPS, config, seed, step)) for seed in range(4)}
    assert len(orders) > 1


def test_rows_over_the_bound_are_left_out_and_counted(
    policy: Policy, make_prompts: Callable[..., list[Prompt]]
) -> None:
    response = "Therefore, the answer is 12."
    length = len(policy.response_ids(response))
    prompts = [
        replace(p, example=replace(p.example, response=response)) for p in make_prompts(64 - length, 65 - length, 3)
    ]
    groups, longer = sft_examples(policy, prompts, 64)
    assert [group.tokens for group in groups] == [64, 3 + length]
    assert longer == 1
    assert groups[1].completions[0].tolist() == policy.response_ids(response).tolist()
    assert groups[1].prompt_ids.tolist() == list(prompts[2].ids)


def test_the_schedule_is_the_configs() -> None:
    rates = replace(CONFIG, warmup_steps=4, schedule="cosine").rates()
    assert [round(rates.at(i, 8), 3) for i in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.854, 0.5, 0.146]


def test_the_stage_is_these_steps_with_one_optimizer(
    make_recipe: Callable[..., Recipe], make_policy: Any, tmp_path: Path
) -> None:
    recipe = make_recipe(data__eval=[], phases=[], retrospective=None, sft__epochs=2)
    final = train(recipe, tmp_path / "run", console=Console(quiet=True))
    config, policy = recipe.sft, make_policy()
    assert config is not None
    prompts = read_prompts(recipe, policy.tokenizer, None, Console(quiet=True)).sft
    groups, _ = sft_examples(policy, prompts, config.upper)
    optimizer = make_optimizer(policy.model, recipe.optimizer)
    for i in range(4):
        batch = sft_batch(groups, config, recipe.run.seed, i)
        sft_step(policy, optimizer, batch, config, learning_rate=1e-2, grad_clip=recipe.optimizer.grad_clip)
    saved = load_file(final / "model.safetensors")
    made = dict(policy.model.named_parameters())
    assert saved.keys() <= made.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in saved.items())
