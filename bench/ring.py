"""One attention layer over several ranks, forward and backward: each schedule's share of the ideal.

    share = seconds of one rank / (ranks x seconds of the slowest of them)

On GPUs these are seconds of the clock. On a CPU, where ranks are processes that share cores with each other and with
whatever else runs, they are seconds of its cores, all threads counted: the share then tells what a schedule costs beside
its arithmetic and how even its parts are, and nothing of waiting for a network. Seconds of the clock stand beside them.

`causal` rows are one sequence of T tokens, `shared` ones a prompt with G completions of R. All ranks hold their part of
the row before the clock starts, and what is timed is the layer alone: head exchange, travel of keys and gradients,
attention. Beside ours, ring-flash-attn's zigzag and llama3 schedules and torch's context parallel, on causal rows, where
they run; where not, a gap says why.

    python -m bench.ring --ranks 2 4                      processes on this CPU over gloo, one thread each
    torchrun --nproc-per-node 8 -m bench.ring             on GPUs over NCCL, one number of ranks a run

Rows go to bench/results/ring-cpu.json or ring-cuda.json, and the table to the terminal.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longreach.engine import Group, ParallelConfig, make_mesh
from longreach.engine import ring_flash as engine_ring_flash
from longreach.engine.attention import SharedPrefix
from longreach.engine.packing import PackedRow, one_row
from longreach.engine.parallel_attention import ParallelSharedPrefix
from longreach.engine.shards import cut_row

from . import results, summary
from .case import Missing
from .peers import failures, version
from .results import Row
from .table import print_table

Tensors = tuple[Tensor, ...]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
ALONE = "longreach, one rank"
DIMS = {
    "cpu": ({"P": 2048, "G": 0, "R": 0, "H": 8, "K": 2, "E": 64}, {"P": 1536, "G": 4, "R": 128, "H": 8, "K": 2, "E": 64}),
    "cuda": (
        {"P": 131072, "G": 0, "R": 0, "H": 32, "K": 8, "E": 128},
        {"P": 122880, "G": 8, "R": 4096, "H": 32, "K": 8, "E": 128},
    ),
}  # fmt: skip
SMALL = ({"P": 96, "G": 0, "R": 0, "H": 4, "K": 2, "E": 16}, {"P": 64, "G": 2, "R": 8, "H": 4, "K": 2, "E": 16})
"""Shows that everything runs, and nothing of speed."""
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
HEADER = ("ranks", "schedule", "forward", "of ideal", "both", "of ideal")
Seconds = list[tuple[float, float]]
"""Of each round: by the clock, and those that the share is made of."""
WRONG = 0.02
"""Relative error of an output against one rank's, past which a contender computes something else."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ring", description="Share of the ideal of each schedule.")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4], help="on a CPU: processes, one run after another"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--out", type=Path, help="file of rows (bench/results/ring-cpu.json or ring-cuda.json)")
    parser.add_argument("--note", help="what else must be said of the machine; goes into each row")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.out or results.FOLDER / f"ring-{device}.json"
    if dist.is_torchelastic_launched():
        of_this_rank(SMALL if options.small else DIMS[device], device, path, options.rounds, options.note)
        return 0
    if device == "cuda":
        print("bench.ring: start it with torchrun: torchrun --nproc-per-node N -m bench.ring", file=sys.stderr)
        return 2
    for ranks in options.ranks:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "bench.ring"]
        given = [
            "--rounds",
            str(options.rounds),
            "--out",
            str(path),
            *(["--note", options.note] if options.note else []),
        ]
        status = subprocess.run([sys.executable, *command, *given], cwd=results.ROOT).returncode
        if status:
            return status
    show(results.load(path))
    return 0


def of_this_rank(sizes: Sequence[dict[str, int]], device: str, path: Path, rounds: int, note: str | None) -> None:
    """Measures every case with the ranks that torchrun started; rank 0 writes."""
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    conditions = results.conditions(device) if dist.get_rank() == 0 else {}
    world = dist.get_world_size()
    for dims in sizes:
        case = Case(dims, device)
        alone: dict[str, float] = {}
        for name, contender in case.contenders():
            for what in ("forward", "both"):
                seconds = measured(contender, what, rounds, device, only_first=name == ALONE)
                if dist.get_rank():
                    continue
                if name == ALONE and not isinstance(seconds, str):
                    alone[what] = summary.summarize([work for _, work in seconds]).median
                about = {
                    **conditions, "op": "ring", "dims": {**dims, "ranks": 1 if name == ALONE else world},
                    "dtype": str(DTYPES[device]).removeprefix("torch."), "pass": what, "contender": name,
                    "ours": name.startswith("longreach"), "note": note,
                }  # fmt: skip
                write(path, about, seconds, alone[what])
    dist.barrier()
    dist.destroy_process_group()


