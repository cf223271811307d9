from __future__ import annotations

import pytest

from longreach.engine.ulysses import Heads


@pytest.mark.parametrize(
    "query, key, ranks, own_key, replicated",
    [(32, 8, 4, 2, False), (32, 8, 16, 1, True), (8, 2, 8, 1, True), (8, 8, 4, 2, False), (12, 4, 6, 2, True), (12, 4, 3, 4, True), (4, 1, 2, 1, True)],
)  # fmt: skip
def test_every_query_head_has_its_key_head_on_its_rank(
    query: int, key: int, ranks: int, own_key: int, replicated: bool
) -> None:
    heads = Heads(query, key, ranks)
    assert (heads.own_query * ranks, heads.own_key, heads.replicated) == (query, own_key, replicated)
    assert len(heads.keys) == ranks * own_key
    for head in range(query):
        rank, place = divmod(head, heads.own_query)
        mine = heads.keys[rank * own_key : (rank + 1) * own_key]
        # attention gives key head j to the query heads of the j-th of equal runs
        assert mine[place // (heads.own_query // own_key)] == head // (query // key)


def test_heads_that_do_not_divide_are_refused_with_the_numbers_that_do() -> None:
    with pytest.raises(
        ValueError, match=r"12 query heads .* parallel.ulysses = 8 .* one of 1, 2, 3, 4, 6, 12 .* parallel.ring"
    ):
        Heads(12, 4, 8)
