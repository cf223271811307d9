"""MLPs and norms computed in pieces of the sequence, so that what they make on the way never exists whole.

    y = [f(x[0:n]), f(x[n:2n]), ...]        forward, without a graph
    dx[i:i+n], dW += backward of f(x[i:i+n])    backward, each piece computed again

An MLP makes three tensors as wide as its inner layer, and a norm fp32 copies of its input; for 120K tokens of an 8B model
these are 3 GB and 2 GB each. In pieces only x is kept, and one piece's worth of the rest is alive. The same values, each
row being its own: a row's products are summed in the same order, but a library may choose another kernel for another
number of rows, which shows in the last bits. A weight's gradient is summed over the pieces in fp32 (fp64 for fp64) and
rounded to the weight's dtype once.

The module stays what it is, class, parameters and names: only the instance's `forward` is replaced. Without checkpointed
layers a piece is computed twice, as its price; within one, not three times: x is saved before the pieces run and nothing
after, so when a layer ends in its MLP, the layer's own recomputation stops there and the pieces run in the backward alone.
What it gives up: under autocast weights are rounded anew for each piece, so pieces should be thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from .precision import Precision

Forward = Callable[[Tensor], Tensor]
_TOLERANCE = 0.02
"""Of the largest output: what rounding may change in bfloat16 when another token changes. A mixing layer changes it by 1."""


def tile(model: PreTrainedModel, tokens: int, *, verify: bool = True) -> list[str]:
    """Makes the model's MLPs and norms work in pieces of at most `tokens`; gives the names of what it changed.

    Routed experts are tiled like any MLP: each token is routed by itself. Without `verify` nothing is computed, so that a
    model without numbers (on the meta device, or of fake tensors) can be tiled.

    Raises:
        ValueError: a layer holds something that isn't an MLP of each token by itself.
    """
    assert tokens > 0
    found = dict(_tileable(model.get_decoder()))
    for name, module in found.items() if verify else ():
        _check_position_wise(name, module, model)
    for module in found.values():
        module.forward = Tiled(module, module.forward, tokens)
    return sorted(found)


def _tileable(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Norms anywhere, and what stands in a layer beside its attention (which knows the number of its layer)."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(decoder).__name__} has no list of layers: leave model.tile_tokens out (0)")
    for name, module in decoder.named_modules():
        if "Norm" in type(module).__name__ and next(module.parameters(), None) is not None:
            yield name, module
    for i, layer in enumerate(layers):
        for name, part in layer.named_children():
            wide = any(parameter.ndim > 1 for parameter in part.parameters())
            if wide and not hasattr(part, "layer_idx"):
                yield f"layers.{i}.{name}", part


@torch.no_grad()
def _check_position_wise(name: str, module: nn.Module, model: PreTrainedModel) -> None:
    """Changes one token of four and looks whether another one's output moves."""
    first = next(module.parameters())
    width = first.shape[-1] if first.ndim == 1 else model.config.get_text_config().hidden_size
    draw = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 1, 4, width, generator=draw).to(first.device, first.dtype)
    outs = [module(x), module(torch.cat([x[:, :2], other[:, 2:3], x[:, 3:]], dim=1))]
    if not all(isinstance(out, Tensor) and out.shape[:2] == x.shape[:2] for out in outs):
        raise ValueError(
            f"{name} ({type(module).__name__}) doesn't give one row a token: leave model.tile_tokens out (0)"
        )
    moved = (outs[0] - outs[1]).abs().flatten(2).amax(-1)[0]
    if moved[[0, 1, 3]].max() > _TOLERANCE * outs[0].abs().max():
        raise ValueError(
            f"{name} ({type(module).__name__}) mixes tokens: in pieces of the sequence it would compute something else; "
            "leave model.tile_tokens out (0)"
        )


class Tiled:
    """Stands in for the `forward` of one module instance."""

    def __init__(self, module: nn.Module, forward: Forward, tokens: int) -> None:
        self.module, self.forward, self.tokens = module, forward, tokens

    def __call__(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        dim = max(range(len(lead)), key=lambda d: lead[d])  # the sequence: [1, T, D], [1, T, H, E] or [1, H, T, E]
        if lead[dim] <= self.tokens:
            return self.forward(x)
        count = -(-lead[dim] // self.tokens)
        call = _Call(self.forward, dim, -(-lead[dim] // count), Precision.current(x.device.type))
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
            return call.pieces(x)
        token = _Keep.apply(x, torch.empty(0, requires_grad=True))
        return _Run.apply(call, token.grad_fn, parameters, token, x, *parameters)


@dataclass(frozen=True)
class _Call:
    """One call of a module: `forward` in pieces of `tokens` along `dim`."""

    forward: Forward
    dim: int
    tokens: int
    precision: Precision

    def pieces(self, x: Tensor) -> Tensor:
        """The whole output, written piece by piece: with `cat` it would stand in memory twice."""
        made: Tensor | None = None
        with self.precision():
            for at, part in self.split(x):
                out = self.forward(part)
                if made is None:
                    made = out.new_empty([*x.shape[:-1], out.shape[-1]])
                self.take(made, at, part).copy_(out)
        assert made is not None
        return made

    def split(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Where each piece begins, and the piece."""
        for at in range(0, x.shape[self.dim], self.tokens):
            yield at, x.narrow(self.dim, at, min(self.tokens, x.shape[self.dim] - at)).contiguous()

    def take(self, x: Tensor, at: int, like: Tensor) -> Tensor:
        """The piece of another tensor that belongs to `like`."""
        return x.narrow(self.dim, at, like.shape[self.dim])


class _Keep(torch.autograd.Function):
    """Saves x before the pieces run, as an empty tensor's history; that belongs to the graph and is freed with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dummy: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Run(torch.autograd.Function):
    """The pieces. Parameters are inputs so that autograd knows what the output hangs on; nothing is saved here."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, kept: Any, parameters: list[nn.Parameter], token: Tensor, x: Tensor, *_: Tensor
    ) -> Tensor:
        ctx.call, ctx.kept, ctx.parameters = call, kept, parameters
        return call.pieces(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        call, parameters, learns = ctx.call, ctx.parameters, ctx.needs_input_grad[4]
        (x,) = ctx.kept.saved_tensors
        dx = torch.empty_like(x) if learns else None
        sums: list[Tensor | None] = [None] * len(parameters)
        for at, part in call.split(x):
            leaf = part.detach().requires_grad_(learns)
            with call.precision(), torch.enable_grad():
                out = call.forward(leaf)
            wanted = [*([leaf] if learns else []), *parameters]
            found = list(torch.autograd.grad(out, wanted, call.take(dy, at, part), allow_unused=True))
            if dx is not None:
                call.take(dx, at, part).copy_(found.pop(0))
            for i, gradient in enumerate(found):
                sums[i] = _add(sums[i], gradient)
        rounded = [None if total is None else total.to(p.dtype) for total, p in zip(sums, parameters, strict=True)]
        return None, None, None, None, dx, *rounded


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """In fp32 at least; a weight that no piece used (an expert that no token chose) stays without a gradient."""
    if part is None:
        return total
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    return total.add_(part)
