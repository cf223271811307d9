"""The head exchange: from a slice of a ring rank's tokens with all heads to all its tokens with a slice of the heads.

Rank u of U gets query heads u H / U onward. Of keys and values it gets the heads which those read: K / U of them, or
fewer ranks than K share one, which is then sent to each of them. Where a rank's query heads begin or end within a group
of query heads that share a key head, that key head is given once for each run of them.

Elements sent by all ranks of one exchange together, T tokens, h = H / U and k key heads a rank, width E: every token's
rows leave its own rank (U - 1) times, T (U - 1) (h + 2 k) E forward and T (U - 1) h E for the output on its way back;
the same in the backward. Gradients of keys and values travel in fp32 where several ranks' must be added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import exchange


@dataclass(frozen=True)
class Heads:
    """Query and key heads of a layer, shared out over ranks."""

    query: int
    key: int
    ranks: int

    def __post_init__(self) -> None:
        if self.query % self.ranks:
            fits = [n for n in range(1, self.query + 1) if self.query % n == 0]
            raise ValueError(
                f"{self.query} query heads can't be shared out over parallel.ulysses = {self.ranks} ranks: set it to "
                f"one of {', '.join(map(str, fits))} and let parallel.ring take the rest"
            )

    @property
    def own_query(self) -> int:
        """Query heads of one rank."""
        return self.query // self.ranks

    @cached_property
    def _run(self) -> int:
        """Query heads that one of a rank's key heads serves."""
        return math.gcd(self.query // self.key, self.own_query)

    @property
    def own_key(self) -> int:
        """Key heads of one rank."""
        return self.own_query // self._run

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """Key heads of all ranks, rank by rank."""
        return tuple(head // (self.query // self.key) for head in range(0, self.query, self._run))

    @property
    def replicated(self) -> bool:
        return len(self.keys) > self.key


@lru_cache(maxsize=16)
def _index(heads: Heads, device: torch.device) -> Tensor:
    return torch.tensor(heads.keys, device=device)


@dataclass(frozen=True)
class HeadExchange:
    """For one ring rank's tokens, of which rank u of the group holds `tokens[u]`."""

    heads: Heads
    tokens: tuple[int, ...]
    group: dist.ProcessGroup

    def scatter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[t, H or K, E] of own tokens -> [T, h or k, E] of all tokens, own heads."""
        heads, index = self.heads, _index(self.heads, k.device)
        parts = [x.unflatten(1, (heads.ranks, -1)) for x in (q, k.index_select(1, index), v.index_select(1, index))]
        made = self._to_heads(torch.cat(parts, 2))
        q, k, v = made.split([heads.own_query, heads.own_key, heads.own_key], 1)
        return q, k, v

    def scatter_queries(self, x: Tensor) -> Tensor:
        """[t, H, E] -> [T, h, E]."""
        return self._to_heads(x.unflatten(1, (self.heads.ranks, -1)))

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `scatter_queries`."""
        return self._to_tokens(x).flatten(1, 2)

    def gather_gradients(self, dq: Tensor, dk: Tensor, dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of `scatter` for gradients, rounded to `dtype`: of copies of a head, their sum."""
        heads = self.heads
        dkv = torch.cat([dk, dv], 1)
        found = self._to_tokens(dkv if heads.replicated else dkv.to(dtype))
        dk, dv = (x.flatten(1, 2) for x in found.split([heads.own_key, heads.own_key], 2))
        if heads.replicated:
            index = _index(heads, dk.device)
            dk, dv = (
                x.new_zeros(x.shape[0], heads.key, x.shape[2]).index_add_(1, index, x).to(dtype) for x in (dk, dv)
            )
        return self.gather(dq.to(dtype)), dk, dv

    def _to_heads(self, x: Tensor) -> Tensor:
        """[t, U, n, E] -> [T, n, E]"""
        return exchange(list(x.unbind(1)), self.tokens, self.group)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """[T, n, E] -> [t, U, n, E]"""
        own = self.tokens[dist.get_rank(self.group)]
        found = exchange(list(x.split(self.tokens)), [own] * self.heads.ranks, self.group)
        return found.unflatten(0, (self.heads.ranks, own)).transpose(0, 1)
