"""Uneven exchanges among the ranks of a group: every rank sends each other what it names, and nothing else travels.

One `all_to_all_single` an exchange, of which no byte is padding; what a rank sends itself stays where it is. Results
come in the order of the senders' ranks, so sums over them are the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Exchange:
    """An exchange under way; `wait`, which is called once, gives what arrived, [sum of `counts`, ...], sender by sender."""

    def __init__(self, rows: Sequence[Tensor], counts: Sequence[int], group: dist.ProcessGroup) -> None:
        """Sends `rows[i]` to rank i of the group, which hands out `counts[j]` rows of rank j."""
        me = dist.get_rank(group)
        assert counts[me] == len(rows[me])
        self._own, self._before = rows[me], sum(counts[:me])
        others = [i for i in range(len(rows)) if i != me]
        self._sent = torch.cat([rows[i] for i in others] or [rows[me][:0]])
        arrive, leave = ([n if i != me else 0 for i, n in enumerate(sizes)] for sizes in (counts, map(len, rows)))
        self._made = self._sent.new_empty(sum(arrive), *self._sent.shape[1:])
        self._work: Any = None
        if others:
            self._work = dist.all_to_all_single(self._made, self._sent, arrive, leave, group=group, async_op=True)

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        del self._sent  # as large as what arrived, of which the next line may make another
        before, after = self._made[: self._before], self._made[self._before :]
        return torch.cat([before, self._own, after]) if len(self._own) else self._made


def exchange(rows: Sequence[Tensor], counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """An `Exchange`, waited for."""
    return Exchange(rows, counts, group).wait()


def gather_rows(mine: Tensor, entries: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """[N, ...]: rows that the ranks hold, each rank those named by its `entries`, whole on every rank.

    Differentiable: since every rank computes the same from them, the gradient is on every rank already and each takes
    its own rows of it, unsummed. A row goes to every other rank once.
    """
    return _GatherRows.apply(mine, entries, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, entries: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
        own = entries[dist.get_rank(group)]
        assert len(own) == len(mine)
        ctx.own = own.to(mine.device)
        found = exchange([mine] * len(entries), [len(x) for x in entries], group)
        return torch.empty_like(found).index_copy_(0, torch.cat(list(entries)).to(mine.device), found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        return grad.index_select(0, ctx.own), None, None
