"""A tiny policy with random weights, hand-made prompts, scripted rewards: what the tests of training share."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from longreach.engine import Sampling, load_tokenizer
from longreach.engine.generate import GeneratorConfig
from longreach.engine.model import ModelConfig
from longreach.rl.config import build
from longreach.rl.data import Example
from longreach.rl.grpo import GrpoConfig, GrpoTrainer
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.recipe import Recipe
from longreach.rl.rewards import Reward, RewardConfig, Scored
from longreach.rl.rollouts import Rollout, RolloutGroup
from longreach.rl.sampler import PromptSampler

ASSETS = Path(__file__).resolve().parents[2] / "rl" / "assets"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 60,000 parameters in the transformers layout, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer(ASSETS / "demo-base")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(eos, int) and isinstance(pad, int)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.15,  # far from a uniform distribution, so that every term of a loss has a gradient
        eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [
        eos,
        *range(7, len(tokenizer), 8),
    ]  # one token in eight, so that lengths differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(tiny_dir: Path) -> Callable[..., Policy]:
    """Policies as loaded, one for each configuration: to be copied, never trained."""
    made: dict[str, Policy] = {}

    def load(batch_tokens: int, model: dict[str, Any]) -> Policy:
        key = repr((batch_tokens, sorted(model.items())))
        if key not in made:
            torch.manual_seed(0)
            config = ModelConfig(**{"path": str(tiny_dir), "device": "cpu", **model})
            made[key] = Policy(config, GeneratorConfig(batch_tokens))
        return made[key]

    return load


@pytest.fixture
def make_policy(loaded: Callable[..., Policy]) -> Callable[..., Policy]:
    """A fresh policy with the same weights each time; keywords are `ModelConfig`'s, and `batch_tokens`."""

    def make(*, batch_tokens: int = 1 << 20, **model: Any) -> Policy:
        fresh = copy.copy(loaded(batch_tokens, model))
        fresh.model = copy.deepcopy(fresh.model)
        return fresh

    return make


