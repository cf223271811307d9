"""Makes `bench` importable, and rows by hand.

bench/ is no part of the installed project. It is loaded by its path here: the root on `sys.path` would offer a bare
`kernels` to every test that runs beside these.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_bench() -> None:
    folder = ROOT / "bench"
    found = importlib.util.spec_from_file_location(
        "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert found is not None and found.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(sys.modules["bench"])


if "bench" not in sys.modules:
    load_bench()

Row = dict[str, Any]


@pytest.fixture
def row() -> Callable[..., Row]:
    """row(**changes) -> a measured row of ours."""

    def make(**changes: Any) -> Row:
        made: Row = {
            "op": "linear_logprob", "dims": {"N": 8, "D": 4, "V": 16}, "dtype": "float32", "pass": "both",
            "contender": "longreach, chunked", "ours": True, "status": "measured", "reason": None,
            "device": "CPU of a test, 2 cores", "threads": 1, "driver": None, "commit": "abc", "sources": "s1",
            "torch": "2.13.0", "triton": "3.7.1", "package": None, "version": None, "date": "2026-01-02 03:04",
            "median_s": 0.1, "iqr_s": 0.002, "least_s": 0.098, "rounds": 5,
            "samples_s": [0.098, 0.099, 0.1, 0.101, 0.103], "peak_mib": 10.0, "result_mib": 1.0,
            "gradient_errors": {"dhidden": 2e-7, "dweight": 3e-7}, "value_error": 1e-6,
            "tflops": 0.05, "gbs": 1.0, "roofline_share": 0.5, "floor_s": 0.05, "bound": "compute",
            "ceiling_tflops": 0.1, "ceiling_gbs": 20.0,
        }  # fmt: skip
        return {**made, **changes}

    return make
