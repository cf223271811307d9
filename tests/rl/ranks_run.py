"""One rank of tests/rl/test_ranks.py: FOLDER. Trains every recipe of FOLDER/jobs.json, one after the other, in fp64 throughout.

A job may ask to be interrupted or killed: `signal` goes to rank `to` after `after` metrics lines, or in the `after`-th
checkpoint (`where` "seal": rank 0 has written it and not renamed it; "gather": the others are about to gather; "full": the
disk is). RANK in a recipe is the rank's number.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from longreach.engine import checkpoint
from longreach.engine.launch import Job, join
from longreach.rl import state, train
from longreach.rl.config import build
from longreach.rl.console import Console
from longreach.rl.recipe import Recipe
from longreach.rl.train import Stopped


def exact_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Transformers' own rounds to fp32 within an fp64 model, and so makes 1e-7 of 1e-16."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


class Interrupting(Console):
    """Rank 0's console: after a number of metrics lines it signals a rank."""

    def __init__(self, folder: Path, trouble: dict[str, Any]) -> None:
        super().__init__(quiet=True)
        self.folder, self.trouble, self.lines = folder, trouble, 0

    def metrics(self, *_: Any, **__: Any) -> None:
        self.lines += 1
        if self.trouble.get("where") == "line" and self.lines == self.trouble["after"]:
            os.kill(
                int((self.folder / f"pid-{self.trouble['to']}").read_text()), signal.Signals[self.trouble["signal"]]
            )


def fill_disk(trouble: dict[str, Any]) -> None:
    """The first checkpoint finds no space for the optimizer, in rank 0's part alone."""
    left, plain = [trouble["after"]], checkpoint.write_tensors

    def full(path: Path, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path, *arguments)

    checkpoint.write_tensors = full


def die_in_checkpoint(job: Job, trouble: dict[str, Any]) -> None:
    left, kill = [trouble["after"]], trouble["to"] == job.rank
    module, name = (checkpoint, "_seal") if trouble["where"] == "seal" else (state, "save_weights")
    plain = getattr(module, name)

    def or_die(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    setattr(module, name, or_die)


def main(folder: Path) -> None:
    Qwen3RMSNorm.forward = exact_norm
    torch.set_num_threads(1)
    with join() as job:
        (folder / f"pid-{job.rank}").write_text(str(os.getpid()))
        for one in json.loads((folder / "jobs.json").read_text()):
            trouble = one.get("trouble", {})
            if trouble.get("where") in ("seal", "gather"):
                die_in_checkpoint(job, trouble)
            if trouble.get("where") == "full":
                fill_disk(trouble)
            try:
                recipe = build(Recipe, json.loads(json.dumps(one["recipe"]).replace("RANK", str(job.rank))))
                train(recipe, Path(one["run_dir"]), console=Interrupting(folder, trouble), job=job)
            except Stopped:
                (folder / f"stopped-{job.rank}").write_text(one["name"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
