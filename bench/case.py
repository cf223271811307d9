"""What is measured: a case of an op, and the contenders that run it on the same tensors.

A contender has three callables, so that each pass is timed by itself:

    forward()        no gradient is wanted: what evaluation, old and reference log-probs do
    train()          the forward of training; what it returns goes to
    backward(state)  -> the gradients, in the order of `Problem.gradients`

`both` is backward(train()). A peer that makes its gradients within its forward (Liger, QuACK) therefore shows nearly
nothing as `backward`: compare such peers by `both`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Missing(Exception):
    """A contender that can't run here; its text is the reason in the gap row."""


@dataclass(frozen=True)
class Case:
    """One shape of one op in one dtype on one device ("cpu" or "cuda")."""

    op: str
    dims: Mapping[str, int]
    dtype: str
    device: str

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.dims.items())

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Contender:
    """One way to do a case: ours, or a peer's. `computes` says what it gives, where not all give the same."""

    name: str
    computes: str
    forward: Callable[[], Tensor]
    train: Callable[[], Any]
    backward: Callable[[Any], Sequence[Tensor | None]]
    package: str | None = None
    """The distribution it comes from, whose version goes into the row; None: torch, or this project."""
    ours: bool = False
    part: Callable[[], Sequence[Tensor | None]] | None = None
    """One of `parts` equal parts of an update, for `once`: its time is multiplied."""
    parts: int = 1
    warm_up: Callable[[], Any] = lambda: None
    """For `once`: the same on little, so that what is compiled or loaded at first use is there."""


@dataclass(frozen=True)
class Gap:
    """A contender that wasn't measured, and why."""

    name: str
    reason: str
    ours: bool = False


@dataclass(frozen=True)
class Exact:
    """The fp64 answer: `values` as `forward` gives them, their loss, and the gradients by name."""

    values: Tensor
    loss: Tensor
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """Inputs of one case, made once: its contenders, the fp64 answer, and the least work that any method must do.

    `flops` and `bytes` are per pass: operations of the formula (recomputation earns no credit) and bytes of inputs and
    results, each moved once. `exact` is None where fp64 is out of reach.
    """

    contenders: Sequence[Contender | Gap]
    flops: Mapping[str, float]
    bytes: Mapping[str, float]
    exact: Callable[[], Exact] | None
    gradients: tuple[str, ...] = field(default=())
    once: bool = False
    """A run takes so long that each contender gets one, without rounds (`once`)."""
    tokens: int | None = None
    """What a throughput counts, where one is told."""


class Op(Protocol):
    """A module of this folder: `SIZES[device][shapes]` lists the dims, `problem` makes the tensors."""

    PASSES: Sequence[str]
    DTYPES: Mapping[str, Sequence[str]]
    SIZES: Mapping[str, Mapping[str, Sequence[Mapping[str, int]]]]

    def problem(self, case: Case) -> Problem: ...


def gather(name: str, make: Callable[[], Contender], *, ours: bool = False) -> Contender | Gap:
    """The contender, or the gap it leaves when what it needs isn't here."""
    try:
        return make()
    except Missing as missing:
        return Gap(name, str(missing), ours)
