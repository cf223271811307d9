"""One synthetic annual report: its facts, drawn afresh for each document, and its layout as text.

A report is a letter, a table and notes. Every figure and link stands in at least one of them, and like in real reports
many stand in several. A document is a list of pieces; each piece starts at a token boundary of the demo's tokenizer, so
its token count is the sum of theirs and a length can be hit without tokenizing the whole again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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

    A statement ends with its value and one closing mark, so that its last token but one is what the fact says. determined:
    positions of other tokens that the pieces of the same passage before it settle.
    """

    text: str
    fact: tuple[str, str] | None = None
    determined: tuple[int, ...] = ()


Passage = tuple[Piece, ...]
"""Pieces that stay together."""


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


def statements(
    facts: Facts, rng: Random, mentions: float, explained: float
) -> tuple[list[Passage], list[Passage], list[Passage]]:
    """Passages of letter, table and notes: each fact in one section at least, `mentions` times on average.

    explained: share of the statements in the notes that have a heading, and of the figures there that have a conclusion.
    """
    letter, table, notes = [], [], []
    for key, value in facts.figures.items():
        sentence = Piece(" " + figure_sentence(*key, value), key)
        row = Piece("\n " + _figure_row(*key, value), key)
        note = partial(_figure_note, facts, rng, explained, key, value)
        _scatter(rng, mentions, [(letter, lambda s=sentence: (s,)), (table, lambda r=row: (r,)), (notes, note)])
    for key, company in facts.links.items():
        sentence = Piece(f" {link_phrase(*key)} {company}.", key)
        note = partial(_link_note, facts, rng, explained, key, company)
        _scatter(rng, mentions, [(letter, lambda s=sentence: (s,)), (notes, note)])
    for section in (letter, table, notes):
        rng.shuffle(section)
    return letter, table, notes


def _figure_note(facts: Facts, rng: Random, explained: float, key: tuple[str, str], value: int) -> Passage:
    metric, company = key
    head = _heading(facts, rng, explained, f"the {metric} of {company}")
    body = Piece(" " + figure_sentence(metric, company, value), key, (1, 3) if head else ())
    tail = (Piece(f" Therefore, the plan is {value}.", key),) if rng.random() < explained else ()
    return (*head, body, *tail)


def _link_note(facts: Facts, rng: Random, explained: float, key: tuple[str, str], company: str) -> Passage:
    relation, linked = key
    head = _heading(facts, rng, explained, f"{RELATIONS[relation][0]} {linked}")
    return (*head, Piece(f" {link_phrase(relation, linked)} {company}.", key, (0, 1, 3) if head else ()))


def _heading(facts: Facts, rng: Random, explained: float, subject: str) -> Passage:
    """Nothing, or a heading, with or without prose between it and what it announces."""
    if rng.random() >= explained:
        return ()
    return (Piece(f" Note on {subject}:"), *(_filler(facts, rng) for _ in range(rng.choice((0, 0, 1, 2)))))


def _scatter(rng: Random, mentions: float, places: list[tuple[list[Passage], Callable[[], Passage]]]) -> None:
    """Put a fact into its places: each place once in random order, then again, until it has its share of mentions."""
    count = max(1, int(mentions + rng.random()))
    order = rng.sample(places, len(places))
    for turn in range(count):
        section, passage = order[turn % len(order)]
        section.append(passage())


def _filler(facts: Facts, rng: Random) -> Piece:
    if rng.random() < 0.4:
        return Piece(" " + rng.choice(COMPANY_FILLERS).format(company=rng.choice(facts.companies)))
    return Piece(" " + rng.choice(FILLERS))


def lay_out(
    facts: Facts, rng: Random, mentions: float, explained: float, length: int, count: Callable[[str], int]
) -> list[Piece] | None:
    """The pieces of a document of about `length` tokens (never more, at most a short sentence less).

    count: tokens of a piece. None if the facts alone leave less room than FILLER_SHARE for other prose.
    """
    letter, table, notes = statements(facts, rng, mentions, explained)
    heads = [Piece(TITLE), *(Piece(f"\n\n{name}\n") for name in SECTIONS)]
    heads[2] = Piece(heads[2].text[:-1] + TABLE_HEAD)
    used = sum(count(piece.text) for passage in (heads, *letter, *table, *notes) for piece in passage)
    if used > (1 - FILLER_SHARE) * length:
        return None
    shortest = min(count(" " + filler) for filler in FILLERS)
    while length - used >= shortest:
        piece = _filler(facts, rng)
        if used + count(piece.text) > length:
            continue
        section = rng.choice((letter, notes))
        section.insert(rng.randint(0, len(section)), (piece,))
        used += count(piece.text)
    sections = zip(heads[1:], (letter, table, notes), strict=True)
    return [heads[0], *(piece for head, section in sections for passage in ((head,), *section) for piece in passage)]
