"""Text of a given length in tokens, with sentences hidden at given depths.

A document is a list of pieces: filler, drawn from a supply, and what is hidden among it. Each distinct piece is tokenized
once, so that a length is met by adding up; the sum is then checked against the rendered prompt as the model reads it, and
corrected by a few pieces, since tokens merge over seams. So a document costs two or three passes of the tokenizer however
long it is, is never longer than asked, and shorter by less than one more piece.

The filler is ours: the words of `synthetic/lexicon.py` in sentences that state no figure of more than two digits, no code,
no variable, no employer, seat or mayor. A draw comes from a pool of `POOL` sentences, so long documents repeat some, far
apart; RULER's own haystacks repeat four sentences, or essays that are not ours to ship.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ..prompts import tokenize
from ..rows import Example
from ..synthetic.lexicon import CITIES, COMPANIES, COMPANY_FILLERS, FILLERS, PEOPLE

POOL = 3000
_PARAGRAPH = 9
_ROUNDS = 8
_THINGS = tuple(
    "bridge museum harbour library orchard factory station theatre garden market tower canal archive bakery school "
    "warehouse workshop road tunnel clinic".split()
)
_TIMES = tuple("spring summer autumn winter May June August October".split())
_TEMPLATES = tuple(
    sentence.strip()
    for sentence in """
    In {time}, {person} walked along the {thing} of {city} and met an old friend.
    {person} and {other} disagreed about the {thing}, and both were right in part.
    The {thing} in {city} is {count} years old and in need of repair.
    Nobody from {company} had been to {city} before {time}.
    {person} wrote a long letter about {city}, which was never sent.
    Between {city} and {town} the train stops {count} times.
    The {thing} near {city} was closed for {count} days in {time}.
    {company} lent its {thing} to the people of {city} for a concert.
    When {person} asked for the key of the {thing}, {other} only smiled.
    The newspapers of {city} had written about the {thing} for weeks.
    {person} remembers {city} by the smell of its {thing}.
    A photograph of the {thing} hangs in the office of {other}.
    The road from {city} to {town} was repaired in {time}.
    {company} and a partner from {city} planned a new {thing} that was never built.
    After {count} hours the meeting about the {thing} was over.
    {person} counted {count} lamps on the way to the {thing}.
    It is said that {other} once swam from the {thing} to the other bank.
    Visitors of {city} like the {thing} better than the new {second}.
    In {time} the {thing} and the {second} share one entrance.
    {person} prefers {town} to {city}, at least in {time}.
    """.strip().splitlines()
)


class Supply(Protocol):
    """Filler pieces, each with its leading space or line break."""

    def draw(self, room: int, count: Counts) -> str | None:
        """A piece of at most `room` tokens, None if there is none."""
        ...


class Counts:
    """Tokens of pieces of text, each distinct one tokenized once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def learn(self, pieces: Sequence[str]) -> None:
        """Count many pieces in one call of the tokenizer."""
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self._known]
        if new:
            encoded = self._tokenizer(new, add_special_tokens=False, return_attention_mask=False, verbose=False)
            self._known.update(zip(new, map(len, encoded["input_ids"]), strict=True))

    def __call__(self, piece: str) -> int:
        if piece not in self._known:
            self.learn([piece])
        return self._known[piece]


class Sentences:
    """The haystack's supply: a pool of sentences made once, drawn from by each document's own random numbers."""

    def __init__(self, seed: int, count: Counts) -> None:
        rng = Random(f"{seed}/sentences")
        texts = [*FILLERS, *(_sentence(rng) for _ in range(POOL))]
        self.pool = [f" {text}" for text in dict.fromkeys(texts)]
        count.learn([*self.pool, *(_opening(piece) for piece in self.pool)])
        self.by_length = sorted(self.pool, key=count)

    def drawn_by(self, rng: Random) -> Supply:
        return _Drawn(self, rng)


