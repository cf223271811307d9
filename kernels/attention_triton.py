"""Attention of a whole packed row in Triton: the backend of NVIDIA GPUs. Formulas: attention_dense.py.

    forward    4 E operations a visible pair; reads q, k, v; writes out and lse
    delta      no product; reads dout, out and lse; writes 8 bytes a row and head
    dk and dv  8 E a visible pair (scores and dp again, dv, dk); reads q, k, v, dout; writes dk, dv
    dq         6 E a visible pair (scores and dp once more, dq); reads the same; writes dq

Pairs are counted per query head: T S of a full segment, T (T + 1) / 2 of a causal one. A backward is 14 E operations a
pair where 10 E are needed: two kernels that each own what they sum, so that nothing is added atomically and every run
gives the same bits. One segment of T = 131072, causal, 32 query heads of E = 128: 2.75e11 pairs, 141 TFLOP forward and
493 backward; each of q, k, v, out crosses memory once at best (1.1 GB of bf16 for q), so both are bound by compute.

The method is FlashAttention-2's (Dao, arXiv:2307.08691): online softmax over blocks of keys, scores and sums in fp32,
probabilities rounded to the inputs' dtype before their product with v. Segments lie where they are: a table of (tile,
segment) is made on the host, heaviest tiles first, and no program is started for a block that nobody sees. A group's
query heads read their key head in place. Tensor memory descriptors (TMA) load whole blocks of 16-bit numbers where the
GPU has them; pointers load the others, and leave out what lies past a segment's end. Addresses are 64-bit.

What it gives up: a head dim of 96 is computed as 128, the last 32 columns being zeros; no atomically summed backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import gpu
from .attention_triton_kernels import LOG2E, delta_kernel, forward_kernel, keys_kernel, queries_kernel
from .gpu import AttentionTiles, Block, address, launch, pretended, tiles

Bounds = tuple[int, ...]

HEAD_DIMS = (16, 32, 64, 96, 128, 256)
DELTA_ROWS = 32
LONGEST_STRIDE = 1 << 22
"""Elements between two tokens: offsets inside a tile of up to 256 tokens are 32-bit numbers."""


def unsuited(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> str | None:
    """Why `forward` and `backward` can't take this call, None if they can."""
    if q.shape[2] not in HEAD_DIMS:
        return f"head dim {q.shape[2]} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if not scale > 0:
        return f"scale {scale} is not positive, and a row's largest score is found before it is scaled"
    return gpu.unsuited(q, k) or gpu.unsuited(q, v)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Bounds,
    bounds_k: Bounds,
    causal: bool,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, E] in out_dtype, lse [H, T] in fp32) of q [T, H, E] over k, v [S, K, E], segment by segment.

    `bounds_*` are cumulative lengths from 0, one more than there are segments; causal, both must be the same. A query
    without keys gets out = 0 and lse = -inf. Only for calls that `unsuited` has nothing against.
    """
    tokens, heads, width = q.shape
    call = _Call.of(q, k, v, causal)
    block = call.tiles.forward
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    programs = work_list(bounds_q, bounds_k, block.rows, "queries" if causal else "")
    call.launch(
        forward_kernel, block, programs, heads,
        out=out, lse=lse, scale=scale * LOG2E.value, stride_out=heads * width,
    )  # fmt: skip
    _tell(4, q, bounds_q, bounds_k, causal)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T, H, E], dk, dv [S, K, E]) in grad_dtype; out [T, H, E] and lse [H, T] may be those of a larger softmax.

    Rows whose lse is infinite (no keys anywhere) get and give no gradient. dout is rounded to q's dtype, which is that
    of the products; out may be wider. `deterministic` changes nothing: sums always have one order.
    """
    (_, heads, width), (_, key_heads, _) = q.shape, k.shape
    call = _Call.of(q, k, v, causal, dout.to(q.dtype))
    base, delta = row_sums(call.rows["dout"], out, lse)
    dq = torch.empty(q.shape, dtype=grad_dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=grad_dtype, device=q.device) for _ in range(2))
    shared: dict[str, Any] = {"base": base, "delta": delta, "scale": scale * LOG2E.value, "unit": scale}
    block = call.tiles.keys
    programs = work_list(bounds_k, bounds_q, block.columns, "keys" if causal else "")
    call.launch(keys_kernel, block, programs, key_heads, dk=dk, dv=dv, stride_dk=key_heads * width, **shared)
    block = call.tiles.queries
    programs = work_list(bounds_q, bounds_k, block.rows, "queries" if causal else "")
    call.launch(queries_kernel, block, programs, heads, dq=dq, stride_dq=heads * width, **shared)
    _tell(14, q, bounds_q, bounds_k, causal)
    return dq, dk, dv


