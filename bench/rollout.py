"""Sampling a group's completions: tokens a second of each generator, with the prompt's keys used again and without.

`longreach, shared prompt` prefills a prompt once and decodes its G completions on the same keys; `longreach, prompt each
time` is the same generator with the prompt given G times. Beside them transformers' `generate`, which repeats the prompt G
times, its continuous batching with shared blocks and without (`generators.py`), and, where its environment is set up
(`make vllm`), vLLM's server over HTTP with its prefix cache and without (`servers.py`). Every contender samples exactly R
tokens a completion from the same weights at temperature 1; each round has a prompt of its own, so that no cache is warm
from the round before.

Tokens a second are those sampled, G R, over the seconds of the whole call, prefill and HTTP included.

Rows of the op `sync` are the seconds that new weights take to the server, through files in a folder that both see: from the
trainer's tensors to a server that samples from them again, for each GB, with training's checks and without.

    python -m bench.rollout [--small] [--only NAME ...] [--vllm PYTHON]

Rows go to bench/results/rollout-cpu.json or rollout-cuda.json, and the table to the terminal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from . import generators, results, servers, summary, timing
from .case import Case, Missing
from .generators import Make, Sample, save
from .peers import failures, version
from .results import Row
from .table import print_table

Made = TypeVar("Made")
SHARED, EACH = "longreach, shared prompt", "longreach, prompt each time"
GENERATE = "transformers, generate"
BATCHED, APART = "transformers, continuous batching", "transformers, continuous batching, nothing shared"
VLLM, UNCACHED = "vLLM, prefix cache", "vLLM, no prefix cache"
NAMES = (SHARED, EACH, GENERATE, BATCHED, APART, VLLM, UNCACHED, *servers.WAYS)

SHAPE = {"cpu": {"layers": 8, "D": 384, "V": 8192}, "cuda": {"layers": 24, "D": 2048, "V": 151936}}
SIZES = {
    "cpu": tuple({"P": p, "G": g, "R": 32} for p in (512, 2048) for g in (1, 8)),
    "cuda": tuple({"P": p, "G": g, "R": 1024} for p in (8192, 32768) for g in (1, 8)),
}
SYNCED = {"cpu": (SHAPE["cpu"], {"layers": 8, "D": 1024, "V": 32768}), "cuda": (SHAPE["cuda"],)}
SYNC_WINDOW = {"P": 480, "G": 1, "R": 32}
"""Of the server that takes weights: what its probe needs."""
SMALL = ({"P": 48, "G": 2, "R": 4},)
SMALL_SHAPE = {"layers": 1, "D": 128, "V": 512}
"""Shows that everything runs, and nothing of speed."""
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
HEADER = ("generator", "tokens/s", "least seconds", "beside ours")
SYNC_HEADER = ("hand-over", "seconds", "least seconds", "GB", "seconds/GB")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description="Tokens a second of each generator.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES, help=f"of {'; '.join(NAMES)}")
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="vLLM's interpreter (that of `make vllm`)")
    parser.add_argument("--out", type=Path, help="file of rows (bench/results/rollout-cpu.json or rollout-cuda.json)")
    parser.add_argument("--note", help="what else must be said of the machine; goes into each row")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.out or results.FOLDER / f"rollout-{device}.json"
    for name in options.only:
        if name not in NAMES:
            print(f"bench.rollout: no contender {name!r}: of {'; '.join(NAMES)}", file=sys.stderr)
            return 2
    conditions = {**results.conditions(device), "note": options.note}
    shape = SMALL_SHAPE if options.small else SHAPE[device]
    chosen = {name: make for name, make in contenders(options.vllm).items() if name in options.only}
    with generators.quiet():
        sizes = SMALL if options.small else SIZES[device]
        cases = [Case("rollout", {**dims, **shape}, DTYPES[device], device) for dims in sizes]
        for row in rows(cases, chosen, options.rounds) if chosen else ():
            results.append(path, {**conditions, **row})
        ways = [way for way in servers.WAYS if way in options.only]
        for model in ([SMALL_SHAPE] if options.small else SYNCED[device]) if ways else ():
            for row in sync_rows(Case("sync", model, DTYPES[device], device), ways, options.rounds, options.vllm):
                results.append(path, {**conditions, **row})
    show(results.load(path))
    return 0


def contenders(python: str) -> dict[str, Make]:
    """By name. `python` runs vLLM's servers."""
    return {
        SHARED: lambda folder, case, stack: generators.ours(folder, case, shared=True),
        EACH: lambda folder, case, stack: generators.ours(folder, case, shared=False),
        GENERATE: generators.of_generate,
        BATCHED: partial(generators.of_batches, shared=True),
        APART: partial(generators.of_batches, shared=False),
        VLLM: partial(servers.served, python=python, cached=True),
        UNCACHED: partial(servers.served, python=python, cached=False),
    }


