"""What our kernels use of Gluon's language, on torch tensors: the vocabulary of `gluon_machine`.

A register tensor is a torch tensor, a scalar one without dimensions; layouts are nothing. Sums and maxima pass NaN as a
GPU does: a maximum leaves it out, a sum doesn't.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Broken(AssertionError):
    """The kernel does what would go wrong on some run on a GPU."""


@dataclass(frozen=True)
class Pointer:
    """Into a tensor; offsets add up in 64 bits, as they stand in the source until then."""

    base: Tensor
    offset: Tensor

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.base.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.offset + torch.as_tensor(offset).to(torch.int64))


class Shared:
    """A view of shared memory. What was never written is NaN."""

    def __init__(self, machine: Any, data: Any) -> None:
        self.machine, self.data = machine, data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: Any) -> Any:
        if not 0 <= int(i) < len(self.data):
            raise Broken(f"slot {int(i)} of {len(self.data)}")
        found = self.data[int(i)]
        return Shared(self.machine, found) if isinstance(found, Tensor) else found

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.machine, self.data.permute(*order))

    def load(self, layout: Any) -> Tensor:
        self.machine.pause()
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.machine.pause()
        self.data.copy_(value)
        self.machine.current.unfenced.append(self.data)

    def overlaps(self, other: Tensor) -> bool:
        a, b = self.data, other
        if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
            return False
        return (
            a.storage_offset() < b.storage_offset() + b.numel() and b.storage_offset() < a.storage_offset() + a.numel()
        )


@dataclass(eq=False)
class InFlight:
    """An asynchronous product: acc + a b, read from shared memory at some time between issue and wait."""

    a: Any
    b: Shared
    acc: Tensor
    done: bool = False
    value: Any = None

    def finish(self) -> None:
        if not self.done:
            a = self.a.data if isinstance(self.a, Shared) else self.a
            assert a.dtype == self.b.dtype
            # products of 16-bit numbers are exact in fp32
            self.value, self.done = self.acc + a.float() @ self.b.data.float(), True


def language(machine: Any) -> dict[int, Any]:
    """id of a thing of Gluon's -> what stands for it on this machine."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper

    def fence() -> None:
        machine.current.unfenced.clear()
        machine.pause()

    def product(a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Any:
        made = machine.multiply(a, b, acc, use_acc)
        return made if is_async else machine.finish(0, [made])

    def wait(outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
        return machine.finish(outstanding, list(deps))

    return {
        id(gl): _Language(machine),
        id(hopper.tma): SimpleNamespace(async_copy_global_to_shared=_Copies(machine)),
        id(hopper.mbarrier): _Barriers(machine),
        id(hopper.fence_async_shared): fence,
        id(hopper.warpgroup_mma): product,
        id(hopper.warpgroup_mma_wait): wait,
    }


@dataclass
class _Copies:
    machine: Any

    def __call__(self, described: Any, where: Sequence[Any], barrier: Any, into: Shared) -> None:
        """Zeros past the tensor's end, which count as bytes too. NaN until it has arrived."""
        row, column = (int(x) for x in where)
        rows, columns = described.block_shape
        assert row >= 0 and 0 <= column <= described.base.shape[1] - columns and into.data.shape == (rows, columns)
        block = torch.zeros(rows, columns, dtype=described.dtype)
        found = described.base[row : row + rows, column : column + columns]
        block[: len(found)] = found
        into.data.fill_(torch.nan)

        def arrive() -> None:
            into.data.copy_(block)
            barrier.receive(block.numel() * block.element_size())

        self.machine.copies.append(arrive)
        self.machine.pause()


@dataclass
class _Barriers:
    machine: Any

    def MBarrierLayout(self) -> str:
        return "barrier"

    def init(self, barrier: Any, count: int) -> None:
        barrier.count = barrier.waited = count

    def expect(self, barrier: Any, size: int) -> None:
        barrier.arrive(announced=size)
        self.machine.pause()

    def arrive(self, barrier: Any, *, count: int) -> None:
        barrier.arrive(count)
        self.machine.pause()

    def wait(self, barrier: Any, parity: Any, pred: Any = True) -> None:
        if pred:
            self.machine.wait(lambda: barrier.passed(int(parity)))


class _Language:
    """triton.experimental.gluon.language"""

    float32, int64 = torch.float32, torch.int64
    where = staticmethod(torch.where)
    exp2, log2 = staticmethod(torch.exp2), staticmethod(torch.log2)
    static_range = range

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.warp_specialize = lambda parts, warps, registers: machine.specialize(parts)
        for name in (
            "NVMMADistributedLayout",
            "DotOperandLayout",
            "SliceLayout",
            "BlockedLayout",
            "SwizzledSharedLayout",
        ):
            setattr(self, name, lambda *values: None)

    def program_id(self, axis: int) -> Tensor:
        assert axis == 0
        return torch.tensor(self.machine.program, dtype=torch.int32)

    def arange(self, start: int, end: int, layout: Any) -> Tensor:
        return torch.arange(start, end, dtype=torch.int32)

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def maximum(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.fmax(a, b)

    def minimum(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)

    def cdiv(self, a: Any, b: Any) -> Tensor:
        return (a + (b - 1)) // b

    def max(self, x: Tensor, axis: int) -> Tensor:
        return torch.where(x.isnan(), -torch.inf, x).amax(axis)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    def convert_layout(self, x: Tensor, layout: Any) -> Tensor:
        return x

    def load(self, pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
        if mask is None:
            return pointer.base[pointer.offset]
        mask, offset = torch.broadcast_tensors(mask, pointer.offset)
        at = offset[mask]
        if len(at) and not 0 <= int(at.min()) <= int(at.max()) < len(pointer.base):
            raise Broken(f"loads {int(at.min())} to {int(at.max())} of {len(pointer.base)} numbers")
        found = torch.full(offset.shape, other, dtype=pointer.base.dtype)
        found[mask] = pointer.base[at]
        return found

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        assert value.dtype == pointer.base.dtype
        mask, offset, value = torch.broadcast_tensors(mask, pointer.offset, value)
        at = offset[mask]
        if len(at) and not 0 <= int(at.min()) <= int(at.max()) < len(pointer.base):
            raise Broken(f"stores {int(at.min())} to {int(at.max())} of {len(pointer.base)} numbers")
        pointer.base[at] = value[mask]

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        if layout == "barrier":
            from .gluon_machine import Barrier

            return Shared(self.machine, [Barrier() for _ in range(shape[0])])
        return Shared(self.machine, torch.full(tuple(shape), torch.nan, dtype=dtype))
