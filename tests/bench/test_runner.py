"""The runner on a small op of the test's own: a row each, errors told, failures as gaps, and nothing measured twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import results, roofline
from bench.case import Case, Contender, Exact, Gap, Missing, Problem, gather
from bench.runner import Plan, Runner

CASE = Case("square", {"N": 100}, "float32", "cpu")
X = torch.arange(100.0).requires_grad_()


def contender(name: str, factor: float = 1.0, ours: bool = False, fails: bool = False) -> Contender:
    """x -> factor x^2, summed; the right one has factor 1."""

    def forward() -> Tensor:
        if fails:
            raise RuntimeError("out of memory, for example\nwith a second line")
        return factor * X * X

    def backward(state: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(state, (X,))

    return Contender(name, "values", forward, lambda: forward().sum(), backward, None, ours)


def op(*contenders: Contender | Gap, count: list[int] | None = None) -> Any:
    def problem(case: Case) -> Problem:
        assert case is CASE
        wide = X.detach().double()

        def truth() -> Exact:
            if count is not None:
                count.append(1)
            return Exact(wide * wide, (wide * wide).sum(), {"dx": 2 * wide})

        work = {"forward": 100.0, "backward": 100.0, "both": 200.0}
        return Problem(contenders, work, {name: 8 * value for name, value in work.items()}, truth, ("dx",))

    return SimpleNamespace(PASSES=("forward", "backward", "both"), problem=problem)


@pytest.fixture
def make_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    monkeypatch.setitem(roofline.MATMUL_SIDE, "cpu", 64)
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 1 << 20)

    def make(sources: str = "s1", fresh: bool = False, **plan: Any) -> Runner:
        conditions = {"device": "this", "threads": 1, "commit": "c", "sources": sources, "date": "today"}
        settings = Plan(**{"seconds": 0.0, "least": 3, **plan})
        return Runner(tmp_path / "rows.json", "cpu", conditions, settings, fresh=fresh, say=lambda _: None)

    return make


def rows_of(runner: Runner) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["contender"], row["pass"]): row for row in results.load(runner.path)}


def test_every_pass_of_every_contender_is_a_row(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner()
    runner.run(op(contender("right", ours=True), contender("wrong", factor=1.5)), [CASE])
    rows = rows_of(runner)
    assert len(rows) == runner.report.written == 6
    for row in rows.values():
        assert row["status"] == "measured"
        assert row["rounds"] == len(row["samples_s"]) == 3
        assert row["median_s"] > 0
        assert row["roofline_share"] == pytest.approx(row["floor_s"] / row["median_s"])
        assert row["ceiling_gbs"] > 0
    assert rows["right", "forward"]["value_error"] == 0
    assert rows["right", "both"]["gradient_errors"] == {"dx": 0}
    # fast and wrong is visible
    assert rows["wrong", "forward"]["value_error"] == pytest.approx(0.5 * 99**2)
    assert rows["wrong", "both"]["gradient_errors"] == {"dx": pytest.approx(0.5)}
    assert rows["right", "forward"]["peak_mib"] * 2**20 == pytest.approx(2 * 400, abs=256)
    assert rows["right", "both"]["result_mib"] * 2**20 == 400


def test_a_failure_is_a_gap_and_the_others_go_on(make_runner: Callable[..., Runner]) -> None:
    def absent() -> Contender:
        raise Missing("it isn't installed")

    runner = make_runner()
    runner.run(op(contender("bad", fails=True, ours=True), gather("absent", absent), contender("good")), [CASE])
    rows = rows_of(runner)
    assert rows["good", "both"]["status"] == "measured"
    assert rows["bad", "both"]["reason"] == "failed: RuntimeError: out of memory, for example"
    assert rows["absent", "both"]["reason"] == "it isn't installed"
    assert runner.report.failed == 3  # ours, once a pass; a missing peer is no failure
    assert "median_s" not in rows["bad", "both"]


def test_a_second_run_goes_on_where_the_first_stopped(make_runner: Callable[..., Runner]) -> None:
    first, counts = make_runner(), [0]
    first.run(op(contender("a"), Gap("peer", "missing")), [CASE])
    before = rows_of(first)

    def counted() -> Tensor:
        counts[0] += 1
        return X * X

    again = Contender("a", "values", counted, lambda: counted().sum(), lambda s: torch.autograd.grad(s, (X,)))
    second = make_runner()
    second.run(op(again, contender("peer")), [CASE])
    assert counts == [0]
    assert second.report.standing == 3
    assert rows_of(second)["a", "both"] == before["a", "both"]
    assert rows_of(second)["peer", "both"]["status"] == "measured"  # what was missing is tried again

    for runner in (make_runner(sources="s2"), make_runner(sources="s2", fresh=True)):
        counts[0] = 0
        runner.run(op(again), [CASE])
        assert counts[0] > 0
        assert rows_of(runner)["a", "both"]["sources"] == "s2"


def test_fp64_is_not_computed_for_what_stands(make_runner: Callable[..., Runner]) -> None:
    counts: list[int] = []
    make_runner().run(op(contender("a"), count=counts), [CASE])
    assert counts == [1]  # once for three passes
    make_runner().run(op(contender("a"), count=counts), [CASE])
    assert counts == [1]


def test_nothing_is_begun_after_the_deadline(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(deadline=time.monotonic() - 1)
    runner.run(op(contender("a")), [CASE])
    assert runner.report.left == 1
    assert results.load(runner.path) == []


def test_each_row_is_written_before_the_next_pass_begins(make_runner: Callable[..., Runner]) -> None:
    """A run that is killed keeps what it has."""

    def killed(_: Any) -> Any:
        raise KeyboardInterrupt

    stops = Contender("a", "values", lambda: X * X, lambda: (X * X).sum(), killed)
    runner = make_runner()
    with pytest.raises(KeyboardInterrupt):
        runner.run(op(stops), [CASE])
    assert set(rows_of(runner)) == {("a", "forward")}


def test_a_contender_that_takes_the_device_down_ends_the_run_and_is_passed_by(
    make_runner: Callable[..., Runner],
) -> None:
    def crash() -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    crashes = Contender("crashes", "values", crash, crash, lambda state: ())
    first = make_runner()
    with pytest.raises(torch.AcceleratorError):
        first.run(op(crashes, contender("a")), [CASE])
    assert set(rows_of(first)) == {("crashes", "forward")}
    while ("a", "both") not in rows_of(first):
        before = len(rows_of(first))
        try:
            make_runner().run(op(crashes, contender("a")), [CASE])
        except torch.AcceleratorError:
            assert len(rows_of(first)) > before
    assert rows_of(first)["crashes", "both"]["reason"].startswith(results.CRASHED)


def single(name: str, *, fails: bool = False, part: bool = False, ran: list[str] | None = None) -> Contender:
    """For an op whose runs take minutes; `ran` is told of each run."""

    def run() -> tuple[Tensor, ...]:
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")
        if ran is not None:
            ran.append(name)
        return torch.autograd.grad((X * X).sum(), (X,))

    def warm_up() -> None:
        if ran is not None:
            ran.append(f"{name}, warm")

    one = {"part": run, "parts": 3} if part else {}
    return Contender(name, "values", lambda: X * X, lambda: None, lambda _: run(), None, True, warm_up=warm_up, **one)


def test_what_takes_minutes_runs_once(make_runner: Callable[..., Runner]) -> None:
    """No rounds; a part's time is multiplied and the row says so; out of memory is a gap and the next goes on."""
    ran: list[str] = []
    contenders = (single("full", fails=True, ran=ran), single("whole", ran=ran), single("part", part=True, ran=ran))
    made = op(*contenders)
    problem = made.problem
    made.problem = lambda case: replace(problem(case), once=True, tokens=50)
    made.PASSES = ("both",)
    runner = make_runner(least=30, most=40)
    runner.run(made, [CASE])
    rows = rows_of(runner)
    assert rows["full", "both"]["reason"] == "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    whole, part = rows["whole", "both"], rows["part", "both"]
    assert (whole["parts"], whole["estimated"], part["parts"], part["estimated"]) == (1, False, 3, True)
    assert part["median_s"] == 3 * part["part_s"] and part["tokens_per_s"] == 50 / part["median_s"]
    assert whole["rounds"] == 1 and whole["gradient_errors"] == {"dx": 0}
    # 400 bytes of the square, its gradient and the result at least
    assert 400 <= whole["peak_mib"] * 2**20 < 8000
    # on a CPU once for the time and once for the memory
    assert ran == ["full, warm", *(["whole, warm"] + 2 * ["whole"]), *(["part, warm"] + 2 * ["part"])]
    assert runner.report.failed == 1
    again = make_runner()
    again.run(made, [CASE])
    assert again.report.standing == 2 and rows_of(again)["whole", "both"] == whole