def write(path: Path, about: Row, seconds: Seconds | str, alone: float) -> None:
    row: Row = {**about, "status": "measured", "reason": None}
    if isinstance(seconds, str):
        row |= {"status": "gap", "reason": seconds}
    else:
        found = summary.summarize([clock for clock, _ in seconds])
        busiest = summary.summarize([work for _, work in seconds]).median
        package = "ring-flash-attn" if about["contender"].startswith("ring-flash-attn") else None
        row |= {
            "median_s": found.median, "iqr_s": found.iqr, "least_s": found.least, "rounds": found.rounds,
            "samples_s": [float(f"{clock:.6g}") for clock, _ in seconds], "package": package, "version": version(package),
            "busiest_s": busiest, "share_of_ideal": alone / (about["dims"]["ranks"] * busiest),
        }  # fmt: skip
    results.append(path, row)
    told = row["reason"] or f"{1e3 * row['median_s']:.3g} ms, {100 * row['share_of_ideal']:.0f} % of the ideal"
    print(f"ring {about['dims']} {about['pass']}: {about['contender']}: {told}", flush=True)


class Case:
    """One row, its tensors (the same on all ranks), and who attends to it."""

    def __init__(self, dims: dict[str, int], device: str) -> None:
        self.dims, self.device, self.world = dims, device, dist.get_world_size()
        P, G, R, H, K, E = (dims[name] for name in ("P", "G", "R", "H", "K", "E"))
        completions = [torch.zeros(R, dtype=torch.long) for _ in range(G)]
        self.row: PackedRow = one_row([Group(torch.zeros(P, dtype=torch.long), completions)])
        draw = torch.Generator(device).manual_seed(0)
        self.whole = tuple(
            torch.randn((self.row.tokens, n, E), generator=draw, device=device).to(DTYPES[device]) for n in (H, K, K, H)
        )
        self.scale = 1 / math.sqrt(E)
        self.exact = torch.empty_like(self.whole[0])
        """One rank's output."""
        if dist.get_rank() == 0:
            q, k, v, _ = self.whole
            self.exact.copy_(SharedPrefix(self.row).attend(0, q, k, v, self.scale))
        dist.broadcast(self.exact, 0)

    def contenders(self) -> Iterator[tuple[str, Contender | str]]:
        """By name; a text is the reason why one can't run."""
        yield ALONE, Contender(self._attend(SharedPrefix(self.row)), self.whole, self.exact)
        layouts = {"ring": (self.world, 1, "ring"), "all-gather": (self.world, 1, "all-gather"), "ulysses": (1, self.world, "ring")}  # fmt: skip
        if self.world % 2 == 0 and self.world > 2:
            layouts["ulysses x ring"] = (self.world // 2, 2, "ring")
        for name, (ring, ulysses, schedule) in layouts.items():
            mesh = make_mesh(ParallelConfig(ring, ulysses, schedule), self.device)
            cut = cut_row(self.row, ring, ulysses)
            layout = ParallelSharedPrefix(cut, mesh)
            held = cut.tokens[mesh.sequence_rank].to(self.device)
            yield (
                f"longreach, {name}",
                Contender(self._attend(layout), tuple(x[held] for x in self.whole), self.exact[held]),
            )
        peers = {"ring-flash-attn, zigzag": self._zigzag, "ring-flash-attn, llama3": self._llama3, "torch context parallel": self._torch}  # fmt: skip
        for name, make in peers.items():
            try:
                yield name, make()
            except Missing as missing:
                yield name, str(missing)

    def _attend(self, layout: Any) -> Attend:
        return lambda q, k, v: layout.attend(0, q, k, v, self.scale)

    def _plain(self, multiple: int) -> None:
        if self.dims["G"]:
            raise Missing("knows plain causal sequences alone")
        if self.row.tokens % multiple:
            raise Missing(f"needs a multiple of {multiple} tokens")

    def _ring_flash(self, stem: str) -> Any:
        try:
            package = engine_ring_flash.load().__package__
        except ValueError as error:
            raise Missing(
                str(error).partition(": set parallel")[0].removeprefix("parallel.schedule is ring-flash-attn, but ")
            ) from error
        return __import__(f"{package}.{stem}", fromlist=["_"])

    def _zigzag(self) -> Contender:
        self._plain(2 * self.world)
        function = self._ring_flash("zigzag_ring_flash_attn").zigzag_ring_flash_attn_func
        held = self._zigzag_tokens()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return function(q[None], k[None], v[None], softmax_scale=self.scale, causal=True)[0]

        return Contender(attend, tuple(x[held] for x in self.whole), self.exact[held])

    def _zigzag_tokens(self) -> Tensor:
        """Of this rank, where a plain row is cut into even zigzag pieces."""
        pieces, me = torch.arange(self.row.tokens, device=self.device).chunk(2 * self.world), dist.get_rank()
        return torch.cat([pieces[me], pieces[2 * self.world - 1 - me]])

    def _llama3(self) -> Contender:
        self._plain(self.world)
        module, me = self._ring_flash("llama3_flash_attn_varlen"), dist.get_rank()
        bounds = torch.tensor([0, self.row.tokens], dtype=torch.int32, device=self.device)
        *prepared, read = module.llama3_flash_attn_prepare_cu_seqlens(bounds, True, me, self.world)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return module.llama3_flash_attn_varlen_func(
                q, k, v, *prepared, 1, read, softmax_scale=self.scale, causal=True, group=dist.group.WORLD
            )

        parts = tuple(x.chunk(self.world)[me].contiguous() for x in (*self.whole, self.exact))
        return Contender(attend, parts[:4], parts[4])

    def _torch(self) -> Contender:
        """With heads repeated, since it knows no grouped keys; buffers are cut in place within its context."""
        self._plain(2 * self.world)
        from torch.distributed.tensor.experimental import context_parallel

        mesh = torch.distributed.device_mesh.init_device_mesh(self.device, (self.world,))
        group = self.dims["H"] // self.dims["K"]
        q, k, v, dout = (x.transpose(0, 1)[None].contiguous() for x in self.whole)
        buffers = [q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), dout]

        def around(run: Callable[[Tensors], None]) -> None:
            with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
                run(tuple(buffers))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # by its full name: torch's context replaces it there
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)

        exact = self.exact[self._zigzag_tokens()].transpose(0, 1)[None]
        return Contender(attend, (), exact, around)


