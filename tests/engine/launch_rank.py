"""One rank of tests/engine/test_launch.py: MODE TIMEOUT_S FOLDER. Steps with a collective each; something happens in step 3 on rank 1."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from longreach.engine.launch import Job, join
from longreach.engine.mesh import ParallelConfig


def misbehave(mode: str) -> None:
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode == "hang":
        time.sleep(600)
    if mode == "user":
        raise ValueError("sft.upper = 3 is too small: raise it")
    if mode == "bug":
        raise KeyError("nothing of that name")


def work(job: Job, mode: str, folder: Path) -> None:
    for step in range(1, 6):
        job.note("sampling", step)
        time.sleep(0.05)
        job.note("update", step)
        if step == 3 and job.rank == (0 if mode.endswith("0") else 1):
            misbehave(mode.rstrip("01"))
        if mode == "busy" and step == 3:
            time.sleep(4 if job.rank else 3)  # long, but nobody waits for the timeout
        dist.all_reduce(torch.ones(4))
        (folder / f"step-{job.rank}").write_text(str(step))


def main(mode: str, timeout_s: float, folder: Path) -> int:
    if mode == "late" and os.environ["RANK"] == "1":
        time.sleep(600)
    with join() as job:
        try:
            if mode == "early" and job.rank == 1:
                raise ValueError("unknown key 'rl.grup_size'")
            job.connect(ParallelConfig(timeout_s=timeout_s), torch.device("cpu"))
            work(job, mode, folder)
        except (ValueError, OSError) as error:
            if job.fail(str(error), 2):
                print(f"longreach: {error}", file=sys.stderr, flush=True)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])))
