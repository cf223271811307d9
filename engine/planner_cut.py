"""What each rank of a sequence group has of a row: the cut that the engine makes (`shards`), in numbers.

Ring ranks are given work evenly as far as whole completions allow. Over Ulysses a ring rank's tokens are sliced as they
lie, completions last, so the last ranks have most of the rows that meet the vocabulary. The fullest rank is what must fit,
and the busiest what the others wait for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .packing import Group, one_row
from .planner_setting import Setting
from .planner_shape import ModelShape, Row
from .ring import hops
from .shards import RingShard, TokenCosts, cut_ring


@dataclass(frozen=True)
class Share:
    """Of one rank: tokens, rows that meet the vocabulary, its share of a row's pairs; and of all its ring rank's tokens, how
    many are prompts."""

    tokens: float
    loss_rows: float
    pairs: float
    prompt_share: float


@lru_cache(maxsize=4096)
def cut(shape: ModelShape, ring: int, ulysses: int, row: Row) -> tuple[Share, ...]:
    """Shares of the first and the last Ulysses rank of each ring rank, each kind once."""
    if ring * ulysses == 1:
        return (Share(row.tokens, row.loss_rows, 1.0, row.prompt_tokens / row.tokens),)
    found: dict[Share, None] = {}
    for shard in _shards(shape, ring, row):
        if shard.tokens == 0:
            continue
        tokens = -(-shard.tokens // ulysses)
        done = shard.tokens - shard.prompt_tokens
        pairs = _pairs(shard, row) / row.pairs / ulysses
        for last in {min(tokens, done), max(0, done - (ulysses - 1) * tokens)}:
            found[Share(tokens, last, pairs, shard.prompt_tokens / shard.tokens)] = None
    return tuple(found)


def shares(shape: ModelShape, setting: Setting, row: Row) -> tuple[Share, ...]:
    """Of every kind of rank, one."""
    return cut(shape, setting.ring, setting.ulysses, row)


def fullest(shape: ModelShape, setting: Setting, row: Row) -> tuple[Share, ...]:
    """Those that can need most memory: the one with the most tokens, and that with the most rows for the vocabulary."""
    found = shares(shape, setting, row)
    most = (
        max(found, key=lambda share: (share.tokens, share.loss_rows)),
        max(found, key=lambda share: (share.loss_rows, share.tokens)),
    )
    return most[: len(set(most))]


def _shards(shape: ModelShape, ring: int, row: Row) -> tuple[RingShard, ...]:
    token = torch.zeros(1, dtype=torch.long)  # only lengths are looked at
    completions = [token.expand(row.completion)] * row.size
    groups = [Group(token.expand(row.prompt), completions) for _ in range(row.groups)]
    if not row.shared:
        groups = [Group(token.expand(row.prompt), [completion]) for group in groups for completion in group.completions]
    pair = 4 * shape.q * shape.layers  # as `sequence_parallel.token_costs`
    costs = TokenCosts(2 * shape.layers * shape.layer_matrices / pair, 2 * shape.head_parameters / pair)
    return cut_ring(one_row(groups), ring, costs)


@lru_cache(maxsize=4096)
def passed(shape: ModelShape, ring: int, row: Row) -> tuple[int, int]:
    """Tokens whose keys a ring rank sends in one round, and whose keys' gradients; of the rank that sends most."""
    shards = _shards(shape, ring, row)
    reach = [list(zip(shard.pieces, far, strict=True)) for shard, far in zip(shards, hops(shards), strict=True)]

    def sent(behind: int) -> int:
        steps = [[reach[(rank + t - behind) % ring] for t in range(1, ring)] for rank in range(ring)]
        return max(sum(p.tokens for t, held in enumerate(of, 1) for p, far in held if far >= t) for of in steps)

    return sent(1), sent(0)


def _pairs(shard: RingShard, row: Row) -> float:
    prompts = sum(p.tokens * (p.start + p.stop + 1) / 2 for p in shard.pieces)
    return prompts + sum(c.tokens * (row.prompt + (c.tokens + 1) / 2) for c in shard.completions)
