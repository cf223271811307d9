"""Trainer and vLLM's servers laid over machines: what the scripts start, and one of them started for real.

There is no Slurm here and no GPU: `srun`, `scontrol` and, where nothing is to run, `torchrun` are stand-ins on the PATH. In the
real one the nodes are processes of this machine: one serves on its CPU, on two others a torchrun each trains over gloo.
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

from longreach.rl.config import read_overrides
from longreach.rl.recipe import Recipe, load_recipe

WAIT_S = 400.0
SHOW = (
    '#!/bin/sh\n{ echo "GPUs=$CUDA_VISIBLE_DEVICES"; for word; do echo "$word"; done; } >"$SHOWN/$(basename "$0")-$$"\n'
)
SRUN = """#!/bin/sh
# Starts its command once for each task, all of them here.
tasks=1
while [ "${1#--}" != "$1" ]; do
	case $1 in --ntasks) tasks=$2; shift ;; --nodes | --nodelist) shift ;; esac
	shift
done
while [ "$tasks" -gt 1 ]; do "$@" & others="${others-} $!"; tasks=$((tasks - 1)); done
"$@"; status=$?
for one in ${others-}; do wait "$one" || status=$?; done
exit $status
"""
NODES = "#!/bin/sh\nfor node in ${NODES:-node1 node2 node3}; do echo $node; done\n"


def stand_ins(folder: Path, **texts: str) -> str:
    """A PATH that begins with programs of these texts."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def shown(folder: Path, name: str) -> list[list[str]]:
    """What each call of a stand-in was given, its GPUs first."""
    return [path.read_text().splitlines() for path in sorted(folder.glob(f"{name}-*"))]


def recipe_in(words: list[str], command: str) -> Recipe:
    """As `longreach` reads it from the words after `command`."""
    at = words.index(command)
    given = [("generator", "vllm")] if command == "serve" else []
    return load_recipe(words[at + 1], [*given, *read_overrides(words[at + 2 :])])


def test_one_machine_s_gpus_are_shared_out_over_trainer_and_servers(root: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": stand_ins(tmp_path / "bin", torchrun=SHOW), "SHOWN": str(tmp_path),
                   "TRAIN": "0,1,2,3", "SERVE": "4,5 6,7"}  # fmt: skip
    command = ["sh", "examples/torchrun_with_vllm.sh", "smoke", "--rl.staleness", "1"]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=60)
    [words] = shown(tmp_path, "torchrun")
    assert words[0] == "GPUs=0,1,2,3" and words[words.index("--nproc-per-node") + 1] == "gpu"
    generator = recipe_in(words, "train").generator
    assert (generator.kind, generator.servers, generator.devices) == ("vllm", 2, ("4,5", "6,7"))
    assert generator.args == ("--tensor-parallel-size", "2")


def test_slurm_s_nodes_are_shared_out_over_servers_and_trainer(root: Path, tmp_path: Path) -> None:
    path = stand_ins(tmp_path / "bin", srun=SHOW, scontrol=NODES)
    environment = {**os.environ, "PATH": path, "SHOWN": str(tmp_path), "NODES": "n1 n2 n3 n4 n5", "SERVING": "2",
                   "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-5]"}  # fmt: skip
    command = ["bash", "examples/slurm_with_vllm.sbatch", "smoke", "--rl.staleness", "1"]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=60)
    until = time.monotonic() + 20.0
    while len(shown(tmp_path, "srun")) < 2 and time.monotonic() < until:  # servers are started beside
        time.sleep(0.05)
    serve, train = sorted(shown(tmp_path, "srun"), key=lambda words: "train" in words)
    assert serve[serve.index("--nodelist") + 1] == "n1,n2" and train[train.index("--nodelist") + 1] == "n3,n4,n5"
    assert serve[serve.index("--ntasks") + 1] == "2" and train[train.index("--nnodes") + 1] == "3"
    assert train[train.index("--rdzv-endpoint") + 1] == "n3:29500"
    assert recipe_in(train, "train").generator.urls == ("http://n1:8000", "http://n2:8000")
    words = [word for word in serve if word not in ("--host", "0.0.0.0", "--port", "8000")]
    assert recipe_in(words, "serve").generator.args == ("--tensor-parallel-size", "8")
    assert recipe_in(words, "serve").rl.staleness == recipe_in(train, "train").rl.staleness == 1


@pytest.fixture
def groups() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Sessions that are ended with the test: servers when asked, as at the end of a job, the rest for sure."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for number, patience in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 5.0)):
        until = time.monotonic() + patience
        for one in started:
            try:
                os.killpg(one.pid, number)
                while time.monotonic() < until:
                    os.killpg(one.pid, 0)
                    time.sleep(0.1)
            except ProcessLookupError:
                continue


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_on_one_node_and_a_trainer_over_two(
    root: Path, tmp_path: Path, vllm_python: Path, groups: list[subprocess.Popen[bytes]]
) -> None:
    if vllm_python != root / ".venv-vllm" / "bin" / "python":
        pytest.skip("trainer and servers get the same arguments here, so the interpreter must be make vllm's")
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        serving, meeting = one.getsockname()[1], other.getsockname()[1]
    run_dir, log = tmp_path / "run", tmp_path / "out.log"
    environment = {
        **os.environ, "PATH": stand_ins(tmp_path / "bin", srun=SRUN, scontrol=NODES), "NODES": "localhost localhost localhost",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "NPROC": "1", "PORT": str(meeting),
        "SERVE_PORT": str(serving), "SERVE_HOST": "127.0.0.1", "SERVE_ARGS": "--max-num-seqs,64", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    small = [
        "smoke", "--run-dir", str(run_dir), "--run.threads", "1", "--synthetic.sft.rows", "32", "--data.eval", "",
        "--parallel.timeout_s", "300", "--phases.0.steps", "2", "--phases.1.steps", "1", "--retrospective", "none",
    ]  # fmt: skip
    with log.open("wb") as out:
        groups.append(
            subprocess.Popen(
                ["bash", "examples/slurm_with_vllm.sbatch", *small], cwd=root, env=environment, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )
        )  # fmt: skip
        status = groups[-1].wait(WAIT_S)
    said = log.read_text()
    assert status == 0, said
    assert "2 ranks: data 2 x ring 1 x ulysses 1" in said and "1 vLLM server(s) ready" in said
    assert f"ready: train with --generator vllm --generator.urls http://127.0.0.1:{serving}" in said
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    served = [step for step in steps if step["stage"] != "sft"]
    assert len(served) == 3 and all(step["rollout/failed_requests"] == 0 for step in served)
    versions = [step["sync/version"] for step in served]
    assert versions[0] > 0 and versions == sorted(set(versions)), "each step was sampled from newer weights"
    assert max(step["sync/probe_max_diff"] for step in served) < 1e-3, "the same fp32 weights on both sides"
    assert [path for path in (tmp_path / "run-servers").glob("*.log") if "reload" in path.read_text().lower()]
    assert (run_dir / "servers" / "handed-over").is_dir(), "the folder that all nodes see"
    AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32)
