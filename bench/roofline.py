"""What this device can do at most, measured in the same run: a large matrix product and a large copy.

    floor = max(operations / matmul rate, bytes / copy rate),  share of the roofline = floor / time

Operations and bytes are those of the formula. A share above 1 is possible where the ceiling's own shape or dtype suits
the device less than the op's; the ceilings stand in every row, so it can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import Clock, Task

MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a square matrix product in one dtype, bytes/s of a copy (read and written bytes both counted)."""

    flops: float
    bytes: float

    def floor(self, flops: float, traffic: float) -> float:
        """Seconds that no method undercuts."""
        return max(flops / self.flops, traffic / self.bytes)

    def bound(self, flops: float, traffic: float) -> str:
        return "compute" if flops / self.flops >= traffic / self.bytes else "memory"


def matmul_rate(clock: Clock, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products of random numbers (zeros would draw less power and run faster)."""
    side = MATMUL_SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    task = Task(lambda _: a @ b)
    clock(task)
    return 2 * side**3 / min(clock(task) for _ in range(ROUNDS))


def copy_rate(clock: Clock, device: str) -> float:
    """Bytes/s of the fastest of a few copies, read and written."""
    source = torch.empty(COPY_BYTES[device] // 4, device=device).uniform_()
    target = torch.empty_like(source)
    task = Task(lambda _: target.copy_(source))
    clock(task)
    return 2 * COPY_BYTES[device] / min(clock(task) for _ in range(ROUNDS))


def measure(clock: Clock, device: str, dtype: torch.dtype) -> Ceilings:
    return Ceilings(matmul_rate(clock, device, dtype), copy_rate(clock, device))
