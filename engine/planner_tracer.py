"""Runs code without memory and counts what it holds and does, operator by operator.

Tensors are fake (`FakeTensorMode`: shape, dtype, device, no storage). One dispatch mode sees every operator:

* memory: storages, counted while they live, and again when they change their size (FSDP2 frees gathered weights so). What
  is asked for as pinned lies on the host, and is counted apart.
* operations: torch's own formulas (`torch.utils.flop_counter`), but attention by its pairs (`planner_operators`).
* messages: a collective or a send does nothing but be counted; what would arrive is memory that is there already.
* integers and short vectors stay real: lengths and masks steer Python, and nothing else in a step depends on values.
  Real numbers that are exchanged come back as this rank sent them: ranks tell each other only what they agree on. Of
  others, all count as not zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .planner_operators import FLOPS, SCRATCH

aten, c10d = torch.ops.aten, torch.ops.c10d
REAL_ELEMENTS = 1 << 20
"""Tensors made from nothing stay real up to this size: a row's numbers, never a layer's."""


@dataclass
class Traced:
    """What a step held, in bytes, and did, in operations. `peak` counts the model itself; `kinds` splits operations.

    `host` is the most that was pinned on the host; `sent` bytes that this rank handed to others, by collective.
    """

    peak: int = 0
    alive: int = 0
    flops: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    peak_operator: str = ""
    host: int = 0
    sent: dict[str, int] = field(default_factory=dict)


class StepTrace(TorchDispatchMode):
    """Counts what runs within it, on top of a `FakeTensorMode` that allows real inputs."""

    def __init__(self, *holding: nn.Module) -> None:
        super().__init__()
        self.made = Traced()
        self._operator = "what is given"
        self._sizes: dict[int, int] = {}
        self._pinned: dict[int, int] = {}
        self._changing: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for module in holding:
            for tensor in (*module.parameters(), *module.buffers()):
                self.hold(tensor)
                if tensor.grad is not None:
                    self.hold(tensor.grad)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with this rank's share
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        fakes = any(isinstance(x, FakeTensor) for x in given)
        if func.namespace == "c10d":
            return self._communicate(func, args, fakes)
        if given and not fakes:
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func._overloadpacket is aten.nonzero:
            with _disable_current_modes():  # which numbers of a step aren't zero nobody knows: all
                return torch.ones(given[0].shape, dtype=torch.bool).nonzero()
        self._operator = str(func)
        pinned = bool(kwargs.pop("pin_memory", False))
        result = func(*args, **kwargs)
        if not given and isinstance(result, FakeTensor) and _stays_real(func, result):
            with _disable_current_modes():
                return func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self.hold(tensor, pinned=pinned, changing=not given)
        self._look_again()
        scratch = SCRATCH[func._overloadpacket](*args) if func._overloadpacket in SCRATCH else 0
        self._reach(self.made.alive + scratch)
        return result

    def hold(self, tensor: Tensor, *, pinned: bool = False, changing: bool = False) -> None:
        """Counts the tensor's storage until it dies; `changing`: it may be freed and filled again while it lives."""
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes or key in self._pinned:
            return
        if pinned:
            self._pinned[key] = size
            self.made.host = max(self.made.host, sum(self._pinned.values()))
        else:
            self._sizes[key] = size
            self.made.alive += size
            if changing:
                self._changing[key] = weakref.ref(storage)
        self._reach(self.made.alive)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._changing.pop(key, None)
        if self._pinned.pop(key, None) is None:
            self.made.alive -= self._sizes.pop(key)

    def _reach(self, total: int) -> None:
        if total > self.made.peak:
            self.made.peak, self.made.peak_operator = total, self._operator

    def _look_again(self) -> None:
        """Storages change their size behind every operator's back."""
        for key, reference in self._changing.items():
            storage = reference()
            size = self._sizes[key] if storage is None else storage.nbytes()
            self.made.alive += size - self._sizes[key]
            self._sizes[key] = size

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        flops = FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if flops is not None:
            spent = int(flops(*args, **kwargs, out_val=result))
            self.made.flops += spent
            named = kwargs.get("kind", args[1]) if func._overloadpacket is torch.ops.longreach.spend else str(func)
            kind = "attention" if "attention" in named else "products"
            self.made.kinds[kind] = self.made.kinds.get(kind, 0) + spent

    def _communicate(self, func: Any, args: Any, fakes: bool) -> Any:
        name = func._overloadpacket.__name__
        arrives, leaves = (tree_leaves(args[i]) for i in (0, 1 if name in _TWO_SIDED else 0))
        if fakes and name != "recv_":
            self._look_again()
            sent = sum(x.nbytes for x in leaves if isinstance(x, Tensor))
            if name in _SHARED_OUT:
                ranks = ProcessGroup.unbox(args[2]).size()
                sent = sent * (ranks - 1) // (ranks if name == "_reduce_scatter_base_" else 1)
            self.made.sent[name] = self.made.sent.get(name, 0) + sent
        elif name == "alltoall_base_":
            with _disable_current_modes():
                arrives[0].copy_(leaves[0])
        work = FakeWork().boxed()
        return work if name in _WORK_ALONE else (args[0], work)


_TWO_SIDED = frozenset({"alltoall_base_", "_allgather_base_", "_reduce_scatter_base_"})
_SHARED_OUT = frozenset({"_allgather_base_", "_reduce_scatter_base_"})
_WORK_ALONE = frozenset({"alltoall_base_", "send", "recv_", "barrier"})


def _stays_real(func: Any, made: Tensor) -> bool:
    """Numbers of a row do; buffers that are filled later, of fractions or bytes, are a step's own."""
    if func._overloadpacket is aten.empty and (made.is_floating_point() or made.dtype == torch.uint8):
        return False
    return not made.is_floating_point() or made.numel() <= REAL_ELEMENTS


def trace(
    model: Callable[[], nn.Module],
    step: Callable[[Any], object],
    *,
    prepare: Callable[[Any], Callable[[Any], object]] | None = None,
) -> Traced:
    """Runs step(model()) without memory; the caller pretends a GPU around it where one is meant.

    `model` is called with the meta device as default. `prepare` gets the fake model, may shard it or take an update, and
    gives the step in place of `step`; none of that is counted. What is trainable then gets gradients, which is how every
    micro-batch but an update's first finds it.
    """
    with torch.device("meta"):
        made = model()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        _as_fake(made)
        if prepare is not None:
            step = prepare(made)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                # a DTensor asks once what the whole would be, on whole fake tensors that aren't a step's
                parameter.grad += parameter.grad
    with fake, StepTrace(made) as tracer:
        kept = step(made)
    del kept
    return tracer.made


def _as_fake(model: nn.Module) -> None:
    """Meta tensors become fake ones of the CPU, whose operators carry a device; shared ones stay shared."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(
                        torch.empty_like(parameter, device="cpu"), parameter.requires_grad
                    )
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
