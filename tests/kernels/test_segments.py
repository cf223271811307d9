"""Plans cover every token once, pad only where they may, and never let a slot show another segment."""

from __future__ import annotations

import torch

from longreach.kernels.segments import PADDABLE, Side, assemble, plan


def bounds(lengths: list[int]) -> tuple[int, ...]:
    return tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())


def tokens(side: Side) -> list[int]:
    if side.tokens is None:
        return list(range(side.start, side.start + side.count * side.length))
    return side.tokens.tolist()


def test_every_token_is_computed_once_and_short_segments_share_a_rectangle() -> None:
    lengths = [5, 0, 24, 1, 700, 24, 700, 3]
    edges = bounds(lengths)
    rectangles = plan(edges, edges, True)
    assert sorted(t for rect in rectangles for t in tokens(rect.q)) == list(range(edges[-1]))
    assert sorted(rect.q.count for rect in rectangles) == [2, 2, 3]
    assert all(rect.q is rect.k for rect in rectangles)


def test_neighbours_of_equal_length_need_no_copy() -> None:
    edges = bounds([16] * 7)
    (rect,) = plan(edges, edges, True)
    x = torch.randn(112, 2, 3)
    assert rect.q.source is None
    assert rect.q.take(x).data_ptr() == x.data_ptr()
    assert assemble([(rect.q, rect.q.take(x))], x.shape, x.dtype, x, 0.0).data_ptr() == x.data_ptr()


def test_long_segments_are_not_padded() -> None:
    edges = bounds([PADDABLE + 2, PADDABLE + 1])
    assert [rect.q.count for rect in plan(edges, edges, True)] == [1, 1]


def test_full_attention_never_pads_keys() -> None:
    queries, keys = bounds([8, 6, 9, 7, 0]), bounds([50, 40, 50, 0, 9])
    rectangles = plan(queries, keys, False)
    assert [(rect.k.count, rect.k.length) for rect in rectangles] == [(2, 50), (1, 40)]
    assert sorted(t for rect in rectangles for t in tokens(rect.q)) == list(range(23))


def test_padded_slots_repeat_their_own_segment_or_hold_the_fill_and_are_dropped() -> None:
    edges = bounds([3, 5])
    (rect,) = plan(edges, edges, True)
    x = torch.arange(8.0)
    assert rect.q.take(x).tolist() == [[0, 1, 2, 2, 2], [3, 4, 5, 6, 7]]
    assert rect.q.take(x, fill=9.0).tolist() == [[0, 1, 2, 9, 9], [3, 4, 5, 6, 7]]
    assert assemble([(rect.q, rect.q.take(x))], x.shape, x.dtype, x, 0.0).tolist() == x.tolist()


def test_rows_without_a_rectangle_get_the_fill() -> None:
    (rect,) = plan(bounds([2, 3]), bounds([4, 0]), False)
    out = assemble([(rect.q, torch.ones(1, 2))], torch.Size([5]), torch.float32, torch.ones(1), -1.0)
    assert out.tolist() == [1, 1, -1, -1, -1]
