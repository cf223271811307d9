"""A group in three phases: its prompt once, its completions one piece after the other, the prompt's gradient last.

    1. the prompt, which leaves keys and values of every layer behind
    2. each piece of completions on those, forward and, in the backward, forward again and backward; what it adds to the
       gradient of the prompt's keys and values is summed in fp32
    3. the prompt's backward, from those sums and from the hidden row that predicts the first tokens

The same numbers as a packed row (Schedule-Level Shared-Prefix Reuse, arXiv 2606.01143), in the memory of the prompt and
one piece; `packing.three_phases_pay` says when that is worth its second forward of the completions. Seen from outside it
is one autograd function from the decoder's parameters to hidden rows, so any loss may follow. It gives up sharding: each
piece is a forward of its own, so weights that are gathered for a forward would be gathered for each piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import attention
from .attention import Layout, SharedPrefix
from .packing import Group, one_row
from .precision import Precision

Decode = Callable[[Tensor, Tensor, Layout], Tensor]
"""(token ids [T], positions [T], layout) -> hidden [T, D]."""
KeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values [P, K, E] of a prompt in each layer, or their gradients."""


def three_phases(
    decode: Decode, parameters: Sequence[nn.Parameter], group: Group, pieces: Sequence[Sequence[int]], backend: str
) -> Tensor:
    """Hidden rows [1 + sum(R), D] of the prompt's last token and of all completions' tokens, in the group's order.

    Args:
        decode: the model's decoder; called once for the prompt and twice for each piece (once without gradients).
        parameters: all of its parameters that require a gradient.
        pieces: which completions are computed together; each of them once.
    """
    device = group.prompt_ids.device.type if not parameters else parameters[0].device.type
    learns = torch.is_grad_enabled() and bool(parameters)
    return _ThreePhases.apply(_Work(decode, group, pieces, backend, Precision.current(device), learns), *parameters)


@dataclass(frozen=True)
class _Work:
    """One group, and how it is cut."""

    decode: Decode
    group: Group
    pieces: Sequence[Sequence[int]]
    backend: str
    precision: Precision
    learns: bool

    def prompt(self) -> tuple[Tensor, KeyValues]:
        """The hidden row of the prompt's last token [1, D], and what completions see of the prompt."""
        row = one_row([Group(self.group.prompt_ids, ())])
        layout = _Keep(SharedPrefix(row, self.backend))
        with self.precision(), torch.set_grad_enabled(self.learns):
            last = self.decode(row.input_ids(), row.position_ids(), layout)[-1:].clone()
        return last, layout.take()

    def completions(self, piece: Sequence[int], past: KeyValues, sums: KeyValues | None) -> Tensor:
        """Hidden rows of the piece's tokens; their backward adds to `sums`."""
        row = one_row([Group(self.group.prompt_ids, [self.group.completions[c] for c in piece])])
        layout = _OnPrompt(past, sums, row.cu_completions, self.backend)
        P = row.prompt_tokens
        with self.precision(), torch.set_grad_enabled(sums is not None):
            return self.decode(row.input_ids()[P:], row.position_ids()[P:], layout)

    @property
    def lengths(self) -> list[int]:
        return [len(c) for c in self.group.completions]

    def filled(self) -> list[Sequence[int]]:
        """The pieces that have tokens."""
        return [piece for piece in self.pieces if any(self.lengths[c] for c in piece)]


class _Keep:
    """Layout of a prompt alone that keeps each layer's keys and values."""

    def __init__(self, inner: Layout) -> None:
        self.inner = inner
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {}

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        if self.kept is not None:  # a checkpointed layer comes here again in the backward
            self.kept[layer] = (k_TKE, v_TKE)
        return self.inner.attend(layer, q_THE, k_TKE, v_TKE, scale)

    def take(self) -> KeyValues:
        """Hands them over: the graph of a checkpointed layer holds its layout, which must not hold that graph."""
        assert self.kept is not None
        kept, self.kept = self.kept, None
        return [kept[layer] for layer in range(len(kept))]


