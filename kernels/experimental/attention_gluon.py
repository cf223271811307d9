"""Attention of a whole packed row in Gluon, for Hopper: the contract of `attention_triton`, by hand down to the warps.

Work, bytes and what each kernel owns are those of `attention_triton`; what differs is how a multiprocessor is kept busy:
a warp that loads, two warp groups that multiply, softmax beside products (`attention_gluon_forward`, `_backward`). No
GPU has run it: `kernels.checks` compiles it for sm_90 and runs its source on a simulated machine. `attention.forward(...,
backend="gluon")` takes it, `auto` never does.

What it gives up: Hopper alone, bf16 and fp16 alone, head dims 64 and 128 (256 forward: the sums of dk and dv would not
fit in registers), heads that don't lie side by side are copied, results leave registers without passing shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import gpu
from ..attention_triton import LONGEST_STRIDE, row_sums, work_list
from ..attention_triton_kernels import LOG2E
from .attention_gluon_backward import keys_kernel, queries_kernel
from .attention_gluon_forward import forward_kernel

Bounds = tuple[int, ...]
Run = Callable[..., None]

ROWS = 64
"""Rows of one warp group, of which a program has two: what one wgmma takes."""
WARPS = 4
REGISTERS = 240
"""Of a thread that multiplies; with 24 for those that load, all that a multiprocessor has."""


@dataclass(frozen=True)
class Ring:
    """Blocks that a program takes in turn: `step` tokens each, `stages` of them in shared memory."""

    step: int
    stages: int


FORWARD = {64: Ring(128, 3), 128: Ring(128, 2), 256: Ring(64, 2)}
KEYS = {64: Ring(64, 3), 128: Ring(64, 2)}
QUERIES = {64: Ring(128, 3), 128: Ring(64, 3)}
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
"""fp32 is for the simulated machine, where it shows errors that 16 bits would hide; on a GPU `unsuited` refuses it."""


def unsuited(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, *, backward: bool = False) -> str | None:
    """Why `forward`, or `backward`, can't take this call, None if it can."""
    if not q.is_cuda:
        return f"it is compiled for Hopper GPUs alone, and these tensors are on {q.device}"
    if reason := gpu.unsuited(q, k) or gpu.unsuited(q, v):
        return reason
    found = gpu.capability(q.device)
    if found[0] != gpu.HOPPER[0]:
        return f"it is compiled for Hopper GPUs alone, and this one's compute capability is {found}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} is not one of bfloat16, float16"
    known = KEYS if backward else FORWARD
    if q.shape[2] not in known:
        what = "its backward's head dims are" if backward else "its head dims are"
        return f"{what} {', '.join(map(str, known))}, and this one is {q.shape[2]}"
    if not scale > 0:
        return f"scale {scale} is not positive, and a row's largest score is found before it is scaled"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Bounds,
    bounds_k: Bounds,
    causal: bool,
    scale: float,
    out_dtype: torch.dtype,
    *,
    run: Run = gpu.launch,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, E] in out_dtype, lse [H, T] in fp32) of q [T, H, E] over k, v [S, K, E], segment by segment.

    As `attention_triton.forward`. `run` launches a kernel; the simulated machine has one of its own.
    """
    tokens, heads, width = q.shape
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    for a, b in alone(bounds_q, bounds_k):
        out[a:b], lse[:, a:b] = 0, -torch.inf
    ring = FORWARD[width]
    programs = visible(work_list(bounds_q, bounds_k, 2 * ROWS, "queries" if causal else ""))
    if len(programs):
        run(
            forward_kernel, (len(programs) * heads,), q.device,
            **described(ROWS, q_tma=q), **described(ring.step, k_tma=k, v_tma=v),
            out=out, lse=lse, programs=_table(programs, q), scale=scale * LOG2E.value, tokens=tokens, heads=heads,
            group=heads // k.shape[1], stride_out=heads * width, COLUMNS=ring.step, **flags(width, ring, causal),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds_q: Bounds,
    bounds_k: Bounds,
    causal: bool,
    scale: float,
    grad_dtype: torch.dtype,
    deterministic: bool,
    *,
    run: Run = gpu.launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T, H, E], dk, dv [S, K, E]) in grad_dtype; out [T, H, E] and lse [H, T] may be those of a larger softmax.

    As `attention_triton.backward`: rows of infinite lse get and give no gradient, sums always have one order.
    """
    (tokens, heads, width), key_heads = q.shape, k.shape[1]
    dout = _flat(dout.to(q.dtype)).view(dout.shape)
    base, delta = row_sums(dout, out, lse)
    dq = torch.empty(q.shape, dtype=grad_dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=grad_dtype, device=q.device) for _ in range(2))
    for a, b in alone(bounds_q, bounds_k):
        dq[a:b] = 0
    for a, b in alone(bounds_k, bounds_q):
        dk[a:b], dv[a:b] = 0, 0
    shared: dict[str, Any] = {
        "base": base, "delta": delta, "scale": scale * LOG2E.value, "unit": scale,
        "tokens": tokens, "group": heads // key_heads,
    }  # fmt: skip
    ring = KEYS[width]
    programs = visible(work_list(bounds_k, bounds_q, 2 * ROWS, "keys" if causal else ""))
    if len(programs):
        run(
            keys_kernel, (len(programs) * key_heads,), q.device,
            **described(ROWS, k_tma=k, v_tma=v), **described(ring.step, q_tma=q, dout_tma=dout),
            dk=dk, dv=dv, programs=_table(programs, q), heads=key_heads, stride_dk=key_heads * width, STEP=ring.step,
            **shared, **flags(width, ring, causal),
        )  # fmt: skip
    ring = QUERIES[width]
    programs = visible(work_list(bounds_q, bounds_k, 2 * ROWS, "queries" if causal else ""))
    if len(programs):
        run(
            queries_kernel, (len(programs) * heads,), q.device,
            **described(ROWS, q_tma=q, dout_tma=dout), **described(ring.step, k_tma=k, v_tma=v),
            dq=dq, programs=_table(programs, q), heads=heads, stride_dq=heads * width, STEP=ring.step,
            **shared, **flags(width, ring, causal),
        )  # fmt: skip
    return dq, dk, dv


