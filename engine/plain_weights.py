"""A model's weights as a serving engine takes them: its checkpoint's names, whole, adapters merged, one tensor at a time.

What `save_pretrained` writes to a file in one go, for hand-overs that hold a tensor or two at once: a file written as it is
made, a broadcast, a shared buffer. One thing is more: a head that shares the embeddings' weight is named too. An engine that
repacked the head when it loaded it (vLLM on a CPU) keeps the old one otherwise, 0.3 to 0.6 nats off and without a word.

It gives up on low memory where transformers renames or splits weights on their way to a checkpoint (the experts of a
mixture): those models pass through memory whole, on the rank that keeps them. Merging rounds to the base weight's dtype, so a
small step of an adapter can be lost in bfloat16; loading the adapter itself loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .whole import whole, whole_state

_BASE = ".base_layer.weight"


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor before it is made."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def like(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class PlainWeights:
    """The weights of `model` in `dtype` (None: each its own; what is no floating-point number always).

    `entries` says what iterating will give, in order. Iterating is a collective call where the model is sharded, so that all
    ranks do it, to the end, one at a time; with `keep` False the tensors are gathered and not looked at.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        self._adapted = _adapted_layers(model)
        self._state = {name: t for name, t in model.state_dict(keep_vars=True).items() if ".lora_" not in name}
        meta = {
            _plain(name): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in self._state.items()
        }
        named = {name for name, _ in _saved(model, meta)}
        self._renamed = named != meta.keys()
        self.entries = [
            Entry(name, tuple(tensor.shape), self._cast(tensor.dtype))
            for name, tensor in (_saved(model, meta) if self._renamed else meta.items())
        ]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @torch.no_grad()
    def pairs(self, *, keep: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every entry, on the model's device (on the CPU where weights are renamed)."""
        for name, tensor in self._whole(keep):
            yield name, tensor.detach().to(self._cast(tensor.dtype)).contiguous() if keep else tensor

    def _whole(self, keep: bool) -> Iterator[tuple[str, Tensor]]:
        if self._renamed:
            if self._adapted:
                raise ValueError(
                    f"merging adapters into a {type(self.model).__name__}, whose checkpoint names other weights than the "
                    'model, is not supported: hand the adapter over instead (generator.sync.kind = "lora")'
                )
            yield from _saved(self.model, whole_state(self.model, keep=keep))
            return
        adapters = self.model.state_dict(keep_vars=True) if self._adapted else {}
        for name, tensor in self._state.items():
            full = whole(tensor.detach())
            layer = self._adapted.get(name)
            yield _plain(name), full if layer is None else _merged(full, name.removesuffix(_BASE), layer, adapters)

    def _cast(self, own: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and own.is_floating_point else own


def _plain(name: str) -> str:
    """A weight's name without what peft put into it."""
    return name.replace(".base_layer.", ".")


def _adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """By the name of its base weight, each layer that an adapter was put around."""
    if not getattr(model, "peft_config", None):
        return {}
    from peft.tuners.lora import Linear

    return {f"{name}{_BASE}": module for name, module in model.named_modules() if isinstance(module, Linear)}


def _merged(base: Tensor, name: str, layer: Any, adapters: Mapping[str, Tensor]) -> Tensor:
    """The base weight with its adapters added, rounded once."""
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    for adapter in layer.active_adapters:
        up, down = (whole(adapters[f"{name}.lora_{part}.{adapter}.weight"].detach()) for part in "BA")
        total = total + (up @ down).to(total) * layer.scaling[adapter]
    return total.to(base.dtype)


def _saved(model: PreTrainedModel, state: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """As `save_pretrained` would name and split them."""
    return list(revert_weight_conversion(model, dict(state)).items())
