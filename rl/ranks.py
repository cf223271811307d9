"""What the RL loop asks of the ranks it runs on. Alone, every answer is what was handed in.

All ranks go through the same steps with the same rollouts, rewards and random streams; what is expensive is shared out and its
results are exchanged, so that each rank knows all of them. Prompts to sample and answers to judge are shared out over all
ranks, packed rows over the data ranks (a sequence-parallel group does its rows together). Only rank 0 touches the run folder.
Objects go through torch's object collectives (pickled between the processes of one run, never from a file).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.launch import Job
from ..engine.mesh import Mesh
from ..kernels import Mean

T = TypeVar("T")


class Ranks:
    """This process among the others of its run; `Ranks()` is one process."""

    def __init__(self, job: Job | None = None, mesh: Mesh | None = None) -> None:
        self.job, self.mesh = job or Job(), mesh
        self.rank, self.size = (0, 1) if mesh is None else (self.job.rank, self.job.size)

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    def __str__(self) -> str:
        if self.mesh is None:
            return "one process"
        weights = "sharded over all of them" if self.mesh.config.shard else "whole on each"
        return f"{self.size} ranks: data {self.mesh.data} x ring {self.mesh.ring} x ulysses {self.mesh.ulysses}, weights {weights}"

    @property
    def sequence(self) -> Mesh | None:
        """The mesh, where rows are shared out over several ranks."""
        return self.mesh if self.mesh is not None and self.mesh.sp > 1 else None

    def note(self, operation: str, step: int | None = None) -> None:
        """Says what this rank does from now on: it is named with that if it dies."""
        self.job.note(operation, step)

    def first(self, work: Callable[[], T]) -> T:
        """What rank 0 makes of it, on every rank; the others don't call it."""
        if self.mesh is None:
            return work()
        made: list[Any] = [work() if self.main else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]

    def together(self, lead: Callable[[], T], follow: Callable[[], object]) -> T:
        """`lead` on rank 0 while the others `follow`; an OSError of rank 0 is everyone's."""
        made, problem = None, None
        if not self.main:
            follow()
        else:
            try:
                made = lead()
            except OSError as error:
                problem = error
        made, problem = self.first(lambda: (made, problem))
        if problem is not None:
            raise problem
        return made  # type: ignore[return-value]

    def every(self, value: T) -> list[T]:
        """Each rank's value, in rank order."""
        return [value] if self.mesh is None else self._gathered(value, None)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return any(self.every(flag))

    def share(self, costs: Sequence[float]) -> list[list[int]]:
        """Indices for each rank: the costliest first, each to the rank that has least to do."""
        loads, shares = [0.0] * self.size, [[] for _ in range(self.size)]
        for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            least = loads.index(min(loads))
            shares[least].append(i)
            loads[least] += costs[i]
        return [sorted(share) for share in shares]

    def rows(self, costs: Sequence[float]) -> list[int | None]:
        """Indices of this data rank's rows. All have the same number: None is a turn in which the others have a row.

        Rows of like cost take the same turn, since ranks with sharded weights wait for each other in every layer.
        """
        if self.mesh is None:
            return list(range(len(costs)))
        order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
        turns: list[int | None] = [*order, *[None] * (-len(order) % self.mesh.data)]
        return turns[self.mesh.data_rank :: self.mesh.data]

    def merge_rows(self, mine: Mapping[int, Tensor], lengths: Sequence[int], like: Tensor) -> list[Tensor]:
        """All rows' results [..., N_i], of which this data rank has `mine`, in the dtype and on the device of `like` [..., 0]."""
        if self.mesh is None or self.mesh.data == 1:
            return [mine[i] for i in range(len(lengths))]
        flat = like.new_zeros((*like.shape[:-1], sum(lengths)))
        parts = flat.split(list(lengths), dim=-1)
        for i, result in mine.items():
            parts[i].copy_(result)
        dist.all_reduce(flat, group=self.mesh.data_group)  # others have zeros there, so the bits stay
        return list(flat.split(list(lengths), dim=-1))

    def total(self, means: Mapping[str, Mean]) -> dict[str, Mean]:
        """Means over the data ranks, of which one may have none at all."""
        if self.mesh is None or self.mesh.data == 1:
            return dict(means)
        numbers = {name: (type(mean), float(mean.total), float(mean.count)) for name, mean in means.items()}
        sums: dict[str, Mean] = {}
        for part in self._gathered(numbers, self.mesh.data_group):
            for name, (kind, total, count) in part.items():
                mean = kind(torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))
                sums[name] = sums[name] + mean if name in sums else mean
        return sums

    def _gathered(self, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        made: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(made, value, group=group)
        return made
