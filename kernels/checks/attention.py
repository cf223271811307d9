"""What is checked of attention's Triton kernels; the numeric cases stand in attention_numerics.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..gpu import AttentionTiles, Block
from .attention_numerics import numeric_cases as numeric_cases
from .case import CompileCase, Mutant, Work

SHAPE = {"T": 131072, "H": 32, "K": 8, "E": 128}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INPUTS = ("q", "k", "v", "dout")


def work(shape: Mapping[str, int]) -> list[Work]:
    """In bf16. Keys are counted once, as if the second level cache held them."""
    tokens, heads, key_heads, width = (shape[name] for name in ("T", "H", "K", "E"))
    rows, columns = 2.0 * tokens * heads * width, 2.0 * tokens * key_heads * width
    made = []
    for label, pairs in (("causal", heads * tokens * (tokens + 1) / 2), ("full", heads * tokens * float(tokens))):
        made += [
            Work(f"forward, {label}", 4 * width * pairs, 2 * rows + 2 * columns + 4 * tokens * heads),
            Work(f"dk and dv, {label}", 8 * width * pairs, 2 * rows + 4 * columns + 8 * tokens * heads),
            Work(f"dq, {label}", 6 * width * pairs, 3 * rows + 2 * columns + 8 * tokens * heads),
        ]
    return [*made, Work("delta", 2.0 * tokens * heads * width, 2 * rows + 12 * tokens * heads)]


def _fault(label: str, old: str, new: str) -> Mutant:
    return Mutant(label, "attention_triton_kernels.py", old, new)


MUTANTS = (
    _fault("a query doesn't see its own key", "[:, None] >= o_column[None, :]", "[:, None] > o_column[None, :]"),
    _fault("dk, dv: a query doesn't see its own key", "o_row[None, :] >= column", "o_row[None, :] > column"),
    _fault("a key past the segment is seen", "(o_column < last)[None, :]", "(o_column <= last)[None, :]"),
    _fault("no mask on the diagonal", "    if CAUSAL:\n        seen =", "    if CAUSAL and last < 0:\n        seen ="),
    _fault("the diagonal of the row's first tile for all", "seen = row + tl.arange", "seen = tl.arange"),
    _fault("last block of keys skipped", "// COLUMNS * COLUMNS\n        stop = last", "// COLUMNS * COLUMNS\n        stop = whole"),
    _fault(
        "key heads dealt out in turn",
        "key_head = head // group\n    b_q = _block(q, q_tma, head, row, end, stride_q, stride_q_head, E, ROWS, WIDTH, TMA, not TMA)\n    acc",
        "key_head = head % (heads // group)\n    b_q = _block(q, q_tma, head, row, end, stride_q, stride_q_head, E, ROWS, WIDTH, TMA, not TMA)\n    acc",
    ),
    _fault("dk, dv: query heads dealt out in turn", "key_head * group + i // masked", "key_head + i // masked * heads"),
    _fault("dk, dv: only the first query head", "range(0, group * masked)", "range(0, masked)"),
    _fault("no scale", "new = tl.maximum(peak, tl.max(scores, 1) * scale)", "scale = LOG2E\n        new = tl.maximum(peak, tl.max(scores, 1) * scale)"),
    _fault("peak of the last block only", "new = tl.maximum(peak, tl.max(scores, 1) * scale)", "new = tl.max(scores, 1) * scale"),
    _fault("out of other peaks added", "acc = acc * decay[:, None]", "acc = acc * 1.0"),
    _fault("sums of other peaks added", "total = total * decay +", "total = total +"),
    _fault("lse in units of log 2", "(peak + tl.log2(total)) * LN2", "(peak + tl.log2(total))"),
    _fault("a row without keys is divided by 0", "total = tl.where(total == 0, 1.0, total)", "total = total * 1.0"),
    _fault("no delta", "tl.where(dead, 0.0, b_delta)", "b_delta * 0.0"),
    _fault("lse in other units than the scores", "b_lse * LOG2E), mask", "b_lse), mask"),
    _fault("rows without keys have p = exp(inf)", 'tl.where(dead, float("inf"), b_lse * LOG2E)', "b_lse * LOG2E"),
    _fault("dk without its scale", "b_dk * unit", "b_dk"),
    _fault("dq without its scale", "acc * unit", "acc"),
    _fault("dk, dv: the segment's end skipped", "masked = edges - skipped", "masked = diagonal + 0 * skipped"),
    _fault("dk, dv: the end's blocks misplaced", "tl.where(block >= diagonal, skipped, 0)", "tl.where(block >= diagonal, 0, 0)"),
    _fault("dk, dv: whole blocks from the diagonal", "start + diagonal * EDGE + i % whole * ROWS", "start + i % whole * ROWS"),
    _fault("dv of a wrong p", "dv = tl.dot(p.to(b_do.dtype), b_do, dv", "dv = tl.dot((p * p).to(b_do.dtype), b_do, dv"),
    Mutant(
        "every segment starts at token 0",
        "attention_triton.py",
        "token = starts[segment] + within * size",
        "token = within * size + 0 * starts[segment]",
    ),
    Mutant(
        "keys of the first segment for all",
        "attention_triton.py",
        "ends[segment], firsts[segment], lasts[segment]]",
        "ends[segment], firsts[segment * 0], lasts[segment * 0]]",
    ),
)  # fmt: skip


def compile_cases(arch: int) -> list[CompileCase]:
    """The blocks that a launch on this architecture uses; bf16 with grouped heads, and what else widens a kernel."""
    causal = [case for width in (16, 32, 64, 96, 128, 256) for case in _kernels(arch, width)]
    full = [case for width in (64, 128, 256) for case in _kernels(arch, width, causal=False)]
    others = [*_kernels(arch, 128, "fp16"), *_kernels(arch, 256, "fp32"), *_kernels(arch, 128, out="fp32")]
    return [*causal, *full, *others, _delta("bf16"), _delta("fp32")]


def _kernels(arch: int, width: int, dtype: str = "bf16", *, out: str = "", causal: bool = True) -> list[CompileCase]:
    """out: the results' dtype, where it isn't the inputs'."""
    from .. import attention_triton_kernels as kernels

    tiles = AttentionTiles.of(divmod(arch, 10), DTYPES[dtype], width)

    def case(kernel: Any, block: Block) -> CompileCase:
        types = _types(tiles, block, dtype, out or dtype)
        values = {
            "E": width, "WIDTH": tiles.width, "ROWS": block.rows, "COLUMNS": block.columns, "EDGE": block.edge,
            "TMA": tiles.tma, "CAUSAL": causal, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        }  # fmt: skip
        signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in values}
        divisible = tuple(name for name in signature if signature[name][0] == "*" or name.startswith("stride"))
        how = f"{' full' if not causal else ''}{f' {out} out' if out else ''}{' tma' if tiles.tma else ''}"
        return CompileCase(
            f"{kernel.__name__.removesuffix('_kernel')} {width} {dtype}{how}",
            *(kernel, signature, values, divisible, block.warps, block.stages),
            tensor_cores=dtype != "fp32",
        )

    return [
        case(kernels.forward_kernel, tiles.forward),
        case(kernels.keys_kernel, tiles.keys),
        case(kernels.queries_kernel, tiles.queries),
    ]


