"""Questions about a synthetic report, with exact answers, worked responses and the chance level.

The response restates facts in the very words of the document and then concludes, so that a model that can copy from its
context can be taught to answer by a few examples. What is asked is drawn independently of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from random import Random

from .lexicon import RELATIONS
from .report import Facts, figure_sentence, link_phrase


@dataclass(frozen=True)
class Question:
    """chance: probability of hitting the answer by picking among the candidates that the document offers.

    lookup, two_hop: the distinct values of the metric asked for. compare: the two companies named. sum, difference: the
    distinct sums or differences over all pairs of companies of the document.
    """

    kind: str
    text: str
    answer: str
    answer_type: str
    response: str
    chance: float


def _conclude(facts: list[str], answer: str | int) -> str:
    return " ".join([*facts, f"Therefore, the answer is {answer}."])


def _lookup(facts: Facts, rng: Random) -> Question:
    metric, company = rng.choice(facts.metrics), rng.choice(facts.companies)
    value = facts.figures[metric, company]
    response = _conclude([figure_sentence(metric, company, value)], value)
    chance = 1 / len(_values(facts, metric))
    return Question("lookup", f"What was the {metric} of {company}?", str(value), "number", response, chance)


def _two_hop(facts: Facts, rng: Random) -> Question:
    metric, company = rng.choice(facts.metrics), rng.choice(facts.companies)
    relation, linked = rng.choice([key for key, owner in facts.links.items() if owner == company])
    title, role, _ = RELATIONS[relation]
    value = facts.figures[metric, company]
    text = f"What was the {metric} of the company whose {role} is {title} {linked}?"
    steps = [f"{link_phrase(relation, linked)} {company}.", figure_sentence(metric, company, value)]
    chance = 1 / len(_values(facts, metric))
    return Question("two_hop", text, str(value), "number", _conclude(steps, value), chance)


def _compare(facts: Facts, rng: Random) -> Question:
    metric, pair, values = _pair(facts, rng)
    winner = pair[0] if values[0] > values[1] else pair[1]
    text = f"Which company had the higher {metric}, {pair[0]} or {pair[1]}?"
    return Question("compare", text, winner, "span", _conclude(_restate(metric, pair, values), winner), 1 / 2)


def _sum(facts: Facts, rng: Random) -> Question:
    metric, pair, values = _pair(facts, rng)
    text = f"What was the sum of the {metric} of {pair[0]} and the {metric} of {pair[1]}?"
    answer = sum(values)
    chance = 1 / len({a + b for a, b in combinations(_values(facts, metric), 2)})
    return Question("sum", text, str(answer), "number", _conclude(_restate(metric, pair, values), answer), chance)


def _difference(facts: Facts, rng: Random) -> Question:
    metric, pair, values = _pair(facts, rng)
    text = f"What was the difference between the {metric} of {pair[0]} and the {metric} of {pair[1]}?"
    answer = abs(values[0] - values[1])
    chance = 1 / len({abs(a - b) for a, b in combinations(_values(facts, metric), 2)})
    return Question(
        "difference", text, str(answer), "number", _conclude(_restate(metric, pair, values), answer), chance
    )


def _values(facts: Facts, metric: str) -> list[int]:
    return sorted({facts.figures[metric, company] for company in facts.companies})


def _pair(facts: Facts, rng: Random) -> tuple[str, list[str], list[int]]:
    metric, pair = rng.choice(facts.metrics), rng.sample(facts.companies, 2)
    return metric, pair, [facts.figures[metric, company] for company in pair]


def _restate(metric: str, pair: list[str], values: list[int]) -> list[str]:
    return [figure_sentence(metric, company, value) for company, value in zip(pair, values, strict=True)]


KINDS: dict[str, Callable[[Facts, Random], Question]] = {
    "lookup": _lookup,
    "two_hop": _two_hop,
    "compare": _compare,
    "sum": _sum,
    "difference": _difference,
}


def ask(facts: Facts, kind: str, rng: Random) -> Question:
    """A question of the given kind (a key of KINDS)."""
    return KINDS[kind](facts, rng)
