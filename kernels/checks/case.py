"""What a kernel's description is made of: cases to compile, cases to run, the work they do, and ways to break them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a `triton.jit` function, as a launch on a GPU would ask for it.

    signature gives Triton's type of every run-time argument ("*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>");
    constexprs the value of all others (None for a pointer that isn't passed). `divisible` names the arguments that are
    multiples of 16: pointers always are, sizes where the model's are. tensor_cores says whether the compiled code must
    use them; where it says no, using them is an error too, since fp32 products there are TF32 ones. `spills_allowed`:
    bytes of stack a thread that are known and put up with; the case's description says why. specialized: a Gluon kernel
    by hand, with a warp that loads: its code must load through descriptors, hand registers from warp to warp, and keep
    its products asynchronous, of which ptxas warns when it can't.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = True
    spills_allowed: int = 0
    specialized: bool = False


@dataclass(frozen=True)
class Comparison:
    """One tensor of a case, three ways: ours, plain torch's in the same dtype, and the fp64 result (see three_way)."""

    name: str
    ours: Tensor
    plain: Tensor
    exact: Tensor
    terms: float = 0.0


@dataclass(frozen=True)
class NumericCase:
    """One call of an op, small enough for the interpreter, in fp32 or fp16."""

    label: str
    dtype: torch.dtype
    run: Callable[[], Iterable[Comparison]]


@dataclass(frozen=True)
class Work:
    """What an op's kernels do: floating-point operations, and the bytes that must cross memory for them."""

    label: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Mutant:
    """A fault to put into a file of kernels/: `old`, which must stand there exactly once, becomes `new`."""

    label: str
    file: str
    old: str
    new: str


class Description(Protocol):
    """What a file of this folder that is named after an op provides. It imports no Triton before it is called.

    SHAPE: sizes at which `work` is shown. Imports of the op are relative: mutants run in a copy of the whole package.
    """

    SHAPE: Mapping[str, int]
    MUTANTS: tuple[Mutant, ...]

    def compile_cases(self, arch: int) -> list[CompileCase]: ...

    def numeric_cases(self) -> list[NumericCase]: ...

    def work(self, shape: Mapping[str, int]) -> list[Work]: ...
