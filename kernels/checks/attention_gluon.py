"""What is checked of attention's Gluon kernels: compiled for Hopper; run from their source on the simulated machine.

Triton's interpreter can't run Gluon, so the numbers here are those of `gluon_machine`; only the sums of dout and out
(`delta_kernel`, Triton) are interpreted. The work is that of attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from . import attention
from .attention_numerics import Call, Setting, dead, halves, whole
from .case import Comparison, CompileCase, Mutant, NumericCase, Work

SHAPE = attention.SHAPE
ARCHITECTURES = (90,)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SPILLS = {"keys 128 bf16": 8}
"""Bytes of stack: dk and dv at a head dim of 128, causal, keep one number a thread in it from before their loop to after
it. The loop itself touches no stack."""


def work(shape: Mapping[str, int]) -> list[Work]:
    return attention.work(shape)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every combination of kernel, head dim and mask; causal in bf16, full in fp16 with unrounded results."""
    if arch not in ARCHITECTURES:
        return []
    from ..experimental import attention_gluon as backend

    causal = [case for width in backend.FORWARD for case in _kernels(width, "bf16", "bf16", True)]
    return causal + [case for width in backend.FORWARD for case in _kernels(width, "fp16", "fp32", False)]


def _kernels(width: int, dtype: str, out: str, causal: bool) -> list[CompileCase]:
    from ..experimental import attention_gluon as backend

    rows, columns = ("q_tma", "dout_tma"), ("k_tma", "v_tma")
    plan = [
        (backend.forward_kernel, backend.FORWARD, "COLUMNS", rows, columns),
        (backend.keys_kernel, backend.KEYS, "STEP", columns, rows),
        (backend.queries_kernel, backend.QUERIES, "STEP", rows, columns),
    ]
    made = []
    for kernel, rings, step, own, other in plan:
        if width not in rings:
            continue
        ring = rings[width]
        values = backend.flags(width, ring, causal) | {step: ring.step}
        warps = values.pop("num_warps")
        types = {
            **dict.fromkeys(own, _described(dtype, backend.ROWS, width)),
            **dict.fromkeys(other, _described(dtype, ring.step, width)),
            **dict.fromkeys(("out", "dq", "dk", "dv"), f"*{out}"), **dict.fromkeys(("lse", "base", "delta"), "*fp32"),
            **dict.fromkeys(("scale", "unit"), "fp32"), "programs": "*i32",
        }  # fmt: skip
        signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in values}
        divisible = tuple(name for name in signature if signature[name][0] == "*" or name.startswith("stride"))
        label = f"{kernel.__name__.removesuffix('_kernel')} {width} {dtype}{'' if causal else f' full {out} out'}"
        case = CompileCase(
            label, kernel, signature, values, divisible, warps, spills_allowed=SPILLS.get(label, 0), specialized=True
        )
        made.append(case)
    return made


def _described(dtype: str, rows: int, width: int) -> str:
    """Triton's type of a descriptor, which names the layout that its blocks have in shared memory."""
    from triton.experimental.gluon import language as gl

    kind = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    return f"tensordesc<{dtype}[{rows},{width}],{gl.NVMMASharedLayout.get_default_for([rows, width], kind)!r}>"


def numeric_cases() -> list[NumericCase]:
    """In fp32, which the GPU's kernels refuse, but which shows errors that rounded probabilities would hide; then fp16."""
    plan = [
        (Setting("one token, four heads", (1,), heads=4, key_heads=2, width=64), whole),
        (Setting("around a tile", (65, 128, 129), width=64), whole),
        (Setting("a segment of NaN between others", (70, 20, 150), width=64, heads=1), _neighbour),
        (Setting("full, a segment of NaN", (70, 20, 3), (20, 30, 300), width=64, heads=1), _neighbour),
        (Setting("full, empty sides", (4, 0, 70, 2), (7, 3, 0, 600), width=64), whole),
        (Setting("E=128, ragged", (300, 0, 3), width=128), whole),
        (Setting("E=128, full", (65,), (400,), width=128), whole),
        (Setting("E=256, forward", (330,), width=256, heads=1), _forward),
        (Setting("E=256, full, forward", (70,), (150,), width=256, heads=1), _forward),
        (Setting("keys in two halves", (70, 3), (130, 20), width=64), halves),
        (Setting("rows of infinite lse", (5, 130), width=64), dead),
        (Setting("scores to 300", (130,), width=64, sharp=75.0), whole),
    ]
    halved = [plan[1], plan[5], plan[6]]
    both = [(torch.float32, *case) for case in plan] + [(torch.float16, *case) for case in halved]
    return [
        NumericCase(setting.label, dtype, partial(_run, way, Call(setting, dtype, partial(_gluon, i))))
        for i, (dtype, setting, way) in enumerate(both)
    ]


