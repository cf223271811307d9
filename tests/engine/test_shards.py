"""Every token is on one rank, whatever the sizes, and all ranks have the same to do."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from longreach.engine import Group
from longreach.engine.blocks import calls_on, own_calls
from longreach.engine.packing import PackedRow, one_row
from longreach.engine.shards import RingShard, TokenCosts, cut_ring, cut_row, zigzag

Shapes = list[tuple[int, tuple[int, ...]]]


def a_row(shapes: Shapes) -> PackedRow:
    return one_row([Group(torch.zeros(p, dtype=torch.long), [torch.zeros(n, dtype=torch.long) for n in c]) for p, c in shapes])  # fmt: skip


def random_shapes(draw: random.Random) -> Shapes:
    return [
        (draw.choice((1, 2, draw.randint(1, 60))), tuple(draw.choice((0, 1, draw.randint(0, 30))) for _ in range(draw.randint(0, 5))))
        for _ in range(draw.randint(1, 5))
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_every_token_is_on_one_rank_and_every_loss_row_on_that_of_its_token(seed: int) -> None:
    draw = random.Random(seed)
    row, ring, ulysses = a_row(random_shapes(draw)), draw.randint(1, 9), draw.randint(1, 5)
    cut = cut_row(row, ring, ulysses, TokenCosts(draw.choice((0.0, 100.0)), 5.0))
    assert len(cut.tokens) == ring * ulysses
    assert torch.cat(cut.tokens).sort()[0].tolist() == list(range(row.tokens))
    entries = torch.cat([found for found, _ in cut.losses])
    assert entries.sort()[0].tolist() == list(range(len(row.targets())))
    for held, (found, rows) in zip(cut.tokens, cut.losses, strict=True):
        assert torch.equal(held[rows], row.loss_rows()[found])
    for r, shard in enumerate(cut.shards):
        assert max(cut.slices(r)) - min(cut.slices(r)) <= 1
        assert list(shard.pieces) == sorted(shard.pieces)
        assert [c.index for c in shard.completions] == sorted(c.index for c in shard.completions)


def test_a_ring_rank_holds_its_pieces_then_its_completions_whole() -> None:
    row = a_row([(8, (3, 1)), (4, (2,))])
    cut = cut_row(row, 2, 1, TokenCosts())
    for shard, held in zip(cut.shards, cut.tokens, strict=True):
        prompts, rest = held[: shard.prompt_tokens], held[shard.prompt_tokens :]
        assert (prompts < row.prompt_tokens).all() and prompts.tolist() == sorted(prompts.tolist())
        assert (rest >= row.prompt_tokens).all() and rest.tolist() == sorted(rest.tolist())
        bounds = row.cu_completions.tolist()
        assert rest.tolist() == [row.prompt_tokens + i for c in shard.completions for i in range(bounds[c.index], bounds[c.index + 1])]  # fmt: skip


def test_zigzag_pieces_mirror_each_other() -> None:
    made = zigzag(0, 16, [1.0, 2.0, 1.0])
    assert [[(p.start, p.stop) for p in pieces] for pieces in made] == [
        [(0, 2), (14, 16)],
        [(2, 6), (10, 14)],
        [(6, 10)],
    ]
    assert zigzag(0, 1, [1.0, 1.0])[0] == () or zigzag(0, 1, [1.0, 1.0])[1] == ()


def work(shards: tuple[RingShard, ...], costs: TokenCosts) -> list[float]:
    """Of each rank: the pairs its calls compute, and what its tokens cost beside them."""
    everything = sorted(p for s in shards for p in s.pieces)
    found = []
    for shard in shards:
        pairs = sum(call.pairs for call in [*own_calls(shard), *calls_on(shard, everything)])
        answers = sum(c.tokens for c in shard.completions)
        found.append(pairs + costs.layers * shard.tokens + costs.head * answers)
    return found


@pytest.mark.parametrize(
    "shapes",
    [
        [(6000, ())],
        [(6000, (400, 100, 300))],
        [(6000, (700,) * 16)],
        [(4000, (300, 20)), (1000, (50,) * 7), (900, ())],
    ],
    ids=["causal", "fewer completions than ranks", "more", "several groups"],
)
@pytest.mark.parametrize("costs", [TokenCosts(), TokenCosts(2000.0, 300.0)])
def test_all_ranks_have_the_same_to_do(shapes: Shapes, costs: TokenCosts) -> None:
    for ring in (2, 3, 8):
        found = work(cut_ring(a_row(shapes), ring, costs), costs)
        assert max(found) < 1.01 * sum(found) / ring, (ring, found)


def test_a_rank_whose_completion_outweighs_the_rest_takes_no_prompt() -> None:
    shards = cut_ring(a_row([(10, (500, 1))]), 4, TokenCosts())
    assert [s.prompt_tokens for s in shards].count(0) == 1
    assert [c.tokens for c in shards[0].completions] == [500] and not shards[0].pieces


def test_the_longest_completions_are_dealt_first() -> None:
    lengths = (5, 9, 7, 3, 8, 2)
    shards = cut_ring(a_row([(1, lengths)]), 2, TokenCosts(1e6))
    assert sorted(sum(c.tokens for c in s.completions) for s in shards) == [17, 17]


def test_no_completion_and_no_prompt_token_is_legal(random_groups: Callable[..., list[Group]]) -> None:
    cut = cut_row(one_row(random_groups([(1, (0,))])), 4, 2)
    assert [len(held) for held in cut.tokens].count(0) == 7
    assert sum(len(found) for found, _ in cut.losses) == 0
