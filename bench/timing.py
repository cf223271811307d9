"""Clocks, and the round robin: every contender runs once a round, so that a drift of the machine hits all alike.

CUDA: a pair of events around the region; before each, a write over more than the L2 cache, so that no run finds its
inputs warm and the launch of the region is queued while the device is still busy. CPU: `time.perf_counter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

FLUSH_BYTES = 256 << 20
"""At least this much is written between CUDA runs; several times the L2 of every GPU so far."""


@dataclass(frozen=True)
class Task:
    """`run(prepare())`, of which only `run` is timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


class Clock(Protocol):
    def __call__(self, task: Task) -> float: ...


def cpu_clock(task: Task) -> float:
    state = task.prepare()
    start = time.perf_counter()
    task.run(state)
    return time.perf_counter() - start


class CudaClock:
    """Seconds between two events on the current stream."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(FLUSH_BYTES, 4 * cache), dtype=torch.int8, device="cuda")

    def __call__(self, task: Task) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        state = task.prepare()
        self._flush.zero_()
        start.record()
        task.run(state)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else cpu_clock


def rounds_for(one_round: float, seconds: float, least: int, most: int) -> int:
    """How many rounds fit into `seconds`, one taking `one_round`; never fewer than `least` or more than `most`."""
    return max(least, min(most, int(seconds / max(one_round, 1e-9))))


def round_robin(
    tasks: Mapping[str, Task], clock: Clock, rounds: int, failures: tuple[type[Exception], ...] = ()
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds of each task in each round; a task that raises one of `failures` leaves the round with its error."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    lost: dict[str, Exception] = {}
    for _ in range(rounds):
        for name in list(taken):
            try:
                taken[name].append(clock(tasks[name]))
            except failures as error:
                lost[name] = error
                del taken[name]
    return taken, lost
