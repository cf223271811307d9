"""A benchmark's document at the evaluation's 120,000 tokens, ours beside the published cut of the whole prompt.

Published (QwenLong-L1, LongBench): the first and the last half of the whole rendered prompt. Ours takes the middle of the
document alone. Both keep both ends and the question; they differ by half of the words that stand around the document.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from longreach.rl.benchmarks.needles import make_needles, needle_test
from longreach.rl.benchmarks.registry import read_benchmark
from longreach.rl.prompts import render, tokenize
from longreach.rl.rows import Example

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
LIMIT = 120_000


def check(example: Example, tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    (whole,) = tokenize([example], tokenizer)
    assert len(whole.ids) > limit
    (ours,) = tokenize([example], tokenizer, max_length=limit, truncate="middle")
    ready = Example("r", "b", ("x",), text=render(example, tokenizer))
    published = whole.ids[: limit // 2] + whole.ids[-limit // 2 :]
    assert len(ours.ids) == len(published) == limit
    assert ours.truncated_from == len(whole.ids)
    around = len(tokenize([Example("e", "b", ("x",), context="", question=example.question)], tokenizer)[0].ids)
    start = next(index for index in range(limit) if ours.ids[index] != whole.ids[index])
    kept = next(index for index in range(limit) if ours.ids[-1 - index] != whole.ids[-1 - index])
    # Both cuts lie at the middle; ours is shifted by what precedes and follows the document.
    assert abs(start - limit // 2) <= around and abs(kept - limit // 2) <= around
    assert example.question is not None and example.context is not None
    text = tokenizer.decode(list(ours.ids))
    assert isinstance(text, str)
    assert example.question.strip() in text and text.rstrip().endswith(render(example, tokenizer)[-20:].rstrip())
    assert example.context.strip()[:200] in text and example.context.strip()[-200:] in text
    # A ready prompt can't be taken apart, and is cut exactly as published (special tokens are the template's own here).
    (whole_cut,) = tokenize([ready], tokenizer, max_length=limit, truncate="middle")
    plain = tokenize([ready], tokenizer)[0].ids
    assert whole_cut.ids == plain[: limit // 2] + plain[len(plain) - limit // 2 :]


def test_a_long_row_of_longbench(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    (made,) = make_needles(needle_test("needles-single-140k"), chatty, questions=1)
    row = {"input": "Who walks?", "context": made.context, "answers": ["Ida"], "dataset": "musique", "_id": "1"}
    (tmp_path / "musique.jsonl").write_text(json.dumps(row))
    (example,) = read_benchmark("musique", source=tmp_path / "musique.jsonl", limit=1).examples
    check(example, chatty, LIMIT)


def test_options_survive_the_cut(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    row = {"_id": "1", "question": "Which?", "answer": "C", "context": "The mill turns. " * 3000, "difficulty": "easy"}
    row |= {
        f"choice_{letter}": f"the {word}" for letter, word in zip("ABCD", ("sun", "sea", "sky", "soil"), strict=True)
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    (example,) = read_benchmark("longbench-v2", source=tmp_path / "data.jsonl", limit=1).examples
    check(example, chatty, 2000)
    text = render(example, chatty)
    assert "\n(A) the sun\n(B) the sea\n(C) the sky\n(D) the soil\n\nFormat your response as follows: " in text
    assert '"The correct answer is (insert answer here)".' in text and "Therefore" not in text


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real documents beside this checkout")
def test_whole_books(bare: PreTrainedTokenizerFast) -> None:
    examples = read_benchmark("narrativeqa", source=SHARED).examples
    longest = max(examples, key=lambda example: len(example.context or ""))
    check(longest, bare, LIMIT)
