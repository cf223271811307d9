"""A head shared out over ranks gives what the whole head gives, on every rank, in value and gradient."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.kernels import LowRank, linear_logprob
from longreach.kernels.checks.three_way import judge

SCRIPT = Path(__file__).with_name("vocab_parallel_rank.py")
PARTS = ("weight", "bias", "up")


@pytest.fixture(scope="module")
def rank() -> Any:
    spec = importlib.util.spec_from_file_location("vocab_parallel_rank", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 or 3 processes got."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    started = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(i), str(world), str(folder)], stderr=subprocess.PIPE)
        for i in range(world)
    ]
    said = [process.communicate(timeout=120)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0] * world, "\n".join(said)
    return [torch.load(folder / f"{i}.pt") for i in range(world)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_whole_head(
    ranks: list[dict[str, Any]], rank: Any, dtype: torch.dtype
) -> None:
    def whole(of: torch.dtype) -> dict[str, torch.Tensor]:
        leaves, targets, heat, upstream = rank.problem(dtype)
        leaves = {name: x.to(of).requires_grad_() for name, x in leaves.items()}
        result = linear_logprob(
            leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], temperature=heat, softcap=20.0,
            lora=LowRank(leaves["down"], leaves["up"], 0.5), backend="reference",
        )  # fmt: skip
        return rank.outcome(result, leaves, upstream)

    made, plain, exact = [r["made"][str(dtype)] for r in ranks], whole(dtype), whole(torch.float64)
    for name, value in exact.items():
        ours = torch.cat([m[name] for m in made]) if name in PARTS else made[0][name]
        assert ours.dtype == plain[name].dtype
        verdict = judge(ours, plain[name], value, terms=float(exact["lse"].abs().max()))
        assert verdict.ok, f"{name}: {verdict.message}"


def test_every_rank_gets_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for made in zip(*(r["made"].values() for r in ranks), strict=True):
        for name in ("logp", "entropy", "lse", "hidden", "down"):
            assert all(torch.equal(m[name], made[0][name]) for m in made[1:])


def test_nothing_is_legal_and_ranks_that_disagree_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert any("weight [V, D]" in said for said in ranks[0]["refused"]), "its part is empty"
    assert all(any("ranks [0] of the group refused" in said for said in r["refused"]) for r in ranks[1:])
    for r in ranks:
        assert r["empty"] == 0
        refused = r["refused"]
        assert any("outside the whole vocabulary" in said for said in refused)
        assert any("knows no shards" in said for said in refused)
        assert any("all must hand in the same" in said for said in refused)
