"""Speed of the links between ranks, where torchrun has started several."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
ROUNDS = 5
WAIT = timedelta(seconds=60)


def link_lines(device: torch.device) -> list[str]:
    """From each rank to the next, one direction; every rank must call it, and rank 0 gets the answer. One process has no links."""
    if not dist.is_torchelastic_launched():
        return ["one process: start this with torchrun --nproc-per-node N -m longreach.rl.cli doctor to measure them"]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=WAIT)
    try:
        return _measure(device, backend)
    finally:
        dist.destroy_process_group()


def _measure(device: torch.device, backend: str) -> list[str]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
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
