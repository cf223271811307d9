"""Needle tests: exact lengths, controlled depths, answers that the text alone gives, and what the rules say of them.

What a document says is found by an independent reader: regular expressions that share nothing with the generator.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longreach.rl.benchmarks.needles import TASKS, halving, make_needles, needle_test, share_found
from longreach.rl.benchmarks.registry import read_benchmark
from longreach.rl.prompts import tokenize
from longreach.rl.rows import Example
from longreach.rl.rules import rule_reward
from longreach.rl.synthetic.lexicon import CITIES, COMPANIES, PEOPLE

LENGTHS = ("4k", "5000", "16k")


@pytest.fixture(scope="module")
def examples(chatty: PreTrainedTokenizerFast) -> list[Example]:
    return [
        example
        for length in LENGTHS
        for example in make_needles(needle_test(f"needles-{length}"), chatty, questions=3 * len(TASKS))
    ]


def of(examples: list[Example], *tasks: str) -> Iterator[Example]:
    found = [example for example in examples if example.columns["task"] in tasks]
    assert len(found) == len(tasks) * 3 * len(LENGTHS)
    return iter(found)


def codes(example: Example) -> dict[str, list[str]]:
    """Key -> codes, in the order of the text."""
    found: dict[str, list[str]] = {}
    for key, code in re.findall(r"The access code of the (\w+ \w+) is (\d+)\.", example.context or ""):
        found.setdefault(key, []).append(code)
    return found


def solve(example: Example) -> set[str]:
    """The answer as a reader of document and question finds it."""
    context, question = example.context or "", example.question or ""
    task = example.columns["task"]
    if task in ("single", "multikey", "multivalue", "multiquery"):
        asked = re.findall(r"[tT]he (\w+ \w+)(?= has|\?|,| and the)", question.replace("access codes of", ""))
        asked += re.findall(r"access code of the (\w+ \w+)\?", question)
        return {code for key in asked for code in codes(example).get(key, [])}
    if task == "hop":
        (value,) = re.findall(r"value (\d+)", question)
        held: dict[str, str] = {}
        for name, number, before in re.findall(
            r"Variable (\w+) (?:is set to (\d+)|takes over the value of variable (\w+))\.", context
        ):
            held[name] = number or held[before]
        return {name for name, number in held.items() if number == value}
    if task == "qa":
        person = re.findall(r"employer of (\w+) ", question)[0]
        employer = re.findall(rf"\b{person} is employed by (\w+)\.", context)
        seat = re.findall(rf"\b{employer[0]} has its seat in (\w+)\.", context)
        mayor = re.findall(rf"The mayor of {seat[0]} is (\w+)\.", context)
        assert len(employer) == len(seat) == len(mayor) == 1
        return set(mayor)
    top = 10 if task == "common" else 3
    ranked = Counter(context.split()).most_common(top + 1)
    assert ranked[top - 1][1] > ranked[top][1], "the asked words must stand out"
    return {word for word, _ in ranked[:top]}


def test_lengths_are_met_and_never_passed(examples: list[Example], chatty: PreTrainedTokenizerFast) -> None:
    for example in examples:
        tokens = len(tokenize([example], chatty)[0].ids)
        length = example.columns["length"]
        assert tokens == example.columns["tokens"] <= length
        # The shortest sentence of the filler has about a dozen tokens here, a word of the lists up to seven.
        assert length - tokens < 16, (example.id, length - tokens)


def test_the_text_gives_the_answer(examples: list[Example]) -> None:
    for example in examples:
        assert solve(example) == set(example.columns["values"]), example.id


def test_the_gold_passes_the_strict_rule_and_others_do_not(examples: list[Example]) -> None:
    for example in examples:
        values, kind = example.columns["values"], example.answer_type

        def score(*said: str, of: Example = example) -> float:
            text = f"I have read it. Therefore, the answer is ({', '.join(said)})."
            return rule_reward(text, of.answers, answer_type=of.answer_type).score

        assert score(*values) == score(*values[::-1]) == 1.0
        wrong = distractor(example)
        assert score(*values[:-1], wrong) == 0.0
        if kind == "list":
            assert score(*values[:-1]) == score(*values, wrong) == 0.0


def distractor(example: Example) -> str:
    """Something of the needle's own shape that the text holds, or could hold, and that is not asked for."""
    values = set(example.columns["values"])
    task, context = example.columns["task"], example.context or ""
    if task == "single":
        return "1234567"
    if task in ("multikey", "multivalue", "multiquery"):
        return next(code for found in codes(example).values() for code in found if code not in values)
    if task == "hop":
        return next(name for name in re.findall(r"Variable (\w+) ", context) if name not in values)
    if task == "qa":
        return next(name for name in re.findall(r"mayor of \w+ is (\w+)", context) if name not in values)
    return next(word for word in context.split() if word not in values)


def test_ruler_scores_the_share_of_values(examples: list[Example]) -> None:
    for example in of(examples, "multivalue", "multiquery", "hop", "common", "frequent"):
        values = example.columns["values"]
        assert share_found(example, f"The answer is {', '.join(values)}.") == 1.0
        assert share_found(example, f"The answer is {', '.join(values[:2])}.") == 2 / len(values)
        assert share_found(example, "The answer is:\n- " + "\n- ".join(values)) == 1.0
        # Only what is announced counts, and only whole words of it.
        assert share_found(example, ", ".join(values)) == 0.0
        assert share_found(example, f"The answer is {values[0]}9 or x{values[1]}.") == 0.0
        assert share_found(example, f"<think>The answer is {values[0]}.") == 0.0


