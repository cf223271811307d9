"""What every test shares: one thread per process, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Two pytest workers on two cores: one thread each is fastest, and sums come out in the same order on every machine.
# In the environment as well, for torch's start-up here and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
VLLM = ROOT / ".venv-vllm"


@dataclass
class Rank:
    """One process of a run, started by the zygote; `status` is negative for a signal, and None while it runs."""

    zygote: Zygote
    pid: int
    out: Path
    err: Path

    @property
    def status(self) -> int | None:
        self.zygote.listen(0.0)
        return self.zygote.statuses.get(self.pid)

    def wait(self, timeout_s: float) -> int:
        until = time.monotonic() + timeout_s
        while self.pid not in self.zygote.statuses:
            assert time.monotonic() < until, f"still running after {timeout_s} s: {self.err.read_text()[-2000:]}"
            self.zygote.listen(0.05)
        return self.zygote.statuses[self.pid]

    def send(self, number: int) -> None:
        if self.status is None:
            os.kill(self.pid, number)


class Zygote:
    """Starts ranks by forking a process that has imported everything (`zygote.py`)."""

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.started: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )

    def listen(self, timeout_s: float) -> int | None:
        """Takes one message, if there is one in time; gives the pid of a new process."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            return None
        line = b""
        while not line.endswith(b"\n"):
            got = os.read(self._process.stdout.fileno(), 1)
            assert got, "the zygote is gone"
            line += got
        message = json.loads(line)
        if "status" in message:
            self.statuses[message["pid"]] = message["status"]
            return None
        self.started.append(message["pid"])
        return message["pid"]

    def fork(self, wanted: Mapping[str, Any]) -> Rank:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dict(wanted)).encode() + b"\n")
        self._process.stdin.flush()
        while (pid := self.listen(60.0)) is None:
            assert self._process.poll() is None
        return Rank(self, pid, Path(wanted["out"]), Path(wanted["err"]))

    def close(self) -> None:
        self.listen(0.0)
        for pid in self.started:
            if pid not in self.statuses:
                os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Rank]]]:
    """start_ranks(2, script, *arguments): processes as torchrun starts them, each with a status and words of its own.

    The store is in this process, as it is in torchrun's agent; with `agent` False in rank 0.
    """
    zygote, stores = Zygote(), []

    def start(size: int, script: Path, *arguments: object, agent: bool = True) -> list[Rank]:
        if agent:
            stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            port = str(stores[-1].port)
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
        folder = tmp_path_factory.mktemp("ranks")
        common = {
            "TORCHELASTIC_RUN_ID": "test",
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": str(agent),
        }
        wanted = {"script": str(script), "argv": [str(argument) for argument in arguments], "cwd": str(ROOT)}
        return [
            zygote.fork(
                {
                    **wanted, "out": str(folder / f"{rank}.out"), "err": str(folder / f"{rank}.err"),
                    "env": {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {},
                }
            )
            for rank in range(size)
        ]  # fmt: skip

    yield start
    zygote.close()


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
        item.add_marker(
            pytest.mark.xdist_group(
                "gpu" if gpu else "vllm" if item.get_closest_marker("vllm") else item.nodeid.split("::")[0]
            )
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tables that tests recorded (`record_property("table", text)`), green or red."""
    for report in (report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())):
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.section(report.nodeid, "-")
                terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter that runs vLLM; the test is skipped without one, and says why there is none."""
    named = os.environ.get("LONGREACH_VLLM_PYTHON")
    if named:
        return Path(named)
    if not list(VLLM.glob(".ready-*")):
        log = VLLM / "setup.log"
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
        pytest.skip(f"no vLLM in {VLLM.name}: " + (f"make vllm failed: {last[-1]}" if last else "make vllm sets it up"))
    return VLLM / "bin" / "python"
