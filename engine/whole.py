"""Sharded tensors made whole, and whole ones cut into shards: what crosses the border between ranks and files.

Files hold whole tensors, so that any number of ranks reads them. One tensor at a time is whole on a rank, and only the
rank that writes keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def whole(tensor: Tensor) -> Tensor:
    """The tensor whole, on every rank; a collective call for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """`full` laid out as `like` is: as it stands, or this rank's shard of it. No communication."""
    if not isinstance(like, DTensor):
        return full
    assert like.shape == full.shape
    (placement,) = like.placements
    assert isinstance(placement, Shard)
    parts, rank = full.chunk(like.device_mesh.size(), placement.dim), like.device_mesh.get_local_rank()
    mine = parts[rank] if rank < len(parts) else full.narrow(placement.dim, 0, 0)
    local = mine.to(like.device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=full.shape, stride=full.stride()
    )


@torch.no_grad()
def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """`model.state_dict()` of whole tensors; a collective call. Sharded ones come to the CPU, and only where `keep`.

    Tied weights stay one tensor, by which transformers knows them.
    """
    made: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            made[name] = made[first[id(tensor)]] if keep else tensor
            continue
        first[id(tensor)] = name
        full = whole(tensor.detach())
        if keep:
            made[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return made if keep else {}
