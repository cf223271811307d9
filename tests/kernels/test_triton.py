"""Starts triton_cases.py where Triton kernels can run: its interpreter on every machine, the GPU where there is one.

In a process of its own, since TRITON_INTERPRET counts when Triton is imported and not afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longreach.kernels import linear_logprob
from longreach.kernels.gpu import Tile

pytest.importorskip("triton", reason="Triton has no wheels for this system")
CASES = Path(__file__).with_name("triton_cases.py")


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


def test_tensors_that_no_kernel_takes_are_refused_with_the_reason() -> None:
    hidden, weight, targets = torch.ones(2, 8), torch.ones(9, 8), torch.zeros(2, dtype=torch.long)
    bad = [
        (hidden, weight, "runs only in its interpreter"),
        (hidden.double(), weight.double(), "float64 is not one of"),
        (hidden, weight.bfloat16(), "both must have one dtype"),
    ]
    for h, w, reason in bad:
        with pytest.raises(ValueError, match=f"can't run here: .*{reason}.*backend='chunked' can"):
            linear_logprob(h, w, targets, backend="triton")


def test_bfloat16_is_refused_in_the_interpreter() -> None:
    code = (
        "import torch; from longreach.kernels import linear_logprob\n"
        "h = torch.ones(2, 8, dtype=torch.bfloat16)\n"
        "linear_logprob(h, h, torch.zeros(2, dtype=torch.long), backend='triton')"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "gives wrong bfloat16 results without a word: use float16 or float32" in done.stderr


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tile_depends_on_the_gpu_and_the_layout_alone(capability: tuple[int, int], dtype: torch.dtype) -> None:
    tile = Tile.of(capability, dtype)
    assert tile.part * tile.parts == tile.columns
    assert not Tile.of(capability, dtype, tma=False).tma
    assert tile.tma == ((9, 0) <= capability < (12, 0) and dtype != torch.float32)
