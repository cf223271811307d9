"""Speed of the links between ranks, where torchrun has started several."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from ..engine.launch import Job
from ..engine.mesh import ParallelConfig

BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
ROUNDS = 5
WAIT_S = 60.0


def link_lines(job: Job, device: torch.device) -> list[str]:
    """From each rank to the next, one direction; every rank must call it, and rank 0 gets the answer. One process has no links."""
    if job.size == 1:
        return ["one process: start this with torchrun --nproc-per-node N -m longreach.rl.cli doctor to measure them"]
    job.connect(ParallelConfig(timeout_s=WAIT_S), device)
    return _measure(device, "nccl" if device.type == "cuda" else "gloo")


def _measure(device: torch.device, backend: str) -> list[str]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # `connect` chose it
    sent = torch.zeros(BYTES[device.type] // 4, device=device)
    received = torch.empty_like(sent)
    mine = [_exchange(sent, received, (rank + 1) % ranks, (rank - 1) % ranks) for _ in range(ROUNDS)]
    rate = torch.tensor(sent.numel() * 4 / min(mine) / 1e9, device=device)
    rates = [torch.empty_like(rate) for _ in range(ranks)]
    dist.all_gather(rates, rate)
    shown = ", ".join(f"{i} to {(i + 1) % ranks}: {value.item():.2f}" for i, value in enumerate(rates))
    if rank:
        return []
    return [f"{ranks} ranks over {backend}, all at once, GB/s: {shown}"]


def _exchange(sent: torch.Tensor, received: torch.Tensor, after: int, before: int) -> float:
    dist.barrier()
    start = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]):
        work.wait()
    if sent.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
