"""Starts attention_triton_cases.py where Triton kernels can run, and tests what needs no kernel to run."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheels for this system")

from longreach.kernels import attention_triton as backend
from longreach.kernels.checks import load, names
from longreach.kernels.checks.compilation import ARCHITECTURES, SHARED_LIMIT, _problems
from longreach.kernels.gpu import AttentionTiles

CASES = Path(__file__).with_name("attention_triton_cases.py")


def run(interpret: str) -> None:
    # a GPU machine may have an older pytest, and none of its plugins
    options = ["-o", "addopts=-q --import-mode=importlib", "-o", "minversion=8.0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-P", "-m", "pytest", *options, str(CASES)]
    env = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(command, env=env, cwd=CASES.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run("1")


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    run("0")


@pytest.mark.slow
def test_the_kernels_are_right_and_their_mutants_are_caught(root: Path) -> None:
    """Their compiled code is checked in test_compile.py."""
    command = [sys.executable, "-m", "longreach.kernels.check", "attention", "--skip", "compile"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "attention: all passed"
    for mutant in load("attention").MUTANTS:
        assert mutant.label in done.stdout


def test_what_no_kernel_takes_is_named() -> None:
    x, odd, wide = torch.ones(4, 2, 64), torch.ones(4, 2, 80), torch.ones(4, 2, 64, dtype=torch.float64)
    assert "runs only in its interpreter" in (backend.unsuited(x, x, x) or "")
    assert "head dim 80 is not one of 16, 32, 64, 96, 128, 256" in (backend.unsuited(odd, odd, odd) or "")
    assert "float64 is not one of" in (backend.unsuited(wide, wide, wide) or "")
    assert "scale -0.5 is not positive" in (backend.unsuited(x, x, x, -0.5) or "")
    assert "scale nan is not positive" in (backend.unsuited(x, x, x, float("nan")) or "")


BOUNDS = (0, 3, 3, 200, 201, 330)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("diagonal", ["", "queries", "keys"])
def test_every_tile_has_one_program_and_the_heaviest_start_first(size: int, diagonal: str) -> None:
    other = (0, 5, 9, 9, 400, 450) if not diagonal else BOUNDS
    table = backend.work_list(BOUNDS, other, size, diagonal).tolist()
    segments = {(BOUNDS[i + 1], other[i], other[i + 1]): BOUNDS[i] for i in range(5)}
    seen, work = [], []
    for token, end, first, last in table:
        begin = segments[end, first, last]
        seen += range(token, min(token + size, end))
        assert (token - begin) % size == 0 and token < end
        # keys before a tile's last query, queries behind a tile's first key
        work.append({"": last - first, "queries": min(token + size, end) - begin, "keys": end - token}[diagonal])
    assert sorted(seen) == list(range(330))
    slack = size if diagonal == "queries" else 0  # a segment's last tile is cut short, its order isn't
    assert all(a + slack >= b for a, b in pairwise(work))


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("width", backend.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_there_are_tiles_for_every_gpu(arch: int, width: int, dtype: torch.dtype) -> None:
    tiles = AttentionTiles.of(divmod(arch, 10), dtype, width)
    assert tiles.width >= width and tiles.width & (tiles.width - 1) == 0
    assert tiles.tma == (arch in (90, 100) and dtype != torch.float32)
    # the masked blocks fill whole ones, on the side that a kernel walks along
    assert tiles.forward.columns % tiles.forward.edge == tiles.queries.columns % tiles.queries.edge == 0
    assert tiles.keys.rows % tiles.keys.edge == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "label, width, causal", [("128 bf16", 128, True), ("96 bf16", 96, True), ("256 bf16 full", 256, False)]
)
def test_what_is_compiled_is_what_is_launched(arch: int, label: str, width: int, causal: bool) -> None:
    """The flags of a case are those that the backend hands to its kernels."""
    q = torch.empty(4, 2, width, dtype=torch.bfloat16)
    tiles = AttentionTiles.of(divmod(arch, 10), q.dtype, width)
    call = backend._Call({"q": q}, {"k": q, "v": q}, causal, tiles)
    cases = {case.label.removesuffix(" tma"): case for case in load("attention").compile_cases(arch)}
    for name in ("forward", "keys", "queries"):
        case = cases[f"{name} {label}"]
        flags = {**case.constexprs, "num_warps": case.num_warps, "num_stages": case.num_stages}
        assert flags == call.flags(getattr(tiles, name))


def test_only_the_spills_that_are_put_up_with_are_allowed() -> None:
    cases = {case.label: case for case in load("attention_gluon").compile_cases(90)}
    used = {"mma": 0, "wgmma": 1, "tcgen05": 0}
    keys, first = cases["keys 128 bf16"], cases["forward 128 bf16"]
    assert _problems(keys, 90, keys.spills_allowed, 0, used) == []
    assert "9 bytes of stack a thread, 8 are allowed" in _problems(keys, 90, 9, 0, used)[0]
    assert "8 bytes of stack a thread: registers are spilled" in _problems(first, 90, 8, 0, used)[0]
    assert [label for label, case in cases.items() if case.spills_allowed] == ["keys 128 bf16"]
    others = (
        case
        for op in names()
        if op != "attention_gluon"
        for arch in (80, 90, 100)
        for case in load(op).compile_cases(arch)
    )
    assert all(case.spills_allowed == 0 for case in others)
