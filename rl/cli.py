"""The `longreach` command: one message and an exit status for whatever goes wrong, no traceback for a user's mistake.

Exit status: 0 done, 2 wrong input (nothing was begun, or what is saved stands), 1 the machine failed (disk, gradients that
aren't finite; for `doctor`: something needed is broken), 3 `plan` found no setting that fits, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..engine.launch import Job, join
from ..engine.model import load_tokenizer, pick_device
from .bench import run_bench
from .config import dump
from .console import Console
from .curriculum import describe, phase_name
from .doctor import add_doctor
from .evaluate import evaluate
from .passes import bucket_line, percent
from .plan import check_fits
from .plan_command import add_plan
from .policy import Policy, model_source
from .ranks import Ranks
from .recipe import Recipe, load_recipe, shipped, to_toml
from .report import write_report
from .rewards import make_reward
from .serving.session import generating
from .sources import check_window, read_eval, read_prompts
from .train import Stopped, train

_SHORT = {"generator": "generator.kind"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit status."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    transformers_logging.disable_progress_bar()  # one bar of ours, not one for each checkpoint
    try:
        job = join()
    except OSError as error:
        return _failed(Job(), error, 1)
    with job:
        console = Console() if job.rank == 0 else Console(quiet=True, warns=False)
        try:
            return int(known.run(known, _overrides(rest), console, job) or 0)
        except ValueError as error:
            return _failed(job, error, 2)
        except (OSError, FloatingPointError) as error:
            return _failed(job, error, 1)
        except Stopped as stopped:
            console.say(str(stopped))
            return 130
        except KeyboardInterrupt:
            if job.fail("interrupted", 130):
                Console().say("stopped at once; the same command goes on from the last checkpoint")
            return 130


def _failed(job: Job, error: Exception, status: int) -> int:
    """One message, whatever the number of ranks that fail."""
    if job.fail(str(error), status):
        print(f"longreach: {error}", file=sys.stderr, flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longreach",
        description="Reinforcement learning for reasoning over 120K-token documents.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    recipes = ", ".join(shipped())
    for name, run, text in (
        ("train", _train, "run or resume a recipe"),
        ("eval", _eval, "evaluate the recipe's model on its evaluation data"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            allow_abbrev=False,
            epilog="Any recipe key can be given as --section.key VALUE, for example --run.seed 4.",
        )
        command.add_argument("recipe", help=f"a .toml file or one of: {recipes}")
        command.add_argument(
            "--skip-bad-rows", action="store_true", help="leave out rows that can't be read, and write them aside"
        )
        command.set_defaults(run=run)
        if name == "train":
            command.add_argument("--run-dir", type=Path, help="the run folder (default: runs/NAME)")
            command.add_argument(
                "--dry-run",
                action="store_true",
                help="print the resolved recipe and what each phase will see, then stop",
            )
            command.add_argument(
                "--replay",
                type=Path,
                metavar="RUN",
                help="train on the saved rollouts of another run, without generating",
            )
            command.add_argument("--force", action="store_true", help="go on though the plan says that it can't fit")
    demo = commands.add_parser("demo", help="train the demo recipe (CPU, minutes)", allow_abbrev=False)
    demo.add_argument("--run-dir", type=Path)
    demo.set_defaults(run=_train, recipe="demo", dry_run=False, replay=None, skip_bad_rows=False, force=False)
    add_plan(commands)
    add_doctor(commands)
    report = commands.add_parser("report", help="draw a run as one HTML page", allow_abbrev=False)
    report.add_argument("run_dir", type=Path, metavar="RUN")
    report.set_defaults(run=_report)
    # its options are its own parser's, so nothing is an option here: no argument begins with NUL
    bench = commands.add_parser("bench", help="measure kernels beside their peers", add_help=False, prefix_chars="\0")
    bench.add_argument("arguments", nargs="*")
    bench.set_defaults(run=lambda known, *_: run_bench(known.arguments))
    return parser


def _overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """[--a.b value, --c.d=value] -> [(a.b, value), (c.d, value)]. A section's short name stands for its kind."""
    pairs: list[tuple[str, str]] = []
    items = iter(rest)
    for item in items:
        if not item.startswith("--"):
            raise ValueError(f"unexpected argument {item!r}: recipe keys are given as --section.key VALUE")
        key, equals, value = item[2:].partition("=")
        if not equals:
            following = next(items, None)
            if following is None or following.startswith("--"):
                raise ValueError(f"--{key} needs a value: --{key} VALUE, or --{key}=VALUE for one that begins with --")
            value = following
        pairs.append((_SHORT.get(key, key), value))
    return pairs


