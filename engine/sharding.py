"""How a model's weights lie on the ranks: whole on one process, copied to all, or sharded over all of them (FSDP2).

Sharded, every decoder layer is a unit that is gathered for its forward and again for its backward. What no layer holds
(embeddings, head) is a unit around the model, gathered once for all that happens in one `run`: the fused loss, which reads
the head chunk by chunk inside it, gets the whole weight and FSDP2 hears of one gradient. A weight that is tied to another
is in that unit with it.

    gradient of a rank's shard = sum over ranks, in fp32, never a mean: the loss is divided once, by a global number

Which dtype computes is autocast's decision alone, on many ranks as on one. Where it would round a layer's weights to
bfloat16 they are rounded before they are gathered, which halves the bytes and changes no bit: the head and the embeddings
stay fp32, and so do vectors (norms, biases), which are never sharded but copied, their gradients summed with one more
collective of a few hundred KB. Frozen weights of an adapter run lie in the same units and keep their own dtype.

Units are gathered by all ranks or by none, so all ranks must run the same number of forwards and backwards (`lockstep`).
It gives up three-phase groups, whose forwards differ from rank to rank, and generation from shards: `run_gathered` holds all
weights on every rank while each generates its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .mesh import Mesh

BUCKET_BYTES = 256 << 20
"""Gradients of copied weights are summed in flat buckets of this size."""
_Result = TypeVar("_Result")


class Weights:
    """A model that every rank holds whole; without a mesh, the only rank."""

    lockstep = False

    def __init__(self, model: PreTrainedModel, mesh: Mesh | None = None) -> None:
        self.model, self.mesh = model, mesh

    def run(self, work: Callable[[], _Result]) -> _Result:
        """`work()`, in which the model may be called; what it returns may be differentiated outside."""
        return work()

    def run_gathered(self, work: Callable[[], _Result]) -> _Result:
        """`work()` without gradients, in which each rank may call the model as often as it likes."""
        return work()

    def sum_gradients(self) -> None:
        """Makes every gradient the sum over all ranks; to be called once, before an update."""
        if self.mesh is not None:
            plain = [p for p in self.model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
            for bucket in _buckets(plain):
                _sum_bucket(bucket)


class ShardedWeights(Weights):
    """A model sharded over all ranks of the mesh.

    Args:
        compute: what autocast computes matrix products in, or None without it.
        device: where the shards go; the model may lie on the CPU.
    """

    lockstep = True

    def __init__(
        self, model: PreTrainedModel, mesh: Mesh, *, compute: torch.dtype | None, device: torch.device
    ) -> None:
        super().__init__(model, mesh)
        vectors = {p for p in model.parameters() if p.ndim <= 1}
        for vector in vectors:
            vector.data = vector.data.to(device)
        wide = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
        self._layers: list[FSDPModule] = []
        rounded = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=wide, cast_forward_inputs=False)
        for layer in _decoder_layers(model):
            fully_shard(layer, mesh=mesh.all, mp_policy=rounded, ignored_params=vectors)
            self._layers.append(_sharded(layer))
        kept = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)
        root = _Around(model)
        fully_shard(root, mesh=mesh.all, mp_policy=kept, ignored_params=vectors, reshard_after_forward=False)
        self._root, self._call = _sharded(root), root
        for unit in (self._root, *self._layers):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum, and NCCL needs none

    def run(self, work: Callable[[], _Result]) -> _Result:
        try:
            return self._call(work)
        finally:
            if not torch.is_grad_enabled():  # else the backward does it
                self._root.reshard()

    @torch.no_grad()
    def run_gathered(self, work: Callable[[], _Result]) -> _Result:
        def gathered() -> _Result:
            for layer in self._layers:
                layer.set_reshard_after_forward(False, recurse=False)
                layer.unshard()
            return work()

        made = self._call(gathered)
        for layer in self._layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()
        self._root.reshard()
        return made


class _Around(nn.Module):
    """The unit that holds what no layer holds; its forward is any work on the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def place(model: PreTrainedModel, mesh: Mesh | None, *, compute: torch.dtype | None, device: torch.device) -> Weights:
    """The model's weights as `mesh.config.shard` says, on `device`; a model without a mesh stays as it is."""
    if mesh is not None and mesh.config.shard:
        return ShardedWeights(model, mesh, compute=compute, device=device)
    nn.Module.to(model, device)
    return Weights(model, mesh)


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} doesn't hold its layers in a list called `layers`, so they can't be sharded: set "
            "parallel.shard = false"
        )
    return layers


def _sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype, up to `BUCKET_BYTES` together."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        size = sum(p.nbytes for p in bucket) + parameter.nbytes
        if bucket and (size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _sum_bucket(bucket: list[nn.Parameter]) -> None:
    """A rank that has no gradient of a weight adds nothing."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
    dist.all_reduce(flat)
    for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(summed.view_as(parameter))
