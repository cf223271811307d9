"""Which calls of the attention contract a rank makes on the keys it holds, or that reach it.

A piece of a prompt reads what stands before it in its prompt, a completion its whole prompt. On any keys, ordered by
prompt and place, that is one call without a mask for the completions and one or two for the pieces: the keys that a
piece reads are the first n of its prompt, and n rises from piece to piece, so the keys between two such n are read by
all pieces from there on. Parts that no call reads are segments whose other side is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

from .shards import Piece, RingShard

Segment = tuple[int, int, int, int]
"""First query, last query + 1, first key, last key + 1."""


@dataclass(frozen=True)
class Call:
    """One call: rows `queries` of q on rows `keys` of k and v, cut into segments."""

    queries: slice
    keys: slice
    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    causal: bool

    @cached_property
    def pairs(self) -> int:
        """Pairs of a query and a key that it computes."""
        sides = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(self.cu_q), pairwise(self.cu_k), strict=True)]
        return sum(n * (n + 1) // 2 if self.causal else n * m for n, m in sides)

    def arguments(self) -> dict[str, Any]:
        """For `kernels.attention`."""
        return {"causal": self.causal, "cu_seqlens_q": self.cu_q, "cu_seqlens_k": self.cu_k}


def fit(segments: Iterable[Segment], *, causal: bool = False) -> list[Call]:
    """The segments, which rise on both sides and don't overlap, as one call; none where nothing is computed."""
    real = [s for s in segments if s[1] > s[0] and s[3] > s[2]]
    if not real:
        return []
    (first_q, _, first_k, _), (_, last_q, _, last_k) = real[0], real[-1]
    cu_q, cu_k = [0], [0]
    for a, b, c, d in ((a - first_q, b - first_q, c - first_k, d - first_k) for a, b, c, d in real):
        if a > cu_q[-1] or c > cu_k[-1]:
            # what nobody asks about: queries against no keys, then keys against no queries
            cu_q += [a, a]
            cu_k += [cu_k[-1], c]
        cu_q.append(b)
        cu_k.append(d)
    return [Call(slice(first_q, last_q), slice(first_k, last_k), tuple(cu_q), tuple(cu_k), causal)]


def own_calls(shard: RingShard) -> list[Call]:
    """Each piece and each completion on itself: what a rank can do before any key has travelled."""
    P, bounds = shard.prompt_tokens, list(accumulate((p.tokens for p in shard.pieces), initial=0))
    ends = list(accumulate((c.tokens for c in shard.completions), initial=P))
    return [
        *fit([(a, b, a, b) for a, b in pairwise(bounds)], causal=True),
        *fit([(a, b, a, b) for a, b in pairwise(ends)], causal=True),
    ]


def calls_on(shard: RingShard, keys: Sequence[Piece]) -> list[Call]:
    """What the shard reads of these pieces of prompts, which lie one behind the other, ordered."""
    places = _places(keys)
    return [*_of_pieces(shard, places), *_of_completions(shard, places)]


Placed = tuple[Piece, int, int]
"""A piece, and its rows."""


def _places(pieces: Sequence[Piece]) -> dict[int, list[Placed]]:
    ends = list(accumulate((p.tokens for p in pieces), initial=0))
    placed = [(piece, a, b) for piece, (a, b) in zip(pieces, pairwise(ends), strict=True)]
    return {group: list(found) for group, found in groupby(placed, key=lambda entry: entry[0].group)}


def _of_pieces(shard: RingShard, keys: dict[int, list[Placed]]) -> list[Call]:
    levels: list[list[Segment]] = []
    for group, queries in _places(shard.pieces).items():
        before = keys.get(group, [])
        counts = [sum(key.stop <= query.start for key, _, _ in before) for query, _, _ in queries]
        read = 0
        for level, count in enumerate(sorted({n for n in counts if n})):
            first = next(i for i, n in enumerate(counts) if n >= count)
            segment = (queries[first][1], queries[-1][2], before[read][1], before[count - 1][2])
            levels += [[] for _ in range(level + 1 - len(levels))]
            levels[level].append(segment)
            read = count
    return [call for level in levels for call in fit(level)]


def _of_completions(shard: RingShard, keys: dict[int, list[Placed]]) -> list[Call]:
    segments: list[Segment] = []
    start = shard.prompt_tokens
    for group, found in groupby(shard.completions, key=lambda c: c.group):
        stop = start + sum(c.tokens for c in found)
        if group in keys:
            segments.append((start, stop, keys[group][0][1], keys[group][-1][2]))
        start = stop
    return fit(segments)
