"""The shipped base model and the script that makes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from longreach.rl.base_model import BaseTraining, new_model, prime_copying, reading_plan, train_base, train_tokenizer
from longreach.rl.synthetic import Synthetic, make_rows

ASSETS = Path(__file__).resolve().parents[2] / "rl" / "assets" / "demo-base"
TINY = BaseTraining(leaflet_steps=2, growth=((2, 160, 200),), batch_tokens=300)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS)


def completions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int, rows: int
) -> tuple[float, float]:
    """(share of 'The <metric> of <company> was' that go on with the document's value, chance level)."""
    hits = chance = 0.0
    config = Synthetic(split="test", rows=rows, kinds=("lookup",), shortest=length, longest=length)
    for row in make_rows(config, tokenizer):
        stem = row["context"] + "\n " + row["response"].split(" was ")[0] + " was"
        ids = tokenizer.encode(stem, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            best = model(input_ids=ids, logits_to_keep=1).logits[0, -1].argmax()
        hits += str(tokenizer.decode([int(best)])).strip() == row["answers"][0]
        chance += row["chance"]
    return hits / rows, chance / rows


def test_shipped_base_is_small_and_plain() -> None:
    files = sorted(path.name for path in ASSETS.iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= 8_000_000


@pytest.mark.parametrize("length, least", [(200, 0.9), (450, 0.8), (900, 0.6)])
def test_shipped_base_recalls_figures_at_a_distance(
    tokenizer: PreTrainedTokenizerFast, length: int, least: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    hits, chance = completions(model, tokenizer, length, rows=20)
    assert hits >= least > chance + 0.3


def test_shipped_base_has_never_seen_a_question(tokenizer: PreTrainedTokenizerFast) -> None:
    """Question words that stand in no document were never trained, and what it reads holds none of the task's forms."""
    text = " ".join(str(tokenizer.decode(page.ids[0].tolist())) for page in reading_plan(TINY, tokenizer))
    assert "the answer is" not in text
    assert "?" not in text
    assert re.search(r"The \w+ of \w+ was \d{3}\.", text)


def test_prior_alone_predicts_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(len(tokenizer))
    prime_copying(model, torch.Generator().manual_seed(0))
    hits, chance = completions(model, tokenizer, 200, rows=20)
    assert hits <= chance


def test_marks_are_what_earlier_text_determines(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each marked figure was stated before for the same metric and company; the first statement is never marked."""
    for page in reading_plan(TINY, tokenizer):
        for ids, marks, real in zip(page.ids.tolist(), page.repeated.tolist(), page.real.tolist(), strict=True):
            words = [str(tokenizer.decode([token])).strip() for token, known in zip(ids, real, strict=True) if known]
            seen: dict[tuple[str, str], str] = {}
            checked = 0
            for i in range(3, len(words) - 1):
                sentence = words[i] == "was" and words[i - 2] == "of"
                row = words[i] == words[i - 2] == "|"
                if (sentence or row) and words[i + 1].isdigit():
                    key = (words[i - 3], words[i - 1])
                    assert marks[i + 1] == (key in seen)
                    assert seen.setdefault(key, words[i + 1]) == words[i + 1]
                    checked += 1
            assert checked > 3


def test_script_runs_and_repeats_itself(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    for name in ("a", "b"):
        train_base(TINY, tokenizer, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == len(tokenizer)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert trained.config.model_type == "qwen3"
    assert trained.config.tie_word_embeddings


def test_shipped_tokenizer_is_the_script_s(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.get_vocab() == train_tokenizer().get_vocab()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template) == (0, 1, None)