def _recipe(known: argparse.Namespace, overrides: list[tuple[str, str]]) -> Recipe:
    skip = [("data.skip_bad_rows", "true")] if known.skip_bad_rows else []
    return load_recipe(known.recipe, [*overrides, *skip])


def _train(known: argparse.Namespace, overrides: list[tuple[str, str]], console: Console, job: Job) -> None:
    recipe = _recipe(known, overrides)
    if known.dry_run:
        _dry_run(recipe, console)
    else:
        check_fits(recipe, console, force=known.force, gpus=job.size)
        train(recipe, known.run_dir or Path("runs") / recipe.name, replay=known.replay, console=console, job=job)


def _dry_run(recipe: Recipe, console: Console) -> None:
    """Reads everything but weights and writes nothing."""
    console.say(to_toml(dump(recipe)))
    check_window(recipe)
    prompts = read_prompts(recipe, _tokenizer(recipe), None, console)
    bounds = [0, *(phase.upper for phase in recipe.phases)]
    phases = {
        f"{phase_name(i)} ({bounds[i]}, {bounds[i + 1]}]": [prompts.train[j] for j in members]
        for i, members in enumerate(prompts.phases)
    }
    beyond = [prompts.train[i] for i in prompts.beyond]
    for name, part in {"sft": prompts.sft, **phases, "beyond the last phase": beyond, "eval": prompts.eval}.items():
        console.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in describe(part).items()))


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    return load_tokenizer(model_source(recipe.model), trust_remote_code=recipe.model.trust_remote_code)


def _eval(known: argparse.Namespace, overrides: list[tuple[str, str]], console: Console, job: Job) -> None:
    recipe = _recipe(known, overrides)
    if not recipe.data.eval:
        raise ValueError(
            "the recipe has no questions to evaluate on: set data.eval to files, datasets names or synthetic:NAME"
        )
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    prompts = read_eval(recipe, _tokenizer(recipe), None, console)
    ranks = Ranks(job, job.connect(recipe.parallel, pick_device(recipe.model.device)))
    policy = Policy(recipe.model, recipe.generator, ranks=ranks)
    longest = max(map(len, (prompt.ids for prompt in prompts)))
    with (
        generating(policy, recipe, recipe.served_window(longest), home=None, say=console.say),
        console.progress("evaluating", len(prompts)) as advance,
    ):
        summary, _ = evaluate(
            policy, make_reward(recipe.reward, ranks=ranks), prompts, recipe.eval, bounds=recipe.buckets(),
            seed=recipe.run.seed, name="eval", on_batch=advance,
        )  # fmt: skip
    for row in summary["benchmarks"]:
        passes = ", ".join(f"pass@{k} {percent(value)}" for k, value in row["pass_at"].items())
        console.say(f"{row['name']}: {percent(row['accuracy'])} ± {percent(row['stderr'])} (n = {row['n']}), {passes}")
    for row in summary["buckets"]:
        console.say(bucket_line(row))


def _report(known: argparse.Namespace, overrides: list[tuple[str, str]], console: Console, _: Job) -> None:
    if overrides:
        raise ValueError(f"report takes no recipe keys, but got --{overrides[0][0]}")
    if not (known.run_dir / "recipe.toml").exists():
        raise ValueError(f"{known.run_dir} is not a run folder: it has no recipe.toml")
    console.say(str(write_report(known.run_dir)))


if __name__ == "__main__":
    sys.exit(main())
