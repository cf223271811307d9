"""Real documents, where they are at hand beside the checkout: every stage trains on them, and whole books pass through.

The model is tiny and its tokenizer is trained here from the documents, so lengths are close to those of real policies.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from longreach.engine import Group, pack_groups
from longreach.rl import evaluate, train
from longreach.rl.config import build
from longreach.rl.console import Console
from longreach.rl.curriculum import Phase, assign
from longreach.rl.data import read_examples
from longreach.rl.policy import Policy
from longreach.rl.prompts import tokenize
from longreach.rl.recipe import Recipe
from longreach.rl.rewards import make_reward

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="no real documents beside this checkout"),
    pytest.mark.xdist_group("real-documents"),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 directory in the transformers layout: byte-level BPE of 4,000 tokens, random weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        e.context or ""
        for name in ("hotpotqa_train100", "tatqa_dev")
        for e in read_examples(DATA / f"{name}.jsonl").examples
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=262144, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def recipe_for(model_dir: Path, folder: Path) -> Recipe:
    """A few steps of each stage on multi-hop and financial questions."""
    examples = [
        e for name in ("2wikimultihopqa_train150", "tatqa_dev") for e in read_examples(DATA / f"{name}.jsonl").examples
    ]
    sft, rl = folder / "sft.jsonl", folder / "rl.jsonl"
    answered = [{**e.to_row(), "response": f"Therefore, the answer is {e.answers[0]}."} for e in examples[:24]]
    sft.write_text("".join(json.dumps(row) + "\n" for row in answered))
    rl.write_text("".join(json.dumps(e.to_row()) + "\n" for e in examples))
    phase = {"max_completion": 12, "steps": 2, "learning_rate": 1e-4}
    values = {
        "name": "real",
        "model": {"path": str(model_dir)},
        "data": {
            "train": str(rl),
            "eval": [str(DATA / "hotpotqa_train100.jsonl")],
            "truncate": "middle",
            "max_length": 2000,
        },
        "sft": {"data": str(sft), "upper": 4000, "batch_size": 8, "learning_rate": 1e-3},
        "rl": {"group_size": 2, "batch_prompts": 2, "micro_batch_tokens": 4096},
        "phases": [{**phase, "upper": 800}, {**phase, "upper": 3000}],
        "retrospective": {"source": "records"},
        "eval": {"max_completion": 8, "base": False},
    }
    return build(Recipe, values)


def test_every_stage_trains_and_evaluates_on_real_documents(model_dir: Path, tmp_path: Path) -> None:
    final = train(recipe_for(model_dir, tmp_path), tmp_path / "run", console=Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["sft"] * 3 + ["phase1"] * 2 + ["phase2"] * 2
    losses = [line["loss"] for line in lines if line["stage"] == "sft"]
    assert losses[-1] < losses[0]
    assert (final / "model.safetensors").exists()
    summary = json.loads((tmp_path / "run" / "evals" / "phase2.json").read_text())
    assert sum(bucket["n"] + bucket["left_out"] for bucket in summary["buckets"]) == 100


def test_whole_books_pass_without_a_quadratic_step(model_dir: Path) -> None:
    """Time per token of tokenising, curriculum and packing does not grow with length, and memory stays far below T x T."""
    recipe = build(
        Recipe,
        {
            "name": "long",
            "model": {"path": str(model_dir)},
            "data": {"train": "-"},
            "phases": [vars(PHASES[0])],
            "rl": {"micro_batch_tokens": 124_000},
        },
    )
    policy = Policy(recipe.model, recipe.generator)
    examples = [
        e
        for name in ("narrativeqa_fullstory", "financebench_filings")
        for e in read_examples(DATA / f"{name}.jsonl").examples
    ]
    books = sorted(examples, key=lambda e: len(e.context or ""))[-6:]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    prompts = tokenize(books, policy.tokenizer)
    lengths = [len(p.ids) for p in prompts]
    members, beyond = assign(lengths, PHASES)
    groups = [Group(torch.tensor(p.ids), [torch.ones(4000, dtype=torch.long)] * 8) for p in prompts]
    rows = pack_groups(groups, max(lengths) + 40_000)
    positions = sum(int(row.position_ids().shape[0] + row.loss_rows().shape[0]) for row in rows)
    seconds, grown_kib = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    tokens = sum(lengths)
    print(
        f"{tokens} tokens in {len(books)} documents, longest {max(lengths)}: {seconds:.1f} s, {grown_kib / 1024:.0f} MiB more"
    )
    assert min(lengths) > 100_000
    assert sorted([i for phase in members for i in phase] + beyond) == list(range(len(books)))
    assert positions >= tokens + 6 * 8 * 4000
    assert grown_kib * 1024 < max(lengths) ** 2 / 8, "something of T x T bits or more was held"


PHASES = (
    Phase(upper=120_000, max_completion=4000, steps=1, learning_rate=1e-6),
    Phase(upper=240_000, max_completion=4000, steps=1, learning_rate=1e-6),
)


def test_evaluate_is_public_and_names_real_benchmarks(model_dir: Path) -> None:
    values = {
        "name": "e",
        "model": {"path": str(model_dir)},
        "data": {"train": "-"},
        "phases": [vars(PHASES[0])],
        "rl": {"micro_batch_tokens": 124_000},
        "eval": {"max_completion": 4, "k": 2},
    }
    recipe = build(Recipe, values)
    policy = Policy(recipe.model, recipe.generator)
    examples = read_examples(DATA / "musique_train100.jsonl", limit=3).examples
    summary, rows = evaluate(
        policy,
        make_reward(recipe.reward),
        tokenize(examples, policy.tokenizer),
        recipe.eval,
        bounds=[8000],
        seed=0,
        name="now",
    )
    assert [b["name"] for b in summary["benchmarks"]] == [examples[0].benchmark]
    assert all(len(row["completions"]) == 2 for row in rows)