def _types(tiles: AttentionTiles, block: Block, dtype: str, out: str) -> dict[str, str]:
    """Triton's types of all arguments but the 32-bit integers."""

    def described(tokens: int) -> str:
        return f"tensordesc<{dtype}[1, {tokens}, {tiles.width}]>" if tiles.tma else f"*{dtype}"

    return {
        **dict.fromkeys(INPUTS, f"*{dtype}"),
        **dict.fromkeys(("q_tma", "dout_tma"), described(block.rows)),
        **dict.fromkeys(("k_tma", "v_tma"), described(block.columns)),
        **dict.fromkeys(("out", "dq", "dk", "dv"), f"*{out}"),
        **dict.fromkeys(("lse", "base", "delta"), "*fp32"),
        **dict.fromkeys(("scale", "unit"), "fp32"),
        "programs": "*i32",
    }


def _delta(out: str) -> CompileCase:
    from .. import attention_triton as backend
    from ..attention_triton_kernels import delta_kernel

    types = {"dout": "*bf16", "out": f"*{out}", **dict.fromkeys(("lse", "delta", "base"), "*fp32")}
    values = {"E": 128, "ROWS": backend.DELTA_ROWS, "WIDTH": 128}
    signature = {name: types.get(name, "i32") for name in delta_kernel.arg_names if name not in values}
    divisible = tuple(name for name in signature if name in types or name.startswith("stride"))
    label = f"delta 128 bf16{f' {out} out' if out != 'bf16' else ''}"
    return CompileCase(label, delta_kernel, signature, values, divisible, 4, 3, tensor_cores=False)
