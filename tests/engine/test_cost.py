"""The model's numbers for schedules that can be computed by hand, and what it prefers."""

from __future__ import annotations

import pytest
import torch

from longreach.engine import Group
from longreach.engine.cost import Shape, Speeds, cheaper, gather_seconds, key_traffic, layer_bytes, ring_seconds
from longreach.engine.packing import one_row
from longreach.engine.shards import Cut, cut_row
from longreach.engine.ulysses import Heads

SHAPE = Shape(query_heads=4, key_heads=2, width=8, dtype=torch.bfloat16)


def a_cut(prompt: int, completions: tuple[int, ...], ring: int, ulysses: int = 1) -> Cut:
    group = Group(torch.zeros(prompt, dtype=torch.long), [torch.zeros(n, dtype=torch.long) for n in completions])
    return cut_row(one_row([group]), ring, ulysses)


def test_traffic_of_rows_that_can_be_counted_by_hand() -> None:
    causal, shared = a_cut(64, (), 4).shards, a_cut(64, (2,) * 4, 4).shards
    # of 8 pieces of 8, the first four go round, those of ranks 0 to 3 behind the middle 0, 1, 2 and 3 hops (the last,
    # being one with its first, 3)
    assert key_traffic(causal, "ring") == 8 * (3 * 4) + 8 * (0 + 1 + 2 + 3)
    # and by readers just as far: the ranks below
    assert key_traffic(causal, "all-gather") == key_traffic(causal, "ring")
    assert key_traffic(shared, "ring") == key_traffic(shared, "all-gather") == 3 * 64
    assert key_traffic(a_cut(64, (2,), 1).shards, "ring") == 0


def test_a_far_reader_makes_a_ring_carry_what_others_do_not_read() -> None:
    """Rank 0's completion costs nothing more, since all later pieces come down to it; rank 1's reads what is behind the
    middle of rank 0, which passes ranks 3 and 2 on its way."""
    assert key_traffic(a_cut(640, (1,), 4).shards, "ring") == key_traffic(a_cut(640, (1,), 4).shards, "all-gather")
    shards = a_cut(640, (1, 1), 4).shards
    assert key_traffic(shards, "ring") > key_traffic(shards, "all-gather")


def test_bytes_of_a_layer() -> None:
    cut = a_cut(64, (2,) * 4, 4)
    heads = Heads(4, 2, 1)
    key = 2 * 2 * 8
    assert layer_bytes(cut, heads, 8, torch.bfloat16, "ring") == (3 * 64 * key * 2, 3 * 64 * key * (2 + 4))
    assert layer_bytes(cut, heads, 8, torch.float64, "ring") == (3 * 64 * key * 8, 3 * 64 * key * (8 + 8))
    alone = a_cut(64, (2,) * 4, 1, 4)  # one query head a rank, and a key head that two ranks share
    swapped = 72 * 3 * 8
    assert layer_bytes(alone, Heads(4, 2, 4), 8, torch.bfloat16, "ring") == (swapped * 4 * 2, swapped * (2 * 2 + 2 * 4))


def test_seconds_of_two_ranks_by_hand() -> None:
    shards = a_cut(8, (), 2).shards  # pieces 0-2 and 6-8, and 2-6
    speeds = Speeds(latency_s=1.0, bytes_s=1e30, call_s=0.0, flops_s=4.0 * 4 * 8)  # a second a pair
    # step 0: rank 0 has 3 + 3 + 4 pairs, rank 1 has 10; step 1: rank 0 8 pairs on the other's, rank 1 8
    assert ring_seconds(shards, SHAPE, speeds) == pytest.approx((10 + 8) * (1 + 2.5))
    # on itself: 6 and 10; on what is gathered: 4 + 8 and 8; gradients home
    assert gather_seconds(shards, SHAPE, speeds) == pytest.approx((10 + 12) * (1 + 2.5) + 1)


@pytest.mark.parametrize(
    "speeds, wanted",
    [
        (Speeds(1e-6, 1e9, 1e-9, 1e12), "ring"),  # the link is what takes time, and a ring hides it
        (Speeds(1e-6, 1e15, 1e-3, 1e15), "all-gather"),  # calls are
    ],
)
def test_the_ring_hides_travel_and_the_all_gather_makes_few_calls(speeds: Speeds, wanted: str) -> None:
    name, seconds = cheaper(a_cut(16384, (512,) * 8, 8).shards, SHAPE, speeds)
    assert name == wanted == min(seconds, key=lambda key: seconds[key])
