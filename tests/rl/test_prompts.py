"""Rendering and tokenising prompts, with a byte-level tokenizer trained here."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longreach.rl.data import Example, read_examples
from longreach.rl.prompts import TEMPLATE, question_of, render, tokenize
from longreach.rl.rules import rule_reward

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(chat: bool, bos: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEMPLATE, "revenue of the year was higher than that of the year before"] * 3, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


@pytest.fixture(scope="module")
def bare() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=False)


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=True, bos=True)


def plain(context: str = "  The document.\n", question: str = " Why? ", **more: Any) -> Example:
    return Example("p", "b", ("x",), context=context, question=question, **more)


PUBLISHED = (
    "Please read the following text and answer the question below.\n\n<text>\nThe document.\n</text>\n\nWhy?\n\n"
    'Format your response as follows: "Therefore, the answer is (insert answer here)".'
)


def test_options_are_asked_for_in_the_words_of_the_published_rules(bare: PreTrainedTokenizerFast) -> None:
    example = plain(choices=("x", "y"))
    asked = PUBLISHED.replace("Therefore, the answer is", "The correct answer is")
    assert render(example, bare) == asked
    assert question_of(Example("p", "b", ("x",), text=asked)) == "Why?"
    for scoring in ("strict", "qwenlong-l1", "qwenlong-l1-eval", "longbench"):
        said = "</think>Clear. The correct answer is (B)."
        assert rule_reward(said, ("B",), answer_type="choice", choices=("x", "y"), scoring=scoring).score == 1.0


def test_plain_row_is_the_published_template(bare: Any, chatty: Any) -> None:
    assert render(plain(), bare) == PUBLISHED
    assert render(plain(), chatty) == f"<|im_start|>user\n{PUBLISHED}<|im_end|>\n<|im_start|>assistant\n"
    assert TEMPLATE.replace("$DOC$", "The document.").replace("$Q$", "Why?") == PUBLISHED


def test_document_is_not_read_as_a_template(bare: Any) -> None:
    assert "$Q$ {question} {{ x }}" in render(plain("$Q$ {question} {{ x }}"), bare)


def test_ready_prompts(bare: Any, chatty: Any) -> None:
    string = Example("s", "b", ("x",), text="  as it is ")
    assert render(string, chatty) == "  as it is "
    one = Example("m", "b", ("x",), messages=({"role": "user", "content": "Hi"},))
    assert render(one, bare) == "Hi"
    two = Example("m2", "b", ("x",), messages=({"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}))
    assert render(two, chatty).startswith("<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi")
    with pytest.raises(ValueError, match=r"m2: 2 messages.*chat_template"):
        render(two, bare)


def test_special_tokens_are_added_once(chatty: Any) -> None:
    bos = chatty.convert_tokens_to_ids("<|bos|>")
    string = Example("s", "b", ("x",), text="hello")
    prompts = tokenize([plain(), string, plain()], chatty)
    assert [prompt.ids.count(bos) for prompt in prompts] == [0, 1, 0]
    assert prompts[0].ids[0] == chatty.convert_tokens_to_ids("<|im_start|>")
    assert chatty.decode(prompts[0].ids) == render(plain(), chatty)


def test_question_of_every_form() -> None:
    assert question_of(plain()) == "Why?"
    content = PUBLISHED.replace("The document.", "A </text> inside. Format your response as follows: no.")
    assert question_of(Example("m", "b", ("x",), messages=({"role": "user", "content": content},))) == "Why?"
    assert question_of(Example("s", "b", ("x",), text=content)) == "Why?"
    assert question_of(Example("s", "b", ("x",), text="What is it?")) == "What is it?"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("excess", [1, 2, 51, 180])
def test_middle_truncation_keeps_template_question_and_both_ends(chat: bool, excess: int) -> None:
    tokenizer = make_tokenizer(chat)
    example = plain("START " + " ".join(str(number) for number in range(100)) + " END.", "Why now?")
    (whole,) = tokenize([example], tokenizer)
    limit = len(whole.ids) - excess
    (cut,) = tokenize([example], tokenizer, max_length=limit, truncate="middle")
    assert len(cut.ids) == limit
    assert cut.truncated_from == len(whole.ids)
    text = str(tokenizer.decode(list(cut.ids)))
    before, after = render(example, tokenizer).split("START")[0], render(example, tokenizer).split("END.")[1]
    assert text.startswith(before + "START")
    assert text.endswith("END." + after)
    head = next(i for i, (left, right) in enumerate(zip(cut.ids, whole.ids, strict=False)) if left != right)
    assert cut.ids == whole.ids[:head] + whole.ids[head + excess :]


def test_the_middle_of_the_document_is_what_goes(bare: Any) -> None:
    document = "".join(chr(0x4E00 + number) for number in range(100))  # 3 tokens each, none shared
    example = plain(document)
    whole = len(tokenize([example], bare)[0].ids)
    (cut,) = tokenize([example], bare, max_length=whole - 90, truncate="middle")
    kept = bare.decode(list(cut.ids)).split("<text>\n")[1].split("\n</text>")[0]
    assert kept == document[:35] + document[65:]


def test_truncation_with_a_tokenizer_that_drops_white_space() -> None:
    words = {
        word: number for number, word in enumerate(["[UNK]", "<", "text", ">", "</", "one", "two", "three", "Why"])
    }
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    example = plain("one " + "two " * 50 + "three", "Why")
    whole = len(tokenize([example], tokenizer)[0].ids)
    (cut,) = tokenize([example], tokenizer, max_length=whole - 48, truncate="middle")
    start = cut.ids.index(words["one"])
    assert cut.ids[start : start + 5] == tuple(words[word] for word in ("one", "two", "two", "three", "</"))
    with pytest.raises(ValueError, match="leaves 1 of the 52"):
        tokenize([example], tokenizer, max_length=whole - 51, truncate="middle")


def test_ready_prompt_is_cut_in_its_own_middle(bare: Any) -> None:
    example = Example("s", "b", ("x",), text="".join(chr(0x4E00 + number) for number in range(100)))
    (whole,) = tokenize([example], bare)
    (cut,) = tokenize([example], bare, max_length=101, truncate="middle")
    assert cut.ids == whole.ids[:51] + whole.ids[-50:]
    assert cut.truncated_from == len(whole.ids)


def test_limits_are_inclusive_and_never_silent(bare: Any) -> None:
    examples = [plain("word " * count) for count in (5, 50, 500)]
    lengths = [len(prompt.ids) for prompt in tokenize(examples, bare)]
    exact = tokenize(examples[:2], bare, max_length=lengths[1], truncate="middle")
    assert [prompt.truncated_from for prompt in exact] == [None, None]
    kept = tokenize(examples, bare, max_length=10, truncate="keep")
    assert [len(prompt.ids) for prompt in kept] == lengths
    with pytest.raises(ValueError, match=rf"2 prompts.*p \({lengths[1]}\), p \({lengths[2]}\)"):
        tokenize(examples, bare, max_length=lengths[1] - 1)
    with pytest.raises(ValueError, match="raise it to at least"):
        tokenize(examples, bare, max_length=20, truncate="middle")
    with pytest.raises(ValueError, match="'left'"):
        tokenize(examples, bare, truncate="left")


def test_a_template_that_rewrites_the_document_is_refused_for_truncation() -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="rewrites"):
        tokenize([plain("word " * 200)], tokenizer, max_length=150, truncate="middle")


def test_long_documents_take_linear_time_and_no_warning(bare: Any, caplog: pytest.LogCaptureFixture) -> None:
    def seconds(characters: int) -> float:
        start = time.process_time()
        (prompt,) = tokenize([plain("revenue was 12 " * (characters // 15))], bare, max_length=1000, truncate="middle")
        assert len(prompt.ids) == 1000
        return time.process_time() - start

    with caplog.at_level(logging.WARNING):
        seconds(50_000)
        small, large = min(seconds(100_000) for _ in range(3)), seconds(1_000_000)
    assert large < 30 * small + 0.5  # ten times as long; a quadratic step would give a hundred
    assert not caplog.records


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real documents are not here")
def test_real_documents(chatty: Any) -> None:
    for path in sorted(SHARED.glob("*.jsonl")):
        examples = read_examples(path, limit=1).examples
        for prompt in tokenize(examples, chatty, max_length=2000, truncate="middle"):
            assert len(prompt.ids) <= 2000
            assert (prompt.truncated_from is None) == (chatty.decode(prompt.ids) == render(prompt.example, chatty))