def test_distractors_grow_with_the_text(examples: list[Example]) -> None:
    assert all(len(codes(example)) == 1 for example in of(examples, "single"))
    number = {example.columns["length"]: len(codes(example)) for example in of(examples, "multikey")}
    assert number[4096] == 4 and number[16384] == 9
    for example in of(examples, "multivalue", "multiquery"):
        assert len(codes(example)) > len({key for key, found in codes(example).items() if set(found) & set(example.columns["values"])})  # fmt: skip
    for example in of(examples, "hop", "qa"):
        assert len(re.findall(r"is set to|The mayor of", example.context or "")) >= 2


def test_no_filler_says_what_is_asked(examples: list[Example]) -> None:
    """Nothing but needles holds a number of more than two digits, a code, a variable, an employer, a seat, a mayor."""
    for example in of(examples, "single", "multikey", "multivalue", "multiquery", "hop", "qa"):
        text = re.sub(r"The access code of the \w+ \w+ is \d+\.|Variable \w+ (?:is set to \d+|takes over the value of variable \w+)\.", "", example.context or "")  # fmt: skip
        text = re.sub(r"\w+ is employed by \w+\.|\w+ has its seat in \w+\.|The mayor of \w+ is \w+\.", "", text)
        assert re.search(r"\d{3}|\bcode\b|\bVariable\b|\bemploye[dr]\b|\bseat\b|\bmayor\b", text) is None


def test_depths_are_controlled_and_recorded(bare: PreTrainedTokenizerFast) -> None:
    wanted = [0.0, 1.0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    assert [halving(index) for index in range(9)] == wanted
    made = list(make_needles(needle_test("needles-single-4k"), bare, questions=9))
    for example, depth in zip(made, wanted, strict=True):
        context = example.context or ""
        start = context.index("The access code")
        before = len(bare.encode(context[:start], add_special_tokens=False))
        real = before / len(bare.encode(context, add_special_tokens=False))
        assert abs(example.columns["depth"] - real) < 0.002
        assert abs(real - depth) < 0.012, "a sentence of text, or the needle itself, off"
    for example in make_needles(needle_test("needles-multivalue-8k"), bare, questions=4):
        places = [(example.context or "").index(value) for value in example.columns["values"]]
        order = sorted(range(4), key=places.__getitem__)
        assert order == sorted(range(4), key=example.columns["depths"].__getitem__)
        assert max(example.columns["depths"]) - min(example.columns["depths"]) > 0.7
    for example in make_needles(needle_test("needles-hop-8k"), bare, questions=3):
        assert example.columns["depths"] == sorted(example.columns["depths"])
    (words,) = make_needles(needle_test("needles-common-8k"), bare, questions=1)
    assert "depth" not in words.columns


def test_the_seed_decides_and_the_number_of_questions_does_not(bare: PreTrainedTokenizerFast) -> None:
    few = read_benchmark("needles-2k", limit=len(TASKS), tokenizer=bare).examples
    many = read_benchmark("needles-2k", limit=2 * len(TASKS), tokenizer=bare).examples
    other = read_benchmark("needles-2k", limit=len(TASKS), tokenizer=bare, seed=1).examples
    assert many[: len(TASKS)] == few
    assert len({example.id for example in [*many, *other]}) == 3 * len(TASKS)
    assert all(mine.answers != theirs.answers for mine, theirs in zip(few, other, strict=True))
    assert len(read_benchmark("needles-single-300", tokenizer=bare).examples) == 10
    assert {example.benchmark for example in many} == {"needles-2k"}
    # Another tokenizer changes how much text there is, and not what is asked.
    demo = AutoTokenizer.from_pretrained(f"{__file__.partition('tests')[0]}rl/assets/demo-base")
    again = read_benchmark("needles-2k", limit=6, tokenizer=demo).examples
    assert [example.question for example in again] == [example.question for example in few[:6]]
    assert all(2048 - 32 < example.columns["tokens"] <= 2048 for example in again)


def test_names(bare: PreTrainedTokenizerFast) -> None:
    test = needle_test("needles-hop-128k")
    assert (test.tasks, test.length, test.title) == (("hop",), 131072, "Needles hop 128K")
    assert (needle_test("needles-1m").length, needle_test("needles-120000").length) == (1048576, 120000)
    assert needle_test("needles-32K").tasks == TASKS
    for name, reason in (
        ("needles", "its form is needles-32k"), ("needles-32g", "its form is"), ("needles-hops-32k", "did you mean 'hop'"),
        ("needles-0k", "at least 256"), ("needles-single-255", "at least 256"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            needle_test(name)
    with pytest.raises(ValueError, match="ten words 6 times fill more than half of 300 tokens; ask for at least"):
        list(make_needles(needle_test("needles-common-300"), bare, questions=1))
    with pytest.raises(
        ValueError,
        match=r"needles-frequent-300-frequent-0-0: takes \d+ tokens without any text around it, .*ask for a longer test",
    ):
        list(make_needles(needle_test("needles-frequent-300"), bare, questions=1))


def test_long_texts_take_seconds(bare: PreTrainedTokenizerFast) -> None:
    """Time grows with length, not with its square: eight times the text in less than 24 times the time."""
    seconds = []
    for name in ("needles-qa-16k", "needles-qa-128k"):
        start = time.process_time()
        made = list(make_needles(needle_test(name), bare, questions=2))
        seconds.append(time.process_time() - start)
        assert all(example.columns["length"] - example.columns["tokens"] < 16 for example in made)
    assert seconds[1] < 30
    assert seconds[1] < 24 * (seconds[0] + 0.05)


def test_names_of_the_lexicon_stay_apart() -> None:
    """`qa` asks for a person: no name may be that of a company or a city too."""
    assert not {*PEOPLE} & {*COMPANIES} and not {*PEOPLE} & {*CITIES} and not {*COMPANIES} & {*CITIES}
