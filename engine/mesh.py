"""Which ranks do what: data x ring x ulysses, on torch's own process groups.

Ranks of one sequence-parallel group (ring x ulysses) hold one packed row together and are handed the same groups; data ranks
are handed different ones. Ulysses ranks, which exchange heads in every layer, stand closest to each other; then come
the ring's, then data's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("data", "ring", "ulysses")
SCHEDULES = ("auto", "ring", "all-gather", "ring-flash-attn")


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are laid out; data parallelism takes what ring and ulysses leave.

    `schedule` is how keys and values travel in the ring dimension. `shard` shards weights, gradients and optimizer
    state over all ranks (FSDP2). A collective that takes longer than `timeout_s` ends the run on all ranks.
    """

    ring: int = 1
    ulysses: int = 1
    schedule: str = "auto"
    shard: bool = True
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("ring", "ulysses"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be at least 1, not {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"parallel.schedule is {self.schedule!r}: it must be one of {', '.join(SCHEDULES)}")
        if not 0.0 < self.timeout_s < math.inf:
            raise ValueError(f"parallel.timeout_s must be a positive number of seconds, not {self.timeout_s}")

    @property
    def sp(self) -> int:
        """Sequence-parallel degree: ranks that share one row."""
        return self.ring * self.ulysses


@dataclass(frozen=True, eq=False)
class Mesh:
    """The layout of a running process group, and this rank's place in it."""

    device_mesh: DeviceMesh
    config: ParallelConfig

    @property
    def data(self) -> int:
        return self.device_mesh["data"].size()

    @property
    def ring(self) -> int:
        return self.config.ring

    @property
    def ulysses(self) -> int:
        return self.config.ulysses

    @property
    def sp(self) -> int:
        return self.config.sp

    @cached_property
    def data_rank(self) -> int:
        return self.device_mesh["data"].get_local_rank()

    @cached_property
    def ring_rank(self) -> int:
        return self.device_mesh["ring"].get_local_rank()

    @cached_property
    def ulysses_rank(self) -> int:
        return self.device_mesh["ulysses"].get_local_rank()

    @property
    def sequence_rank(self) -> int:
        """Place among the ranks that share this rank's row: ring first, ulysses fastest."""
        return self.ring_rank * self.ulysses + self.ulysses_rank

    @cached_property
    def data_group(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group("data")

    @cached_property
    def ring_group(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group("ring")

    @cached_property
    def ulysses_group(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group("ulysses")

    @cached_property
    def sequence(self) -> DeviceMesh:
        """The ranks that share this rank's row, in the order of `sequence_rank`."""
        return self.device_mesh["ring", "ulysses"]._flatten("sequence")

    @cached_property
    def all(self) -> DeviceMesh:
        """Every rank in one dimension: what weights are sharded over."""
        return self.device_mesh._flatten("all")

    @cached_property
    def sequence_group(self) -> dist.ProcessGroup:
        return self.sequence.get_group()


def make_mesh(config: ParallelConfig, device_type: str) -> Mesh:
    """The mesh over all ranks of the initialized process group; a collective call.

    Raises:
        ValueError: the ranks can't be shared out.
    """
    ranks = dist.get_world_size()
    if ranks % config.sp:
        raise ValueError(
            f"{ranks} ranks can't be shared out over parallel.ring x parallel.ulysses = {config.ring} x "
            f"{config.ulysses} = {config.sp}: start a multiple of {config.sp}, or lower one of the two"
        )
    shape = (ranks // config.sp, config.ring, config.ulysses)
    mesh = Mesh(init_device_mesh(device_type, shape, mesh_dim_names=AXES), config)
    assert mesh.sequence.size() == config.sp  # made by all ranks now: later, not all may ask for it
    assert mesh.all.size() == ranks
    for group in (mesh.ring_group, mesh.ulysses_group):
        # a first message between two ranks alone can't set up a group's connections where all ranks must take part
        dist.all_reduce(torch.zeros(1, device=device_type), group=group)
    return mesh
