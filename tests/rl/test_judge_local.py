"""A transformers model directory as judge: the same prompt, grammar and cache as behind a server."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine import Sampling, generate
from longreach.rl import judge_local
from longreach.rl.data import Example
from longreach.rl.judge import Case, JudgeConfig, LocalJudge, make_judge
from longreach.rl.judge_cache import VerdictCache
from longreach.rl.rewards import RewardConfig, make_reward

CASES = [Case("Which city?", ("Paris",), name) for name in ("Lutetia", "the French capital", "Rome")]
Made = Callable[..., LocalJudge]


@pytest.fixture
def made(tiny_dir: Path) -> Made:
    def make(home: Path | None = None, **options: Any) -> LocalJudge:
        usual = {
            "model_dir": str(tiny_dir),
            "device": "cpu",
            "dtype": "float32",
            "max_tokens": 4,
            "max_failure_share": 1.0,
        }
        one = make_judge(JudgeConfig(**{**usual, **options}), {}, home)
        assert isinstance(one, LocalJudge)
        return one

    return make


def speak(monkeypatch: pytest.MonkeyPatch, words: Callable[[str], str]) -> list[str]:
    """The tiny model can only babble: its words are replaced after it has really generated. Gives the prompts it read."""
    read: list[str] = []

    def answers(self: LocalJudge, chats: list[list[dict[str, str]]]) -> list[str | None]:
        assert all(text is not None for text in original(self, chats))
        read.extend(chat[1]["content"] for chat in chats)
        return [words(chat[1]["content"]) for chat in chats]

    original = LocalJudge._words
    monkeypatch.setattr(LocalJudge, "_words", answers)
    return read


def ask(one: LocalJudge, *cases: Case) -> list[float | None]:
    return asyncio.run(one.verdicts(cases or CASES))


def test_a_model_that_babbles_gives_no_verdict(made: Made) -> None:
    one = made()
    assert ask(one) == [None] * 3
    assert one.metrics()["judge/calls"] == 3
    assert one.metrics()["judge/failed/no_clear_verdict"] == 3


def test_what_it_says_is_the_engines_greedy_generation_of_the_prompt(made: Made) -> None:
    one = made()
    chats = [judge_local.judge_prompt.messages(case) for case in CASES]
    said = one._words(chats)
    for chat, text in zip(chats, said, strict=True):
        whole = f"{chat[0]['content']}\n\n{chat[1]['content']}"
        turn = [{"role": "user", "content": whole}]
        if one.tokenizer.chat_template is None:
            ids = one.tokenizer(whole + "\n")["input_ids"]
        else:
            text_of = one.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = one.tokenizer(str(text_of), add_special_tokens=False)["input_ids"]
        [[alone]] = generate(
            one.model, [torch.tensor(ids)], 1, Sampling(4, temperature=0.0), stop_ids=one._stops, seed=0
        )  # fmt: skip
        assert one.tokenizer.decode(list(alone.ids), skip_special_tokens=True) == text


def test_verdicts_go_through_the_grammar_and_into_the_cache(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = speak(
        monkeypatch, lambda user: "so [[NO]]" if "Rome" in user else "[[YES]] [[NO]]" if "Lut" in user else "[[YES]]"
    )
    assert ask(made(tmp_path), *CASES, CASES[2]) == [None, 1.0, 0.0, 0.0]
    assert len(read) == 3, "equal cases are asked once"
    again = made(tmp_path)
    assert ask(again) == [None, 1.0, 0.0]
    assert len(read) == 4, "what had no verdict is asked again, the rest is not"
    assert again.metrics()["judge/cache_hits"] == 2


def test_other_weights_are_another_judge(made: Made, tiny_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "judge"
    shutil.copytree(tiny_dir, copy)
    one = made(model_dir=str(copy))
    (copy / "model.safetensors").touch()
    other = made(model_dir=str(copy))
    assert one._name != other._name
    assert made()._name == made()._name


def test_a_prompt_past_the_window_is_no_verdict(made: Made) -> None:
    one = made(batch_tokens=400)
    long = Case("Which city? " * 300, ("Paris",), "Rome")
    assert ask(one, long, CASES[0]) == [None, None]
    assert one.metrics()["judge/failed/too_long_a_prompt"] >= 1
    with pytest.raises(ValueError, match="leaves no room"):
        made(max_tokens=2000, batch_tokens=2000)


def test_a_chat_template_is_used_where_there_is_one(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    one, chat = made(), judge_local.judge_prompt.messages(CASES[0])
    one.tokenizer.chat_template = None
    plain = one.tokenizer.decode(one._ids(chat))
    one.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"
        "<turn>{{ m.content }}</turn>{% endfor %}{% if add_generation_prompt %}<judge>{% endif %}"
    )
    chatted = one.tokenizer.decode(one._ids(chat))
    assert isinstance(plain, str) and isinstance(chatted, str)
    assert "<turn>" not in plain
    assert chatted.startswith("<turn>") and chatted.endswith("</turn><judge>")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing-here"):
        LocalJudge(JudgeConfig(model_dir=str(tmp_path / "nothing-here")), VerdictCache(None, print))


def test_it_judges_a_reward_group_by_group(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = speak(monkeypatch, lambda user: "[[YES]]" if "Lut" in user else "[[NO]]")
    config = JudgeConfig(model_dir=str(tiny_dir), device="cpu", dtype="float32", max_tokens=2, audit=0.0)
    reward = make_reward(RewardConfig(judge=config), {})
    example = Example("q", "b", ("Paris",), context="c", question="Which city?")
    texts = [f"the answer is {name}." for name in ("Paris", "Lutetia", "Rome")]
    scored = reward.score([example] * 3, ["p"] * 3, texts, [[1]] * 3, ["stop"] * 3)
    assert [(one.reward, one.parts["judge"]) for one in scored] == [(1.0, None), (1.0, 1.0), (0.0, 0.0)]
    assert len(read) == 2
