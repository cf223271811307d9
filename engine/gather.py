"""Keys and values, all-gathered: every rank gets what it reads of the prompts in one exchange, then computes.

While it is under way a rank computes its own pieces and completions on themselves. The gathered keys stand in the order
of the prompts, so few large calls follow. The backward gathers again rather than keep them, and sends each rank the
gradients of its own keys in fp32, where they are added rank by rank: always the same bits, unlike a reduce-scatter's.

Bytes sent in a layer by all ranks, b = 2 K E n for n bytes an element and K key heads on a rank (after Ulysses, whose
ranks each send so much):

    forward   sum over pieces p of tokens(p) readers(p) b(model's dtype)
    backward  sum over pieces p of tokens(p) readers(p) (b(model's dtype) + b(fp32))

readers(p) being the other ranks that read any of p: all of them where each holds a completion of its group, and without
one those whose last piece stands behind p. A completion's keys stay where they are. It gives up memory: three copies of
the keys and values it reads, twice as large in the backward, and their travel is hidden by a rank's own work alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks import Call, calls_on, own_calls
from .exchange import Exchange, exchange
from .partials import Gradients, Kernel, Merged
from .shards import Piece, RingShard


class GatherSchedule:
    """Attention of ring rank `rank` of those that hold `shards`."""

    def __init__(self, shards: Sequence[RingShard], rank: int, group: dist.ProcessGroup) -> None:
        self.shards, self.rank, self.group = shards, rank, group
        self.own = shards[rank]
        self._indices: dict[torch.device, list[Tensor]] = {}

    @cached_property
    def read(self) -> list[Piece]:
        """What stands in the gathered keys: what this rank reads of others', and its own."""
        others = [p for r, s in enumerate(self.shards) if r != self.rank for p in s.pieces if self.own.reads(p)]
        return sorted([*others, *self.own.pieces])

    @cached_property
    def calls(self) -> tuple[list[Call], list[Call]]:
        """(on itself, on the gathered keys)."""
        return own_calls(self.own), calls_on(self.own, self.read)

    @cached_property
    def counts(self) -> list[int]:
        """Tokens that come from each rank; of its own, all."""
        shards = enumerate(self.shards)
        return [sum(p.tokens for p in s.pieces if r == self.rank or self.own.reads(p)) for r, s in shards]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        under_way = self._gather(k, v)
        merged = Merged(q, kernel)
        merged.begin(self.calls[0], k, v)
        kv = self._in_order(under_way.wait())
        merged.add(self.calls[1], kv[:, 0], kv[:, 1])
        return merged.out, merged.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: Kernel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in fp32 (fp64 for fp64)."""
        under_way = self._gather(k, v)
        gradients = Gradients(dout, q, out, lse, kernel)
        dkv = gradients.keys(len(k), k)
        gradients.add(self.calls[0], k, v, dkv)
        kv = self._in_order(under_way.wait())
        del under_way
        dgathered = gradients.keys(len(kv), k)
        gradients.add(self.calls[1], kv[:, 0], kv[:, 1], dgathered)
        del kv
        arrived = self._as_arrived(dgathered)
        del dgathered  # each of these is all of the row's keys and values
        self._add_home(arrived, dkv)
        return gradients.dq, dkv[:, 0], dkv[:, 1]

    def _gather(self, k: Tensor, v: Tensor) -> Exchange:
        mine = torch.stack([k[: self.own.prompt_tokens], v[: self.own.prompt_tokens]], 1)
        sends = self._index(mine.device)[:-1]
        return Exchange(
            [mine if len(i) == len(mine) else mine.index_select(0, i) for i in sends], self.counts, self.group
        )

    def _in_order(self, arrived: Tensor) -> Tensor:
        return arrived.index_select(0, self._index(arrived.device)[-1])

    def _as_arrived(self, ordered: Tensor) -> Tensor:
        """The inverse of `_in_order`."""
        return torch.empty_like(ordered).index_copy_(0, self._index(ordered.device)[-1], ordered)

    def _add_home(self, arrived: Tensor, dkv: Tensor) -> None:
        """Sends the gradients of other ranks' keys there, and adds what comes for own ones."""
        *sends, _ = self._index(dkv.device)
        lengths = [len(i) for i in sends]
        parts = exchange(arrived.split(self.counts), lengths, self.group).split(lengths)
        for index, part in zip(sends, parts, strict=True):
            dkv.index_add_(0, index, part)

    def _index(self, device: torch.device) -> list[Tensor]:
        """Of each rank, the rows of own prompt tokens that go there (of its own, all); then, for each row of the
        gathered keys, where it arrives."""
        if device not in self._indices:
            self._indices[device] = [x.to(device) for x in (*self._sends(), self._order())]
        return self._indices[device]

    def _sends(self) -> list[Tensor]:
        made, rows = [], torch.arange(self.own.prompt_tokens).split([p.tokens for p in self.own.pieces])
        for r, shard in enumerate(self.shards):
            parts = [x for p, x in zip(self.own.pieces, rows, strict=True) if r == self.rank or shard.reads(p)]
            made.append(torch.cat(parts) if parts else torch.empty(0, dtype=torch.long))
        return made

    def _order(self) -> Tensor:
        places: dict[Piece, Tensor] = {}
        start = 0
        for r, shard in enumerate(self.shards):
            for piece in shard.pieces:
                if r == self.rank or self.own.reads(piece):
                    places[piece] = torch.arange(start, start + piece.tokens)
                    start += piece.tokens
        return torch.cat([places[p] for p in self.read]) if self.read else torch.empty(0, dtype=torch.long)