def _tell(operations: int, q: Tensor, bounds_q: Bounds, bounds_k: Bounds, causal: bool) -> None:
    """Tells a trace without memory, for which no kernel is started, of so many operations E a visible pair and head."""
    if pretended(q):
        # an operator of torch's, of which a process has one: imported above, mutated copies of this file would make another
        from .spend import spend

        sides = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True)]
        pairs = sum(n * (n + 1) // 2 if causal else n * m for n, m in sides)
        spend(operations * pairs * q.shape[1] * q.shape[2], "attention")


@dataclass(frozen=True)
class _Call:
    """What the launches of one call share. `rows` are read in blocks of queries, `columns` in blocks of keys."""

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    causal: bool
    tiles: AttentionTiles

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, causal: bool, dout: Tensor | None = None) -> _Call:
        rows = _alike({"q": q} if dout is None else {"q": q, "dout": dout})
        columns = _alike({"k": k, "v": v})
        return cls(rows, columns, causal, AttentionTiles.of(gpu.capability(q.device), q.dtype, q.shape[2]))

    def launch(self, kernel: Any, block: Block, programs: np.ndarray, heads: int, **own: Any) -> None:
        """One program a tile and head; `own` are the kernel's own arguments."""
        if not len(programs) or pretended(self.rows["q"]):
            return
        q, k = self.rows["q"], self.columns["k"]
        # not waited for: memory that isn't pinned is staged before the call returns
        table = torch.from_numpy(programs).to(q.device, non_blocking=True)
        launch(
            kernel, (len(programs) * heads,), q.device, **self._tensors(block), **own, **self.flags(block),
            programs=table, tokens=q.shape[0], heads=heads, group=q.shape[1] // k.shape[1],
            stride_q=q.stride(0), stride_q_head=q.stride(1), stride_k=k.stride(0), stride_k_head=k.stride(1),
        )  # fmt: skip

    def flags(self, block: Block) -> dict[str, Any]:
        """Compile-time values."""
        q = self.rows["q"]
        return {
            "E": q.shape[2], "WIDTH": self.tiles.width, "ROWS": block.rows, "COLUMNS": block.columns,
            "EDGE": block.edge, "TMA": self.tiles.tma, "CAUSAL": self.causal,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "num_warps": block.warps, "num_stages": block.stages,
        }  # fmt: skip

    def _tensors(self, block: Block) -> dict[str, Any]:
        """Tensors for masked blocks, and descriptors of them for whole ones (heads first: their size in blocks is 1)."""
        found: dict[str, Any] = {}
        for tensors, size in ((self.rows, block.rows), (self.columns, block.columns)):
            for name, x in tensors.items():
                shape = [1, size, self.tiles.width]
                described = TensorDescriptor.from_tensor(x.transpose(0, 1), shape) if self.tiles.tma else x
                found |= {name: x, f"{name}_tma": described}
        return found


def row_sums(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(base, delta) [H, T] in fp32, as the gradients' kernels read them. dout's heads have unit stride."""
    lse = lse.float().contiguous()
    out = out if out.stride(2) == 1 else out.contiguous()
    tokens, heads, width = dout.shape
    base, delta = torch.empty_like(lse), torch.empty_like(lse)
    if tokens:
        launch(
            delta_kernel, (tiles(tokens, DELTA_ROWS) * heads,), dout.device, dout, out, lse, delta, base, tokens, heads,
            dout.stride(0), dout.stride(1), out.stride(0), out.stride(1),
            E=width, ROWS=DELTA_ROWS, WIDTH=1 << (width - 1).bit_length(), num_warps=4,
        )  # fmt: skip
    return base, delta


@lru_cache(maxsize=64)
def work_list(own: Bounds, other: Bounds, size: int, diagonal: str) -> np.ndarray:
    """[n, 4] in int32: a tile's first token, its segment's end, and begin and end of the other side's segment.

    Heaviest first, so that the last to finish are short ones. `diagonal` says whether the tiles are of "queries" or of
    "keys" under a causal mask. In NumPy, so that what is remembered belongs to no device and to no mode of torch.
    """
    starts, ends = np.array(own[:-1], np.int64), np.array(own[1:], np.int64)
    firsts, lasts = np.array(other[:-1], np.int64), np.array(other[1:], np.int64)
    counts = -(-(ends - starts) // size)
    segment = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    token = starts[segment] + within * size
    if diagonal == "queries":
        work = token - starts[segment]
    elif diagonal == "keys":
        work = ends[segment] - token
    else:
        work = (lasts - firsts)[segment]
    table = np.stack([token, ends[segment], firsts[segment], lasts[segment]], axis=1)
    return np.ascontiguousarray(table[np.argsort(-work, kind="stable")], dtype=np.int32)


def _alike(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the kernels read them: one set of strides, laid out for wide loads; copies where that isn't so."""
    strides = {x.stride() for x in tensors.values()}
    if len(strides) == 1 and all(_readable(x) for x in tensors.values()):
        return tensors
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


def _readable(x: Tensor) -> bool:
    """Heads of unit stride; address and other strides as descriptors and wide loads ask for them, and not too long."""
    token, head, unit = x.stride()
    aligned = address(x) % 16 == 0 and token % 16 == 0 and head % 16 == 0
    return unit == 1 and aligned and 0 < token <= LONGEST_STRIDE and head > 0
