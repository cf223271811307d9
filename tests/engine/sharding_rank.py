"""One rank of tests/engine/test_sharding.py: FOLDER. Two data ranks, several models; saves what it found to FOLDER/RANK.pt."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from longreach.engine import Group, Sampling, attention, completion_policy_loss, generate
from longreach.engine.checkpoint import load_state, save_state
from longreach.engine.launch import join
from longreach.engine.lora import add_lora
from longreach.engine.mesh import Mesh, ParallelConfig
from longreach.engine.model import LoraConfig, trainable
from longreach.engine.optimizer import OptimizerConfig, apply_update, make_optimizer
from longreach.engine.sharding import Weights, place
from longreach.engine.whole import shard_like, whole, whole_state

VOCAB, LAYERS = 101, 3
CASES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {"tied": False, "checkpointing": True},
    "copied": {"tied": True, "shard": False},
    "autocast": {"tied": False, "autocast": True},
    "bf16-lora": {"tied": False, "dtype": torch.bfloat16, "lora": True},
}


class Collectives(TorchDispatchMode):
    """Notes the names of all collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def make_model(
    tied: bool, dtype: torch.dtype = torch.float32, checkpointing: bool = False, lora: bool = False
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=30, intermediate_size=45, num_hidden_layers=LAYERS, num_attention_heads=3,
        num_key_value_heads=1, head_dim=10, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    if lora:
        add_lora(model, LoraConfig(rank=3))
        for name, parameter in trainable(model).items():
            if ".lora_B." in name:  # zeros at first, which would make the gradient of A zero
                parameter.data.normal_(std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def clone_of(gradient: Tensor | None) -> Tensor:
    """Clipping scales it in place."""
    assert gradient is not None
    return gradient.clone()


def groups() -> list[Group]:
    draw = torch.Generator().manual_seed(1)
    return [
        Group(torch.randint(VOCAB, (n,), generator=draw), [torch.randint(VOCAB, (m,), generator=draw) for m in (3, 5)])
        for n in (7, 9, 4, 6)
    ]


def loss(model: PreTrainedModel, some: list[Group]) -> Tensor:
    advantages = torch.linspace(-1, 2, 8).repeat(len(some))
    return completion_policy_loss(model, some, None, advantages, kind="reinforce", normalizer=8.0).loss


def run(case: dict[str, Any], mesh: Mesh, rank: int, folder: Path, name: str) -> dict[str, Any]:
    case = dict(case)
    autocast, shard = case.pop("autocast", False), case.pop("shard", True)
    model = make_model(**case)
    alone = copy.deepcopy(model)
    weights = place(
        model, mesh if shard else Mesh(mesh.device_mesh, ParallelConfig(shard=False)),
        compute=torch.bfloat16 if autocast else None, device=torch.device("cpu"),
    )  # fmt: skip

    def precision() -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()

    def step(one: PreTrainedModel, turns: list[list[Group]], inside: Callable[[Callable[[], Tensor]], Tensor]) -> None:
        for some in turns:
            with precision():
                made = inside(lambda some=some: loss(one, some))
            made.backward()

    step(alone, [[g] for g in groups()], lambda work: work())
    with Collectives() as counted:
        step(model, [[groups()[rank]], [groups()[rank + 2]]], weights.run)
    weights.sum_gradients()
    found: dict[str, Any] = {
        "gathers": sum("gather" in op for op in counted.names),
        "scatters": sum("scatter" in op for op in counted.names),
        "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "gradients": {
            n: (whole(p.grad).clone(), clone_of(alone.get_parameter(n).grad))
            for n, p in trainable(model).items()
            if p.grad is not None
        },
        "without": sorted(n for n, p in trainable(model).items() if p.grad is None),
    }
    config = OptimizerConfig(grad_clip=0.5)
    optimizers = [make_optimizer(one, config) for one in (model, alone)]
    found["norms"] = [apply_update(o, m, 1e-3, 0.5) for o, m in zip(optimizers, (model, alone), strict=True)]
    found |= {"update": {n: (whole(p.detach()), alone.get_parameter(n).detach()) for n, p in trainable(model).items()}}
    found["drawn"] = sampled(model, weights, precision)
    found["alone"] = sampled(alone, Weights(alone), precision)
    found["state"] = whole_state(model, keep=rank == 0)
    found["restored"] = restored(optimizers[0], folder if rank == 0 else None, folder, name)
    return found


def sampled(model: PreTrainedModel, weights: Weights, precision: Any) -> list[Any]:
    """Every rank a different number of prompts, and so of forwards."""
    rank, prompts = torch.distributed.get_rank(), [g.prompt_ids for g in groups()]
    with precision():
        return weights.run_gathered(
            lambda: generate(
                model, prompts, 2, Sampling(6), stop_ids=[5, 6, 7], seed=3, share=[rank] if rank else [0, 2, 3]
            )
        )


def restored(optimizer: torch.optim.Optimizer, mine: Path | None, folder: Path, name: str) -> bool:
    """Whether a state that went through a file is the same, shard by shard."""
    save_state(optimizer.state_dict(), mine, name)
    torch.distributed.barrier()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(path: tuple[Any, ...], tensor: Tensor) -> Tensor:
        like = parameters[path[1]] if path[0] == "state" and tensor.ndim else tensor
        return shard_like(tensor, like)

    saved = load_state(folder, name, placed)
    before = optimizer.state_dict()["state"]
    return all(
        torch.equal(whole(saved["state"][i][key]), whole(value)) for i in before for key, value in before[i].items()
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join() as job:
        mesh = job.connect(ParallelConfig(timeout_s=60.0), torch.device("cpu"))
        assert mesh is not None
        torch.save({n: run(case, mesh, job.rank, folder, n) for n, case in CASES.items()}, folder / f"{job.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
