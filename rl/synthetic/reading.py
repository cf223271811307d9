"""What the base model reads: documents as tokens, with the places where earlier text determines the next token.

A leaflet is a shuffled run of statements about few companies, the easiest text to learn copying from; a document is a
whole report. Both mark the values of facts that were stated before: those can be predicted, all other figures cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch

from .report import Piece, draw_facts, statements
from .rows import Synthetic, draw_document

Encoder = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Reading:
    """Token batch for next-token training. ids, repeated, real: [B, T]; rows are padded on the right.

    repeated: tokens that earlier text determines: values of facts stated before, and what a heading announced. real: tokens that are no padding.
    """

    ids: torch.Tensor
    repeated: torch.Tensor
    real: torch.Tensor


def read_leaflets(rng: Random, encode: Encoder, pad: int, *, explained: float, rows: int, length: int) -> Reading:
    """Leaflets of at most `length` tokens: two to four companies, one or two figures each, stated over and over."""
    pages = []
    for _ in range(rows):
        facts = draw_facts(rng, rng.randint(2, 4), rng.randint(1, 2))
        passages = [passage for section in statements(facts, rng, 5.0, explained) for passage in section]
        rng.shuffle(passages)
        pages.append(_mark([piece for passage in passages for piece in passage], encode, length))
    return _stack(pages, pad)


def read_documents(rng: Random, encode: Encoder, pad: int, *, config: Synthetic, tokens: int) -> Reading:
    """Documents of one length, drawn between the bounds of `config`: as many as fit into `tokens`, at least one."""
    length = rng.randint(config.shortest, config.longest)
    config = replace(config, shortest=length, longest=length)
    count = max(1, tokens // length)
    drawn = [draw_document(config, rng, lambda text: len(encode(text))) for _ in range(count)]
    return _stack([_mark(pieces, encode, length) for _, pieces in drawn], pad)


def _mark(pieces: list[Piece], encode: Encoder, length: int) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    repeated: list[bool] = []
    seen = set()
    for piece in pieces:
        tokens = encode(piece.text)
        if len(ids) + len(tokens) > length:
            break
        ids.extend(tokens)
        repeated.extend(position in piece.determined for position in range(len(tokens)))
        if piece.fact is not None:
            repeated[-2] = piece.fact in seen
            seen.add(piece.fact)
    return ids, repeated


def _stack(pages: list[tuple[list[int], list[bool]]], pad: int) -> Reading:
    longest = max(len(ids) for ids, _ in pages)
    shape = (len(pages), longest)
    ids_BT, repeated_BT, real_BT = torch.full(shape, pad), torch.zeros(shape).bool(), torch.zeros(shape).bool()
    for row, (ids, repeated) in enumerate(pages):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        repeated_BT[row, : len(ids)] = torch.tensor(repeated)
        real_BT[row, : len(ids)] = True
    return Reading(ids_BT, repeated_BT, real_BT)
