"""The ladder of memory: each feature's line lies below the one before, and a prompt is read off as the formula says."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import longest, longest_plot, results
from bench.memory import peak_bytes

DIMS = {"G": 3, "R": 8, "layers": 10, "D": 32, "V": 128, "tile": 64}
"""So narrow that gradients of weights, which no prompt changes, are small beside the tokens."""


@pytest.fixture(scope="module")
def ladder() -> dict[str, Any]:
    """The lines that are measured at a size of seconds: all but the first, which holds everything."""
    names = ["fused loss", "checkpointing", "tiling", "offload", "shared prefix"]
    made = [longest.ladder_row("cpu", DIMS, (256, 384), 64, name, longest.LADDER[name]) for name in names]
    return {row["contender"]: row for row in made}


@pytest.mark.slow
def test_each_feature_saves_memory(ladder: dict[str, Any]) -> None:
    slopes = [row["bytes_per_token"] for row in ladder.values()]
    assert all(after < 0.85 * before for before, after in pairwise(slopes)), slopes
    tokens = 4 * DIMS["D"] * DIMS["G"]  # bytes of one [T, D] for each token of a prompt
    assert slopes[0] - slopes[1] > (DIMS["layers"] - 3) * 10 * tokens  # of each checkpointed layer, its intermediates
    assert slopes[2] - slopes[3] > (DIMS["layers"] - 4) * tokens  # its inputs, but for those on their way
    assert slopes[4] < slopes[3] / (DIMS["G"] - 0.5)
    furthest = 384 * 3 // 2
    assert ladder["offload"]["host_mib"] == pytest.approx(DIMS["layers"] * 3 * (furthest + 8) * 32 * 4 / (1 << 20))
    assert ladder["tiling"]["host_mib"] == 0


@pytest.mark.slow
def test_the_line_is_straight_and_holds_beyond_its_points(ladder: dict[str, Any]) -> None:
    for row in ladder.values():
        assert row["fit_error"] < 0.05 and abs(row["check_error"]) < 0.05, row["contender"]
        rest = row["budget_mib"] - row["fixed_mib"] - row["start_mib"]
        assert row["longest"] == int(rest * (1 << 20) / row["bytes_per_token"])


def test_the_prompt_of_a_budget() -> None:
    assert longest.longest(10, 2 << 20, 1 << 20, 1024.0) == 7 * 1024
    assert longest.longest(2, 2 << 20, 1 << 20, 1024.0) == 0
    row = {"bytes_per_token": 1024.0, "fixed_mib": 2.0, "start_mib": 1.0, "contender": "x"}
    found = longest.shared_out(row, 10)
    assert (found["longest"], found["status"]) == (8 * 7 * 1024, "modelled")


def test_the_plain_loss_is_the_fused_one() -> None:
    """So that the ladder's first line does the same work as the second."""
    model = longest.make_model("cpu", DIMS)
    gradients = []
    for name in ("none", "fused loss"):
        longest.update(model, DIMS, 20, name)(keep=True)  # type: ignore[call-arg]
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    scale = [(a * b).sum() / (a * a).sum() for a, b in zip(*gradients, strict=True)]
    for a, b, s in zip(*gradients, scale, strict=True):
        assert s > 0 and (b - scale[0] * a).norm() < 1e-4 * b.norm()


def test_what_optimizers_save_is_counted() -> None:
    rows = {row["contender"]: row for row in longest.per_parameter("cpu", {**DIMS, "D": 128})}
    assert rows["adamw"]["gradients"] == 4.0
    assert rows["adamw"]["averages"] == pytest.approx(8.0)
    missing = "needs a GPU" if importlib.util.find_spec("torchao") else "torchao is not installed"
    assert rows["adamw-offload"]["status"] == "gap" and missing in rows["adamw-offload"]["reason"]
    if rows["adamw-8bit"]["status"] == "measured":
        assert 2.0 < rows["adamw-8bit"]["averages"] < 3.0
    if rows["adamw, LoRA of rank 16"]["status"] == "measured":
        assert rows["adamw, LoRA of rank 16"]["gradients"] < 3.0


def test_the_committed_rows_are_drawn(tmp_path: Path, root: Path) -> None:
    rows = results.load(results.FOLDER / "memory-cpu.json")
    lines = [row for row in rows if row["op"] == "longest"]
    assert [row["contender"] for row in lines] == [*longest.LADDER, "sp = 8"]
    assert [row["status"] for row in lines] == ["measured"] * 6 + ["modelled"]
    assert all(abs(row["check_error"]) < 0.02 for row in lines[:-1])
    assert longest_plot.draw(rows, tmp_path / "memory.png").stat().st_size > 10_000
    assert (root / "docs" / "memory.png").exists()
    with pytest.raises(ValueError, match="no row of `longest`"):
        longest_plot.draw([], tmp_path / "x.png")
    assert json.dumps(rows)


def test_a_peak_without_the_wide_intermediate() -> None:
    """`peak_bytes` sees what tiling is for: an MLP's peak falls from all of [T, 4 D] to a piece of it."""
    peaks = []
    for tokens in (0, 32):
        model: Any = longest.make_model("cpu", DIMS)
        longest.save_memory(model, tile_tokens=tokens)
        mlp, x = model.get_decoder().layers[0].mlp, torch.randn(1, 1024, 32, requires_grad=True)
        peaks.append(peak_bytes(lambda mlp=mlp, x=x: mlp(x).sum().backward(), "cpu"))
    assert peaks[1] < 0.4 * peaks[0]
