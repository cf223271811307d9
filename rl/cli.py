"""The `longreach` command: one message and an exit status for whatever goes wrong, no traceback for a user's mistake.

Exit status: 0 done, 2 wrong input (nothing was begun, or what is saved stands), 1 the machine failed (disk, gradients that
aren't finite; for `doctor`: something needed is broken), 3 `plan` found no setting that fits, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..engine.launch import Job, join
from ..engine.model import load_tokenizer
from .behaviours.command import add_behaviours
from .bench import run_bench
from .benchmarks.command import RECIPE_KEYS, add_compare, add_eval
from .config import dump, read_overrides
from .console import Console
from .curriculum import describe, phase_name
from .doctor import add_doctor
from .plan import check_fits
from .plan_command import add_plan
from .policy import model_source
from .recipe import Recipe, load_recipe, shipped, to_toml
from .report import write_report
from .serving.serve_command import add_serve
from .sources import check_window, read_prompts
from .trace_command import add_trace
from .train import Stopped, train


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
            return int(known.run(known, read_overrides(rest), console, job) or 0)
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
    command = commands.add_parser("train", help="run or resume a recipe", allow_abbrev=False, epilog=RECIPE_KEYS)
    command.add_argument("recipe", help=f"a .toml file or one of: {recipes}")
    command.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that can't be read, and write them aside"
    )
    command.add_argument("--run-dir", type=Path, help="the run folder (default: runs/NAME)")
    command.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and what each phase will see, then stop"
    )
    command.add_argument(
        "--replay", type=Path, metavar="RUN", help="train on the saved rollouts of another run, without generating"
    )
    command.add_argument("--force", action="store_true", help="go on though the plan says that it can't fit")
    command.set_defaults(run=_train)
    add_eval(commands)
    add_compare(commands)
    demo = commands.add_parser("demo", help="train the demo recipe (CPU, minutes)", allow_abbrev=False)
    demo.add_argument("--run-dir", type=Path, help="the run folder (default: runs/demo)")
    demo.set_defaults(run=_train, recipe="demo", dry_run=False, replay=None, skip_bad_rows=False, force=False)
    add_plan(commands)
    add_serve(commands)
    add_doctor(commands)
    add_behaviours(commands)
    add_trace(commands)
    report = commands.add_parser("report", help="draw a run as one HTML page", allow_abbrev=False)
    report.add_argument("run_dir", type=Path, metavar="RUN")
    report.set_defaults(run=_report)
    # its options are its own parser's, so nothing is an option here: no argument begins with NUL
    bench = commands.add_parser("bench", help="measure kernels beside their peers", add_help=False, prefix_chars="\0")
    bench.add_argument("arguments", nargs="*")
    bench.set_defaults(run=lambda known, *_: run_bench(known.arguments))
    return parser


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


def _report(known: argparse.Namespace, overrides: list[tuple[str, str]], console: Console, _: Job) -> None:
    if overrides:
        raise ValueError(f"report takes no recipe keys, but got --{overrides[0][0]}")
    if not (known.run_dir / "recipe.toml").exists():
        raise ValueError(f"{known.run_dir} is not a run folder: it has no recipe.toml")
    console.say(str(write_report(known.run_dir)))


if __name__ == "__main__":
    sys.exit(main())
