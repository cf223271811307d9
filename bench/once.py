"""One run of a contender whose runs take minutes: no rounds, and on a GPU time and peak memory come from the same run.

A contender made of equal parts runs one of them, and its time is multiplied: such a row has `estimated` true, `parts`, and
in `part_s` what the clock said. `held_mib` is what was there before (weights above all), `peak_mib` what came on top.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .case import Contender
from .memory import peak_bytes
from .results import Row
from .timing import Clock, Task

MIB = 1 << 20


def measure(contender: Contender, clock: Clock, device: str) -> tuple[float, Sequence[Tensor | None], Row]:
    """Seconds of the whole, what the run gave (a part's gradients where it is one), and the facts of its row."""
    clean(device)
    contender.warm_up()
    clean(device)
    held = torch.cuda.memory_allocated() if device == "cuda" else None
    found: list[Any] = []
    seconds: list[float] = []
    task = Task(lambda _: found.append(run(contender)))
    if device == "cuda":
        peak = peak_bytes(lambda: seconds.append(clock(task)), device)
    else:  # counting on a CPU takes time of its own
        seconds.append(clock(task))
        peak = peak_bytes(lambda: run(contender), device)
    facts: Row = {"peak_mib": peak / MIB, "held_mib": None if held is None else held / MIB}
    facts |= {"parts": contender.parts, "part_s": seconds[0], "estimated": contender.parts > 1}
    return seconds[0] * contender.parts, found[0], facts


def run(contender: Contender) -> Sequence[Tensor | None]:
    return contender.part() if contender.part is not None else contender.backward(contender.train())


def clean(device: str) -> None:
    """Lets go of what an earlier contender left: after an error, reference cycles hold its activations."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
