"""The launch scripts, started for real: torchrun on one node, killed and interrupted on the way, and Slurm's two nodes.

Two processes on the CPU over gloo, the smoke recipe made smaller. There is no Slurm here: `srun` and `scontrol` are stand-ins on
the PATH, and the two nodes are two torchruns that meet at one address.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
WAIT_S = 240.0
SMALL = (
    "smoke", "--run.threads", "1", "--run.save_every", "1", "--synthetic.sft.rows", "32", "--data.eval", "", "--parallel.timeout_s", "60",
    "--phases.0.steps", "2", "--phases.1.steps", "1",
)  # fmt: skip
STEPS = 2 + 2 + 1
SRUN = """#!/bin/sh
# Starts its command once for each node, all of them here.
while [ "${1#--}" != "$1" ]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first; a=$?
wait $second; b=$?
exit $((a | b))
"""


class Launched:
    """A launcher with its processes, in a session of their own."""

    def __init__(self, command: list[str], root: Path, **environment: str) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            command, cwd=root, env={**os.environ, "PATH": path} | environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def workers(self) -> list[int]:
        """Processes of ranks, wherever they stand below the launcher."""
        found, left = [], [self.process.pid]
        while left:
            pid = left.pop()
            try:
                below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            left += map(int, below)
            if b"longreach.rl.cli" in command and not any(b"torchrun" in part for part in command):
                found.append(pid)
        return sorted(found)

    def wait(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out


@pytest.fixture
def launched() -> Iterator[list[Launched]]:
    made: list[Launched] = []
    yield made
    for one in made:
        if one.process.poll() is None:
            for pid in one.workers():
                os.kill(pid, signal.SIGKILL)
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()


def lines(run_dir: Path) -> list[dict[str, object]]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def reach(one: Launched, run_dir: Path, count: int) -> None:
    until = time.monotonic() + WAIT_S
    while len(lines(run_dir)) < count:
        assert one.process.poll() is None and time.monotonic() < until, one.process.communicate()[0]
        time.sleep(0.05)


def gone(pids: list[int]) -> bool:
    until = time.monotonic() + 10.0
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def test_one_node_killed_then_interrupted_then_finished(root: Path, tmp_path: Path, launched: list[Launched]) -> None:
    run_dir = tmp_path / "run"
    script = ["sh", "examples/torchrun_one_node.sh", *SMALL, "--run-dir", str(run_dir)]

    def start() -> Launched:
        launched.append(Launched(script, root, NPROC="2"))
        return launched[-1]

    reach(first := start(), run_dir, 1)
    pids = first.workers()
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    status, out = first.wait()
    assert status != 0
    assert "2 ranks: data 2 x ring 1 x ulysses 1, weights sharded over all of them" in out
    assert out.count("no longer answers: last seen rank") == 1
    assert gone(pids)

    reach(second := start(), run_dir, 3)
    second.process.send_signal(signal.SIGINT)
    status, out = second.wait()
    assert status != 0
    assert "the same command goes on from here" in out
    done = len(lines(run_dir))
    assert sorted((run_dir / "checkpoints").iterdir())[-1].name == f"{done:08d}", "the step it was in is saved"

    status, out = start().wait()
    assert status == 0, out
    assert f"at step {done}" in out
    assert len(lines(run_dir)) == STEPS
    AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32)


def test_two_slurm_nodes(root: Path, tmp_path: Path, launched: list[Launched]) -> None:
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho localhost\necho localhost\n")):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(stat.S_IRWXU)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run_dir, path = (
        tmp_path / "run",
        f"{stand_ins}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    launched.append(
        Launched(
            ["bash", "examples/slurm_two_nodes.sbatch", *SMALL, "--parallel.ulysses", "2", "--run-dir", str(run_dir)], root,
            PATH=path, PORT=port, NPROC="1", SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[1-2]",
        )
    )  # fmt: skip
    status, out = launched[-1].wait()
    assert status == 0, out
    assert "2 ranks: data 1 x ring 1 x ulysses 2, weights sharded over all of them" in out
    assert len(lines(run_dir)) == STEPS
    AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32)
