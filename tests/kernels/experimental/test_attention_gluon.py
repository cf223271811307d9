"""Attention in Gluon: its source on the simulated machine, its compiled code, what it refuses; on a Hopper GPU, numbers."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheels for this system")

from longreach.kernels import attention, attention_choice, gpu
from longreach.kernels.checks import load
from longreach.kernels.checks.compilation import _problems_of_warps, _source
from longreach.kernels.checks.gluon_machine import SCHEDULES, simulate
from longreach.kernels.experimental import attention_gluon as backend
from longreach.kernels.experimental.attention_gluon_forward import forward_kernel

EDGES = (1, 63, 64, 65, 127, 128, 129, 0, 191, 257)


def bounds(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def draw(queries: int, keys: int, dtype: torch.dtype, width: int, heads: tuple[int, int] = (2, 1)) -> list[Tensor]:
    """q, k, v, dout"""
    generator = torch.Generator().manual_seed(queries + 7 * keys + width)
    shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return [torch.randn(*shape, width, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.slow
def test_the_source_is_right_and_its_mutants_are_caught(root: Path) -> None:
    """Its compiled code is checked in test_compile.py."""
    command = [sys.executable, "-m", "longreach.kernels.check", "attention_gluon", "--skip", "compile"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "attention_gluon: all passed"
    for mutant in load("attention_gluon").MUTANTS:
        assert mutant.label in done.stdout


@pytest.mark.parametrize("width", backend.FORWARD)
@pytest.mark.parametrize("causal", [True, False])
def test_every_visible_pair_counts_once(causal: bool, width: int) -> None:
    """With equal scores, lse is the logarithm of how many keys a query sees, and out their mean: integers, exact."""
    lengths = EDGES if width == 64 else (65, 129, 257)
    at_q = bounds(lengths)
    at_k = at_q if causal else bounds(tuple(reversed(lengths)))
    q = torch.zeros(at_q[-1], 1, width)
    k = torch.randn(at_k[-1], 1, width)
    v = torch.randint(-8, 9, k.shape).float()
    out, lse = backend.forward(q, k, v, at_q, at_k, causal, 1.0, torch.float32, run=simulate)
    for (a, b), (c, d) in zip(pairwise(at_q), pairwise(at_k), strict=True):
        seen = torch.ones(b - a, d - c).tril() if causal else torch.ones(b - a, d - c)
        count = seen.sum(1)
        torch.testing.assert_close(lse[0, a:b], count.log(), rtol=0, atol=2e-6)
        wanted = (seen @ v[c:d, 0]) / count[:, None]
        torch.testing.assert_close(out[a:b, 0], torch.where(count[:, None] > 0, wanted, 0), rtol=1e-6, atol=1e-6)


def test_every_schedule_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def row_sums(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return lse / math.log(2), (dout.float() * out.float()).sum(2).t().contiguous()

    monkeypatch.setattr(backend, "row_sums", row_sums)  # a Triton kernel, for which there is no GPU
    q, k, v, dout = draw(200, 200, torch.bfloat16, 64)
    where = ((0, 130, 200), (0, 130, 200), True, 0.125)
    found = []
    for schedule in SCHEDULES:
        run = partial(simulate, schedule=schedule)
        out, lse = backend.forward(q, k, v, *where, torch.float32, run=run)
        grads = backend.backward(dout, q, k, v, out, lse, *where, torch.float32, True, run=run)
        found.append([out, lse, *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_bf16(three_way: Callable[..., None], causal: bool) -> None:
    q, k, v, _ = draw(150, 150 if causal else 300, torch.bfloat16, 128)
    at_q, at_k = (0, 150), (0, len(k))
    out, lse = backend.forward(q, k, v, at_q, at_k, causal, 0.1, torch.bfloat16, run=simulate)
    how: dict[str, Any] = {"causal": causal, "scale": 0.1, "backend": "reference"}
    plain = attention.forward(q, k, v, **how)
    exact = attention.forward(q.double(), k.double(), v.double(), **how)
    three_way(out, plain[0], exact[0], terms=1.0)
    three_way(lse, plain[1], exact[1], terms=10.0)


def test_addresses_past_two_billion_numbers() -> None:
    """The last tile of a row of 2^19 + 40 tokens with 32 heads of 128: memory that is never touched costs nothing."""
    tokens, heads, width = (1 << 19) + 40, 32, 128
    q = torch.empty(tokens, heads, width, dtype=torch.float16)
    out, lse = torch.empty_like(q), torch.full((heads, tokens), math.nan)
    _, k, v, _ = draw(1, 50, torch.float16, width, (1, 8))
    first = tokens - 40
    q[first:] = draw(40, 1, torch.float16, width, (heads, 1))[0]
    ring = backend.FORWARD[width]
    simulate(
        forward_kernel, (heads,), q.device, **backend.described(backend.ROWS, q_tma=q),
        **backend.described(ring.step, k_tma=k, v_tma=v), out=out, lse=lse,
        programs=torch.tensor([[first, tokens, 0, 50]], dtype=torch.int32), scale=0.1 * 1.4426950408889634,
        tokens=tokens, heads=heads, group=4, stride_out=heads * width, COLUMNS=ring.step,
        **backend.flags(width, ring, False),
    )  # fmt: skip
    wanted, wanted_lse = attention.forward(q[first:], k, v, causal=False, scale=0.1, backend="reference")
    torch.testing.assert_close(out[first:], wanted, rtol=0, atol=4e-3)
    torch.testing.assert_close(lse[:, first:], wanted_lse, rtol=0, atol=1e-3)
    assert lse[:, :first].isnan().all()


def test_heads_that_lie_otherwise_are_copied() -> None:
    q, k, v, _ = draw(70, 70, torch.float16, 64, (2, 2))
    where = ((0, 70), (0, 70), True, 0.125, torch.float16)
    right = backend.forward(q, k, v, *where, run=simulate)

    def apart(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    fused = torch.cat([q, k, v], 1)
    views = (
        (fused[:, :2], fused[:, 2:4], fused[:, 4:]),
        (apart(q), apart(k), apart(v)),
        (torch.cat([torch.zeros(3, dtype=q.dtype), q.flatten()])[3:].view_as(q), k, v),
    )
    for view in views:
        for a, b in zip(backend.forward(*view, *where, run=simulate), right, strict=True):
            assert torch.equal(a, b)


def test_segments_without_another_side_start_no_program() -> None:
    at_q, at_k = (0, 4, 4, 200), (0, 0, 9, 100)
    table = backend.visible(backend.work_list(at_q, at_k, 128, ""))
    assert sorted(row[0] for row in table.tolist()) == [4, 132]
    assert backend.alone(at_q, at_k) == [(0, 4)]
    assert backend.alone(at_k, at_q) == [(0, 9)]


class OnAGpu:
    """As much of a CUDA tensor as the choice reads."""

    is_cuda = True
    device = torch.device("cuda:0")

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.shape = dtype, torch.Size([12, 4, width])


@pytest.mark.parametrize(
    "dtype, width, capability, backward, named",
    [
        (torch.bfloat16, 128, (9, 0), True, None),
        (torch.float16, 256, (9, 0), False, None),
        (torch.bfloat16, 256, (9, 0), True, "its backward's head dims are 64, 128, and this one is 256"),
        (torch.bfloat16, 96, (9, 0), False, "its head dims are 64, 128, 256, and this one is 96"),
        (torch.float32, 64, (9, 0), False, "torch.float32 is not one of bfloat16, float16"),
        (torch.bfloat16, 64, (8, 0), False, "Hopper GPUs alone, and this one's compute capability is (8, 0)"),
        (torch.bfloat16, 64, (10, 0), True, "Hopper GPUs alone, and this one's compute capability is (10, 0)"),
    ],
)
def test_what_it_takes(
    dtype: torch.dtype, width: int, capability: tuple[int, int], backward: bool, named: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    x: Any = OnAGpu(dtype, width)
    found = backend.unsuited(x, x, x, backward=backward)
    assert found is None if named is None else named in str(found)
    if width == 256 and backward:
        monkeypatch.setattr(attention_choice, "_automatic", lambda *_: "flash")
        assert attention_choice.choose("gluon", "forward", x, 1) == "gluon"
        with pytest.raises(ValueError, match=r"its backward's head dims are 64, 128.*use 'flash'"):
            attention_choice.choose("gluon", "backward", x, 1)


def test_it_is_taken_by_name_alone() -> None:
    assert "gluon" in attention.BACKENDS
    assert "gluon" not in attention_choice.UNMEASURED
    assert all("gluon" not in order for table in attention_choice.MEASURED.values() for order in table.values())
    q = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'gluon' can't do this: .*Hopper GPUs alone.* on cpu; use 'cpu' or 'auto'"):
        attention.forward(q, q, q, causal=True, backend="gluon")


def test_a_scale_that_is_not_positive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    q: Any = OnAGpu(torch.bfloat16, 64)
    assert "scale -1.0 is not positive" in str(backend.unsuited(q, q, q, -1.0))


def test_what_is_compiled_is_what_is_launched() -> None:
    q, k, v, _ = draw(4, 4, torch.bfloat16, 128)
    (case,) = (case for case in load("attention_gluon").compile_cases(90) if case.label == "forward 128 bf16")
    launched: dict[str, Any] = {}
    backend.forward(q, k, v, (0, 4), (0, 4), True, 1.0, torch.bfloat16, run=lambda *_, **given: launched.update(given))
    assert {name: launched[name] for name in case.constexprs} == case.constexprs
    assert launched["num_warps"] == case.num_warps
    assert set(launched) == {*case.constexprs, *case.signature, "num_warps"}
    for name, kind in case.signature.items():
        if kind.startswith("tensordesc"):
            found = launched[name]
            assert kind == f"tensordesc<bf16[{found.block_shape[0]},{found.block_shape[1]}],{found.layout!r}>"
    assert load("attention_gluon").compile_cases(80) == []


def test_a_kernel_that_is_not_specialised_is_found() -> None:
    good = "cp.async.bulk.tensor.2d setmaxnreg.inc wgmma.wait_group.sync.aligned 1;"
    assert _problems_of_warps(good, "") == []
    assert _problems_of_warps(good.replace(" 1;", " 0;"), "") == ["no asynchronous product"]
    assert len(_problems_of_warps("", "warning: wgmma.mma_async instructions are serialized due to")) == 4


@pytest.mark.parametrize("label, exponentials", [("forward 128 bf16", 66), ("queries 128 bf16", 32)])
def test_exponentials_run_beside_a_product(label: str, exponentials: int) -> None:
    """In the machine code of both warp groups, between the wait for scores and that for the product before: ptxas moves
    the second wait up to the first if nothing holds it. A thread has two rows of the forward's scores: 64 numbers, and
    two by which older sums shrink."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    (case,) = (case for case in load("attention_gluon").compile_cases(90) if case.label == label)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(_source(case), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {"HGMMA": "H", "WARPGROUP.DEPBAR": "w", "MUFU.EX2": "e"}
    order = "".join(names[found] for found in re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2)\b", listing))
    beside = [len(run) for run in re.findall(r"w(e+)(?=w)", order)]
    # a wait, exponentials, the next wait, and no product issued in between
    assert [run for run in beside if run >= exponentials] == [exponentials] * 2, order


