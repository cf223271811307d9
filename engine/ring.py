"""A ring of ranks: keys and values of the prompts go round from neighbour to neighbour while each rank computes.

At step t rank r works on keys of rank r + t, which came from rank r + 1, while the next are under way to it and these to
rank r - 1. In the backward keys and values travel again, and the sum of their gradients follows them a step behind in
fp32, each rank adding its own; from the last reader it goes home to its owner. Sums are made in the ring's order, so two
runs are bitwise equal.

A piece of a prompt travels as far as someone reads it: hops(p) is the distance, down the ring, to the farthest rank that
does. In a plain causal row the piece before the middle goes all the way, ring - 1 hops, and that behind the middle of rank
s is read by ranks below s alone, s hops: the way down was chosen for that. A rank with a completion reads the whole prompt
of its group. Completions' keys stay where they are. Bytes sent in a layer by all ranks, b = 2 K E n for n bytes an
element and K key heads on a rank (after Ulysses, whose ranks each send so much):

    forward   sum over pieces p of tokens(p) hops(p) b(model's dtype)
    backward  sum over pieces p of tokens(p) hops(p) (b(model's dtype) + b(fp32))

A step holds two ranks' keys and, in the backward, the gradients of two. It gives up large calls: each step's are 1 / ring
of what the all-gather computes at once, and every step waits for the slowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks import calls_on, own_calls
from .partials import Gradients, Kernel, Merged
from .shards import Piece, RingShard

Message = tuple[Tensor, int]
"""What is sent or received, and the other rank's place in the ring."""


def hops(shards: Sequence[RingShard]) -> list[list[int]]:
    """Of each rank and each of its pieces, how far down the ring it is read."""
    ring = len(shards)
    return [
        [max((t for t in range(1, ring) if shards[(s - t) % ring].reads(piece)), default=0) for piece in shard.pieces]
        for s, shard in enumerate(shards)
    ]


