"""What every test shares: one thread per process, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

# Two pytest workers on two cores: one thread each is fastest, and sums come out in the same order on every machine.
# In the environment as well, for torch's start-up here and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what the machine can't run, and tells xdist what stays together."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        gpu = item.get_closest_marker("gpu") is not None
        if gpu and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        # One worker at a time on the GPU; elsewhere a file's tests share its fixtures, so they go to one worker.
        item.add_marker(pytest.mark.xdist_group("gpu" if gpu else item.nodeid.split("::")[0]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tables that tests recorded (`record_property("table", text)`), green or red."""
    for report in (report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())):
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.section(report.nodeid, "-")
                terminalreporter.write_line(text)
