"""Questions as they are asked: cut by the published limit, told apart by their ids, told from others by a fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.engine import load_tokenizer
from longreach.rl.benchmarks.questions import cut_text, read_questions, tokenizer_sha256

Settings = Callable[..., Any]


@pytest.fixture
def tokenizer(tiny_dir: Path) -> Any:
    return load_tokenizer(tiny_dir)


def test_long_prompts_keep_both_ends(settings: Settings, tokenizer: Any, quiet: Any) -> None:
    whole, _ = read_questions(settings("dir", "qasper", max_input=1000), tokenizer, quiet)
    cut, _ = read_questions(settings("dir", "qasper", max_input=150), tokenizer, quiet)
    for before, after in zip(whole, cut, strict=True):
        assert not before.is_cut and len(before.ids) == before.length == after.length
        assert len(after.ids) == min(150, after.length)
        text = tokenizer.decode(after.ids)
        assert text.endswith('"Therefore, the answer is (insert answer here)".') and "Please read the following" in text
        half = 40 if after.is_cut else len(after.ids)
        assert after.ids[:half].tolist() == before.ids[:half].tolist()
        assert after.ids[-half:].tolist() == before.ids[-half:].tolist()


def test_a_fingerprint_is_of_documents_and_answers(
    settings: Settings, seven: dict[str, str], tokenizer: Any, quiet: Any, tmp_path: Path
) -> None:
    def fingerprint(change: Callable[[dict[str, Any]], object]) -> str:
        rows = [json.loads(line) for line in Path(seven["qasper"]).read_text().splitlines()]
        change(rows[1])
        path = tmp_path / "qasper.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_questions(settings("dir", "qasper", data={"qasper": str(path)}), tokenizer, quiet)[1][0].fingerprint

    same = fingerprint(lambda row: None)
    assert same == read_questions(settings("dir", "qasper"), tokenizer, quiet)[1][0].fingerprint, (
        "where it lies is nothing"
    )
    changes = (
        lambda row: row.update(context="other"), lambda row: row.update(answers=["9"]), lambda row: row.update(question="other?"),
        lambda row: row.update(id="other"), lambda row: row.update(answer_type="span"),
    )  # fmt: skip
    assert len({same, *map(fingerprint, changes)}) == 6


def test_the_same_tokenizer_has_the_same_fingerprint(tiny_dir: Path, tokenizer: Any) -> None:
    other = load_tokenizer(tiny_dir)
    assert tokenizer_sha256(other) == tokenizer_sha256(tokenizer)
    other.chat_template = "{{ messages[0].content }}"
    assert tokenizer_sha256(other) != tokenizer_sha256(tokenizer)
    other = load_tokenizer(tiny_dir)
    other.add_tokens(["<new>"])
    assert tokenizer_sha256(other) != tokenizer_sha256(tokenizer)


@pytest.mark.parametrize("excess", [1, 2, 7, 30])
def test_a_cut_takes_so_many_tokens_from_the_middle(tokenizer: Any, excess: int) -> None:
    text = " ".join(f"word{i}" for i in range(40))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = cut_text(text, excess, tokenizer)
    half = (len(ids) - excess) // 2
    assert cut[:5] == text[:5] and cut[-5:] == text[-5:]
    assert cut.startswith(tokenizer.decode(ids[:half]).strip()) and cut.endswith(tokenizer.decode(ids[-half:]).strip())
    # The two ends meet within a word of six or seven tokens, which may become another word.
    assert abs(len(tokenizer(cut, add_special_tokens=False)["input_ids"]) - (len(ids) - excess)) <= 6
    assert cut_text(text, 0, tokenizer) == text


def test_twins_are_refused(settings: Settings, tokenizer: Any, quiet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from longreach.rl.benchmarks import registry

    read = registry.read_benchmark

    def doubled(*args: Any, **keys: Any) -> Any:
        made = read(*args, **keys)
        made.examples.append(made.examples[0])
        return made

    monkeypatch.setattr(registry, "read_benchmark", doubled)
    with pytest.raises(ValueError, match="two questions have the id 'qasper-0'"):
        read_questions(settings("dir", "qasper"), tokenizer, quiet)
