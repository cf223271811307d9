"""Needles that are sentences: for each task what is hidden, where, and what is asked about it.

Each task is `(random numbers, depth, length) -> Needles`. A single needle stands at the depth. Several are spread evenly
from there on and around the end to the beginning, so that the depth moves all of them; those of a chain keep the order in
which they are to be read. Distractors have the shape of the needle and stand anywhere; longer texts hold more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from ..synthetic.lexicon import CITIES, COMPANIES, PEOPLE
from .haystack import Hidden
from .needle_words import draw_words

_VALUES = 4
_CHAIN = 5
# One more distractor for so many tokens of text, up to as many as the names allow.
_TOKENS_EACH = 2048
_ADJECTIVES = tuple(
    "amber ancient blue brass bright broken calm copper crimson crooked distant dusty emerald empty frozen gentle golden "
    "green grey hidden hollow iron ivory lonely marble mossy narrow northern painted quiet red rusty sandy silent silver "
    "stone sunny velvet white wooden".split()
)
_NOUNS = tuple(
    "anchor balcony beehive cabin carriage cellar chapel chimney cliff cottage crane dovecote ferry fountain gate glacier "
    "hangar hut island kiln ladder lagoon lantern lighthouse locker meadow mill observatory pavilion pier quarry raft "
    "sawmill shed spring stable terrace vault windmill yard".split()
)


@dataclass(frozen=True)
class Needles:
    """asked: what the question is about, in the order of the values or of the chain. others: distractors.

    values: what the answer must name. complete: whether it must name all of them, or is the one value.
    """

    question: str
    values: tuple[str, ...]
    complete: bool
    asked: tuple[Hidden, ...]
    others: tuple[Hidden, ...] = ()


def _single(rng: Random, depth: float, length: int) -> Needles:
    return _one_code(rng, depth, 0)


def _multikey(rng: Random, depth: float, length: int) -> Needles:
    return _one_code(rng, depth, _distractors(length, 3, 200))


def _one_code(rng: Random, depth: float, others: int) -> Needles:
    keys, codes = _keys(rng, 1 + others), _codes(rng, 1 + others)
    question = f"What is the access code of the {keys[0]}?"
    return Needles(question, (codes[0],), False, (Hidden(_says(keys[0], codes[0]), depth),), _anywhere(rng, keys[1:], codes[1:]))  # fmt: skip


def _multivalue(rng: Random, depth: float, length: int) -> Needles:
    others = _distractors(length, 2, 50)
    keys, codes = _keys(rng, 1 + others), _codes(rng, _VALUES + others)
    asked = _spread([_says(keys[0], code) for code in codes[:_VALUES]], depth)
    question = f"The {keys[0]} has several access codes. What are all of them? List them, separated by commas."
    return Needles(question, tuple(codes[:_VALUES]), True, asked, _anywhere(rng, keys[1:], codes[_VALUES:]))


def _multiquery(rng: Random, depth: float, length: int) -> Needles:
    others = _distractors(length, 2, 50)
    keys, codes = _keys(rng, _VALUES + others), _codes(rng, _VALUES + others)
    asked = _spread([_says(key, code) for key, code in zip(keys[:_VALUES], codes, strict=False)], depth)
    named = ", ".join(f"the {key}" for key in keys[: _VALUES - 1]) + f" and the {keys[_VALUES - 1]}"
    question = f"What are the access codes of {named}? List the {_VALUES} codes, separated by commas."
    return Needles(question, tuple(codes[:_VALUES]), True, asked, _anywhere(rng, keys[_VALUES:], codes[_VALUES:]))


def _hop(rng: Random, depth: float, length: int) -> Needles:
    chains = 1 + _distractors(length, 1, 12, per=8 * _TOKENS_EACH)
    names = [word.upper() for word in draw_words(rng, chains * _CHAIN)]
    values = rng.sample(range(10_000, 100_000), chains)
    pieces: list[list[Hidden]] = []
    for chain, value in enumerate(values):
        own = names[chain * _CHAIN : (chain + 1) * _CHAIN]
        said = [f"Variable {own[0]} is set to {value}."]
        said += [f"Variable {name} takes over the value of variable {before}." for before, name in pairwise(own)]
        places = _turned(_CHAIN, depth) if chain == 0 else [rng.random() for _ in own]
        pieces.append([Hidden(text, at) for text, at in zip(said, sorted(places), strict=True)])
    question = f"Which variables have the value {values[0]} in the end? List all their names, separated by commas."
    others = tuple(piece for chain in pieces[1:] for piece in chain)
    return Needles(question, tuple(names[:_CHAIN]), True, tuple(pieces[0]), others)


def _qa(rng: Random, depth: float, length: int) -> Needles:
    chains = 1 + _distractors(length, 2, 15, per=2 * _TOKENS_EACH)
    people, companies, cities = (
        rng.sample(PEOPLE, 2 * chains),
        rng.sample(COMPANIES, chains),
        rng.sample(CITIES, chains),
    )
    facts = [
        (f"{people[k]} is employed by {companies[k]}.", f"{companies[k]} has its seat in {cities[k]}.",
         f"The mayor of {cities[k]} is {people[chains + k]}.")
        for k in range(chains)
    ]  # fmt: skip
    asked = _spread(rng.sample(facts[0], len(facts[0])), depth)
    others = tuple(Hidden(fact, rng.random()) for chain in facts[1:] for fact in chain)
    question = f"Who is the mayor of the city in which the employer of {people[0]} has its seat?"
    return Needles(question, (people[chains],), False, asked, others)


def _distractors(length: int, fewest: int, most: int, per: int = _TOKENS_EACH) -> int:
    return min(most, max(fewest, length // per))


def _keys(rng: Random, number: int) -> list[str]:
    drawn = rng.sample(range(len(_ADJECTIVES) * len(_NOUNS)), number)
    return [f"{_ADJECTIVES[key // len(_NOUNS)]} {_NOUNS[key % len(_NOUNS)]}" for key in drawn]


def _codes(rng: Random, number: int) -> list[str]:
    return [str(code) for code in rng.sample(range(1_000_000, 10_000_000), number)]


def _says(key: str, code: str) -> str:
    return f"The access code of the {key} is {code}."


def _anywhere(rng: Random, keys: list[str], codes: list[str]) -> tuple[Hidden, ...]:
    return tuple(Hidden(_says(key, code), rng.random()) for key, code in zip(keys, codes, strict=True))


def _turned(number: int, depth: float) -> list[float]:
    """Depths at equal distances from `depth` on, past the end from the beginning; the end itself stays the end."""
    return [at if at <= 1.0 else at - 1.0 for at in (depth + index / number for index in range(number))]


def _spread(texts: list[str] | tuple[str, ...], depth: float) -> tuple[Hidden, ...]:
    return tuple(Hidden(text, at) for text, at in zip(texts, _turned(len(texts), depth), strict=True))


SENTENCE_TASKS: dict[str, Callable[[Random, float, int], Needles]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "hop": _hop,
    "qa": _qa,
}
