"""An op's numeric cases in Triton's interpreter, by the three-way rule, on poisoned memory.

The interpreter computes on NumPy arrays, block by block: it shows wrong formulas, masks and offsets, not races and not
what a compiler makes of them. It keeps bf16 as 16-bit integers and gives garbage without a word, so bf16 is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch

from .case import Description, NumericCase
from .three_way import judge

NAMES = {torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True)
class Outcome:
    """One case. worst: the tensor that uses the largest share of its allowed error."""

    label: str
    dtype: str
    tensors: int
    worst: str
    share: float
    seconds: float
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems


def require_interpreter() -> None:
    """Raises ValueError in a process that compiles its kernels."""
    from triton import knobs

    if not knobs.runtime.interpret:
        raise ValueError("kernels would be compiled here: set TRITON_INTERPRET=1 before Python starts")


def run_case(case: NumericCase) -> Outcome:
    """Runs one case. Raises ValueError for a dtype that the interpreter can't do, bf16 above all."""
    if case.dtype not in NAMES:
        raise ValueError(
            f"{case.label}: {case.dtype} can't be interpreted, the results would be garbage without an error; "
            "run it in float32 or float16, and on a GPU"
        )
    start, tensors, worst, share, problems = time.perf_counter(), 0, "", 0.0, []
    for item in case.run():
        if torch.bfloat16 in (item.ours.dtype, item.plain.dtype):
            raise ValueError(f"{case.label}: {item.name} is bfloat16, which can't be interpreted; use float16")
        verdict = judge(item.ours, item.plain, item.exact, terms=item.terms)
        tensors += 1
        if verdict.share >= share:
            worst, share = item.name, verdict.share
        if not verdict.ok:
            problems.append(f"{item.name}: {verdict.message}")
    if not tensors:
        problems.append("it compares nothing")
    return Outcome(case.label, NAMES[case.dtype], tensors, worst, share, time.perf_counter() - start, problems)


def run_cases(description: Description) -> Iterator[Outcome]:
    """Every case of an op. A buffer that a kernel should have filled holds NaN, wherever it didn't."""
    require_interpreter()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # torch fills what torch.empty returns in this mode
    torch.use_deterministic_algorithms(True)
    try:
        for case in description.numeric_cases():
            # the interpreter computes what a mask then drops, and NumPy would warn of it
            with numpy.errstate(all="ignore"):
                outcome = run_case(case)
            yield outcome
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
