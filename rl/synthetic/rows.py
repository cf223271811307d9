"""Data sets of synthetic reports: rows of context, question and answer at a given token length.

Same configuration, same bytes: each row has a random stream of its own, seeded by (seed, split, index). A row does not
depend on how many rows stand before it, and splits share no stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Protocol

from .questions import KINDS, ask
from .report import Facts, Piece, draw_facts, lay_out

FEWEST_COMPANIES = 2
MOST_COMPANIES = 36
SHORTEST = 120
LAST_TRIES = 20
"""How often the smallest document is drawn anew before a length is given up: mentions are random."""


class Tokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Synthetic:
    """What to generate.

    rows: how many. kinds: question kinds, drawn evenly. shortest, longest: bounds of the document's length in tokens,
    drawn uniformly between them (a prompt is about 55 tokens longer: template and question). metrics: figures per
    company at most. mentions: statements per fact, on average. explained: share of the notes with a
    heading or a conclusion. company_tokens: a document of length n is about
    n / company_tokens companies, so that longer documents hold more candidates.
    """

    seed: int = 0
    split: str = "train"
    rows: int = 1000
    kinds: tuple[str, ...] = ("lookup", "two_hop")
    shortest: int = 140
    longest: int = 200
    metrics: int = 3
    mentions: float = 1.3
    explained: float = 0.1
    company_tokens: int = 60

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise ValueError(f"synthetic.kinds: {unknown or 'nothing'}; choose from {', '.join(KINDS)}")
        if not SHORTEST <= self.shortest <= self.longest:
            raise ValueError(
                f"synthetic lengths {self.shortest}..{self.longest}: need {SHORTEST} <= shortest <= longest tokens"
            )


def make_rows(config: Synthetic, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Rows in order: id, context, question, answers, answer_type, benchmark (the kind), response, chance."""
    count = token_counter(tokenizer)
    for index in range(config.rows):
        rng = Random(f"{config.seed}/{config.split}/{index}")
        kind = rng.choice(config.kinds)
        facts, pieces = draw_document(config, rng, count)
        question = ask(facts, kind, rng)
        yield {
            "id": f"{config.split}-{config.seed}-{index}",
            "context": "".join(piece.text for piece in pieces),
            "question": question.text,
            "answers": [question.answer],
            "answer_type": question.answer_type,
            "benchmark": kind,
            "response": question.response,
            "chance": question.chance,
        }


def write_rows(config: Synthetic, tokenizer: Tokenizer, path: Path) -> Path:
    """The rows as JSON lines in `path`."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(config, tokenizer))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def draw_document(config: Synthetic, rng: Random, count: Callable[[str], int]) -> tuple[Facts, list[Piece]]:
    """Facts and pieces of one document; fewer figures, then fewer companies, if they don't fit into its length."""
    length = rng.randint(config.shortest, config.longest)
    companies = min(max(FEWEST_COMPANIES + 1, round(length / config.company_tokens)), MOST_COMPANIES)
    sizes = sorted(
        product(range(1, config.metrics + 1), range(FEWEST_COMPANIES, companies + 1)),
        key=lambda size: (size[0] == 1, -size[1], -size[0]),
    )
    for metrics, number in sizes + LAST_TRIES * sizes[-1:]:
        facts = draw_facts(rng, number, metrics)
        pieces = lay_out(facts, rng, config.mentions, config.explained, length, count)
        if pieces is not None:
            return facts, pieces
    raise ValueError(
        f"{config.metrics} metrics with {config.mentions} mentions do not fit into {length} tokens: lengthen the documents"
    )


def token_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """A function that counts the tokens of a piece; each distinct piece is tokenized once."""
    return cache(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