def rows(cases: Sequence[Case], contenders: Mapping[str, Make], rounds: int) -> Iterator[Row]:
    """A row for each contender in each case, all on the weights in one folder; in a case they take turns."""
    widest = Case(cases[0].op, most(cases), cases[0].dtype, cases[0].device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save(widest, Path(folder))
        samples = {name: attempt(partial(make, Path(folder), widest, stack)) for name, make in contenders.items()}
        for case in cases:
            g, r = case.dims["G"], case.dims["R"]
            tasks = {name: attempt(partial(task, case, sample)) for name, sample in samples.items()}
            for row in measured(case, tasks, timing.make_clock(case.device), rounds):
                speed = {"tokens_per_s": g * r / row["median_s"]} if "median_s" in row else {}
                package = version("transformers") if row["contender"].startswith("transformers") else None
                yield {**row, **speed, "pass": "sample", "version": package}


def most(cases: Sequence[Case]) -> dict[str, int]:
    """The largest of each dim."""
    return {name: max(case.dims[name] for case in cases) for name in cases[0].dims}


def task(case: Case, sample: Sample | Exception) -> timing.Task:
    """After a first round, which compiles and loads and doesn't count."""
    if isinstance(sample, Exception):
        raise sample
    g, r = case.dims["G"], case.dims["R"]
    made = sample(prompt(case), g, r)
    if made != g * r:
        raise Missing(f"sampled {made} tokens and not {g * r}")
    return timing.Task(lambda ids: sample(ids, g, r), lambda: prompt(case))


def sync_rows(case: Case, ways: Sequence[str], rounds: int, python: str) -> Iterator[Row]:
    """A row for each way of handing over the weights of a model with the dims of `case`."""
    wide = Case(case.op, {**case.dims, **SYNC_WINDOW}, case.dtype, case.device)
    sizes: dict[str, int] = {}

    def pushed(way: str, made: Mapping[str, timing.Task] | Exception) -> timing.Task:
        if isinstance(made, Exception):
            raise made
        sizes[way] = made[way].run(made[way].prepare())
        return made[way]

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save(wide, Path(folder))
        made = attempt(lambda: servers.pushes(Path(folder), wide, stack, python))
        tasks = {way: attempt(partial(pushed, way, made)) for way in ways}
        for row in measured(case, tasks, timing.cpu_clock, rounds):
            size = sizes.get(row["contender"], 0)
            rate = {"bytes": size, "s_per_gb": row["median_s"] / (size / 1e9)} if "median_s" in row else {}
            yield {**row, **rate, "pass": "push", "version": None}


def attempt(make: Callable[[], Made]) -> Made | Exception:
    """What it makes, or what stood in its way."""
    try:
        return make()
    except failures() as error:
        return error


def measured(
    case: Case, tasks: Mapping[str, timing.Task | Exception], clock: timing.Clock, rounds: int
) -> Iterator[Row]:
    """A row for each contender: what it took, or why it didn't run."""
    ready = {name: task for name, task in tasks.items() if isinstance(task, timing.Task)}
    lost = {name: error for name, error in tasks.items() if isinstance(error, Exception)}
    taken, more = timing.round_robin(ready, clock, rounds, failures())
    for name in tasks:
        about: Row = {"op": case.op, "dims": dict(case.dims), "dtype": case.dtype, "contender": name,
                      "ours": name.startswith("longreach")}  # fmt: skip
        if name in taken:
            found = summary.summarize(taken[name])
            yield {
                **about, "status": "measured", "reason": None, "median_s": found.median, "iqr_s": found.iqr,
                "least_s": found.least, "rounds": found.rounds,
                "samples_s": [float(f"{seconds:.6g}") for seconds in taken[name]],
            }  # fmt: skip
        else:
            yield {**about, "status": "gap", "reason": reason({**lost, **more}[name])}


def reason(error: Exception) -> str:
    """A gap's, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, Missing) else f"failed: {type(error).__name__}: {lines[0]}"[:300]


_DRAW = torch.Generator().manual_seed(0)


def prompt(case: Case) -> Tensor:
    """A new one every time it is called."""
    return torch.randint(1, case.dims["V"], (case.dims["P"],), generator=_DRAW)


def show(rows: Sequence[Row]) -> None:
    cases: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        label = " ".join(f"{k}={v}" for k, v in row["dims"].items())
        cases.setdefault((row["op"], label, row["dtype"], row["device"]), []).append(row)
    for (op, label, dtype, device), found in cases.items():
        measured = [row for row in found if row["status"] == "measured"]
        own = next((row for row in measured if row["contender"] == SHARED), None)
        lines = [sync_line(row) if op == "sync" else line(row, own) for row in measured]
        title = "weights to a server" if op == "sync" else "sampling"
        print_table(f"{title}, {label}, {dtype}, {device}", SYNC_HEADER if op == "sync" else HEADER, lines)
        for row in found:
            if row["status"] == "gap":
                print(f"gap: {row['contender']}: {row['reason']}")


def line(row: Row, own: Row | None) -> list[str]:
    share = f"{row['tokens_per_s'] / own['tokens_per_s']:.2f}" if own else ""
    return [row["contender"], f"{row['tokens_per_s']:.1f}", f"{row['least_s']:.3g}", share]


def sync_line(row: Row) -> list[str]:
    size, seconds = f"{row['bytes'] / 1e9:.3g}", f"{row['median_s']:.3g}"
    return [row["contender"], seconds, f"{row['least_s']:.3g}", size, f"{row['s_per_gb']:.3g}"]


if __name__ == "__main__":
    sys.exit(main())
