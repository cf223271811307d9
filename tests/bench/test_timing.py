"""Contenders take turns, only the region itself is timed, and the peak of memory is counted to the byte."""

from __future__ import annotations

import time

import pytest
import torch

from bench import memory, timing


def test_contenders_take_turns() -> None:
    order: list[str] = []
    tasks = {name: timing.Task(lambda _, name=name: order.append(name)) for name in "abc"}
    taken, lost = timing.round_robin(tasks, timing.cpu_clock, 3)
    assert not lost
    assert "".join(order) == "abcabcabc"
    assert {name: len(found) for name, found in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_task_that_fails_leaves_the_others() -> None:
    runs = {"fails": 0, "stays": 0}

    def run(name: str) -> None:
        runs[name] += 1
        if runs["fails"] == 2 and name == "fails":
            raise RuntimeError("in the second round")

    tasks = {name: timing.Task(lambda _, name=name: run(name)) for name in runs}
    taken, lost = timing.round_robin(tasks, timing.cpu_clock, 4, (RuntimeError,))
    assert runs == {"fails": 2, "stays": 4}
    assert list(taken) == ["stays"]
    assert str(lost["fails"]) == "in the second round"
    runs["fails"] = 0
    with pytest.raises(RuntimeError):
        timing.round_robin(tasks, timing.cpu_clock, 4)


def test_preparation_is_not_timed() -> None:
    def prepare() -> float:
        time.sleep(0.2)
        return 0.02

    taken = timing.cpu_clock(timing.Task(time.sleep, prepare))
    assert 0.02 <= taken < 0.2


@pytest.mark.parametrize(
    ("one_round", "rounds"), [(100.0, 5), (1.0, 10), (0.9, 11), (0.001, 40), (0.0, 40)]
)  # fmt: skip
def test_rounds_fill_the_time_within_bounds(one_round: float, rounds: int) -> None:
    assert timing.rounds_for(one_round, 10.0, least=5, most=40) == rounds


def test_peak_counts_what_was_alive_at_once() -> None:
    held = torch.zeros(1 << 20)

    def run() -> torch.Tensor:
        first = held + 1  # 4 MiB
        second = first[: 1 << 18] * 2  # 1 MiB more: the peak
        del first
        return second + torch.ones(1 << 19).sum()  # 2 MiB and 1 MiB beside the 1 MiB

    assert memory.peak_bytes(run, "cpu") == pytest.approx(5 << 20, abs=4096)


def test_peak_of_a_backward_holds_its_gradients() -> None:
    x = torch.zeros(1 << 18, requires_grad=True)
    y = (x * x).sum()
    peak = memory.peak_bytes(lambda: torch.autograd.grad(y, x), "cpu")
    assert 1 << 20 <= peak <= 5 << 20


def test_shared_storage_counts_once() -> None:
    x = torch.zeros(100)
    assert memory.tensor_bytes((x, [x[:10], torch.zeros(3, dtype=torch.float64)], None)) == 400 + 24


@pytest.mark.gpu
def test_cuda_clock_and_peak() -> None:
    clock, x = timing.make_clock("cuda"), torch.randn(4096, 4096, device="cuda")
    short, long = (timing.Task(lambda _, n=n: [x @ x for _ in range(n)]) for n in (1, 20))
    clock(long)
    assert clock(long) > 5 * clock(short) > 0
    assert memory.peak_bytes(lambda: x + 1, "cuda") == x.numel() * 4
