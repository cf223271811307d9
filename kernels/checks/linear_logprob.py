"""What is checked of linear_logprob's Triton kernels; the numeric cases stand in linear_logprob_numerics.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from .case import CompileCase, Mutant, Work
from .linear_logprob_numerics import numeric_cases as numeric_cases

SHAPE = {"N": 8192, "D": 4096, "V": 128256}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

TYPES = {
    **dict.fromkeys(("inverse_heat", "partials", "target_z", "row_terms"), "*fp32"),
    **dict.fromkeys(("n", "vocab", "begin", "stop", "width", "low_width", "first"), "i32"),
    **dict.fromkeys(("stride_x", "stride_w", "stride_low_x", "stride_low_w", "stride_kept", "stride_dx"), "i32"),
    **{"targets": "*i64", "softcap": "fp32"},
}
"""Triton's types of the arguments whose type is always the same."""
PADDED = frozenset({"stride_kept", "stride_dx"})
"""Always multiples of 16: the backend's own buffers."""
ALIGNED = frozenset(name for name, kind in TYPES.items() if kind == "i32") - {"n", "first"}
"""Multiples of 16 where a model's sizes are."""


def work(shape: Mapping[str, int]) -> list[Work]:
    """In bf16, every row with a gradient. Inputs are read once a product, [N, V] buffers once a use: dx is written, then
    read by two products; in one pass the exponentials are written and read before it."""
    n, d, v = shape["N"], shape["D"], shape["V"]
    product, inputs, block = 2.0 * n * d * v, 2.0 * (n * d + v * d), 2.0 * n * v
    return [
        Work("forward", product, inputs),
        Work("backward", 3 * product, 3 * inputs + 3 * block),
        Work("both, two passes", 4 * product, 4 * inputs + 3 * block),
        Work("both, one pass", 3 * product, 3 * inputs + 5 * block),
    ]


def _fault(label: str, old: str, new: str) -> Mutant:
    return Mutant(label, "linear_logprob_triton.py", old, new)


MUTANTS = (
    _fault(
        "entries past the end have mass", 'tl.where(m_column[None, :], acc * inverse, float("-inf"))', "acc * inverse"
    ),
    _fault("no temperature", "acc * inverse, float", "acc, float"),
    _fault("no soft-cap", "acc = _tanh(acc / softcap) * softcap", "acc = acc"),
    _fault("no slope of the soft-cap", "dx * (1 - squashed * squashed)", "dx"),
    _fault("no second product", "if LOW:", "if LOW and width < 0:"),
    _fault(
        "width cut by a step",
        "acc = tl.zeros([ROWS, COLUMNS], tl.float32)",
        "acc = tl.zeros([ROWS, COLUMNS], tl.float32)\n    width = width // STEP * STEP",
    ),
    _fault("one step's weights for all (descriptors)", "w.load([column, k])", "w.load([column, 0])"),
    _fault("one step's weights for all (pointers)", "p_w += STEP", "p_w += 0"),
    _fault("largest score at least 0", 'peak = tl.full([ROWS], float("-inf")', 'peak = tl.full([ROWS], float("0")'),
    _fault("sums of other peaks added", "total = total * old_scale +", "total = total +"),
    _fault("entropy of other peaks added", "(weighted + total * old_shift)", "weighted"),
    _fault("half a tile done twice", "acc = low if index == 0 else high", "acc = low"),
    _fault("last group of rows misplaced", "size = tl.minimum(n_rows - group * GROUP, GROUP)", "size = GROUP"),
    _fault("no gradient of entropy", "p * (a - b * log_p)", "p * a"),
    _fault("sign of the entropy's gradient", "p * (a - b * log_p)", "p * (a + b * log_p)"),
    _fault("target like any other", "tl.where(o_column[None, :] == target[:, None], at_target, dx)", "dx"),
    _fault("kept numbers of other peaks", "offset = (part_peak - peak) - log_sum", "offset = -log_sum"),
    _fault("every block from entry 0", "o_column = begin + start + tl.arange", "o_column = start + tl.arange"),
    _fault(
        "ids of a shard from 0",
        "m_row = o_row < n\n    target = tl.load(targets + o_row, mask=m_row, other=-1) - first",
        "m_row = o_row < n\n    target = tl.load(targets + o_row, mask=m_row, other=-1)",
    ),
)


def compile_cases(arch: int) -> list[CompileCase]:
    """The tiles that a launch on this architecture uses, in each dtype; then what widens a kernel most."""
    plain = [case for dtype in ("bf16", "fp16", "fp32") for case in _kernels(arch, dtype)]
    full = [case for case in _kernels(arch, "bf16", full=True) if "partial" not in case.label]
    return [*plain, *full, *_kernels(arch, "bf16", aligned=False), _combine()]


def _kernels(arch: int, dtype: str, *, full: bool = False, aligned: bool = True) -> list[CompileCase]:
    """full: a low-rank head, bias and soft-cap. aligned: rows of x and W at multiples of 16 bytes, as those of models are."""
    from .. import linear_logprob_triton as kernels
    from ..gpu import Tile

    tile = Tile.of(divmod(arch, 10), DTYPES[dtype], tma=aligned, capped=full)
    how = (" lora bias cap" if full else "") + ("" if aligned else " odd")

    def block(rows: int, columns: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {columns}]>" if tile.tma else f"*{dtype}"

    x, w, out = block(tile.rows, tile.step), block(tile.columns, tile.step), block(tile.rows, tile.part)
    types = {**TYPES, "x": x, "low_x": x, "w": w, "low_w": w, "dx": out, "bias": f"*{dtype}"}
    values = {
        **{name.upper(): value for name, value in asdict(tile).items()},
        **{"LOW": full, "BIAS": full, "SOFTCAP": full, "PRECISION": "ieee" if dtype == "fp32" else "tf32"},
    }

    def case(label: str, kernel: Any, kept: str = f"*{dtype}", **more: Any) -> CompileCase:
        names = set(kernel.arg_names)
        signature = {name: kind for name, kind in {**types, "kept": kept}.items() if name in names and name not in more}
        constexprs = {name: value for name, value in {**values, **more}.items() if name in names}
        sizes = ALIGNED if aligned else PADDED
        divisible = [name for name, kind in signature.items() if kind.startswith("*") or name in sizes]
        products = "x" in names
        return CompileCase(
            f"{label} {dtype}{how}{' tma' if tile.tma and products else ''}",
            *(kernel, signature, constexprs, tuple(divisible)),
            num_warps=tile.warps if products else 4,
            num_stages=tile.stages,
            tensor_cores=products and dtype != "fp32",
        )

    return [
        case("partial", kernels._partial_kernel, KEEP=False),
        case("one row", kernels._partial_kernel, KEEP=False, n=1),  # Triton makes a size of 1 a constant
        case("keep", kernels._partial_kernel, out, KEEP=True),
        case("gradient", kernels._gradient_kernel),
        case("kept", kernels._kept_gradient_kernel, ROWS=16, COLUMNS=tile.part),
    ]


def _combine() -> CompileCase:
    from .. import linear_logprob_triton as kernels

    signature = {"partials": "*fp32", "merged": "*fp32", "n": "i32", "parts": "i32"}
    sizes = {"ROWS": kernels.COMBINE_ROWS, "PARTS": kernels.COMBINE_PARTS}
    pointers = ("partials", "merged")
    return CompileCase("combine", kernels._combine_kernel, signature, sizes, pointers, 4, 3, tensor_cores=False)
