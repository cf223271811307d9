"""The compile matrix: every described kernel, on three architectures, with the newest and the oldest Triton we support.

0 spills, tensor cores used where they should be and only there, shared memory within the limit: what makes a row
fail stands in longreach.kernels.checks.compilation, and test_check.py shows that each of it does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from longreach.kernels.checks import load, names, table
from longreach.kernels.checks.compilation import ARCHITECTURES, Row
from longreach.kernels.checks.worker import Job, read
from longreach.kernels.scores import Scores

pytest.importorskip("triton", reason="Triton has no wheels for this system")
OLD = Path(sys.prefix) / "old-triton"
DTYPES = ("bf16", "fp16", "fp32")


def environment(triton: str) -> dict[str, str]:
    if triton == "installed":
        return dict(os.environ)
    assert (OLD / "triton").is_dir(), "the oldest supported Triton isn't installed: run `make old-triton`"
    return {**os.environ, "PYTHONPATH": str(OLD)}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row]]:
    """An op and its rows, from a process of its own: another Triton can't be loaded into this one."""
    name, triton = request.param
    into = tmp_path_factory.mktemp(f"{name}-{triton}") / "rows"
    job = Job("compile", ARCHITECTURES)
    job.start(name, into, environment(triton))
    assert job.wait() == 0
    return name, [row for row in read("compile", into) if isinstance(row, Row)]


MATRIX = [(name, triton) for name in names() for triton in ("installed", "oldest")]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", MATRIX, ids="-".join, indirect=True)
def test_every_case_fits_every_architecture(compiled: tuple[str, list[Row]], record_property) -> None:
    """Those that a description says it is for, which is all if it doesn't."""
    name, rows = compiled
    text = table.compilation(rows)
    record_property("table", text)
    assert all(row.ok for row in rows), f"\n{text}"
    described = load(name)
    architectures = getattr(described, "ARCHITECTURES", ARCHITECTURES)
    labels = [{row.label for row in rows if row.arch == arch} for arch in architectures]
    assert all(labels), "an architecture without a case"
    for dtype in getattr(described, "DTYPES", DTYPES):
        assert all(any(dtype in label for label in found) for found in labels), f"no case in {dtype}"


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [case for case in MATRIX if case[1] == "oldest"], ids="-".join, indirect=True)
def test_the_oldest_triton_is_another_one(compiled: tuple[str, list[Row]]) -> None:
    """A PYTHONPATH that isn't heeded would compile everything twice with the same."""
    import triton

    (version,) = {row.triton for row in compiled[1]}
    assert version != triton.__version__
    assert version.startswith("3.6.")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "label, dtype, low",
    [("keep bf16", "bfloat16", 0), ("keep fp32", "float32", 0), ("keep bf16 lora bias cap", "bfloat16", 16)],
)
def test_what_is_compiled_is_what_is_launched(arch: int, label: str, dtype: str, low: int) -> None:
    """The flags of a case are those that the backend hands to its kernels for a model's tensors."""
    from longreach.kernels import linear_logprob_triton as backend
    from longreach.kernels.gpu import Tile

    kind = getattr(torch, dtype)
    hidden, weight = torch.empty(4, 64, dtype=kind), torch.empty(32, 64, dtype=kind)
    pair = (torch.empty(4, low, dtype=kind), torch.empty(32, low, dtype=kind)) if low else (None, None)
    bias, softcap = (torch.empty(32, dtype=kind), 3.0) if low else (None, None)
    scores = Scores(hidden, weight, torch.zeros(4, dtype=torch.long), torch.ones(4), bias, softcap, *pair)
    tile = Tile.of(divmod(arch, 10), kind, tma=True, capped=bool(low))
    _, _, launched = backend._arguments(scores, tile)
    cases = load("linear_logprob").compile_cases(arch)
    (case,) = (case for case in cases if case.label.removesuffix(" tma") == label)
    assert {**case.constexprs, "num_warps": case.num_warps, "num_stages": case.num_stages} == {**launched, "KEEP": True}
