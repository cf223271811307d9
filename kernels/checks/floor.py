"""The roofline's floor: no kernel that does an op's work is faster than its operations or its bytes allow."""

from __future__ import annotations

from dataclasses import dataclass

from .case import Work

TFLOPS, TERABYTES = 790.0, 4.3
"""What one H200 reaches: a large bf16 matmul in 1e12 operations a second, a large copy in 1e12 bytes a second."""


@dataclass(frozen=True)
class Floor:
    """The least time that some work takes, in milliseconds, and what it is bound by."""

    label: str
    tflop: float
    gigabytes: float
    milliseconds: float
    bound: str


def floor(work: Work, tflops: float = TFLOPS, terabytes: float = TERABYTES) -> Floor:
    """tflops and terabytes: ceilings, each in 1e12 a second. Raises ValueError unless they are positive."""
    for name, value in (("operations", tflops), ("bytes", terabytes)):
        if not value > 0:
            raise ValueError(f"the ceiling of {name} a second must be positive, got {value}")
    compute, memory = work.flops / tflops * 1e-9, work.bytes / terabytes * 1e-9
    bound = "compute" if compute >= memory else "memory"
    return Floor(work.label, work.flops * 1e-12, work.bytes * 1e-9, max(compute, memory), bound)