class RingSchedule:
    """Attention of ring rank `rank` of those that hold `shards`; nothing travels where that is one rank."""

    def __init__(self, shards: Sequence[RingShard], rank: int, group: dist.ProcessGroup) -> None:
        self.ring, self.rank, self.group, self.own = len(shards), rank, group, shards[rank]
        self._reach = [list(zip(s.pieces, n, strict=True)) for s, n in zip(shards, hops(shards), strict=True)]
        self.own_calls = [*own_calls(self.own), *calls_on(self.own, self.own.pieces)]
        self.calls = [calls_on(self.own, self.arriving(t)) for t in range(self.ring)]
        """By step; of step 0, what `own_calls` has already."""
        self._steps = range(1, self.ring)
        self._known: dict[tuple[int, int, bool, torch.device], Tensor] = {}

    def arriving(self, t: int) -> list[Piece]:
        """What reaches this rank at step t, all of it read here or farther on; at step 0, what it holds."""
        return [piece for piece, far in self._reach[(self.rank + t) % self.ring] if far >= t]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        coming = self._pass_keys(1, self._own_keys(k, v))
        merged = Merged(q, kernel)
        diagonal = [call for call in self.own_calls if call.causal]
        merged.begin(diagonal, k, v)
        merged.add(self.own_calls[len(diagonal) :], k, v)
        for t in self._steps:
            kv = coming.wait()
            coming = self._pass_keys(t + 1, kv)
            merged.add(self.calls[t], kv[:, 0], kv[:, 1])
        return merged.out, merged.lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: Kernel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in fp32 (fp64 for fp64)."""
        coming = self._pass_keys(1, self._own_keys(k, v))
        gradients = Gradients(dout, q, out, lse, kernel)
        dkv = gradients.keys(len(k), k)
        gradients.add(self.own_calls, k, v, dkv)
        sums, home = _Coming(dkv[:0], [], []), []
        for t in self._steps:
            kv = coming.wait()
            coming = self._pass_keys(t + 1, kv)
            mine = gradients.keys(len(kv), k)
            gradients.add(self.calls[t], kv[:, 0], kv[:, 1], mine)
            if t > 1:
                mine += sums.wait()
            sums, arriving = self._pass_sums(t, mine)
            home.append(arriving)
        for t, arriving in zip(self._steps, home, strict=True):
            dkv.index_add_(0, self._rows(0, t, dkv.device, exactly=True), arriving.wait())
        return gradients.dq, dkv[:, 0], dkv[:, 1]

    def _own_keys(self, k: Tensor, v: Tensor) -> Tensor:
        """[n, 2, K, E]: what of this rank's could travel."""
        return torch.stack([k[: self.own.prompt_tokens], v[: self.own.prompt_tokens]], 1)

    def _pass_keys(self, t: int, held: Tensor) -> _Coming:
        """What arrives at step t; of what is held now, the rest goes on. Nothing after the last step."""
        if t >= self.ring:
            return _Coming(held[:0], [], [])
        made = held.new_empty(_tokens(self.arriving(t)), *held.shape[1:])
        down, up = (self.rank - 1) % self.ring, (self.rank + 1) % self.ring
        onward = _pick(held, self._rows(t - 1, t, held.device))
        return _Coming(made, self._post([(onward, down)], [(made, up)]), [onward])

    def _pass_sums(self, t: int, mine: Tensor) -> tuple[_Coming, _Coming]:
        """Gradients of the keys of step t: on with those keys, or home. (What follows to step t + 1, what is own.)"""
        owner, last_reader = (self.rank + t) % self.ring, (self.rank - t) % self.ring
        down, up = (self.rank - 1) % self.ring, (self.rank + 1) % self.ring
        device = mine.device
        onward, ended = _pick(mine, self._rows(t, t + 1, device)), _pick(mine, self._rows(t, t, device, exactly=True))
        follows = mine.new_empty(_tokens(self.arriving(t + 1)) if t + 1 < self.ring else 0, *mine.shape[1:])
        own = mine.new_empty(len(self._rows(0, t, device, exactly=True)), *mine.shape[1:])
        work = self._post([(onward, down), (ended, owner)], [(follows, up), (own, last_reader)])
        return _Coming(follows, work, [onward, ended]), _Coming(own, work, [])

    def _rows(self, t: int, far: int, device: torch.device, *, exactly: bool = False) -> Tensor:
        """Of the keys of step t, the rows of pieces that go `far` hops or farther, or exactly so far. Remembered, since
        every layer asks for the same."""
        name = (t, far, exactly, device)
        if name not in self._known:
            reach = [(piece, n) for piece, n in self._reach[(self.rank + t) % self.ring] if n >= t]
            wanted = torch.tensor([n == far if exactly else n >= far for _, n in reach], dtype=torch.bool)
            tokens = torch.tensor([piece.tokens for piece, _ in reach], dtype=torch.long)
            self._known[name] = wanted.repeat_interleave(tokens).nonzero().squeeze(1).to(device)
        return self._known[name]

    def _post(self, sends: list[Message], receives: list[Message]) -> list[Any]:
        """Between each pair of ranks messages match in order; empty ones are left out on both sides."""
        pairs = [(dist.isend, m) for m in sends] + [(dist.irecv, m) for m in receives]
        found = [
            dist.P2POp(op, x, dist.get_global_rank(self.group, peer), group=self.group)
            for op, (x, peer) in pairs
            if x.numel()
        ]
        return dist.batch_isend_irecv(found) if found else []


class _Coming:
    """A tensor under way, and those that must live until it has left.

    Two that were posted together share their list of work, and each piece of work is waited for once: gloo would wait
    for ever for a message that was taken already.
    """

    def __init__(self, made: Tensor, work: list[Any], sent: list[Tensor]) -> None:
        self.made, self.work, self.sent = made, work, sent

    def wait(self) -> Tensor:
        while self.work:
            self.work.pop(0).wait()
        return self.made


def _tokens(pieces: Sequence[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)


def _pick(held: Tensor, rows: Tensor) -> Tensor:
    return held if len(rows) == len(held) else held.index_select(0, rows)
