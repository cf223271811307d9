"""Needle tests after RULER (arXiv 2404.06654), made here at any length: what is asked, what is hidden, and how it is scored.

    single      one code among text                           multikey    one code among codes of other keys
    multivalue  all four codes of one key                     multiquery  the codes of four keys
    hop         all variables of a chain of assignments       qa          person -> employer -> its seat -> the mayor there
    common      the ten most common words of a list           frequent    the three most frequent words of a coded text

A benchmark's name is `needles-LENGTH` (all tasks in turn) or `needles-TASK-LENGTH`; LENGTH counts tokens of the rendered
prompt: 32k is RULER's 32,768, 1m is 1,048,576, and a bare number is itself. The same seed gives the same questions, and
the first N of them are the same whatever N is. Depths of successive questions halve the document ever finer (0, 1, 1/2,
1/4, 3/4, ..), so that any number of them is spread evenly. Differences from RULER: our own texts and prompt (the published
template of QwenLong-L1), distractors of the needle's own shape (more of them in longer texts), words instead of a numbered
list, and `qa` over invented facts.

Scores: the rule reward takes a list for right only when it is complete, in any order, with nothing else in it.
RULER's own score is the share of the values that the answer names; `share_found` gives it beside the rule's.

Columns of each example: task, length (asked for), tokens (of the rendered prompt), depth (mean of what is asked about;
none where the words are everywhere), depths (of each piece, in the order of `values` or of the chain), values, seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from transformers import PreTrainedTokenizerBase

from ..answers import extract
from ..config import nearest
from ..rows import Example
from .haystack import Counts, Fitter, Hidden, Sentences, Supply, place
from .needle_tasks import SENTENCE_TASKS, Needles
from .needle_words import WORD_TASKS, Words

TASKS = (*SENTENCE_TASKS, *WORD_TASKS)
PER_TASK = 10
SHORTEST = 256
_NAME = re.compile(r"needles(?:-(?P<task>[a-z]+))?-(?P<number>\d{1,9})(?P<unit>[km]?)", re.IGNORECASE)


@dataclass(frozen=True)
class NeedleTest:
    """What a name asks for. length: tokens of the rendered prompt, at most."""

    name: str
    tasks: tuple[str, ...]
    length: int

    @property
    def title(self) -> str:
        return " ".join(["Needles", *self.name.split("-")[1:-1], self.name.rpartition("-")[2].upper()])


def needle_test(name: str) -> NeedleTest:
    """The test of a name. Raises ValueError for a name of another form, an unknown task, or no room."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no needle test; its form is needles-32k or needles-TASK-32k, TASK one of {', '.join(TASKS)}")  # fmt: skip
    task = match["task"]
    if task is not None and task.lower() not in TASKS:
        raise ValueError(f"needle task {task!r} is unknown; {nearest(task.lower(), TASKS)}")
    length = int(match["number"]) * {"": 1, "k": 1024, "m": 1024**2}[match["unit"].lower()]
    if length < SHORTEST:
        raise ValueError(f"{name}: {length} tokens leave no room for text; ask for at least {SHORTEST}")
    return NeedleTest(name, (task.lower(),) if task else TASKS, length)


def make_needles(
    test: NeedleTest, tokenizer: PreTrainedTokenizerBase, *, questions: int | None = None, seed: int = 0
) -> Iterator[Example]:
    """The questions of a test, tasks in turn; `PER_TASK` of each task unless a number in all is given.

    Raises ValueError when a task's own text doesn't fit into the length.
    """
    count = Counts(tokenizer)
    sentences = Sentences(seed, count)
    fitters = {task: Fitter(tokenizer, count) for task in test.tasks}
    for number in range(questions if questions is not None else PER_TASK * len(test.tasks)):
        index, turn = divmod(number, len(test.tasks))
        task = test.tasks[turn]
        key = f"{seed}/{task}/{test.length}/{index}"
        if task in SENTENCE_TASKS:
            needles = SENTENCE_TASKS[task](Random(key), halving(index), test.length)
            build = partial(_with_sentences, needles, count)
            supply: Supply = sentences.drawn_by(Random(f"{key}/filler"))
        else:
            words = WORD_TASKS[task](Random(key), test.length, count)
            build, supply = partial(_with_words, words, key), words.supply
        label = {"id": f"{test.name}-{task}-{seed}-{index}", "benchmark": test.name}
        example, tokens = fitters[task].fill(_labelled(build, label), supply, test.length)
        columns = {"task": task, "length": test.length, "tokens": tokens, "seed": seed, **example.columns}
        yield replace(example, columns=columns)


def halving(index: int) -> float:
    """0, 1, 1/2, 1/4, 3/4, 1/8, 5/8, ..: the ends, then van der Corput's sequence."""
    if index < 2:
        return float(index)
    bits = index - 1
    value, weight = 0.0, 0.5
    while bits:
        value += weight * (bits & 1)
        bits, weight = bits >> 1, weight / 2
    return value


def share_found(example: Example, completion: str) -> float:
    """RULER's score: the share of the values that the final answer names, each as a word of its own; 0 without an answer."""
    found = extract(completion)
    if found.answer is None or found.reason is not None:
        return 0.0
    text = (found.block or found.printed).casefold()
    values: list[str] = example.columns["values"]
    named = [re.search(rf"(?<!\w){re.escape(value.casefold())}(?!\w)", text) is not None for value in values]
    return sum(named) / len(named)


def _labelled(build: Callable[[Sequence[str]], Example], label: dict[str, str]) -> Callable[[Sequence[str]], Example]:
    return lambda filler: replace(build(filler), **label)


def _with_sentences(needles: Needles, count: Counts, filler: Sequence[str]) -> Example:
    hidden = [*needles.asked, *needles.others]
    document, depths = place(filler, [Hidden(f" {piece.text}", piece.depth) for piece in hidden], count)
    own = [round(depth, 4) for depth in depths[: len(needles.asked)]]
    columns = {"depth": round(sum(own) / len(own), 4), "depths": own, "values": list(needles.values)}
    return _example(document, needles.question, needles.values, needles.complete, columns)


def _with_words(words: Words, key: str, filler: Sequence[str]) -> Example:
    stream = [*words.fixed, *filler]
    Random(f"{key}/order").shuffle(stream)
    return _example("".join(stream).strip(), words.question, words.values, True, {"values": list(words.values)})


def _example(
    document: str, question: str, values: tuple[str, ...], complete: bool, columns: dict[str, object]
) -> Example:
    answer, answer_type = (", ".join(values), "list") if complete else (values[0], "span")
    return Example("", "", (answer,), answer_type, context=document, question=question, columns=columns)