class Contender:
    """Attention on this rank's tensors q, k, v and dout, which a peer may hand out within a context of its own."""

    def __init__(
        self, attend: Attend, tensors: Tensors, exact: Tensor, around: Callable[..., None] | None = None
    ) -> None:
        self.attend, self.tensors, self.exact = attend, tensors, exact
        self.around = around or (lambda run: run(tensors))

    def seconds(self, what: str, rounds: int, device: str, together: bool) -> Seconds:
        taken: Seconds = []

        def run(tensors: Tensors) -> None:
            *parts, dout = tensors
            for _ in range(1 + rounds):  # the first is a warm-up
                leaves = [x.detach().requires_grad_(what == "both") for x in parts]
                meet(device, together)
                start, busy = time.perf_counter(), time.process_time()
                out = self.attend(*leaves)
                if what == "both":
                    torch.autograd.grad(out, leaves, dout)
                if device == "cuda":
                    torch.cuda.synchronize()
                clock, work = time.perf_counter() - start, time.process_time() - busy
                taken.append((clock, clock if device == "cuda" else work))
                if len(taken) == 1:
                    error = float((out.detach() - self.exact).norm() / self.exact.norm())
                    if not error < WRONG:
                        raise Missing(f"runs, and its output is off one rank's by {error:.2g} of its norm")

        self.around(run)
        return taken[1:]


def meet(device: str, together: bool) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    if together:
        dist.barrier()


def measured(contender: Contender | str, what: str, rounds: int, device: str, *, only_first: bool) -> Seconds | str:
    """Seconds of each round on the slowest rank, the clock's and the work's, or why there are none. One rank alone runs while the others wait."""
    if isinstance(contender, str):
        return contender
    found: Seconds | str = [(0.0, 0.0)] * rounds
    if not only_first or dist.get_rank() == 0:
        try:
            found = contender.seconds(what, rounds, device, together=not only_first)
        except failures() as error:
            lines = str(error).strip().splitlines()
            found = (
                str(error)
                if isinstance(error, Missing)
                else f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:300]
            )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    failed = [x for x in everyone if isinstance(x, str)]
    return (
        failed[0] if failed else [(max(c for c, _ in of), max(w for _, w in of)) for of in zip(*everyone, strict=True)]
    )


def show(rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        dims = dict(row["dims"])
        ranks = dims.pop("ranks")
        lines.setdefault((" ".join(f"{k}={v}" for k, v in dims.items()), ranks, row["contender"]), {})[row["pass"]] = (
            row
        )
    by_case: dict[str, list[list[str]]] = {}
    gaps = {f"{name}, {case}: {found['both']['reason']}": None for (case, _, name), found in lines.items() if found["both"]["reason"]}  # fmt: skip
    for (case, ranks, name), found in sorted(lines.items(), key=lambda line: line[0][1]):
        if not found["both"]["reason"]:
            cells = [text for row in (found["forward"], found["both"]) for text in told(row)]
            by_case.setdefault(case, []).append([str(ranks), name, *cells])
    for case, made in by_case.items():
        print_table(f"attention over ranks, {case}, {rows[0]['device']}", HEADER, made)
    for gap in gaps:
        print(f"gap: {gap}")


def told(row: Row) -> tuple[str, str]:
    return f"{1e3 * row['median_s']:.0f} ms", f"{100 * row['share_of_ideal']:.0f} %"


if __name__ == "__main__":
    sys.exit(main())
