"""What peers published about themselves, shown beside our rows where conditions match, never as measured by us.

Milliseconds of mean cross-entropy (the linear ops) on one H200 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A peer's own figure: milliseconds of one pass at these dims."""

    peer: str
    op: str
    dims: Mapping[str, int]
    step: str
    ms: float
    source: str


_SWEEP = "Liger-Kernel #1356"
_TABLE = {  # tokens: (Liger CuTe, Liger cuTile, QuACK, Liger Triton)
    4096: (16.71, 17.21, 16.78, 142.6),
    8192: (34.35, 35.56, 35.47, 154.0),
    16384: (73.7, 74.1, 73.7, 185.5),
}
_PEERS = ("Liger CuTe, SM90", "Liger cuTile", "QuACK", "Liger Triton")

FIGURES = (
    *(
        Published(peer, "linear_logprob", {"N": n, "D": 4096, "V": 128256}, "both", ms, _SWEEP)
        for n, row in _TABLE.items()
        for peer, ms in zip(_PEERS, row, strict=True)
    ),
    Published(
        "Liger scaled CE, SM90 (two passes)", "linear_logprob", {"N": 32000, "D": 4096, "V": 131072}, "both", 218.7,
        "Liger-Kernel #1334",
    ),
)  # fmt: skip
DEVICE, DTYPE = "NVIDIA H200", "bfloat16"


def beside(row: Mapping[str, Any]) -> list[Published]:
    """Figures for the conditions of a row: its op, dims, dtype and device."""
    if row["device"] != DEVICE or row["dtype"] != DTYPE:
        return []
    return [figure for figure in FIGURES if figure.op == row["op"] and dict(figure.dims) == dict(row["dims"])]
