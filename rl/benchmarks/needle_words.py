"""Needles that are words: the document is a list of invented words, and the question is which occur most often.

`common`, as in RULER: ten words occur `_COMMON` times each, all others `_RARE` times. Where ten words so often would fill
more than half of the document, they occur less often. `frequent`: words follow a zeta distribution with exponent 2, so
that the first three stand out by a factor; each block of `_BLOCK` words has exactly these proportions, and so has each of
its beginnings but for rounding. A document is one block at least, and the order of all words is drawn at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from .haystack import Counts, Supply

_TEN, _COMMON, _RARE = 10, 30, 3
_THREE, _VOCABULARY, _BLOCK, _EXPONENT = 3, 60, 120, 2.0
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = len(_CONSONANTS) * len(_VOWELS)


@dataclass(frozen=True)
class Words:
    """fixed: pieces that are in the document however long it is. values: the words asked for."""

    question: str
    values: tuple[str, ...]
    fixed: tuple[str, ...]
    supply: Supply


def draw_words(rng: Random, number: int, syllables: int = 3) -> list[str]:
    """Different invented words: syllables of a consonant and a vowel."""
    drawn = rng.sample(range(_SYLLABLES**syllables), number)
    return ["".join(_syllable(code // _SYLLABLES**place % _SYLLABLES) for place in range(syllables)) for code in drawn]


def _syllable(code: int) -> str:
    return _CONSONANTS[code // len(_VOWELS)] + _VOWELS[code % len(_VOWELS)]


@dataclass
class _Stream:
    """Words in the order of a function that makes the next ones; none is skipped, so that proportions hold."""

    more: Callable[[], list[str]]
    waiting: list[str] = field(default_factory=list)

    def draw(self, room: int, count: Counts) -> str | None:
        if not self.waiting:
            self.waiting = self.more()[::-1]
            count.learn(self.waiting)
        return self.waiting.pop() if count(self.waiting[-1]) <= room else None


def _common(rng: Random, length: int, count: Counts) -> Words:
    """The rare words are drawn as the document needs them: at 1M tokens there are tens of thousands."""
    values = draw_words(rng, _TEN)
    pieces = [f" {word}" for word in values]
    count.learn(pieces)
    often = min(_COMMON, length // 2 // sum(map(count, pieces)))
    if often < 2 * _RARE:
        raise ValueError(
            f"needles-common: ten words {2 * _RARE} times fill more than half of {length} tokens; ask for at least "
            f"{4 * _RARE * sum(map(count, pieces))}"
        )
    used = set(values)

    def more() -> list[str]:
        fresh = [word for word in draw_words(rng, 500) if word not in used]
        used.update(fresh)
        return [f" {word}" for word in fresh for _ in range(_RARE)]

    question = "Which ten words occur most often in the text? List the ten words, separated by commas."
    return Words(question, tuple(values), tuple(pieces * often), _Stream(more))


def _frequent(rng: Random, length: int, count: Counts) -> Words:
    words = draw_words(rng, _VOCABULARY)
    weights = [1 / rank**_EXPONENT for rank in range(1, len(words) + 1)]
    exact = [weight / sum(weights) * _BLOCK for weight in weights]
    times = [int(share) for share in exact]
    rest = sorted(range(len(words)), key=lambda index: times[index] - exact[index])
    for index in rest[: _BLOCK - sum(times)]:
        times[index] += 1
    turns = [((turn + 0.5) / number, word) for word, number in zip(words, times, strict=True) for turn in range(number)]
    block = [f" {word}" for _, word in sorted(turns, key=lambda turn: turn[0])]
    question = "Which three words occur most often in the text? List the three words, separated by commas."
    return Words(question, tuple(words[:_THREE]), tuple(block), _Stream(lambda: block))


WORD_TASKS: dict[str, Callable[[Random, int, Counts], Words]] = {"common": _common, "frequent": _frequent}