def _run(way: Callable[[Call], Iterator[Comparison]], call: Call) -> Iterator[Comparison]:
    """A deadlock or a race as a comparison that fails."""
    from .gluon_machine import Broken

    try:
        yield from way(call)
    except Broken as error:
        zero = torch.zeros(1)
        yield Comparison(str(error), zero + math.nan, zero, zero.double())


def _gluon(index: int) -> Any:
    """The backend on the simulated machine, each case on a schedule of its own."""
    from ..experimental import attention_gluon as backend
    from .gluon_machine import SCHEDULES, simulate

    run = partial(simulate, schedule=SCHEDULES[index % len(SCHEDULES)])
    return SimpleNamespace(forward=partial(backend.forward, run=run), backward=partial(backend.backward, run=run))


def _forward(call: Call) -> Iterator[Comparison]:
    where = (call.bounds_q, call.bounds_k, call.causal, call.scale)
    out, lse = call.kernels().forward(call.q, call.k, call.v, *where, call.dtype)
    yield from call.compare({"out": out, "lse": lse}, call.dout)


def _neighbour(call: Call) -> Iterator[Comparison]:
    """The second segment is NaN, and nothing of it is seen in the others."""
    kernels, where = call.kernels(), (call.bounds_q, call.bounds_k, call.causal, call.scale)
    at_q, at_k = (slice(*bounds[1:3]) for bounds in (call.bounds_q, call.bounds_k))
    q, k, v, dout = (x.clone() for x in (call.q, call.k, call.v, call.dout))
    q[at_q], dout[at_q], k[at_k], v[at_k] = math.nan, math.nan, math.nan, math.nan
    out, lse = kernels.forward(q, k, v, *where, call.dtype)
    dq, dk, dv = kernels.backward(dout, q, k, v, out, lse, *where, call.dtype, True)
    found = {"out": out, "lse": lse.t(), "dq": dq, "dk": dk, "dv": dv}
    exact = call.usual(torch.float64, call.dout)
    exact["lse"] = exact["lse"].t()
    for name, x in found.items():
        at = at_k if name in ("dk", "dv") else at_q
        ones = torch.ones_like(x[at])
        yield Comparison(f"NaN of {name}", x[at].isnan().to(x.dtype), ones, ones.double())
        x[at] = exact[name][at].to(x.dtype)
    found["lse"] = found["lse"].t()
    yield from call.compare(found, call.dout)


