"""The verdict on hand-made files: a regression is found and named, noise is none, and what is missing is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import compare, results
from bench.__main__ import main

MakeRow = Callable[..., dict[str, Any]]


def slower(row: MakeRow, factor: float, **changes: Any) -> dict[str, Any]:
    before = row(**changes)
    samples = [factor * value for value in before["samples_s"]]
    return {**before, "samples_s": samples, "median_s": factor * before["median_s"], "sources": "s2"}


def test_a_slower_row_is_a_regression(row: MakeRow) -> None:
    (found,) = compare.compare([row()], [slower(row, 1.3)]).pairs
    assert found.ratio == pytest.approx(1.3)
    assert 1.2 < found.low < 1.3 < found.high < 1.4
    assert found.faults == ("slower",)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.04])
def test_faster_or_a_little_slower_is_none(row: MakeRow, factor: float) -> None:
    assert not compare.compare([row()], [slower(row, factor)]).regressed


def test_a_wide_spread_is_no_evidence(row: MakeRow) -> None:
    noisy = row(samples_s=[0.08, 0.09, 0.112, 0.15, 0.16], median_s=0.112)
    found = compare.compare([row()], [noisy])
    assert found.pairs[0].ratio > 1.05
    assert not found.regressed


def test_the_threshold_is_the_callers(row: MakeRow) -> None:
    a, b = [row()], [slower(row, 1.3)]
    assert not compare.compare(a, b, threshold=0.5).regressed
    assert compare.compare(a, [slower(row, 1.04)], threshold=0.0).regressed


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"peak_mib": 10.6}, "memory 10.0 -> 10.6 MiB"),
        ({"value_error": 3e-6}, "value error 1.0e-06 -> 3.0e-06"),
        ({"value_error": float("nan")}, "value error 1.0e-06 -> nan"),
        ({"gradient_errors": {"dhidden": 2e-7, "dweight": 1e-3}}, "dweight error 3.0e-07 -> 1.0e-03"),
    ],
)
def test_memory_and_accuracy_are_judged_too(row: MakeRow, changes: dict[str, Any], fault: str) -> None:
    (found,) = compare.compare([row()], [row(**changes)]).pairs
    assert found.faults == (fault,)
    assert not compare.compare([row(ours=False)], [row(ours=False, **changes)]).regressed


def test_peers_are_shown_and_not_judged(row: MakeRow) -> None:
    found = compare.compare([row(ours=False)], [slower(row, 2.0, ours=False)])
    assert found.pairs[0].ratio == pytest.approx(2)
    assert not found.regressed


@pytest.mark.parametrize(
    ("machine", "ours", "regressed"), [(3.0, 3.0, False), (3.0, 3.9, True), (0.5, 0.65, True), (1.7, 1.0, False)]
)
def test_what_moved_the_peers_too_was_the_machine(row: MakeRow, machine: float, ours: float, regressed: bool) -> None:
    peer = {"ours": False, "contender": "torch"}
    found = compare.compare([row(), row(**peer)], [slower(row, ours), slower(row, machine, **peer)])
    first = found.pairs[0]
    assert first.machine == pytest.approx(machine)
    assert first.ratio == pytest.approx(ours / machine)
    assert found.regressed is regressed


def test_noise_of_a_round_cancels(row: MakeRow) -> None:
    """Half of the rounds were slow for all: plain medians would tell nothing."""
    rounds = [0.1, 0.5, 0.1, 0.5, 0.5]
    peer = {"ours": False, "contender": "torch", "samples_s": rounds}
    a = [row(samples_s=rounds), row(**peer)]
    b = [row(samples_s=[1.2 * value for value in reversed(rounds)]), row(**{**peer, "samples_s": rounds[::-1]})]
    first = compare.compare(a, b).pairs[0]
    assert (first.ratio, first.low, first.high) == pytest.approx((1.2, 1.2, 1.2))
    assert first.faults == ("slower",)


@pytest.mark.parametrize(
    "changes", [{"version": "2"}, {"torch": "3.0"}, {"samples_s": [3.0] * 4}, {"status": "gap"}, {"dtype": "bfloat16"}]
)
def test_another_peer_is_no_measure(row: MakeRow, changes: dict[str, Any]) -> None:
    peer = row(ours=False, contender="x", package="x", version="1")
    first = compare.compare([row(), peer], [row(), {**peer, **changes}]).pairs[0]
    assert first.machine is None
    assert first.ratio == 1


def test_missing_rows_are_named(row: MakeRow) -> None:
    a = [row(), row(contender="old one"), row(contender="never ran", status="gap")]
    b = [row(), row(contender="new one")]
    found = compare.compare(a, b)
    assert found.only_a == ["linear_logprob N=8 D=4 V=16 float32 both: old one"]
    assert found.only_b == ["linear_logprob N=8 D=4 V=16 float32 both: new one"]
    assert not found.regressed


def test_ours_that_no_longer_runs_is_a_regression(row: MakeRow) -> None:
    gap = row(contender="longreach, x", status="gap", reason="failed: RuntimeError: no")
    found = compare.compare([row(), row(contender="longreach, x")], [row(), gap])
    assert found.regressed
    assert found.lost == [
        "linear_logprob N=8 D=4 V=16 float32 both: longreach, x (failed: RuntimeError: no)"
    ]  # fmt: skip


def test_the_command_and_its_status(tmp_path: Path, row: MakeRow, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("a", "same", "worse", "other")}
    results.append(paths["a"], row())
    results.append(paths["a"], row(contender="gone"))
    results.append(paths["same"], row(sources="s2"))
    results.append(paths["worse"], slower(row, 1.5, device="another machine"))
    results.append(paths["other"], row(op="attention"))
    status = {name: main(["--compare", str(paths["a"]), str(path)]) for name, path in paths.items()}
    assert status == {"a": 0, "same": 0, "worse": 1, "other": 2}
    shown = capsys.readouterr()
    assert "no regression" in shown.out
    assert "1 regressions" in shown.out
    assert "only in A: linear_logprob N=8 D=4 V=16 float32 both: gone" in shown.out
    assert "the files come from different devices: CPU of a test, 2 cores, another machine" in shown.out
    assert "no measured row in common" in shown.err
    assert main(["--compare", str(paths["a"]), str(paths["worse"]), "--threshold", "1.0"]) == 0
    assert main(["--compare", str(paths["a"]), str(tmp_path / "none.json")]) == 2
