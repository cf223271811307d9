"""How one packed row is cut over the ranks that compute it together.

Over the ring dimension, a completion stays whole: the most expensive first, each to the rank with the least to do so
far. Prompts are shared out so that all ranks end with the same cost: each is cut into 2 x ring pieces whose sizes rise
to the middle and fall again by the same steps (s0 s1 .. sn sn .. s1 s0), and a rank has one piece on either side. Such
a pair costs s (s0 + .. ) + s (P - ..) = s P pairs whatever the place of its pieces is, so a rank's share of the tokens
is its share of the cost, and shares may be uneven: a rank with much to do for completions takes less of the prompts.

Over the ulysses dimension, the ring rank's tokens are cut into even slices as they lie; heads are exchanged for tokens
before attention. Integers on the CPU, the same on all ranks; every size down to nothing is legal.

A ring rank's tokens stand in this order: its pieces, by prompt and place; its completions, in the row's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .packing import PackedRow


@dataclass(frozen=True)
class TokenCosts:
    """What a token costs beside attention, in pairs of a query and a key: in the layers, and in the head."""

    layers: float = 0.0
    head: float = 0.0


@dataclass(frozen=True, order=True)
class Piece:
    """Tokens start..stop of the prompt of one group."""

    group: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class WholeCompletion:
    """One completion of the row: its group, its place among all completions of the row, its length."""

    group: int
    index: int
    tokens: int


@dataclass(frozen=True)
class RingShard:
    """What one ring rank holds: pieces and completions that have tokens, in order."""

    pieces: tuple[Piece, ...]
    completions: tuple[WholeCompletion, ...]

    @cached_property
    def prompt_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @cached_property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(c.tokens for c in self.completions)

    @cached_property
    def answered(self) -> frozenset[int]:
        """Groups whose whole prompt is read by a completion here."""
        return frozenset(c.group for c in self.completions)

    @cached_property
    def latest(self) -> dict[int, int]:
        """Of each prompt, where the last piece here begins: all before it is read."""
        return {piece.group: piece.start for piece in self.pieces}

    def reads(self, piece: Piece) -> bool:
        """Whether any query here sees this piece of a prompt, which is another rank's."""
        return piece.group in self.answered or self.latest.get(piece.group, -1) >= piece.stop


def cut_ring(row: PackedRow, ring: int, costs: TokenCosts) -> tuple[RingShard, ...]:
    """The shards of the ring ranks, by rank."""
    prompts, lengths = row.prompt_lengths, row.completion_lengths
    whole = [
        WholeCompletion(g, i, lengths[i])
        for i, g in enumerate(g for g, group in enumerate(row.groups) for _ in group.completions)
        if lengths[i]
    ]
    loads, held = [0.0] * ring, [[] for _ in range(ring)]
    for completion in sorted(whole, key=lambda c: (-_completion_cost(c, prompts, costs), c.index)):
        rank = min(range(ring), key=lambda r: loads[r])
        loads[rank] += _completion_cost(completion, prompts, costs)
        held[rank].append(completion)
    shares = _even_out(loads, sum(_prompt_cost(P, costs) for P in prompts))
    pieces = [zigzag(g, P, shares) for g, P in enumerate(prompts)]
    return tuple(
        RingShard(
            tuple(piece for of_prompt in pieces for piece in of_prompt[r]),
            tuple(sorted(held[r], key=lambda c: c.index)),
        )
        for r in range(ring)
    )


def zigzag(group: int, length: int, shares: Sequence[float]) -> list[tuple[Piece, ...]]:
    """Of each rank, its pieces of one prompt: one before the middle and one after it, or one where they touch."""
    total, ranks = sum(shares), len(shares)
    halves = [share / (2 * total) for share in (*shares, *reversed(shares))]
    inner = [round(length * part) for part in accumulate(halves[:-1])]
    cuts = [Piece(group, a, b) for a, b in pairwise([0, *inner, length])]
    made = []
    for early, late in zip(cuts[:ranks], reversed(cuts[ranks:]), strict=True):
        both = [Piece(group, early.start, late.stop)] if early.stop == late.start else [early, late]
        made.append(tuple(piece for piece in both if piece.tokens))
    return made


def _completion_cost(completion: WholeCompletion, prompts: Sequence[int], costs: TokenCosts) -> float:
    R = completion.tokens
    return R * (costs.layers + costs.head + prompts[completion.group] + (R + 1) / 2)


def _prompt_cost(length: int, costs: TokenCosts) -> float:
    return length * (costs.layers + (length + 1) / 2)


def _even_out(loads: Sequence[float], more: float) -> list[float]:
    """How much of `more` each rank takes, so that the least loaded are raised to one level."""
    level, below = 0.0, 0.0
    for n, load in enumerate(sorted(loads), 1):
        below += load
        if (below + more) / n > load:
            level = (below + more) / n
    return [max(0.0, level - load) for load in loads]


@dataclass(frozen=True, eq=False)
class Held:
    """A packed row over the ranks of a sequence group, named by their place in it."""

    row: PackedRow

    @cached_property
    def tokens(self) -> tuple[Tensor, ...]:
        """Of each rank, which tokens of the row it holds, in its own order."""
        raise NotImplementedError

    @cached_property
    def losses(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of each rank, (which of the row's N completion tokens it predicts, by which of its own rows)."""
        owner = torch.empty(self.row.tokens, dtype=torch.long)
        place = torch.empty_like(owner)
        for rank, held in enumerate(self.tokens):
            owner[held], place[held] = rank, torch.arange(len(held))
        rows = self.row.loss_rows()
        entries = [(owner[rows] == rank).nonzero().squeeze(1) for rank in range(len(self.tokens))]
        return tuple((found, place[rows[found]]) for found in entries)


@dataclass(frozen=True, eq=False)
class Cut(Held):
    """A row over ring x ulysses ranks; a rank's place is its ring rank x ulysses + its own."""

    shards: tuple[RingShard, ...]
    ulysses: int

    def slices(self, ring_rank: int) -> list[int]:
        """Tokens of each ulysses rank of a ring rank."""
        tokens = self.shards[ring_rank].tokens
        return [tokens // self.ulysses + (u < tokens % self.ulysses) for u in range(self.ulysses)]

    @cached_property
    def tokens(self) -> tuple[Tensor, ...]:
        starts = [0, *accumulate((*self.row.prompt_lengths, *self.row.completion_lengths))]
        groups, made = len(self.row.groups), []
        for ring_rank, shard in enumerate(self.shards):
            parts = [torch.arange(starts[p.group] + p.start, starts[p.group] + p.stop) for p in shard.pieces]
            parts += [torch.arange(starts[groups + c.index], starts[groups + c.index + 1]) for c in shard.completions]
            held = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
            made += held.split(self.slices(ring_rank))
        return tuple(made)


def cut_row(row: PackedRow, ring: int, ulysses: int, costs: TokenCosts | None = None) -> Cut:
    """The row over ring x ulysses ranks."""
    return Cut(row, cut_ring(row, ring, costs or TokenCosts()), ulysses)
