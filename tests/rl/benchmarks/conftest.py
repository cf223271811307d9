"""Seven small benchmarks as files, a server that knows their answers, and a tokenizer trained on our own filler."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longreach.engine import load_tokenizer
from longreach.rl.benchmarks.registry import SEVEN
from longreach.rl.benchmarks.settings import EvaluationConfig
from longreach.rl.config import build
from longreach.rl.console import Console
from longreach.rl.prompts import TEMPLATE
from longreach.rl.synthetic.lexicon import FILLERS

QUESTIONS = 4


def gold(name: str, index: int) -> str:
    return str(100 * (SEVEN.index(name) + 1) + index)


@pytest.fixture(scope="session")
def seven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of each of the seven: question i of NAME is "What is item i of NAME?", its gold a number."""
    folder = tmp_path_factory.mktemp("seven")
    for name in SEVEN:
        rows = [
            {
                "id": f"{name}-{i}", "context": f"Report {i}. " * (3 + 20 * i), "question": f"What is item {i} of {name}?",
                "answers": [gold(name, i)], "answer_type": "number",
            }
            for i in range(QUESTIONS)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in SEVEN}


@pytest.fixture
def settings(seven: dict[str, str], tiny_dir: Path) -> Callable[..., EvaluationConfig]:
    """An evaluation of `model` on all seven; keywords are keys, `server__retries=1` for those of a section."""

    def make(model: str, *names: str, **keys: Any) -> EvaluationConfig:
        asked = names or SEVEN
        values: dict[str, Any] = {
            "model": model, "benchmarks": ",".join(asked), "data": {name: seven[name] for name in asked if name in seven}, "resamples": 500,
            "max_input": 400, "max_output": 8, "buckets": [64, 128, 256],
        }  # fmt: skip
        if model.startswith("http"):
            values |= {"tokenizer": str(tiny_dir), "served_name": "small"}
            values["server"] = {"backoff": 0.001, "style": "completions", "timeout": 5.0, "breaker_pause": 0.05}
        for key, value in keys.items():
            section, _, inner = key.partition("__")
            if inner:
                values.setdefault(section, {})[inner] = value
            else:
                values[key] = value
        return build(EvaluationConfig, values)

    return make


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


class Known:
    """What a served model is asked, and the answers that it gives to a question's (benchmark, index)."""

    def __init__(self, server: Any, folder: Path) -> None:
        self.server, self.tokenizer = server, load_tokenizer(folder)
        self.answer: Callable[[str, int], str] = gold
        self.asked: list[tuple[str, int]] = []
        server.respond = self.respond

    def question(self, body: dict[str, Any]) -> tuple[str, int]:
        text = str(self.tokenizer.decode(body["prompt"])) if "prompt" in body else body["messages"][-1]["content"]
        found = re.search(r"What is item (\d+) of (\w+)\?", text)
        assert found, text
        return found[2], int(found[1])

    def texts(self, body: dict[str, Any]) -> list[str]:
        name, index = self.question(body)
        self.asked.append((name, index))
        return [f"Therefore, the answer is {self.answer(name, index)}."] * body["n"]

    def completion(self, texts: list[str], **more: Any) -> Any:
        choices = [{"index": i, "text": text, "finish_reason": "stop", **more} for i, text in enumerate(texts)]
        return self.server.http(
            200, json.dumps({"choices": choices, "usage": {"completion_tokens": 7, "total_tokens": 90}})
        )

    def respond(self, _n: int, body: dict[str, Any]) -> Any:
        if body["max_tokens"] == 1:  # whether token ids are taken
            return self.completion(["."])
        return self.completion(self.texts(body))


@pytest.fixture
def served(server: Any, tiny_dir: Path) -> Known:
    return Known(server, tiny_dir)


CHAT = (
    "{{ '<|bos|>' }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEMPLATE, *FILLERS, "The access code of the crooked anchor is 7310942."] * 3, trainer)
    core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


@pytest.fixture(scope="session")
def bare() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=False)


@pytest.fixture(scope="session")
def chatty() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=True)
