"""One synthetic annual report: its facts, drawn afresh for each document, and its layout as text.

A report is a letter, a table and notes. Every figure and link stands in at least one of them, and like in real reports
many stand in several. A document is a list of pieces; each piece starts at a token boundary of the demo's tokenizer, so
its token count is the sum of theirs and a length can be hit without tokenizing the whole again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .lexicon import (
    COMPANIES,
    COMPANY_FILLERS,
    FILLERS,
    HIGHEST,
    LOWEST,
    METRICS,
    RELATIONS,
    SECTIONS,
    TABLE_HEAD,
    TITLE,
)

FILLER_SHARE = 0.15
"""Least share of a document's tokens that carries no fact."""


@dataclass(frozen=True)
class Facts:
    """What is true in one document.

    figures: (metric, company) -> value; the values of one metric are all different.
    links: (relation, name) -> company; a name belongs to one company.
    """

    companies: tuple[str, ...]
    metrics: tuple[str, ...]
    figures: dict[tuple[str, str], int]
    links: dict[tuple[str, str], str]


@dataclass(frozen=True)
class Piece:
    """A stretch of a document: text with its leading space or line break, and the fact it states, if any.

    A statement ends with its value and one closing mark, so that its last token but one is what the fact says.
    """

    text: str
    fact: tuple[str, str] | None = None


def draw_facts(rng: Random, companies: int, metrics: int) -> Facts:
    """Facts about `companies` companies with `metrics` figures and one link each; all independent."""
    names = tuple(rng.sample(COMPANIES, companies))
    chosen = tuple(rng.sample(METRICS, metrics))
    figures: dict[tuple[str, str], int] = {}
    for metric in chosen:
        values = rng.sample(range(LOWEST, HIGHEST + 1), companies)
        figures.update({(metric, name): value for name, value in zip(names, values, strict=True)})
    unused = {relation: rng.sample(pool, companies) for relation, (_, _, pool) in RELATIONS.items()}
    links: dict[tuple[str, str], str] = {}
    for name in names:
        relation = rng.choice(tuple(RELATIONS))
        links[relation, unused[relation].pop()] = name
    return Facts(names, chosen, figures, links)


def figure_sentence(metric: str, company: str, value: int) -> str:
    return f"The {metric} of {company} was {value}."


def link_phrase(relation: str, linked: str) -> str:
    title, role, _ = RELATIONS[relation]
    return f"{title} {linked} is {role} of"


def _figure_row(metric: str, company: str, value: int) -> str:
    return f"| {metric} | {company} | {value} |"


def statements(facts: Facts, rng: Random, mentions: float) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """Statements for letter, table and notes: each fact in one section at least, in `mentions` statements on average."""
    letter, table, notes = [], [], []
    for key, value in facts.figures.items():
        sentence = Piece(" " + figure_sentence(*key, value), key)
        row = Piece("\n " + _figure_row(*key, value), key)
        _scatter(rng, mentions, [(letter, sentence), (table, row), (notes, sentence)])
    for key, company in facts.links.items():
        sentence = Piece(f" {link_phrase(*key)} {company}.", key)
        _scatter(rng, mentions, [(letter, sentence), (notes, sentence)])
    for section in (letter, table, notes):
        rng.shuffle(section)
    return letter, table, notes


def _scatter(rng: Random, mentions: float, places: list[tuple[list[Piece], Piece]]) -> None:
    """Put a fact into its places: each place once in random order, then again, until it has its share of mentions."""
    count = max(1, int(mentions + rng.random()))
    order = rng.sample(places, len(places))
    for turn in range(count):
        section, piece = order[turn % len(order)]
        section.append(piece)


def _filler(facts: Facts, rng: Random) -> Piece:
    if rng.random() < 0.4:
        return Piece(" " + rng.choice(COMPANY_FILLERS).format(company=rng.choice(facts.companies)))
    return Piece(" " + rng.choice(FILLERS))


def lay_out(facts: Facts, rng: Random, mentions: float, length: int, count: Callable[[str], int]) -> list[Piece] | None:
    """The pieces of a document of about `length` tokens (never more, at most a short sentence less).

    count: tokens of a piece. None if the facts alone leave less room than FILLER_SHARE for other prose.
    """
    letter, table, notes = statements(facts, rng, mentions)
    heads = [Piece(TITLE), *(Piece(f"\n\n{name}\n") for name in SECTIONS)]
    heads[2] = Piece(heads[2].text[:-1] + TABLE_HEAD)
    used = sum(count(piece.text) for piece in (*heads, *letter, *table, *notes))
    if used > (1 - FILLER_SHARE) * length:
        return None
    shortest = min(count(" " + filler) for filler in FILLERS)
    while length - used >= shortest:
        piece = _filler(facts, rng)
        if used + count(piece.text) > length:
            continue
        section = rng.choice((letter, notes))
        section.insert(rng.randint(0, len(section)), piece)
        used += count(piece.text)
    return [heads[0], heads[1], *letter, heads[2], *table, heads[3], *notes]
