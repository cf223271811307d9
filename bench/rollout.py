"""Sampling a group's completions: tokens a second of each generator, with the prompt's keys used again and without.

`longreach, shared prompt` prefills a prompt once and decodes its G completions on the same keys; `longreach, prompt each
time` is the same generator with the prompt given G times. Beside them transformers' `generate`, which repeats the prompt G
times, its continuous batching with and without shared blocks, and, where its environment is set up (`make vllm`), vLLM's
server over HTTP with and without its prefix cache. Every contender samples exactly R tokens a completion from the same
weights at temperature 1; each round has a prompt of its own, so that no cache is warm from the round before.

Tokens a second are those sampled, G R, over the seconds of the whole call, prefill and HTTP included.

    python -m bench.rollout [--small] [--without-vllm]

Rows go to bench/results/rollout-cpu.json or rollout-cuda.json, and the table to the terminal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longreach.engine import Sampling, generate, load_model
from longreach.engine.attention import NAME as OUR_ATTENTION

from . import results, summary, timing
from .case import Case, Missing
from .peers import failures, version
from .results import Row
from .table import print_table
from .train_step import make_model, tokenizer

SHARED, EACH = "longreach, shared prompt", "longreach, prompt each time"
GENERATE, BATCHED = "transformers, generate", "transformers, continuous batching"
SHAPE = {"cpu": {"layers": 8, "D": 384, "V": 8192}, "cuda": {"layers": 24, "D": 2048, "V": 151936}}
SIZES = {
    "cpu": tuple({"P": p, "G": g, "R": 32} for p in (512, 2048) for g in (1, 8)),
    "cuda": tuple({"P": p, "G": g, "R": 1024} for p in (8192, 32768) for g in (1, 8)),
}
SMALL = ({"P": 48, "G": 2, "R": 4},)
SMALL_SHAPE = {"layers": 1, "D": 128, "V": 512}
"""Shows that everything runs, and nothing of speed."""
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
HEADER = ("generator", "tokens/s", "least seconds", "beside ours")

Sample = Callable[[Tensor], int]
"""Takes a prompt [P], gives how many tokens were sampled after it."""
Make = Callable[[Path, Case, ExitStack], Sample]
"""A contender on the model saved in a folder; what it holds open goes on the stack."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description="Tokens a second of each generator.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--out", type=Path, help="file of rows (bench/results/rollout-cpu.json or rollout-cuda.json)")
    parser.add_argument("--note", help="what else must be said of the machine; goes into each row")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.out or results.FOLDER / f"rollout-{device}.json"
    for name in options.only or ():
        if name not in CONTENDERS:
            print(f"bench.rollout: no contender {name!r}: of {', '.join(CONTENDERS)}", file=sys.stderr)
            return 2
    conditions = {**results.conditions(device), "note": options.note}
    shape = SMALL_SHAPE if options.small else SHAPE[device]
    chosen = {name: make for name, make in CONTENDERS.items() if name in (options.only or CONTENDERS)}
    for dims in SMALL if options.small else SIZES[device]:
        case = Case("rollout", {**dims, **shape}, DTYPES[device], device)
        for row in rows(case, chosen, options.rounds):
            results.append(path, {**conditions, **row})
    show(results.load(path))
    return 0


def rows(case: Case, contenders: Mapping[str, Make], rounds: int) -> Iterator[Row]:
    """A row for each contender; they take turns, and the first round, which compiles and loads, doesn't count."""
    g, r = case.dims["G"], case.dims["R"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save(case, Path(folder))
        ready: dict[str, timing.Task] = {}
        lost: dict[str, Exception] = {}
        for name, make in contenders.items():
            try:
                sample = make(Path(folder), case, stack)
                made = sample(prompt(case))
                if made != g * r:
                    raise Missing(f"sampled {made} tokens and not {g * r}")
                ready[name] = timing.Task(sample, lambda: prompt(case))
            except failures() as error:
                lost[name] = error
        taken, more = timing.round_robin(ready, timing.make_clock(case.device), rounds, failures())
    place: Row = {"op": "rollout", "dims": dict(case.dims), "dtype": case.dtype, "pass": "sample"}
    for name in contenders:
        about = {**place, "contender": name, "ours": name.startswith("longreach")}
        if name in taken:
            found = summary.summarize(taken[name])
            yield {
                **about, "status": "measured", "reason": None, "median_s": found.median, "iqr_s": found.iqr,
                "least_s": found.least, "rounds": found.rounds, "tokens_per_s": g * r / found.median,
                "samples_s": [float(f"{seconds:.6g}") for seconds in taken[name]], "version": version(PACKAGES.get(name)),
            }  # fmt: skip
        else:
            yield {**about, "status": "gap", "reason": reason({**lost, **more}[name])}


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (
        lines[0] if isinstance(error, Missing) else f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:300]
    )