@dataclass
class _Drawn:
    sentences: Sentences
    rng: Random

    def draw(self, room: int, count: Counts) -> str | None:
        piece = self.rng.choice(self.sentences.pool)
        if self.rng.random() < 1 / _PARAGRAPH:
            piece = _opening(piece)
        if count(piece) <= room:
            return piece
        short = self.sentences.by_length
        fitting = bisect_right(short, room, key=count)
        return self.rng.choice(short[:fitting]) if fitting else None


def _opening(piece: str) -> str:
    return "\n\n" + piece[1:]


def _sentence(rng: Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(COMPANY_FILLERS).format(company=rng.choice(COMPANIES))
    people, cities, things = rng.sample(PEOPLE, 2), rng.sample(CITIES, 2), rng.sample(_THINGS, 2)
    return rng.choice(_TEMPLATES).format(
        person=people[0], other=people[1], city=cities[0], town=cities[1], thing=things[0], second=things[1],
        company=rng.choice(COMPANIES), time=rng.choice(_TIMES), count=rng.randint(3, 60),
    )  # fmt: skip


@dataclass(frozen=True)
class Hidden:
    """A piece to hide. depth: the share of the filler that stands before it, 0 to 1."""

    text: str
    depth: float


def place(filler: Sequence[str], hidden: Sequence[Hidden], count: Counts) -> tuple[str, list[float]]:
    """The document, and the share of its tokens that really stands before each hidden piece (in the order given)."""
    total = sum(map(count, filler))
    order = sorted(range(len(hidden)), key=lambda index: hidden[index].depth)
    pieces: list[str] = []
    starts: dict[int, int] = {}
    before = passed = 0
    waiting = 0
    for piece in [*filler, None]:
        while waiting < len(order) and (piece is None or passed >= hidden[order[waiting]].depth * total):
            text = hidden[order[waiting]].text
            starts[order[waiting]] = before
            pieces.append(text)
            before += count(text)
            waiting += 1
        if piece is not None:
            pieces.append(piece)
            passed += count(piece)
            before += count(piece)
    return "".join(pieces).strip(), [starts[index] / before for index in range(len(hidden))]


class Fitter:
    """Fills documents up to a length. It remembers by how much the sum of the pieces was off, for the next document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, count: Counts) -> None:
        self._tokenizer, self._count = tokenizer, count
        self._drift = 0.0

    def fill(self, build: Callable[[Sequence[str]], Example], supply: Supply, length: int) -> tuple[Example, int]:
        """(the example, the tokens of its rendered prompt), at most `length`.

        build: the example out of filler pieces. Raises ValueError when it is too long without any.
        """
        frame = self._tokens(build([]))
        if frame > length:
            raise ValueError(
                f"{build([]).id}: takes {frame} tokens without any text around it, more than the {length} asked for: ask for a longer test"
            )
        filler: list[str] = []
        self._add(filler, supply, int((length - frame) / (1 + self._drift)))
        summed = sum(map(self._count, filler))
        for turn in range(_ROUNDS):
            example = build(filler)
            tokens = self._tokens(example)
            if turn == 0 and summed:
                self._drift = (tokens - frame - summed) / summed
            if tokens > length:
                self._remove(filler, tokens - length)
            elif turn == _ROUNDS - 1 or not self._add(filler, supply, length - tokens - turn // 2):
                return example, tokens
        while (tokens := self._tokens(example := build(filler))) > length:
            self._remove(filler, tokens - length)
        return example, tokens

    def _tokens(self, example: Example) -> int:
        return len(tokenize([example], self._tokenizer)[0].ids)

    def _add(self, filler: list[str], supply: Supply, room: int) -> bool:
        before = len(filler)
        while room > 0 and (piece := supply.draw(room, self._count)) is not None:
            filler.append(piece)
            room -= self._count(piece)
        return len(filler) > before

    def _remove(self, filler: list[str], excess: int) -> None:
        assert filler, "nothing is left to remove"
        while excess > 0 and filler:
            excess -= self._count(filler.pop())