def _fault(label: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(label, f"experimental/attention_gluon{file}.py", old, new)


_READY = "mbarrier.wait(k_full.index(after), after_parity, "
# (that a block's keys are let go too early has no mutant in the forward: their slot is filled behind a later block's
# values, which wait for a product that comes after)
MUTANTS = (
    _fault("a query doesn't see its own key", "_parts", ">= o_column[None, :]", "> o_column[None, :]"),
    _fault("a key past the segment is seen", "_parts", "o_column < last", "o_column <= last"),
    _fault("values past the segment are factors", "_forward", "if last - column < COLUMNS:", "if last < 0:"),
    _fault("sums of an older peak aren't scaled", "_forward", "acc = acc * gl.convert_layout(decay,", "acc = acc * gl.convert_layout(decay * 0 + 1,"),
    _fault("lse in units of log 2", "_forward", "gl.log2(total)) * LN2", "gl.log2(total))"),
    _fault("key head of the first group for all", "_forward", "(head // group) * E", "(head // group * 0) * E"),
    _fault("both groups read the same queries", "_forward", "[tile + who * ROWS, head * E]", "[tile, head * E]"),
    _fault("blocks in the wrong order", "_forward", "first + (blocks - 1 - turn) * COLUMNS", "first + turn * COLUMNS"),
    _fault("keys are used before they are there", "_forward", f"{_READY}pred=turn + 1 < blocks)", f"{_READY}pred=turn < 0)"),
    _fault("values are used before they are there", "_forward", "mbarrier.wait(v_full.index(before), before_parity)\n        ", ""),
    _fault("values are overwritten while they are read", "_forward", "acc = warpgroup_mma_wait(0, deps=[adding])\n        mbarrier.arrive(v_empty.index(before), count=1)", "mbarrier.arrive(v_empty.index(before), count=1)\n        acc = warpgroup_mma_wait(0, deps=[adding])"),
    _fault("a slot counts as free in its first phase", "_forward", "k_empty.index(slot), parity ^ 1", "k_empty.index(slot), parity"),
    _fault("a hidden block's keys aren't let go", "_parts", "mbarrier.arrive(k_empty.index(slot), count=1)\n        mbarrier.wait(v_full", "mbarrier.wait(v_full"),
    _fault("scores are taken in flight", "_forward", "warpgroup_mma_wait(1, deps=[started])", "warpgroup_mma_wait(2, deps=[started])"),
    _fault("no fence behind the zeros", "_parts", "    fence_async_shared()\n", "    pass\n"),
    _fault("zeros one row late", "_parts", "(o_row < valid)", "(o_row <= valid)"),
    _fault("a row past the segment is stored", "_parts", "(row + o_row < end)", "(row + o_row <= end)"),
    _fault("blocks behind the diagonal", "_parts", "row + 2 * ROWS", "row + ROWS"),
    _fault("dk, dv: a query doesn't see its own key", "_backward", "[None, :] >= o_column[:, None]", "[None, :] > o_column[:, None]"),
    _fault("dk, dv: queries past the segment are factors", "_backward", "if last - row < STEP:", "if last < 0:"),
    _fault("dk, dv: delta in the place of base", "_backward", "rows_s.index(2 * slot).store(b_base)", "rows_s.index(2 * slot).store(b_delta)"),
    _fault("dk, dv: base isn't waited for", "_backward", "mbarrier.init(full.index(slot), count=2)", "mbarrier.init(full.index(slot), count=1)"),
    _fault("dk, dv: a slot is let go while it is read", "_backward", "b_dv, b_dk = warpgroup_mma_wait(0, deps=[adding_dv, adding_dk])\n        mbarrier.arrive(empty.index(slot), count=1)", "mbarrier.arrive(empty.index(slot), count=1)\n        b_dv, b_dk = warpgroup_mma_wait(0, deps=[adding_dv, adding_dk])"),
    _fault("dk, dv: the next head begins where the last one ended", "_backward", "gl.where(row + STEP < last, row + STEP, start)", "row + STEP"),
    _fault("dk, dv: query heads of the first key head", "_backward", "head = key_head * group + turn // blocks", "head = turn // blocks + 0 * key_head"),
    _fault("dk without its scale", "_backward", "b_dk * unit", "b_dk"),
    _fault("dq without its scale", "_backward", "acc * unit", "acc"),
    _fault("dq: no mask", "_backward", "scale, seen, True)", "scale, seen, False)"),
    _fault("dq: keys past the segment are factors", "_backward", "if last - column < STEP:", "if last < 0:"),
    _fault("dq: keys are overwritten while they are read", "_backward", "acc = warpgroup_mma_wait(0, deps=[adding])\n        mbarrier.arrive(k_empty.index(before), count=1)", "mbarrier.arrive(k_empty.index(before), count=1)\n        acc = warpgroup_mma_wait(0, deps=[adding])"),
    _fault("dq: values aren't waited for", "_backward", "mbarrier.wait(v_full.index(slot), parity)\n        slopes", "slopes"),
    _fault("a program without keys is started", "", "programs[:, 2] < programs[:, 3]", "programs[:, 2] <= programs[:, 3]"),
    _fault("rows without keys aren't filled", "", "if b > a and c == d", "if b > a and c > d"),
)  # fmt: skip
