"""Which schedule is faster for a row: bytes against operations, at speeds that were measured once on these ranks.

Of a layer, with c calls and n pairs of a query and a key a rank, and m bytes sent or received, the slowest rank's time is

    compute = c call_s + 4 h E n / flops_s (backward: 2.5 of it)          travel = latency_s + m / bytes_s
    ring        sum over steps t of max(compute of step t, travel of what arrives at t + 1)
    all-gather  max(compute on own keys, travel) + compute on the gathered ones; backward: + travel of the gradients

Calls on own keys stand first and hide the first travel. A ring's calls are smaller and more, an all-gather's travel is
hidden less: small rows and fast links favour the all-gather, long rows and slow links the ring. All ranks know the whole
cut and agree on the speeds (the slowest of each), so all choose alike. The probe takes milliseconds; it gives up what a
busy link or a large call's better use of the device would change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import attention
from .blocks import Call, calls_on, own_calls
from .gather import GatherSchedule
from .mesh import Mesh
from .partials import Kernel, wide
from .ring import RingSchedule, hops
from .shards import Cut, RingShard
from .ulysses import Heads

BACKWARD = 2.5
"""Operations of a backward call, in those of a forward one: five products instead of two."""
PROBE_BYTES, PROBE_TOKENS = {"cpu": 1 << 20, "cuda": 1 << 25}, {"cpu": 256, "cuda": 4096}
"""Sizes of the larger message and the larger call."""
REPEATS = 3


@dataclass(frozen=True)
class Speeds:
    """Of the slowest rank: seconds of an empty message and an empty call, bytes and operations a second beyond that."""

    latency_s: float
    bytes_s: float
    call_s: float
    flops_s: float


@dataclass(frozen=True)
class Shape:
    """What a layer's calls and messages look like on one rank: heads of a ulysses rank, their width, the dtype."""

    query_heads: int
    key_heads: int
    width: int
    dtype: torch.dtype

    @property
    def key_bytes(self) -> int:
        """Of one token's keys and values."""
        return 2 * self.key_heads * self.width * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of the gradient of one token's keys and values, as it travels."""
        return 2 * self.key_heads * self.width * wide(self.dtype).itemsize


def key_traffic(shards: Sequence[RingShard], schedule: str) -> int:
    """Prompt tokens, each counted as often as its keys are sent in one pass: by hops in a ring, else by readers."""
    if schedule == "ring":
        return sum(p.tokens * n for s, far in zip(shards, hops(shards), strict=True) for p, n in zip(s.pieces, far, strict=True))  # fmt: skip
    return sum(
        piece.tokens * sum(reader.reads(piece) for r, reader in enumerate(shards) if r != s)
        for s, shard in enumerate(shards)
        for piece in shard.pieces
    )


def layer_bytes(cut: Cut, heads: Heads, width: int, dtype: torch.dtype, schedule: str) -> tuple[int, int]:
    """What all ranks of the sequence group send for one layer's attention, (forward, backward); the formulas stand in
    `ring`, `gather` and `ulysses`."""
    shape = Shape(heads.own_query, heads.own_key, width, dtype)
    tokens = key_traffic(cut.shards, schedule) * cut.ulysses
    swapped = cut.row.tokens * (cut.ulysses - 1)
    queries = heads.own_query * width * dtype.itemsize
    keys_back = shape.gradient_bytes if heads.replicated else shape.key_bytes
    forward = tokens * shape.key_bytes + swapped * (2 * queries + shape.key_bytes)
    backward = tokens * (shape.key_bytes + shape.gradient_bytes) + swapped * (2 * queries + keys_back)
    return forward, backward


def ring_seconds(shards: Sequence[RingShard], shape: Shape, speeds: Speeds) -> float:
    """Of one layer, forward and backward."""
    ring, total = len(shards), 0.0
    far = [list(zip(s.pieces, n, strict=True)) for s, n in zip(shards, hops(shards), strict=True)]
    for t in range(ring):
        calls = [calls_on(s, [p for p, n in far[(r + t) % ring] if n >= t]) for r, s in enumerate(shards)]
        if t == 0:
            calls = [[*own_calls(s), *found] for s, found in zip(shards, calls, strict=True)]
        arriving = max(sum(p.tokens for p, n in pieces if n > t) for pieces in far)
        keys, gradients = arriving * shape.key_bytes, arriving * shape.gradient_bytes
        work = max(compute_seconds(found, shape, speeds) for found in calls)
        work_back = max(compute_seconds(found, shape, speeds, BACKWARD) for found in calls)
        total += max(work, travel_seconds(keys, speeds)) + max(work_back, travel_seconds(keys + gradients, speeds))
    return total


