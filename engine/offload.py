"""The inputs of checkpointed layers in host memory instead of the GPU's, moved while the GPU computes.

    forward, layer i     its input [1, T, D] is copied out on a side stream while the layer runs, then its memory is free
    backward, layer i    waits for its own input, starts the copy of layer i-1's, and computes

Checkpointed layers leave one such tensor each: 1 GB at T = 120K and D = 4096 in bfloat16, 35 GB for the 36 layers of an
8B model. With this the GPU holds two. A copy of 1 GB takes 20 to 40 ms over PCIe, a layer of that size some 100 ms, so it
should hide; that is arithmetic, not measured. The host holds the sum, pinned, and keeps its buffers for the next step,
since pinning is slow; the largest row so far decides their size. Nothing but these inputs moves: rotary embeddings and
masks belong to all layers and stay. What comes back is what went out, bit for bit.

On the CPU the same copies are made without streams, which saves nothing and is there to be tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..kernels.gpu import on_gpu

_FUNCTION = "_gradient_checkpointing_func"
"""What transformers has each layer call as (function, *inputs); ours is put around it, instance by instance."""


def offload(model: PreTrainedModel) -> Offload:
    """Wraps what the model's layers are checkpointed with; to be called after checkpointing was turned on."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if layer.gradient_checkpointing]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no checkpointed layers whose inputs could go to host memory: "
            "leave model.offload_activations out"
        )
    store = Offload()
    for i, layer in enumerate(layers):
        inner = getattr(layer, _FUNCTION)
        setattr(layer, _FUNCTION, partial(store.run, inner, i == 0))
    return store


class _Kept:
    """One layer's input on the host, and on its way back."""

    def __init__(self, host: Tensor, device: torch.device, below: weakref.ref[_Kept] | None) -> None:
        self.host, self.device, self.below = host, device, below
        self.back: tuple[Tensor, torch.Event | None] | None = None


class Offload:
    """Host buffers, the side streams, and the chain of what the running forward has put there."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.bytes = 0
        self._last: weakref.ref[_Kept] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Offload:
        """A copied model begins with buffers of its own; a stream can't be copied."""
        memo[id(self)] = fresh = Offload()
        return fresh

    def run(self, checkpoint: Callable[..., Any], first: bool, function: Callable[..., Any], *args: Any) -> Any:
        """`checkpoint(function, *args)`, what it saves of `args` going to the host.

        Whatever `function` saves meets the checkpoint's own hooks, which stand within these.
        """
        if not torch.is_grad_enabled():
            return checkpoint(function, *args)
        if first:
            self._last = None
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *args)

    def _pack(self, x: Tensor) -> Tensor | _Kept:
        if not x.is_floating_point() or not x.numel():
            return x
        buffer = self._take(x.nbytes, on_gpu(x))
        host = buffer[: x.nbytes].view(x.dtype).view(x.shape)
        with self._aside(x.device):
            host.copy_(x, non_blocking=x.is_cuda)
        if x.is_cuda:
            x.record_stream(self._stream(x.device))  # its memory is taken again only after the copy
        kept = _Kept(host, x.device, self._last)
        weakref.finalize(kept, self.free.append, buffer).atexit = False
        self._last = weakref.ref(kept)  # the graph alone says how long a buffer is in use
        return kept

    def _unpack(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x, arrived = kept.back or self._fetch(kept)
        kept.back = None
        below = None if kept.below is None else kept.below()
        if below is not None and below.back is None:
            below.back = self._fetch(below)
        if arrived is not None:
            torch.cuda.current_stream(x.device).wait_event(arrived)
        return x

    def _fetch(self, kept: _Kept) -> tuple[Tensor, torch.Event | None]:
        """Begins a copy back. The memory belongs to the computing stream, so the copy waits for what used it before."""
        x = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
        with self._aside(kept.device):
            x.copy_(kept.host, non_blocking=x.is_cuda)
        if not x.is_cuda:
            return x, None
        x.record_stream(self._stream(x.device))
        return x, self._stream(x.device).record_event()

    def _aside(self, device: torch.device) -> AbstractContextManager[object]:
        """The side stream, after all that the computing stream has been given."""
        if device.type != "cuda":
            return nullcontext()
        stream = self._stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """One for both directions: a buffer is written again only after what was read from it, in the stream's order."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _take(self, size: int, pinned: bool) -> Tensor:
        """The smallest free buffer that is large enough; else a new one in place of one that was too small."""
        fitting = [i for i, buffer in enumerate(self.free) if buffer.nbytes >= size]
        if fitting:
            return self.free.pop(min(fitting, key=lambda i: self.free[i].nbytes))
        if self.free:
            self.bytes -= self.free.pop().nbytes
        self.bytes += size
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
