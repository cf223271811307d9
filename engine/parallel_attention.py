"""Attention of a packed row that several ranks hold together: the layout that a decoder gets on a mesh.

    own tokens, all heads --ulysses--> the ring rank's tokens, own heads --ring or all-gather--> out --ulysses--> back

One autograd function for all of it, since gradients of keys and values stay in fp32 until the last rank has added its
own. It saves what it was given after the head exchange, the merged output and its lse; in the backward keys and values
travel again. All ranks of a sequence group must make the same calls in the same order, so a rank without tokens takes
part as well: the decoder then runs on one token that nothing reads.

Partial results are asked for in fp32. Backends that round theirs to the model's dtype (torch's flash and cuDNN operators,
flash-attention) add an error with every part; `auto` passes them over for our Triton kernel where that can run, and
the logger longreach.parallel says once which is used.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import attention_choice
from ..kernels.gpu import on_gpu
from .cost import choose, make_schedule
from .mesh import Mesh
from .partials import Kernel
from .shards import Cut
from .ulysses import HeadExchange, Heads

log = logging.getLogger("longreach.parallel")

UNROUNDED = ("reference", "blockwise", "cpu", "triton", "gluon")
"""Backends whose partial results are as wide as they are asked for."""


class Schedule(Protocol):
    """How keys and values reach the queries in the ring dimension."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """(out [T, h, E], lse [h, T]) in fp32 (fp64 for fp64)."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: Kernel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) in fp32 (fp64 for fp64)."""
        ...


class ParallelSharedPrefix:
    """Layout of this rank's tokens of a cut row, for every layer of a decoder."""

    def __init__(self, cut: Cut, mesh: Mesh, backend: str = "auto") -> None:
        self.cut, self.mesh, self.backend = cut, mesh, backend
        self.tokens = len(cut.tokens[mesh.sequence_rank])
        self.schedule: Schedule | None = None
        """Made with the first layer, whose shape says what is faster; all layers have the same."""

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        filler = q_THE.shape[0] - self.tokens
        q, k, v = (x[: self.tokens] for x in (q_THE, k_TKE, v_TKE))
        heads = Heads(q.shape[1], k.shape[1], self.mesh.ulysses)
        how = kernel(q, scale, self.backend)
        if self.schedule is None:
            name, seconds = choose(self.cut, self.mesh, q, k.shape[1], how)
            if seconds:
                _say_schedule(self.mesh, name, seconds)
            self.schedule = make_schedule(name, self.cut, self.mesh)
        slices = tuple(self.cut.slices(self.mesh.ring_rank))
        across = HeadExchange(heads, slices, self.mesh.ulysses_group) if self.mesh.ulysses > 1 else None
        out = _ParallelAttention.apply(q, k, v, _Work(across, self.schedule, how))
        return out if not filler else torch.cat([out, out.new_zeros(filler, *out.shape[1:])])


_said: WeakSet[Mesh] = WeakSet()


def _say_schedule(mesh: Mesh, name: str, seconds: dict[str, float]) -> None:
    """Once for each mesh, with its first row's numbers."""
    if mesh not in _said:
        _said.add(mesh)
        told = ", ".join(f"{other} {1e3 * taken:.3g} ms" for other, taken in seconds.items())
        log.info("ring of %d: %s, by the cost model (a layer: %s)", mesh.ring, name, told)


@dataclass(frozen=True)
class _Work:
    """One layer's attention on one rank."""

    across: HeadExchange | None
    schedule: Schedule
    kernel: Kernel


class _ParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: _Work) -> Tensor:
        if work.across is not None:
            q, k, v = work.across.scatter(q, k, v)
        wide_out, lse = work.schedule.forward(q, k, v, work.kernel)
        out = wide_out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.work = work
        return out if work.across is None else work.across.gather(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        work: _Work = ctx.work
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):  # a caller's backward may run within autocast
            if work.across is not None:
                dout = work.across.scatter_queries(dout)
            gradients = work.schedule.backward(dout, q, k, v, out, lse, work.kernel)
            if work.across is not None:
                return *work.across.gather_gradients(*gradients, q.dtype), None
        return *(x.to(q.dtype) for x in gradients), None


def kernel(q: Tensor, scale: float, backend: str) -> Kernel:
    """A backend for each pass whose partial results are unrounded, if there is one; logged once."""
    asked = Kernel(scale, backend, backend)
    chosen = {stage: _unrounded(stage, q, backend) for stage in ("forward", "backward")}
    return replace(asked, **chosen)


def _unrounded(stage: str, q: Tensor, backend: str) -> str:
    if backend != "auto":
        if backend not in UNROUNDED:
            _say(stage, backend, "as asked")
        return backend
    if q.dtype == torch.float64 or not on_gpu(q):
        return backend  # of these, all are unrounded
    name = attention_choice.choose("auto", stage, q, 0)
    if name in UNROUNDED:
        return name
    if attention_choice.unsuited("triton", q) is None:
        return "triton"
    _say(stage, name, "nothing else here can do it")
    return name


@lru_cache(maxsize=16)
def _say(stage: str, name: str, why: str) -> None:
    log.warning(
        "attention %s on a mesh by %s (%s): it rounds partial results, so errors grow with the number of ring ranks",
        stage, name, why,
    )  # fmt: skip
