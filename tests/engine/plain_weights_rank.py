"""One rank of tests/engine/test_plain_weights.py: FOLDER. Two ranks share the weights; rank 0 keeps what they gather."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from longreach.engine.launch import join
from longreach.engine.mesh import ParallelConfig
from longreach.engine.plain_weights import PlainWeights
from longreach.engine.sharding import place

_SPEC = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("test_plain_weights.py"))
assert _SPEC is not None and _SPEC.loader is not None
plain = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plain)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join() as job:
        mesh = job.connect(ParallelConfig(shard=True), torch.device("cpu"))
        for case in ("plain", "lora"):
            model = plain.make(lora=case == "lora")
            place(model, mesh, compute=None, device=torch.device("cpu"))
            assert any(isinstance(p, DTensor) for p in model.parameters())
            weights = PlainWeights(model, torch.bfloat16)
            made = dict(weights.pairs(keep=job.rank == 0))
            if job.rank == 0:
                save_file(made, folder / f"{case}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
