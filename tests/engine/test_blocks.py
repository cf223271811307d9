"""The calls of all ranks together compute every pair that the mask of the row has, once, by either way of the keys."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from longreach.engine import Group
from longreach.engine.blocks import Call, calls_on, fit, own_calls
from longreach.engine.packing import PackedRow, one_row
from longreach.engine.ring import RingSchedule, hops
from longreach.engine.shards import Cut, Piece, cut_row

CASES = {
    "causal": [(37, ())],
    "shared": [(29, (4, 0, 6, 13, 2))],
    "several": [(29, (4, 0, 6, 13, 2)), (1, (3, 2)), (17, ()), (11, (5,))],
    "one token": [(1, (3, 2))],
    "outweighed": [(3, (20, 1))],
}


def a_row(case: str) -> PackedRow:
    return one_row([Group(torch.zeros(p, dtype=torch.long), [torch.zeros(n, dtype=torch.long) for n in c]) for p, c in CASES[case]])  # fmt: skip


def mask(row: PackedRow) -> Tensor:
    """[T, T]: does a token (first) see another's key?"""
    parts = [(g, -1, n) for g, n in enumerate(row.prompt_lengths)]
    parts += [
        (g, i, len(c)) for i, (g, c) in enumerate((g, c) for g, x in enumerate(row.groups) for c in x.completions)
    ]
    group, part = (torch.tensor([p[i] for p in parts]).repeat_interleave(torch.tensor([p[2] for p in parts])) for i in (0, 1))  # fmt: skip
    position = row.position_ids()
    own = (part[None] == -1) | (part[:, None] == part[None])
    return (group[:, None] == group[None]) & own & (position[:, None] >= position[None])


def count(call: Call, queries: Tensor, keys: Tensor, into: Tensor) -> None:
    """Adds one to every pair of the call, whose rows are these tokens of the packed row."""
    queries, keys = queries[call.queries], keys[call.keys]
    assert call.cu_q[-1] == len(queries) and call.cu_k[-1] == len(keys)
    for (a, b), (c, d) in zip(pairwise(call.cu_q), pairwise(call.cu_k), strict=True):
        assert a <= b and c <= d and (not call.causal or b - a == d - c)
        seen = torch.ones(b - a, d - c, dtype=into.dtype)
        into[queries[a:b, None], keys[None, c:d]] += seen.tril() if call.causal else seen


def tokens(pieces: list[Piece], row: PackedRow) -> Tensor:
    starts = [0, *accumulate(row.prompt_lengths)]
    parts = [torch.arange(starts[p.group] + p.start, starts[p.group] + p.stop) for p in pieces]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


@pytest.mark.parametrize("ring", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_the_mask_is_computed_once(case: str, ring: int) -> None:
    row = a_row(case)
    cut = cut_row(row, ring, 1)
    by_ring, gathered = (torch.zeros(row.tokens, row.tokens, dtype=torch.long) for _ in range(2))
    for rank, shard in enumerate(cut.shards):
        held = cut.tokens[rank]
        schedule = RingSchedule(cut.shards, rank, None)  # type: ignore[arg-type]  (nothing is sent)
        for call in schedule.own_calls:
            count(call, held, held, by_ring)
        for t in range(1, ring):
            for call in schedule.calls[t]:
                count(call, held, tokens(schedule.arriving(t), row), by_ring)
        for call in own_calls(shard):
            count(call, held, held, gathered)
        read = sorted(p for s in cut.shards for p in s.pieces if s is shard or shard.reads(p))
        calls = calls_on(shard, read)
        assert len(calls) <= 3
        for call in calls:
            count(call, held, tokens(read, row), gathered)
    assert torch.equal(by_ring, mask(row).long())
    assert torch.equal(gathered, mask(row).long())
    assert sum(c.pairs for s in range(ring) for c in all_calls(cut, s)) == int(mask(row).sum())


def all_calls(cut: Cut, rank: int) -> list[Call]:
    schedule = RingSchedule(cut.shards, rank, None)  # type: ignore[arg-type]
    return [*schedule.own_calls, *(call for t in range(1, len(cut.shards)) for call in schedule.calls[t])]


def test_a_causal_row_sends_its_later_pieces_down_the_ring_alone() -> None:
    shards = cut_row(a_row("causal"), 4, 1).shards
    assert hops(shards) == [[3, 0], [3, 1], [3, 2], [3]]  # the last rank's two pieces are one
    shared = hops(cut_row(one_row([Group(torch.zeros(64, dtype=torch.long), [torch.zeros(2, dtype=torch.long)] * 4)]), 4, 1).shards)  # fmt: skip
    assert all(far == 3 for of_rank in shared for far in of_rank)


def test_what_nobody_asks_about_is_a_segment_with_an_empty_side() -> None:
    (call,) = fit([(2, 4, 1, 3), (6, 6, 3, 9), (7, 9, 5, 6)])
    assert (call.queries, call.keys) == (slice(2, 9), slice(1, 6))
    assert call.cu_q == (0, 2, 5, 5, 7) and call.cu_k == (0, 2, 2, 4, 5)
    assert call.pairs == 2 * 2 + 2 * 1
    assert fit([(0, 0, 0, 5)]) == []