def on_the_gpu() -> None:
    if gpu.capability(torch.device("cuda"))[0] != 9:
        pytest.skip("it is compiled for Hopper GPUs alone")


@pytest.fixture
def poisoned() -> Any:
    """Uninitialised memory holds NaN, so that a value which is read before it was written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", backend.FORWARD)
def test_on_the_gpu(three_way: Callable[..., None], width: int, causal: bool, dtype: torch.dtype) -> None:
    """Ragged segments at every edge of a tile and of 1K to 4K tokens, grouped heads, NaN in a segment between others."""
    on_the_gpu()
    queries = (*EDGES, 1024, 40, 3001, 4096)
    keys = queries if causal else (*reversed(queries[:10]), 2048, 77, 4096, 1500)
    spoilt = len(EDGES) + 1
    at_q, at_k = bounds(queries), bounds(keys)
    clean = [x.cuda() for x in draw(at_q[-1], at_k[-1], dtype, width, (4, 2))]
    tensors = [x.clone() for x in clean]
    for x, at in zip(tensors, (at_q, at_k, at_k, at_q), strict=True):
        x[at[spoilt] : at[spoilt + 1]] = math.nan
    how: dict[str, Any] = {"causal": causal, "cu_seqlens_q": at_q, "cu_seqlens_k": at_k}

    def results(name: str, kind: torch.dtype, given: list[Tensor]) -> list[Tensor]:
        q, k, v, dout = (x.to(kind) for x in given)
        out, lse = attention.forward(q, k, v, backend=name, **how)
        found = [out, lse.t()]
        if width in backend.KEYS:
            found += attention.backward(dout, q, k, v, out, lse, backend=name, **how)
        return found

    ours, again = (results("gluon", dtype, tensors) for _ in range(2))
    plain, exact = results("reference", dtype, clean), results("reference", torch.float64, clean)
    for a, again_a, b, c, at in zip(ours, again, plain, exact, (at_q, at_q, at_q, at_k, at_k), strict=False):
        kept = torch.ones(len(a), dtype=torch.bool, device="cuda")
        kept[at[spoilt] : at[spoilt + 1]] = False
        assert a[~kept].isnan().all()
        assert torch.equal(a[kept], again_a[kept])
        seen = torch.isfinite(c) & kept.view(-1, *[1] * (c.dim() - 1))
        assert torch.equal(torch.isfinite(a), seen)
        three_way(a[seen], b.to(a.dtype)[seen], c[seen], terms=1.0)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", backend.KEYS)
def test_merged_results_on_the_gpu(three_way: Callable[..., None], width: int) -> None:
    """Keys in two parts: out and lse merged, each part's gradients in fp32 of the merged pair, summed."""
    on_the_gpu()
    q, k, v, dout = (x.cuda() for x in draw(2000, 2500, torch.bfloat16, width, (8, 2)))
    parts = ((k[:1100], v[:1100]), (k[1100:], v[1100:]))
    made = [attention.forward(q, *part, causal=False, backend="gluon", out_dtype=torch.float32) for part in parts]
    out, lse = attention.merge(*made[0], *made[1])
    grads = [
        attention.backward(dout, q, *part, out, lse, causal=False, backend="gluon", grad_dtype=torch.float32)
        for part in parts
    ]
    ours = [
        out,
        lse,
        grads[0][0] + grads[1][0],
        *(torch.cat(pair) for pair in zip(*(g[1:] for g in grads), strict=True)),
    ]
    wanted: list[list[Tensor]] = []
    for kind in (torch.bfloat16, torch.float64):
        a, b, c, d = (y.to(kind) for y in (q, k, v, dout))
        o, s = attention.forward(a, b, c, causal=False, backend="reference")
        wanted.append([o, s, *attention.backward(d, a, b, c, o, s, causal=False, backend="reference")])
    for a, b, c in zip(ours, *wanted, strict=True):
        # unrounded, but made of probabilities in bf16: judged by that
        three_way(a, b, c, terms=1.0)
