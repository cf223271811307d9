"""`longreach eval RECIPE`, `longreach eval --model DIR_OR_URL`, and `longreach compare A B`.

`eval` reads its own arguments, since its two forms take different ones: a recipe with recipe keys, or a model with the keys
of `EvaluationConfig`. Both stop with one message and status 2 at a key that they don't know.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...engine.checkpoint import write_atomically
from ...engine.launch import Job
from ...engine.model import load_tokenizer, pick_device
from ..config import build, override, read_overrides
from ..console import Console
from ..evaluate import evaluate
from ..passes import bucket_line, percent
from ..plan_text import table
from ..policy import Policy, model_source
from ..ranks import Ranks
from ..recipe import load_recipe, shipped
from ..rewards import make_reward
from ..serving.session import generating
from ..sources import read_eval
from ..train import Stopped
from . import report
from .compare import Comparison, compare_folders, comparison_tables, write_comparison
from .run import run_evaluation
from .settings import EvaluationConfig

RECIPE_KEYS = "Any recipe key can be given as --section.key VALUE, for example --run.seed 4."
_MODEL_KEYS = (
    "With --model any key of EvaluationConfig can be given as --key VALUE or --section.key VALUE: --scoring, --rules, --seed, --top-k, "
    "--buckets, --resamples, --judge.*, --server.*, --local.*. The defaults are the published conditions."
)
# Option, the key that it sets, what it is.
_OPTIONS = (
    ("samples", "samples", "N", "answers a question (default: 1)"),
    ("limit", "limit", "N", "the first N questions of each benchmark"),
    ("max-input", "max_input", "TOKENS", "longest prompt; longer ones lose their middle (default: 120000)"),
    ("max-output", "max_output", "TOKENS", "longest answer (default: 10000)"),
    ("temperature", "temperature", "T", "default: 0.7"),
    ("top-p", "top_p", "P", "default: 0.95"),
    ("tokenizer", "tokenizer", "DIR", "the model's tokenizer; a URL needs one"),
    ("served-name", "served_name", "NAME", "what the server calls the model"),
    ("concurrency", "server.concurrency", "N", "requests under way at once (default: 32)"),
    ("api-key-env", "server.api_key_env", "NAME", "environment variable that holds the server's key"),
    ("judge-url", "judge.base_url", "URL", "OpenAI-compatible server of the judge"),
    ("judge-model", "judge.model", "NAME", "what the judge's server calls it"),
)  # fmt: skip
_LISTED = 10


def add_eval(commands: Any) -> None:
    # its options are its own parser's, so nothing is an option here: no argument begins with NUL
    command = commands.add_parser(
        "eval", help="evaluate a recipe's model, or any model on the benchmarks", add_help=False, prefix_chars="\0"
    )
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=run_eval)


def add_compare(commands: Any) -> None:
    command = commands.add_parser(
        "compare", help="two evaluations of the same questions: paired differences and flips", allow_abbrev=False
    )
    command.add_argument("a", type=Path, metavar="A", help="results folder of `longreach eval --model ... --out A`")
    command.add_argument("b", type=Path, metavar="B")
    command.add_argument("--out", type=Path, metavar="FILE", help="write it all to a .html, .md or .json file")
    command.set_defaults(run=run_compare)


def run_eval(known: argparse.Namespace, _: Sequence[tuple[str, str]], console: Console, job: Job) -> None:
    """Either form, told apart by --model."""
    arguments: list[str] = known.arguments
    by_model = any(word == "--model" or word.startswith("--model=") for word in arguments)
    given, rest = _parser(by_model).parse_known_args(arguments)
    overrides = read_overrides(rest)
    if by_model:
        _eval_model(given, overrides, console, job)
    else:
        _eval_recipe(given, overrides, console, job)


def _parser(by_model: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longreach eval", allow_abbrev=False, epilog=f"{RECIPE_KEYS} {_MODEL_KEYS}")
    if not by_model:
        names = ", ".join(shipped())
        parser.add_argument("recipe", metavar="RECIPE | --model DIR_OR_URL", help=f"a .toml file or one of: {names}")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that can't be read")
    group = parser.add_argument_group("with --model")
    group.add_argument(
        "--model",
        metavar="DIR_OR_URL",
        help="a transformers model directory, run here, or the URL of a server (.../v1)",
    )
    group.add_argument("--benchmarks", metavar="NAMES", help="all, seven, or names with commas (default: all)")
    group.add_argument(
        "--data", action="append", default=[], metavar="NAME=FILE", help="a benchmark's questions, if not from the hub"
    )
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="results folder (default: evals/MODEL); the same command goes on in it"
    )
    group.add_argument(
        "--rescore", action="store_true", help="count the responses there anew under another judge or rule"
    )
    for option, key, metavar, text in _OPTIONS:
        group.add_argument(f"--{option}", dest=key, metavar=metavar, help=text)
    return parser


def _eval_model(given: argparse.Namespace, overrides: Sequence[tuple[str, str]], console: Console, job: Job) -> None:
    if job.size > 1:
        raise ValueError(
            f"eval --model runs on one process, not {job.size}: for many GPUs serve the model and give its URL"
        )
    values: dict[str, Any] = {"data": dict(map(_data, given.data))}
    flat = [(key, getattr(given, key)) for _, key, _, _ in _OPTIONS if getattr(given, key) is not None]
    named = [(key, getattr(given, key)) for key in ("model", "benchmarks") if getattr(given, key) is not None]
    skip = [("skip_bad_rows", "true")] if given.skip_bad_rows else []
    for key, text in (*named, *flat, *skip, *overrides):
        override(values, key, text)
    config = build(EvaluationConfig, values)
    root = given.out or Path("evals") / _folder_name(config)
    try:
        results = run_evaluation(config, root, console, os.environ, rescore=given.rescore)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; every response so far is kept in {root}, and the same command goes on") from None
    _tell(results, root, console)


def _data(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"--data {text!r}: give NAME=FILE, for example --data hotpotqa=hotpotqa.jsonl")
    return name, path


def _folder_name(config: EvaluationConfig) -> str:
    name = (
        config.served_name
        or re.sub(r"^https?://", "", config.model).rstrip("/").rpartition("/" if not config.is_served else "\0")[2]
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _tell(results: dict[str, Any], root: Path, console: Console) -> None:
    made = report.headline(results)
    console.say(f"\n{made.title}\n" + table(list(made.head), [list(row) for row in made.rows]))
    for note in report.notes_of(results)[1:]:
        console.say(note)
    for failure in results["failures"][:_LISTED]:
        console.say(
            f"failed: {failure['benchmark']} {failure['id']}, sample {failure['sample']}: {_short(failure['why'], 200)}"
        )
    if any(name in report.SEVEN for name in (b["name"] for b in results["benchmarks"])):
        console.say("the published table and what differs from its conditions are in the report")
    console.say(str(root / "report.html"))


def _eval_recipe(given: argparse.Namespace, overrides: Sequence[tuple[str, str]], console: Console, job: Job) -> None:
    unused = [
        name for name in ("benchmarks", "data", "out", "rescore", *(o[1] for o in _OPTIONS)) if getattr(given, name)
    ]
    if unused:
        raise ValueError(f"{', '.join(unused)} would do nothing with a recipe: give --model too, or recipe keys alone")
    skip = [("data.skip_bad_rows", "true")] if given.skip_bad_rows else []
    recipe = load_recipe(given.recipe, [*overrides, *skip])
    if not recipe.data.eval:
        raise ValueError(
            "the recipe has no questions to evaluate on: set data.eval to files, datasets names or synthetic:NAME"
        )
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    tokenizer = load_tokenizer(model_source(recipe.model), trust_remote_code=recipe.model.trust_remote_code)
    prompts = read_eval(recipe, tokenizer, None, console)
    ranks = Ranks(job, job.connect(recipe.parallel, pick_device(recipe.model.device)))
    policy = Policy(recipe.model, recipe.generator, ranks=ranks)
    window = recipe.served_window(max(len(prompt.ids) for prompt in prompts))
    with (
        generating(policy, recipe, window, home=None, say=console.say),
        console.progress("evaluating", len(prompts)) as advance,
    ):
        summary, _ = evaluate(
            policy, make_reward(recipe.reward, ranks=ranks), prompts, recipe.eval, bounds=recipe.buckets(),
            seed=recipe.run.seed, name="eval", on_batch=advance,
        )  # fmt: skip
    for row in summary["benchmarks"]:
        passes = ", ".join(f"pass@{k} {percent(value)} %" for k, value in row["pass_at"].items())
        console.say(
            f"{row['name']}: {percent(row['accuracy'])} ± {percent(row['stderr'])} % (n = {row['n']}), {passes}"
        )
    for row in summary["buckets"]:
        console.say(bucket_line(row))


def run_compare(known: argparse.Namespace, overrides: Sequence[tuple[str, str]], console: Console, _: Job) -> None:
    if overrides:
        raise ValueError(f"compare takes no such option: --{overrides[0][0]}")
    if known.out is not None and known.out.suffix not in (".html", ".md", ".json"):
        raise ValueError(f"--out {known.out}: the ending must be .html, .md or .json")
    made = compare_folders(known.a, known.b)
    _tell_comparison(made, console)
    if known.out is not None:
        if known.out.suffix == ".json":
            write_atomically(known.out, json.dumps(made.dump()) + "\n")
        else:
            write_comparison(made, known.out)
        console.say(str(known.out))


def _tell_comparison(made: Comparison, console: Console) -> None:
    console.say(f"A: {made.names[0]}\nB: {made.names[1]}")
    for note in made.notes:
        console.say(note)
    first, *flips = comparison_tables(made)
    console.say(f"\n{first.title}. {first.lead}\n" + table(list(first.head), [list(row) for row in first.rows]))
    for part in flips:
        rows = [[_short(cell) for cell in row] for row in part.rows[:_LISTED]]
        more = f"\n... and {len(part.rows) - _LISTED} more (--out FILE has all)" if len(part.rows) > _LISTED else ""
        console.say(f"\n{part.title}\n" + table(list(part.head), rows) + more)


def _short(text: str, most: int = 48) -> str:
    line = " ".join(report.whole_characters(text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
