"""Kernels compiled for GPUs that aren't there: registers, spills, shared memory, tensor-core instructions.

It says that a kernel fits an architecture and uses its units, not that it is right or fast. Registers and stack come
from `cuobjdump --dump-resource-usage` on the very cubin that Triton would load; a second run of ptxas might use other
options than Triton's. The stack holds whatever a thread couldn't keep in registers: 0 bytes of it means no spills.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from .case import CompileCase, Description

ARCHITECTURES = (80, 90, 100)
KIB = 1024
SHARED_LIMIT = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Bytes of shared memory that one block may have (CUDA C++ Programming Guide, technical specifications)."""
TENSOR_CORES = {"mma": r"\bmma\.sync\.", "wgmma": r"\bwgmma\.mma_async\.", "tcgen05": r"\btcgen05\.mma\."}
OWN_INSTRUCTION = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
"""The tensor-core instruction that reaches an architecture's full speed."""
SPECIALIZED = {
    "load through a descriptor": r"\bcp\.async\.bulk\.tensor\.",
    "registers handed from warp to warp": r"\bsetmaxnreg\.",
    "asynchronous product": r"\bwgmma\.wait_group\.sync\.aligned\s+[1-9]",
}
TMA_LOAD = r"\bcp\.async\.bulk\.tensor\.[\w.:]*\bshared::(?:cluster|cta)\.global\b"


@dataclass(frozen=True)
class Row:
    """One case on one architecture; sizes in bytes, counts in instructions of the PTX."""

    label: str
    arch: int
    triton: str
    warps: int
    registers: int
    stack: int
    shared: int
    shared_limit: int
    mma: int
    wgmma: int
    tcgen05: int
    tma: int
    seconds: float
    cached: bool
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems


def _source(case: CompileCase) -> Any:
    """Raises ValueError where the case and the kernel disagree about its arguments."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(case.kernel, JITFunction):
        raise ValueError(
            f"{case.label}: {type(case.kernel).__name__} can't be compiled; it takes a triton.jit function (kernel.fn "
            "of an autotuned one), in a process without TRITON_INTERPRET"
        )
    order, given = list(case.kernel.arg_names), {*case.signature, *case.constexprs}
    if set(order) != given or set(case.signature) & set(case.constexprs) or not given.issuperset(case.divisible):
        raise ValueError(
            f"{case.label}: {case.kernel.__name__} takes {order}; the case gives types of {sorted(case.signature)}, "
            f"values of {sorted(case.constexprs)}, and divisible {sorted(case.divisible)}"
        )
    signature = {name: case.signature.get(name, "constexpr") for name in order}
    attrs = {(order.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = GluonASTSource if case.kernel.is_gluon() else ASTSource
    return source(case.kernel, signature, constexprs=dict(case.constexprs), attrs=attrs)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread) of a cubin with one kernel in it."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", listing)
    return int(registers), int(stack)


def _problems(case: CompileCase, arch: int, stack: int, shared: int, tensor_cores: dict[str, int]) -> list[str]:
    found = []
    if stack > case.spills_allowed:
        allowed = f", {case.spills_allowed} are allowed" if case.spills_allowed else ""
        found.append(f"{stack} bytes of stack a thread{allowed}: registers are spilled")
    if shared > SHARED_LIMIT[arch]:
        found.append(f"{shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    own = OWN_INSTRUCTION[arch]
    if case.tensor_cores and not tensor_cores[own]:
        found.append(f"no {own} instruction: the tensor cores aren't used, or not at full speed")
    if not case.tensor_cores and any(tensor_cores.values()):
        found.append("tensor-core instructions where none should be: fp32 products are TF32")
    return found


def _problems_of_warps(ptx: str, log: str) -> list[str]:
    """Of a kernel that deals out its warps by hand. log: what ptxas said."""
    found = [f"no {what}" for what, pattern in SPECIALIZED.items() if not re.search(pattern, ptx)]
    return found + [line.strip() for line in log.splitlines() if "wgmma" in line and "serialized" in line]


def compile_case(case: CompileCase, arch: int) -> Row:
    """Compiles one case for sm_`arch`, on a machine with or without a GPU.

    Raises ValueError for an architecture without known limits, and where the case doesn't fit its kernel.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    if arch not in SHARED_LIMIT:
        raise ValueError(f"no limits are known for sm_{arch}: choose from {', '.join(map(str, SHARED_LIMIT))}")
    hits: list[bool] = []
    source, options = _source(case), {"num_warps": case.num_warps, "num_stages": case.num_stages}
    start = time.perf_counter()
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        # ptxas speaks only when it runs
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = case.specialized
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    registers, stack = _resources(compiled.asm["cubin"])
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    problems = _problems_of_warps(ptx, log.getvalue()) if case.specialized else []
    tensor_cores = {name: len(re.findall(pattern, ptx)) for name, pattern in TENSOR_CORES.items()}
    return Row(
        label=case.label,
        arch=arch,
        triton=triton.__version__,
        warps=compiled.metadata.num_warps,
        registers=registers,
        stack=stack,
        shared=shared,
        shared_limit=SHARED_LIMIT[arch],
        **tensor_cores,
        tma=len(re.findall(TMA_LOAD, ptx)),
        seconds=seconds,
        cached=all(hits),
        problems=problems + _problems(case, arch, stack, shared, tensor_cores),
    )


def compile_cases(description: Description, architectures: tuple[int, ...]) -> Iterator[Row]:
    """Every case of an op on each architecture."""
    for arch in architectures:
        for case in description.compile_cases(arch):
            yield compile_case(case, arch)
