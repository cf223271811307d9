"""One rank of tests/rl/serving/test_sync_ranks.py: FOLDER. Two ranks share a model's weights and push them; later things go wrong on rank 0."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import torch

from longreach.engine.generate import GeneratorConfig
from longreach.engine.launch import join
from longreach.engine.mesh import ParallelConfig
from longreach.engine.model import ModelConfig
from longreach.rl.policy import Policy
from longreach.rl.ranks import Ranks
from longreach.rl.serving import sync_files
from longreach.rl.serving.sync_config import SyncConfig
from longreach.rl.serving.sync_kinds import weight_sync


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    told = json.loads((folder / "told.json").read_text())
    with join() as job:
        ranks = Ranks(job, job.connect(ParallelConfig(shard=True), torch.device("cpu")))
        policy = Policy(ModelConfig(told["model"], device="cpu"), GeneratorConfig(), ranks=ranks)
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(1.05)
        config = SyncConfig(kind="auto", deadline=20.0)
        sync = weight_sync(policy, told["urls"], "policy", "here:/runs/a", config, folder / "hand")
        said: list[Any] = [sync.push(policy, 1).metrics()]
        try:  # before anything was gathered
            weight_sync(policy, told["urls"], "policy", "there:/runs/b", config, folder / "hand").push(policy, 2)
        except OSError as error:
            said.append([type(error).__name__, str(error)])

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        plain, sync_files.write_tensors = sync_files.write_tensors, full
        try:  # while rank 0 writes and the other gathers
            sync.push(policy, 2)
        except OSError as error:
            said.append([type(error).__name__, str(error)])
        sync_files.write_tensors = plain
        said.append(sync.push(policy, 2).metrics())
        (folder / f"said-{job.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
