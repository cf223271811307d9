"""What is checked of the trial matmul."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from longreach.kernels.checks.case import Comparison, CompileCase, Mutant, NumericCase, Work

SHAPE = {"N": 1024, "V": 2048, "D": 512}

MUTANTS = (
    Mutant("last block of depth dropped", "matmul.py", "range(0, depth, DEPTH)", "range(0, depth - DEPTH, DEPTH)"),
    Mutant("last column never stored", "matmul.py", "o_col < n_cols", "o_col < n_cols - 1"),
)


def compile_cases(arch: int) -> list[CompileCase]:
    from ..matmul import matmul_kernel

    sizes, tile = {"n_rows": "i32", "n_cols": "i32", "depth": "i32"}, {"ROWS": 64, "COLS": 64, "DEPTH": 32}
    return [
        CompileCase(
            f"matmul {dtype}",
            matmul_kernel,
            {"p_a": f"*{dtype}", "p_b": f"*{dtype}", "p_c": "*fp32", **sizes},
            tile,
            ("p_a", "p_b", "p_c", "depth"),
            tensor_cores=dtype != "fp32",
        )
        for dtype in ("bf16", "fp32")
    ]


def numeric_cases() -> list[NumericCase]:
    return [case(n, v, d, dtype) for n, v, d in ((1, 1, 1), (33, 31, 40)) for dtype in (torch.float32, torch.float16)]


def case(n: int, v: int, d: int, dtype: torch.dtype) -> NumericCase:
    def run() -> Iterator[Comparison]:
        from ..matmul import matmul

        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (n, v))
        yield Comparison("c", matmul(a, b), a.float() @ b.float().t(), a.double() @ b.double().t())

    return NumericCase(f"{n}x{v}x{d}", dtype, run)


def work(shape: Mapping[str, int]) -> list[Work]:
    n, v, d = shape["N"], shape["V"], shape["D"]
    return [Work("forward", 2.0 * n * v * d, 2.0 * (n * d + v * d) + 4.0 * n * v)]
