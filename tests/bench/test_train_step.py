"""The FLOP model counts what it says it counts, and the table of speed-ups is made from rows and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench import train_step
from bench.case import Case

DIMS = {"P": 7, "G": 3, "R": 4, "layers": 2, "D": 192, "V": 50}


def counted(lengths: list[tuple[int, int]], dims: dict[str, int]) -> float:
    """The model of sequences written out: (tokens seen before, own tokens) each, every pair of query and key by itself."""
    tokens = sum(own for _, own in lengths)
    pairs = sum(seen + i + 1 for seen, own in lengths for i in range(own))
    rows = dims["G"] * dims["R"]
    model = train_step.make_model(Case("train_step", dims, "float32", "cpu"), "sdpa")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    forward = 2 * tokens * matrices + 2 * rows * dims["D"] * dims["V"]
    return 3 * forward + 3.5 * 4 * dims["D"] * dims["layers"] * pairs


@pytest.mark.parametrize("changes", [{}, {"G": 1}, {"P": 1}, {"R": 1}, {"D": 128}])
def test_flop_model(changes: dict[str, int]) -> None:
    dims = {**DIMS, **changes}
    P, G, R = (dims[name] for name in "PGR")
    assert train_step.flops(dims, shared=True) == counted([(0, P), *[(P, R)] * G], dims)
    assert train_step.flops(dims, shared=False) == counted([(0, P + R)] * G, dims)


def test_sharing_tends_to_the_groups_size() -> None:
    long = {**DIMS, "P": 1 << 20, "G": 8, "R": 1}
    assert train_step.flops(long, shared=False) / train_step.flops(long, shared=True) == pytest.approx(8, rel=1e-3)


def test_the_headlines_model_has_twenty_million_weights() -> None:
    dims = train_step.SIZES["cpu"]["large"][0]
    assert train_step.weights(dims) + dims["V"] * dims["D"] == pytest.approx(20e6, rel=0.05)


def test_table_of_rows(row: Callable[..., dict[str, Any]]) -> None:
    def update(contender: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
        about = {"op": "train_step", "dims": DIMS, "contender": contender, "samples_s": seconds}
        return row(**about, median_s=sorted(seconds)[len(seconds) // 2], **changes)

    rows = [
        update(train_step.SHARED, [1.0, 2.0, 4.0]),
        update(train_step.DENSE, [5.0, 10.0, 24.0], peak_mib=80.0),  # the machine was slower in each round
        update(train_step.TRL, [6.0, 12.0, 24.0], gradient_errors={"w": 2e-6}),
    ]
    model = train_step.flops(DIMS, shared=False) / train_step.flops(DIMS, shared=True)
    case = "P=7 G=3 R=4 layers=2 D=192 V=50"
    wanted = [case, "2", "10", "12", "5.00 (5.00-5.50)", "6.00 (6.00-6.00)", f"{model:.2f}", "10 80 10", "2e-06"]
    assert train_step.tables(rows) == {"CPU of a test, 2 cores": [wanted]}
    gap = update(train_step.TRL, [1.0], status="gap", reason="trl can't be imported")
    (line,) = train_step.tables([*rows[:2], gap])["CPU of a test, 2 cores"]
    assert line[3] == line[5] == "" and line[7] == "10 80"
    assert train_step.tables([*rows[1:], row()]) == {}
