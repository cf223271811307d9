"""The `longreach` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from ..engine.model import load_tokenizer
from .config import dump
from .console import Console
from .curriculum import describe, phase_name
from .evaluate import evaluate
from .policy import Policy, model_source
from .recipe import Recipe, load_recipe, shipped, to_toml
from .report import write_report
from .rewards import make_reward
from .sources import read_prompts
from .train import Stopped, check_window, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; an error of the user's is one message and exit status 2."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    console = Console()
    transformers_logging.disable_progress_bar()  # one bar of ours, not one for each checkpoint
    try:
        return int(known.run(known, _overrides(rest), console) or 0)
    except ValueError as error:
        print(f"longreach: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        console.say(str(stopped))
        return 130


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
            epilog="Any recipe key can be given as --section.key VALUE, for example --rl.group-size 4.",
        )
        command.add_argument("recipe", help=f"a .toml file or one of: {recipes}")
        command.add_argument("--run-dir", type=Path, help="the run folder (default: runs/NAME)")
        command.set_defaults(run=run)
        if name == "train":
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
    demo = commands.add_parser("demo", help="train the demo recipe (CPU, minutes)", allow_abbrev=False)
    demo.add_argument("--run-dir", type=Path)
    demo.set_defaults(run=_train, recipe="demo", dry_run=False, replay=None)
    report = commands.add_parser("report", help="draw a run as one HTML page", allow_abbrev=False)
    report.add_argument("run_dir", type=Path, metavar="RUN")
    report.set_defaults(run=_report)
    return parser


def _overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """[--a.b value, --c.d=value] -> [(a.b, value), (c.d, value)]."""
    pairs: list[tuple[str, str]] = []
    items = iter(rest)
    for item in items:
        if not item.startswith("--"):
            raise ValueError(f"unexpected argument {item!r}: recipe keys are given as --section.key VALUE")
        key, equals, value = item[2:].partition("=")
        if not equals:
            following = next(items, None)
            if following is None or following.startswith("--"):
                raise ValueError(f"--{key} needs a value")
            value = following
        pairs.append((key, value))
    return pairs


def _train(known: argparse.Namespace, overrides: list[tuple[str, str]], console: Console) -> None:
    recipe = load_recipe(known.recipe, overrides)
    run_dir = known.run_dir or Path("runs") / recipe.name
    if known.dry_run:
        _dry_run(recipe, run_dir, console)
    else:
        train(recipe, run_dir, replay=known.replay, console=console)


def _dry_run(recipe: Recipe, run_dir: Path, console: Console) -> None:
    console.say(to_toml(dump(recipe)))
    check_window(recipe)
    tokenizer = load_tokenizer(model_source(recipe.model), trust_remote_code=recipe.model.trust_remote_code)
    prompts = read_prompts(recipe, tokenizer, run_dir / "data", console)
    seen = [
        ("sft", prompts.sft),
        *((phase_name(i), [prompts.train[j] for j in members]) for i, members in enumerate(prompts.phases)),
    ]
    for name, part in [
        *seen,
        ("beyond the last phase", [prompts.train[i] for i in prompts.beyond]),
        ("eval", prompts.eval),
    ]:
        console.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in describe(part).items()))


def _eval(known: argparse.Namespace, overrides: list[tuple[str, str]], console: Console) -> None:
    recipe = load_recipe(known.recipe, overrides)
    if not recipe.data.eval:
        raise ValueError("the recipe has no data.eval to evaluate on")
    run_dir = known.run_dir or Path("runs") / recipe.name
    tokenizer = load_tokenizer(model_source(recipe.model), trust_remote_code=recipe.model.trust_remote_code)
    prompts = read_prompts(recipe, tokenizer, run_dir / "data", console).eval
    policy = Policy(recipe.model, recipe.generator)
    with console.progress("evaluating", len(prompts)) as advance:
        summary, _ = evaluate(
            policy, make_reward(recipe.reward), prompts, recipe.eval, bounds=recipe.buckets(),
            seed=recipe.run.seed, name="eval", on_batch=advance,
        )  # fmt: skip
    for row in [*summary["benchmarks"], *({**b, "name": f"<= {b['upper']} tokens"} for b in summary["buckets"])]:
        console.say(f"{row['name']}: {row['accuracy']} ± {row['stderr']} (n = {row['n']})")


def _report(known: argparse.Namespace, overrides: list[tuple[str, str]], console: Console) -> None:
    if overrides:
        raise ValueError(f"report takes no recipe keys, but got --{overrides[0][0]}")
    if not (known.run_dir / "recipe.toml").exists():
        raise ValueError(f"{known.run_dir} is not a run folder: it has no recipe.toml")
    console.say(str(write_report(known.run_dir)))


if __name__ == "__main__":
    sys.exit(main())