@pytest.fixture
def policy(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy()


@pytest.fixture
def make_prompts() -> Callable[..., list[Prompt]]:
    """Prompts p0, p1, ... of the given lengths, random tokens; benchmarks alternate between "even" and "odd"."""

    def make(*lengths: int) -> list[Prompt]:
        draw = torch.Generator().manual_seed(len(lengths))
        return [
            Prompt(
                Example(f"p{i}", "odd" if i % 2 else "even", ("x",), text=f"prompt {i}"),
                tuple(torch.randint(10, 500, (length,), generator=draw).tolist()),
            )
            for i, length in enumerate(lengths)
        ]

    return make


class ScriptedReward(Reward):
    """A `Reward` whose verdict on a completion is a function of its example and its place in the group."""

    def __init__(self, rule: Callable[[Example, int], float | None]) -> None:
        super().__init__(RewardConfig(), None, None)
        self.rule = rule
        self.asked: list[str] = []

    def finish(self, scoring: Any, examples: Sequence[Example], *_: Any, **__: Any) -> list[Scored]:
        self.asked += [example.id for example in examples]
        places: dict[str, int] = {}
        scores = []
        for example in examples:
            place = places[example.id] = places.get(example.id, -1) + 1
            value = self.rule(example, place)
            scores.append(Scored(value, {"rule": value}, "scripted"))
        return scores


@pytest.fixture
def scripted() -> Callable[..., Any]:
    return ScriptedReward


@pytest.fixture
def make_groups() -> Callable[..., list[RolloutGroup]]:
    """Hand-made rollouts: `advantages[g][i]` of completion i of prompt g, None for no verdict; random tokens and lengths."""

    def make(prompts: Sequence[Prompt], advantages: Sequence[Sequence[float | None]], longest: int = 7) -> Any:
        draw = torch.Generator().manual_seed(1)

        def rollout(group: int, prompt: Prompt, advantage: float | None) -> Rollout:
            n = int(torch.randint(2, longest + 1, (), generator=draw))
            logprobs = tuple((-3.0 - torch.rand(n, generator=draw)).tolist())
            return Rollout(
                stage="phase1", step=1, group=group, prompt_id=prompt.example.id, benchmark=prompt.example.benchmark,
                prompt_length=len(prompt.ids), completion_ids=tuple(torch.randint(10, 500, (n,), generator=draw).tolist()),
                completion="", logprobs=logprobs, kept_logmass=(-0.1,) * n, finish_reason="stop", rewards={"rule": 1.0},
                reward=None if advantage is None else 1.0, reason="", advantage=advantage, used=True,
            )  # fmt: skip

        return [
            RolloutGroup(prompt, tuple(rollout(g, prompt, a) for a in row))
            for g, (prompt, row) in enumerate(zip(prompts, advantages, strict=True))
        ]

    return make


@pytest.fixture
def make_trainer() -> Callable[..., GrpoTrainer]:
    """A trainer with plain SGD and no clipping of gradients, so that the change of the weights is the gradient."""

    def make(
        policy: Policy, config: GrpoConfig, prompts: Sequence[Prompt] = (), *, reward: Any = None, reference: Any = None,
        sampling: Sampling | None = None, sampler: PromptSampler | None = None, grad_clip: float = 0.0,
    ) -> GrpoTrainer:  # fmt: skip
        tasks = {i: prompt.example.benchmark for i, prompt in enumerate(prompts)}
        scored: Any = reward or ScriptedReward(lambda example, place: 1.0)
        return GrpoTrainer(
            config, policy, scored, torch.optim.SGD(policy.model.parameters(), lr=0.0), stage="phase1",
            sampling=sampling or Sampling(8, temperature=0.7), prompts=prompts, seed=0, grad_clip=grad_clip, reference=reference,
            sampler=sampler or (PromptSampler(range(len(prompts)), tasks, seed=0) if prompts else None),  # type: ignore[arg-type]
        )  # fmt: skip

    return make


REWARDS = '''
import random

import numpy as np
import torch


def uneven(completion_ids, **columns):
    """Differs within a group, hangs on the tokens alone, and now and then gives no verdict."""
    return [None if sum(ids) % 13 == 0 else (sum(ids) % 7) / 6 for ids in completion_ids]


def noisy(completion_ids, **columns):
    """Draws from every generator that belongs to nobody."""
    return [(random.random() + float(np.random.rand()) + float(torch.rand(()))) / 3 for ids in completion_ids]
'''


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A judge's server that behaves as `server.respond` says (`judge_server.py`)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    spec = importlib.util.spec_from_file_location("judge_server", Path(__file__).with_name("judge_server.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    running = module.Server()
    yield running
    running.close()


@pytest.fixture(scope="session")
def data_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (12 rows, two benchmarks, growing lengths), eval.jsonl (6), sft.jsonl (8), rewards.py; `median` holds the
    prompt length that halves the training rows."""
    folder, tokenizer = tmp_path_factory.mktemp("data"), load_tokenizer(tiny_dir)
    for name, count in (("train", 12), ("eval", 6), ("sft", 8)):
        rows = [
            {
                "id": f"{name}-{i}", "prompt": f"{name} " * (2 + 2 * i) + "What was the revenue?", "answers": [str(i)],
                "benchmark": "odd" if i % 3 == 0 else "even", "response": f"Therefore, the answer is {i}.", "chance": 0.25,
            }
            for i in range(count)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if name == "train":
            lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
            assert lengths == sorted(set(lengths))
            (folder / "median").write_text(str(lengths[5]))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="session")
def make_recipe(tiny_dir: Path, data_dir: Path) -> Callable[..., Recipe]:
    """The whole main job in a second or two: 2 steps of SFT, 2 phases of 3 steps, a difficulty pass between them.

    Keywords are dotted keys with `__` for the dots: `rl__updates=2`, `phases__0__steps=1`.
    """

    def make(**keys: Any) -> Recipe:
        phase = {"max_completion": 6, "steps": 3, "learning_rate": 1e-2}
        values: dict[str, Any] = {
            "name": "tiny",
            "model": {"path": str(tiny_dir), "device": "cpu"},
            "data": {"train": str(data_dir / "train.jsonl"), "eval": [str(data_dir / "eval.jsonl")]},
            "sft": {"data": str(data_dir / "sft.jsonl"), "upper": 200, "batch_size": 4, "learning_rate": 1e-2},
            "rl": {"group_size": 3, "batch_prompts": 2, "micro_batch_tokens": 600},
            "phases": [{**phase, "upper": int((data_dir / "median").read_text())}, {**phase, "upper": 500}],
            "retrospective": {"samples": 2, "threshold": 0.4},
            "reward": {"rule": False, "function": f"{data_dir / 'rewards.py'}:uneven"},
            "eval": {"max_completion": 6, "batch": 4},
            "run": {"save_every": 2},
        }
        for key, value in keys.items():
            *path, last = key.split("__")
            at: Any = values
            for part in path:
                at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
            at[last] = copy.deepcopy(value)  # a later key may reach into it
        return build(Recipe, {key: value for key, value in values.items() if value is not None})

    return make