def alone(own: Bounds, other: Bounds) -> list[tuple[int, int]]:
    """(begin, end) of the segments that the other side has no tokens for: no program is started for them."""
    sides = zip(pairwise(own), pairwise(other), strict=True)
    return [(a, b) for (a, b), (c, d) in sides if b > a and c == d]


def visible(programs: np.ndarray) -> np.ndarray:
    """Those of `work_list` that have something on the other side."""
    return programs[programs[:, 2] < programs[:, 3]]


def flags(width: int, ring: Ring, causal: bool) -> dict[str, Any]:
    """Compile-time values that all kernels have."""
    return {
        "E": width, "ROWS": ROWS, "STAGES": ring.stages, "CAUSAL": causal, "REGISTERS": REGISTERS, "num_warps": WARPS,
    }  # fmt: skip


def described(rows: int, **tensors: Tensor) -> dict[str, Any]:
    """Descriptors of [tokens, heads x E], read in blocks of `rows` tokens of one head."""
    made = {}
    for name, x in tensors.items():
        block = [rows, x.shape[2]]
        layout: Any = gl.NVMMASharedLayout.get_default_for(block, TYPES[x.dtype])
        made[name] = TensorDescriptor.from_tensor(_flat(x), block, layout)
    return made


def _flat(x: Tensor) -> Tensor:
    """x [tokens, heads, E] as [tokens, heads x E], as descriptors ask for it; a copy where it lies otherwise."""
    token, head, unit = x.stride()
    aligned = x.data_ptr() % 16 == 0 and token % 16 == 0 and 0 < token <= LONGEST_STRIDE
    if not (aligned and unit == 1 and head == x.shape[2]):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(1)


def _table(programs: np.ndarray, like: Tensor) -> Tensor:
    # not waited for: memory that isn't pinned is staged before the call returns
    return torch.from_numpy(programs).to(like.device, non_blocking=True)
