"""The demo's claim rests on the document: with it a briefly tuned policy answers, without it nobody could."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longreach.engine.optimizer import OptimizerConfig, make_optimizer
from longreach.rl.data import Example, read_examples
from longreach.rl.evaluate import EvalConfig, evaluate
from longreach.rl.policy import Policy
from longreach.rl.prompts import tokenize
from longreach.rl.recipe import Recipe, load_recipe
from longreach.rl.rewards import make_reward
from longreach.rl.sft import SftConfig, sft_batch, sft_examples, sft_step
from longreach.rl.synthetic import Synthetic, write_rows

SHORT = Synthetic(shortest=140, longest=180, kinds=("lookup", "two_hop"))
STEPS = 70


def examples(policy: Policy, folder: Path, split: str, rows: int, needs: str = "answers") -> list[Example]:
    path = write_rows(replace(SHORT, split=split, rows=rows), policy.tokenizer, folder / f"{split}.jsonl")
    return read_examples(path, needs="response" if needs == "response" else "answers").examples


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("demo")


@pytest.fixture(scope="module")
def tuned(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Path]:
    """The shipped base model after a short warm-up SFT."""
    folder = tmp_path_factory.mktemp("demo")
    policy = Policy(recipe.model, recipe.generator)
    config = SftConfig(data="", upper=300, learning_rate=2e-3, batch_size=16, epochs=2, micro_batch_tokens=8192)
    prompts = tokenize(examples(policy, folder, "sft", 8 * STEPS, "response"), policy.tokenizer)
    groups, longer = sft_examples(policy, prompts, config.upper)
    assert not longer
    optimizer = make_optimizer(policy.model, OptimizerConfig(beta2=0.95, weight_decay=0.0))
    for step in range(STEPS):
        rate = config.learning_rate * min(1.0, (step + 1) / 10) * (1 - step / STEPS)
        sft_step(policy, optimizer, sft_batch(groups, config, 0, step), config, learning_rate=rate, grad_clip=1.0)
    return policy, folder


def accuracy(policy: Policy, recipe: Recipe, questions: list[Example]) -> tuple[float, float]:
    """Accuracy on the questions, and the chance of guessing among their documents' candidates."""
    config = EvalConfig(k=1, temperature=0.0, top_p=1.0, max_completion=32)
    made, rows = evaluate(
        policy,
        make_reward(recipe.reward),
        tokenize(questions, policy.tokenizer),
        config,
        bounds=[1024],
        seed=0,
        name="x",
    )
    return sum(row["scores"][0] for row in rows) / len(rows), made["chance"]


@pytest.mark.slow
def test_answers_come_from_the_document_alone(tuned: tuple[Policy, Path], recipe: Recipe) -> None:
    policy, folder = tuned
    questions = examples(policy, folder, "eval", 64)
    torch.manual_seed(0)
    with_document, chance = accuracy(policy, recipe, questions)
    emptied = [replace(q, context="Annual report of the group") for q in questions]
    without, _ = accuracy(policy, recipe, emptied)
    exchanged = [replace(q, context=questions[i - 1].context) for i, q in enumerate(questions)]
    with_another, _ = accuracy(policy, recipe, exchanged)
    margin = 3 * math.sqrt(chance * (1 - chance) / len(questions))
    assert with_document > chance + 2 * margin
    assert without < chance + margin
    assert with_another < chance + margin


def test_the_demo_separates_its_data(recipe: Recipe) -> None:
    """SFT, training and evaluation rows come from streams that share nothing, and evaluation covers every bucket."""
    splits = [recipe.synthetic[name].split for name in ("sft", "train", "eval")]
    assert len(set(splits)) == 3
    assert recipe.synthetic["eval"].longest > recipe.buckets()[-2]
    assert recipe.synthetic["sft"].longest <= recipe.phases[0].upper
