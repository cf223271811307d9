"""AdamW with 8-bit averages or with averages in host memory, both by torchao (an extra).

8-bit: codes of a fixed table, scaled in blocks of 256 entries (Dettmers et al., arXiv 2110.02861); a parameter of fewer than
4096 entries, or of a number that 256 doesn't divide, keeps fp32 averages. The update is compiled by torch at the first
step, once for each shape of parameter: a minute for a small model on a CPU.

Offloaded: torchao's `CPUOffloadOptimizer` keeps a copy of the weights and their AdamW on the host and updates there. It
copies a gradient out as soon as the backward has it, which is before it is clipped, and passes over parameters without one.
`OffloadedAdamW` hands it aliases of the parameters instead, other leaves on the same memory, and gives those their gradients
at the step: clipped, summed over all micro-batches, zero where none came. What that gives up is the overlap of the copies
with the backward. It needs a GPU and has not been run on one yet: its logic is tested on the CPU with streams that do
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchao.optim import AdamW8bit, CPUOffloadOptimizer  # pyright: ignore[reportMissingImports]
from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

_PARTS, _ATTRIBUTES = "8-bit parts", "8-bit attributes"


def make(kind: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer called `kind`, on groups of parameters as `torch.optim.AdamW` takes them.

    Raises:
        ValueError: weights that are not on a GPU, for the offloaded one.
    """
    if kind == "adamw-8bit":
        optimizer = AdamW8bit(groups, **options)
        optimizer.register_state_dict_post_hook(_to_parts)
        optimizer.register_load_state_dict_pre_hook(_from_parts)
        return optimizer
    device = groups[0]["params"][0].device
    if device.type != "cuda":
        raise ValueError(
            f"optimizer.kind = {kind!r} moves AdamW's averages from a GPU to host memory, but the weights are on "
            f'{device.type}: set optimizer.kind = "adamw"'
        )
    return OffloadedAdamW(groups, options)


def _to_parts(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """8-bit averages as the plain tensors they are made of, for a checkpoint that knows no classes."""

    def plain(value: Any) -> Any:
        if not isinstance(value, OptimState8bit):
            return value
        names, attributes = value.__tensor_flatten__()
        parts = {name: getattr(value, name) for name in names}
        return {_PARTS: parts, _ATTRIBUTES: [str(a) if isinstance(a, torch.dtype) else a for a in attributes]}

    return {**saved, "state": _mapped(saved["state"], plain)}


def _from_parts(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    def whole(value: Any) -> Any:
        if not isinstance(value, dict) or _PARTS not in value:
            return value
        attributes = [getattr(torch, a.removeprefix("torch.")) if isinstance(a, str) else a for a in value[_ATTRIBUTES]]
        return OptimState8bit.__tensor_unflatten__(value[_PARTS], attributes)

    return {**saved, "state": _mapped(saved["state"], whole)}


def _mapped(state: dict[Any, dict[str, Any]], change: Any) -> dict[Any, dict[str, Any]]:
    return {key: {name: change(value) for name, value in averages.items()} for key, averages in state.items()}


class OffloadedAdamW(CPUOffloadOptimizer):
    """torchao's, on aliases of the parameters that get their gradients at the step. One GPU: it knows no shards."""

    def __init__(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        aliased = []
        for group in groups:
            pairs = [(p, nn.Parameter(p.detach())) for p in group["params"]]
            self._pairs += pairs
            aliased.append({**group, "params": [alias for _, alias in pairs]})
        super().__init__(aliased, torch.optim.AdamW, offload_gradients=True, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Takes the parameters' gradients, and drops each when its copy to the host has been queued."""
        assert closure is None
        for parameter, alias in self._pairs:
            if parameter.grad is not None:
                torch.autograd.backward([alias], [parameter.grad])
                parameter.grad = None
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _ in self._pairs:
            parameter.grad = None
        super().zero_grad(set_to_none)
