"""What a GPU can take, and the tiles its kernels use. Nothing here is guessed from a name: capability and dtype decide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

OLDEST = (8, 0)
"""Ampere: the first with bfloat16 products and asynchronous copies, for both of which the kernels are written."""
HOPPER = (9, 0)
"""The first with tensor memory descriptors (TMA) and products of whole warp groups."""
INTERPRETER = (0, 0)
"""Stands for a CPU under Triton's interpreter."""


@dataclass(frozen=True)
class Tile:
    """Of one program: rows x columns of the result, `step` of the summed width a turn; `group` row tiles share L2.
    What follows the products is done in `parts` column ranges (1 or 2), so that it fits in registers."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    parts: int = 1
    group: int = 8
    tma: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def part(self) -> int:
        """Columns of one part."""
        return self.columns // self.parts

    @staticmethod
    def of(capability: tuple[int, int], dtype: torch.dtype, *, tma: bool = True, capped: bool = False) -> Tile:
        """The tile of the fused products for a GPU of this capability. One tile whatever N: a row's bits depend on it.

        `tma`: the tensors are laid out for tensor memory descriptors; addresses in registers leave no room for a wide
        tile, nor does the tanh of a soft-cap (`capped`).
        """
        if capability == INTERPRETER:
            return replace(INTERPRETED, tma=tma)
        if dtype == torch.float32:
            return Tile(64, 64, 32, warps=4, stages=2)
        if HOPPER <= capability < CONSUMER_BLACKWELL and tma:
            return Tile(128, 128 if capped else 256, 64, warps=8, stages=3, parts=2, tma=True)
        return Tile(128, 128, 32, warps=8, stages=4, parts=2)


INTERPRETED = Tile(64, 128, 64, warps=4, stages=1, parts=2)
"""Small, so that small tensors have edges; the interpreter's time goes by operations, not by their size."""


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    from triton import knobs  # needs Triton, which not every machine has

    return bool(knobs.runtime.interpret)


_PRETENDED: ContextVar[tuple[int, int] | None] = ContextVar("pretended", default=None)


@contextmanager
def pretending(capability: tuple[int, int]) -> Iterator[None]:
    """Within it, tensors without memory (fake ones) count as lying on a GPU of that capability.

    Backends are then chosen and buffers made as there, on a machine without one: how a step is traced at full shape.
    """
    token = _PRETENDED.set(capability)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


def pretended(x: Tensor) -> bool:
    """Whether `x` is a fake tensor that counts as a GPU's."""
    return _PRETENDED.get() is not None and isinstance(x, FakeTensor)


def address(x: Tensor) -> int:
    """Where its first element is; of a fake tensor, in its storage, which would begin at a multiple of any alignment."""
    return int(x.storage_offset()) * x.element_size() if pretended(x) else x.data_ptr()


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda or pretended(x)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; `INTERPRETER` for a CPU, unless a GPU is pretended."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return _PRETENDED.get() or INTERPRETER


def tiles(size: int, tile: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // tile)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **flags: Any) -> None:
    """Runs a Triton kernel on the device of its tensors: Triton alone would take the current one. Fake ones are left alone."""
    if _PRETENDED.get() is not None and any(isinstance(x, FakeTensor) for x in (*arguments, *flags.values())):
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **flags)


def unsuited(hidden: Tensor, weight: Tensor) -> str | None:
    """Why our kernels can't take these tensors, None if they can."""
    if find_spec("triton") is None:
        return "Triton isn't installed"
    if hidden.dtype != weight.dtype:
        return f"hidden is {hidden.dtype} and weight {weight.dtype}, and both must have one dtype"
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{hidden.dtype} is not one of bfloat16, float16, float32"
    if hidden.device != weight.device:
        return f"hidden is on {hidden.device} and weight on {weight.device}"
    if on_gpu(hidden):
        return _unsuited_gpu(hidden.device)
    if not interpreted():
        return (
            f"the tensors are on {hidden.device.type}, where Triton runs only in its interpreter (TRITON_INTERPRET=1)"
        )
    if hidden.dtype == torch.bfloat16:
        return "Triton's interpreter gives wrong bfloat16 results without a word: use float16 or float32"
    return None


def _unsuited_gpu(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "AMD GPUs haven't been tried"
    if capability(device) < OLDEST:
        return f"compute capability {capability(device)} is below {OLDEST}"
    return None


@dataclass(frozen=True)
class Block:
    """Of one attention kernel: `rows` queries against `columns` keys a turn, `edge` where pairs have to be masked."""

    rows: int
    columns: int
    edge: int
    warps: int = 8
    stages: int = 2


@dataclass(frozen=True)
class AttentionTiles:
    """The blocks of attention's kernels: forward, dk and dv (`keys`), dq (`queries`). width: the head dim, padded."""

    width: int
    tma: bool
    forward: Block
    keys: Block
    queries: Block

    @staticmethod
    def of(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> AttentionTiles:
        """For a GPU of this capability. None of it depends on lengths: a row's bits stay the same in any company."""
        width = 1 << (head_dim - 1).bit_length()
        step = max(width, 64)
        if capability == INTERPRETER:
            # descriptors where a GPU with them would use them, so that both ways of loading are interpreted
            return AttentionTiles(width, dtype != torch.float32, *[Block(32, 32, 16)] * 3)
        if dtype == torch.float32:
            return AttentionTiles(width, False, *[Block(32, 16, 16)] * 3)
        if HOPPER <= capability < CONSUMER_BLACKWELL:
            blocks = _HOPPER[step] if capability < BLACKWELL else _BLACKWELL[step]
            return AttentionTiles(width, True, *blocks)
        return AttentionTiles(width, False, *(_SMALL if step == 256 and capability != OLDEST else _AMPERE[step]))


BLACKWELL, CONSUMER_BLACKWELL = (10, 0), (12, 0)
"""The first has tensor memory for the products' sums; the second has Ampere's tensor cores and 99 KB of shared memory."""
_AMPERE = {
    64: (Block(128, 64, 32), Block(64, 128, 16), Block(128, 64, 32)),
    128: (Block(128, 64, 32), Block(64, 64, 32), Block(128, 32, 16)),
    256: (Block(64, 64, 32), Block(32, 32, 16), Block(64, 32, 16)),
}
_SMALL = (Block(64, 32, 16), Block(32, 32, 16), Block(32, 32, 16))
"""A head dim of 256 in 99 KB of shared memory."""
_HOPPER = {
    64: (Block(128, 128, 64, stages=3), Block(64, 128, 32), Block(128, 128, 64)),
    128: (Block(128, 128, 64), Block(64, 128, 32), Block(128, 64, 32, stages=3)),
    256: (Block(128, 64, 32), Block(32, 64, 16), Block(64, 32, 16)),
}
_BLACKWELL = {
    64: (_HOPPER[64][0], Block(64, 128, 32, stages=1), _HOPPER[64][2]),
    128: (_HOPPER[128][0], Block(64, 128, 32, stages=1), _HOPPER[128][2]),
    256: (_HOPPER[256][0], Block(32, 64, 16, stages=1), _HOPPER[256][2]),
}
