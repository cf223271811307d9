"""One rank of tests/engine/test_vocab_parallel.py: RANK WORLD FOLDER. Saves what it got to FOLDER/RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longreach.engine import vocab_parallel
from longreach.kernels import LowRank

V, D, N, R = 61, 12, 23, 3


def problem(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = {
        "hidden": draw(N, D) * 3, "weight": draw(V, D) / D**0.5, "bias": draw(V), "down": draw(R, D), "up": draw(V, R),
    }  # fmt: skip
    upstream = [draw(N) for _ in range(3)]
    for x in upstream:
        x[::4] = 0.0
    targets = torch.randint(V, (N,), generator=generator)
    return {name: x.to(dtype) for name, x in leaves.items()}, targets, torch.linspace(0.5, 2, N), upstream


def outcome(made: Any, leaves: dict[str, Tensor], upstream: list[Tensor]) -> dict[str, Tensor]:
    loss = torch.stack([(x * g.to(x.dtype)).sum() for x, g in zip(made, upstream, strict=True)]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {**{k: v.detach() for k, v in made._asdict().items()}, **dict(zip(leaves, gradients, strict=True))}


def parts(world: int) -> list[int]:
    """Uneven shares: the first rank has what the others leave."""
    share = V // world - 3
    return [V - share * (world - 1), *[share] * (world - 1)]


def refused(group: dist.ProcessGroup, rank: int) -> list[str]:
    """Messages of calls that no rank may get through."""
    said = []
    calls = {
        "rows": (torch.ones(2 + rank, D), torch.ones(5, D), torch.zeros(2 + rank, dtype=torch.long), {}),
        "targets": (torch.ones(2, D), torch.ones(5, D), torch.full((2,), 99), {}),
        "empty": (torch.ones(2, D), torch.ones(5 * (rank > 0), D), torch.zeros(2, dtype=torch.long), {}),
        "backend": (torch.ones(2, D), torch.ones(5, D), torch.zeros(2, dtype=torch.long), {"backend": "reference"}),
    }
    for hidden, weight, targets, options in calls.values():
        try:
            vocab_parallel.vocab_parallel_logprob(hidden, weight, targets, group, **options)
        except ValueError as error:
            said.append(str(error))
    return said


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    vocab_parallel.CHUNK_ROWS = 10
    made = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        whole, targets, heat, upstream = problem(dtype)
        mine = {name: x.split(parts(world))[rank] if len(x) == V else x for name, x in whole.items()}
        leaves = {name: x.clone().requires_grad_() for name, x in mine.items()}
        result = vocab_parallel.vocab_parallel_logprob(
            leaves["hidden"], leaves["weight"], targets, group, bias=leaves["bias"], temperature=heat, softcap=20.0,
            lora=LowRank(leaves["down"], leaves["up"], 0.5),
        )  # fmt: skip
        made[str(dtype)] = outcome(result, leaves, upstream)
    empty = vocab_parallel.vocab_parallel_logprob(
        torch.ones(0, D), torch.ones(5, D), torch.zeros(0, dtype=torch.long), group
    )
    torch.save({"made": made, "empty": len(empty.logp), "refused": refused(group, rank)}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
