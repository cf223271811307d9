"""The questions of an evaluation: read, rendered, cut in the middle to the longest prompt, and told apart by a fingerprint.

A served model that takes no token ids gets text. Its cut is made on token boundaries of the document, so the server may
count a few tokens more or less than the limit, since tokens merge where the two ends meet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..console import Console
from ..prompts import render_turns, tokenize
from ..rows import Example
from . import registry
from .settings import EvaluationConfig

Key = tuple[str, str]


@dataclass(frozen=True)
class Question:
    """`ids`: the prompt in the model's tokens (int32: a whole evaluation has 30 million); `length` before any cut.

    `judged`: whether a judge is asked besides the rule (a choice needs none).
    """

    benchmark: str
    example: Example
    ids: np.ndarray
    length: int
    judged: bool = True

    @property
    def key(self) -> Key:
        return self.benchmark, self.example.id

    @property
    def is_needle(self) -> bool:
        """Whether it was made here, with the columns of `needles.py`."""
        return self.benchmark.startswith("needle")

    @property
    def is_cut(self) -> bool:
        return self.length > len(self.ids)


@dataclass(frozen=True)
class Source:
    """Where a benchmark's questions came from. `fingerprint`: SHA-256 over its rows, documents and answers included."""

    name: str
    source: str
    questions: int
    bad_rows: int
    fingerprint: str


def read_questions(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[list[Question], list[Source]]:
    """All questions, benchmark by benchmark.

    Raises:
        ValueError: an unknown benchmark, a file for one that isn't asked, a bad row, or two questions of one id.
    """
    names = registry.benchmark_names(config.benchmarks)
    for name in config.data:
        if name not in names:
            raise ValueError(
                f"data {name}={config.data[name]}: {name!r} is none of the benchmarks asked for: {', '.join(names)}"
            )
    questions: list[Question] = []
    sources: list[Source] = []
    for name in names:
        read = registry.read_benchmark(
            name, source=config.data.get(name), limit=config.limit, tokenizer=tokenizer, seed=config.seed,
            skip_bad_rows=config.skip_bad_rows,
        )  # fmt: skip
        for warning in read.warnings:
            console.warn(warning)
        made = _questions(name, read.examples, tokenizer, config.max_input)
        cut = sum(question.is_cut for question in made)
        console.say(f"{name}: {len(made)} questions" + (f", {cut} cut to {config.max_input} tokens" if cut else ""))
        questions += made
        source = config.data.get(name) or registry.find_benchmark(name).source
        sources.append(Source(name, source, len(made), len(read.bad), _fingerprint(read.examples)))
    return questions, sources


def _questions(
    name: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[Question]:
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise ValueError(f"{name}: two questions have the id {example.id!r}, by which their responses are kept")
        seen.add(example.id)
    prompts = tokenize(examples, tokenizer, max_length=longest, truncate="middle")
    judged = registry.find_benchmark(name).judged
    return [
        Question(name, p.example, np.array(p.ids, np.int32), p.truncated_from or len(p.ids), judged) for p in prompts
    ]


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.to_row(), sort_keys=True, default=str).encode(errors="backslashreplace"))
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of vocabulary and chat template: what a prompt's tokens hang on."""
    told = json.dumps([sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template)])
    return hashlib.sha256(told.encode(errors="backslashreplace")).hexdigest()


def chat_messages(question: Question, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The question as messages, cut like the prompt: the middle of the document, or of the last turn where it is ready."""
    example, excess = question.example, question.length - len(question.ids)
    if example.text is not None:
        return [{"role": "user", "content": cut_text(example.text, excess, tokenizer)}]
    if example.messages is None:
        assert example.context is not None
        return render_turns(replace(example, context=cut_text(example.context.strip(), excess, tokenizer)))
    *before, last = (dict(message) for message in example.messages)
    return [*before, {**last, "content": cut_text(last["content"], excess, tokenizer)}]


def cut_text(text: str, excess: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` without `excess` tokens of its middle. ValueError: it hasn't as many."""
    if excess <= 0:
        return text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = encoding["offset_mapping"]
    kept = len(offsets) - excess
    if kept < 2:
        raise ValueError(f"{excess} of the text's {len(offsets)} tokens would have to go: raise max_input")
    head = (kept + 1) // 2
    return text[: offsets[head - 1][1]] + text[offsets[head + excess][0] :]
