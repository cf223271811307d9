"""ring-flash-attn (github.com/zhuzilin/ring-flash-attention) as the schedule, where it and flash-attn are installed.

Its `llama3_flash_attn_varlen`: tokens of all sequences in even slices as they lie, keys and values all-gathered a head at
a time. It knows plain causal sequences alone, so a row is refused in which completions share a prompt; and its gradients
of keys and values are rounded and summed in the model's dtype, so its error grows with the ring. Ulysses beside it is
refused. Sequences are prompt and completion together; the last slice is filled up with a sequence that nobody reads.

The package's own `__init__` imports an adapter for transformers that transformers 5 broke, so the one module that is used
is imported without it, as a package of another name that lies in the same folder.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .mesh import Mesh
from .packing import PackedRow
from .shards import Held

_ALIAS = "longreach_ring_flash_attn"
WAY_OUT = "set parallel.schedule to ring, all-gather or auto"


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """Its module.

    Raises:
        ValueError: it or flash-attn isn't installed, or can't be imported.
    """
    found = {name: find_spec(name) for name in ("ring_flash_attn", "flash_attn")}
    missing = [name.replace("_", "-") for name, spec in found.items() if spec is None]
    if missing:
        raise ValueError(f"parallel.schedule is ring-flash-attn, but {' and '.join(missing)} is missing: {WAY_OUT}")
    spec = found["ring_flash_attn"]
    assert spec is not None
    package = ModuleType(_ALIAS)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[_ALIAS] = package
    try:
        return importlib.import_module(f"{_ALIAS}.llama3_flash_attn_varlen")
    except ImportError as error:
        raise ValueError(
            f"parallel.schedule is ring-flash-attn, which can't be imported ({error}): {WAY_OUT}"
        ) from error


@dataclass(frozen=True, eq=False)
class Slices(Held):
    """A row's sequences, one behind the other, in even slices."""

    ranks: int

    @cached_property
    def lengths(self) -> list[int]:
        """Of the sequences: prompt and completion."""
        return [group.tokens for group in self.row.groups]

    @property
    def slice(self) -> int:
        """Tokens of each rank; of the last ones, some may be filling."""
        return -(-self.row.tokens // self.ranks)

    @cached_property
    def tokens(self) -> tuple[Tensor, ...]:
        starts = [0, *accumulate((*self.row.prompt_lengths, *self.row.completion_lengths))]
        parts, completion = [], len(self.row.groups)
        for g, group in enumerate(self.row.groups):
            last = completion + len(group.completions)
            parts += [torch.arange(starts[g], starts[g + 1]), torch.arange(starts[completion], starts[last])]
            completion = last
        order = torch.cat(parts)
        return tuple(order[r * self.slice : (r + 1) * self.slice] for r in range(self.ranks))


def cut_plain(row: PackedRow, mesh: Mesh) -> Slices:
    """The row in slices.

    Raises:
        ValueError: completions of it share a prompt, or the mesh exchanges heads.
    """
    shared = [g for g, group in enumerate(row.groups) if sum(len(c) > 0 for c in group.completions) > 1]
    if shared:
        raise ValueError(
            f"ring-flash-attn knows plain causal sequences alone, and completions of group {shared[0]} share a prompt: "
            f"pass shared_prefix=False, or {WAY_OUT}"
        )
    if mesh.ulysses > 1:
        raise ValueError(
            f"ring-flash-attn runs without a head exchange, and parallel.ulysses is {mesh.ulysses}: set it to 1, or {WAY_OUT}"
        )
    return Slices(row, mesh.ring)


class RingFlash:
    """Layout of this rank's slice."""

    def __init__(self, cut: Slices, mesh: Mesh) -> None:
        self.cut, self.mesh, self.module = cut, mesh, load()
        self.tokens = len(cut.tokens[mesh.sequence_rank])
        filling = cut.slice * cut.ranks - cut.row.tokens
        lengths = [*cut.lengths, *([filling] if filling else [])]
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self._prepared = self.module.llama3_flash_attn_prepare_cu_seqlens(bounds, True, mesh.ring_rank, mesh.ring)

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        cu_q, cu_k, longest_q, longest_k, read = self._prepared
        q, k, v = (self._filled(x) for x in (q_THE, k_TKE, v_TKE))
        out: Any = self.module.llama3_flash_attn_varlen_func(
            q, k, v, cu_q.to(q.device), cu_k.to(q.device), longest_q, longest_k, 1, read,
            softmax_scale=scale, causal=True, group=self.mesh.ring_group,
        )  # fmt: skip
        filler = q_THE.shape[0] - self.tokens
        return torch.cat([out[: self.tokens], out.new_zeros(filler, *out.shape[1:])])

    def _filled(self, x: Tensor) -> Tensor:
        own = x[: self.tokens]
        return torch.cat([own, own.new_zeros(self.cut.slice - len(own), *own.shape[1:])])