def gather_seconds(shards: Sequence[RingShard], shape: Shape, speeds: Speeds) -> float:
    """Of one layer, forward and backward."""
    own = [own_calls(shard) for shard in shards]
    read = [sorted(p for s in shards for p in s.pieces if s is reader or reader.reads(p)) for reader in shards]
    gathered = [calls_on(shard, pieces) for shard, pieces in zip(shards, read, strict=True)]
    tokens = max(sum(p.tokens for p in pieces) - s.prompt_tokens for s, pieces in zip(shards, read, strict=True))
    travel, home = (travel_seconds(tokens * n, speeds) for n in (shape.key_bytes, shape.gradient_bytes))
    total = home
    for factor in (1.0, BACKWARD):
        first, then = (max(compute_seconds(c, shape, speeds, factor) for c in calls) for calls in (own, gathered))
        total += max(first, travel) + then
    return total


def compute_seconds(calls: Sequence[Call], shape: Shape, speeds: Speeds, factor: float = 1.0) -> float:
    """Of some calls of one rank; a backward's by its factor."""
    flops = 4.0 * shape.query_heads * shape.width * sum(call.pairs for call in calls)
    return factor * (len(calls) * speeds.call_s + flops / speeds.flops_s)


def travel_seconds(size: float, speeds: Speeds) -> float:
    """Of one message of so many bytes."""
    return speeds.latency_s + size / speeds.bytes_s if size else 0.0


def cheaper(shards: Sequence[RingShard], shape: Shape, speeds: Speeds) -> tuple[str, dict[str, float]]:
    """The name of the faster schedule, and the seconds that a layer takes by each."""
    found = {"ring": ring_seconds(shards, shape, speeds), "all-gather": gather_seconds(shards, shape, speeds)}
    return min(found, key=lambda name: found[name]), found


@lru_cache(maxsize=8)
def measure(mesh: Mesh, device: torch.device, shape: Shape, kernel: Kernel) -> Speeds:
    """Once for each mesh and shape; a collective call of the sequence group, which agrees on the slowest of each."""
    group, ring, me = mesh.ring_group, mesh.ring, mesh.ring_rank
    peers = [dist.get_global_rank(group, (me + step) % ring) for step in (-1, 1)]

    def message(size: int) -> Callable[[], None]:
        sent, made = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))

        def run() -> None:
            ops = [dist.P2POp(dist.isend, sent, peers[0], group=group), dist.P2POp(dist.irecv, made, peers[1], group=group)]  # fmt: skip
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        return run

    def call(tokens: int) -> Callable[[], object]:
        q, k = (torch.zeros(tokens, n, shape.width, dtype=shape.dtype, device=device) for n in (shape.query_heads, shape.key_heads))  # fmt: skip
        return lambda: attention.forward(
            q, k, k, causal=False, scale=kernel.scale, backend=kernel.forward, out_dtype=wide(shape.dtype)
        )

    size, tokens = PROBE_BYTES[device.type], PROBE_TOKENS[device.type]
    taken = [_seconds(run, device) for run in (message(1), message(size), call(16), call(tokens))]
    agreed = torch.tensor(taken, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=mesh.sequence_group)
    latency, sent, empty, full = agreed.tolist()
    flops = 4.0 * shape.query_heads * shape.width * tokens**2
    return Speeds(latency, size / max(sent - latency, 1e-9), empty, flops / max(full - empty, 1e-9))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of some runs, after one that pays for set-up."""
    found = []
    for _ in range(1 + REPEATS):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_schedule(name: str, cut: Cut, mesh: Mesh) -> RingSchedule | GatherSchedule:
    """A schedule by its name, for this rank."""
    kind = GatherSchedule if name == "all-gather" and mesh.ring > 1 else RingSchedule
    return kind(cut.shards, mesh.ring_rank, mesh.ring_group)


def choose(cut: Cut, mesh: Mesh, q: Tensor, key_heads: int, kernel: Kernel) -> tuple[str, dict[str, float]]:
    """The schedule's name for queries like q of a layer with so many key heads, and the seconds it was chosen by."""
    if mesh.config.schedule != "auto" or mesh.ring == 1:
        return mesh.config.schedule, {}
    heads = Heads(q.shape[1], key_heads, mesh.ulysses)
    shape = Shape(heads.own_query, heads.own_key, q.shape[2], q.dtype)
    return cheaper(cut.shards, shape, measure(mesh, q.device, shape, kernel))