class _OnPrompt:
    """Layout of completions whose prompt is there already as keys and values."""

    def __init__(self, past: KeyValues, sums: KeyValues | None, cu_completions: Tensor, backend: str) -> None:
        self.past, self.sums, self.cu_completions, self.backend = past, sums, cu_completions, backend

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        cross = {"causal": False, "scale": scale, "backend": self.backend}
        own = {"causal": True, "scale": scale, "backend": self.backend, "cu_seqlens_q": self.cu_completions}
        own["cu_seqlens_k"] = self.cu_completions
        sums = None if self.sums is None else self.sums[layer]
        return _OnPromptAttention.apply(q_THE, k_TKE, v_TKE, *self.past[layer], sums, cross, own)


class _OnPromptAttention(torch.autograd.Function):
    """Completions on their prompt and on themselves, merged; the prompt's part of the gradient goes into `sums`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor,
        sums: tuple[Tensor, Tensor] | None, cross: dict[str, Any], own: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(q.dtype, torch.float32)  # partial results are merged before they are rounded
        out_x, lse_x = attention.forward(q, past_k, past_v, out_dtype=wide, **cross)
        out_c, lse_c = attention.forward(q, k, v, out_dtype=wide, **own)
        out, lse = attention.merge(out_x, lse_x, out_c, lse_c)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse)
        ctx.sums, ctx.calls = sums, (cross, own)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grads
        q, k, v, past_k, past_v, out, lse = ctx.saved_tensors
        cross, own = ctx.calls
        wide = torch.promote_types(q.dtype, torch.float32)  # partial gradients are added before they are rounded
        with torch.autocast(q.device.type, enabled=False):
            dq, dk_x, dv_x = attention.backward(dout, q, past_k, past_v, out, lse, grad_dtype=wide, **cross)
            dq_c, dk, dv = attention.backward(dout, q, k, v, out, lse, grad_dtype=wide, **own)
            for total, part in zip(ctx.sums, (dk_x, dv_x), strict=True):
                total.add_(part)
        return dq.add_(dq_c).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 5


class _ThreePhases(torch.autograd.Function):
    """From parameters to hidden rows; they are inputs so that autograd knows what the rows hang on."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *parameters: nn.Parameter) -> Tensor:
        last, past = work.prompt()
        ctx.work, ctx.parameters, ctx.prompt = work, parameters, (last, past)
        seen = [(k.detach(), v.detach()) for k, v in past]
        rows = [last.new_empty(0, last.shape[1]) for _ in work.lengths]
        for piece in work.filled():
            hidden = work.completions(piece, seen, None)
            for c, part in zip(piece, hidden.split([work.lengths[c] for c in piece]), strict=True):
                rows[c] = part
        return torch.cat([last.detach(), *rows])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        work, (last, past) = ctx.work, ctx.prompt
        dlast, *drows = dhidden.split([1, *work.lengths])
        seen = [(k.detach(), v.detach()) for k, v in past]
        sums = [(_zeros(k), _zeros(v)) for k, v in past]
        totals: list[Tensor | None] = [None] * len(ctx.parameters)

        def add(outputs: list[Tensor], douts: list[Tensor]) -> None:
            for i, part in enumerate(torch.autograd.grad(outputs, ctx.parameters, douts, allow_unused=True)):
                total = totals[i]
                totals[i] = part if total is None else total if part is None else total + part

        for piece in work.filled():
            add([work.completions(piece, seen, sums)], [torch.cat([drows[c] for c in piece])])
        roots = [(last, dlast)]
        for pair, of_pair in zip(past, sums, strict=True):
            roots += [(x, total.to(x.dtype)) for x, total in zip(pair, of_pair, strict=True)]
        roots = [(x, gradient) for x, gradient in roots if x.requires_grad]  # with adapters, the first layer's don't
        add([x for x, _ in roots], [gradient for _, gradient in roots])
        return None, *totals


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