_DRAW = torch.Generator().manual_seed(0)


def prompt(case: Case) -> Tensor:
    """A new one every time it is called."""
    return torch.randint(1, case.dims["V"], (case.dims["P"],), generator=_DRAW)


def save(case: Case, folder: Path) -> None:
    """The weights that all of them load."""
    make_model(case, OUR_ATTENTION).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def ours(folder: Path, case: Case, *, shared: bool) -> Sample:
    model = load_model(folder, dtype=case.torch_dtype, device=torch.device(case.device))
    g, r = case.dims["G"], case.dims["R"]

    def sample(prompt: Tensor) -> int:
        prompts, size = ([prompt], g) if shared else ([prompt] * g, 1)
        made = generate(model, prompts, size, Sampling(r, 1.0), stop_ids=[], seed=0, batch_tokens=1 << 22)
        return sum(len(one.ids) for group in made for one in group)

    return sample


def plain(folder: Path, case: Case) -> Any:
    made: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=case.torch_dtype)
    return made.to(case.device).eval()


def settings(case: Case) -> dict[str, Any]:
    r = case.dims["R"]
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": r, "min_new_tokens": r,
            "pad_token_id": 0, "eos_token_id": None}  # fmt: skip


def of_generate(folder: Path, case: Case, stack: ExitStack) -> Sample:
    model, g = plain(folder, case), case.dims["G"]

    def sample(prompt: Tensor) -> int:
        ids = prompt[None].to(case.device)
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, num_return_sequences=g, **settings(case))
        return made[:, len(prompt) :].numel()

    return sample


def of_batches(folder: Path, case: Case, stack: ExitStack) -> Sample:
    """A request for each completion, of which it shares the prompt's whole blocks where it can."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, (p, g, r) = plain(folder, case), (case.dims[name] for name in "PGR")
    config = GenerationConfig(**{key: value for key, value in settings(case).items() if key != "min_new_tokens"})
    batching = ContinuousBatchingConfig()
    if case.device == "cpu":  # else it takes all memory there is, and fills it first
        blocks = -(-(p + r) // batching.page_size)
        batching = ContinuousBatchingConfig(num_blocks=2 * g * blocks + 2, max_batch_tokens=2048)
    stack.callback(model.destroy_cached_continuous_batching_manager)

    def sample(prompt: Tensor) -> int:
        made = model.generate_batch(
            [prompt.tolist()] * g, config, batching, progress_bar=False, warmup=False, persistent_manager=True
        )
        return sum(len(output.generated_tokens) for output in made.values())

    return sample


CONTENDERS: dict[str, Make] = {
    SHARED: lambda folder, case, stack: ours(folder, case, shared=True),
    EACH: lambda folder, case, stack: ours(folder, case, shared=False),
    GENERATE: of_generate,
    BATCHED: of_batches,
}
PACKAGES = {GENERATE: "transformers", BATCHED: "transformers"}


def show(rows: Sequence[Row]) -> None:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(" ".join(f"{k}={v}" for k, v in row["dims"].items()), []).append(row)
    for case, found in cases.items():
        own = next((row for row in found if row["contender"] == SHARED and row["status"] == "measured"), None)
        lines = [line(row, own) for row in found if row["status"] == "measured"]
        print_table(f"sampling, {case}, {found[0]['dtype']}, {found[0]['device']}", HEADER, lines)
        for row in found:
            if row["status"] == "gap":
                print(f"gap: {row['contender']}: {row['reason']}")


def line(row: Row, own: Row | None) -> list[str]:
    share = f"{row['tokens_per_s'] / own['tokens_per_s']:.2f}" if own else ""
    return [row["contender"], f"{row['tokens_per_s']:.1f}", f"{row['least_s']:.3g}", share]


if __name__ == "__main__":
    sys.exit(main())
