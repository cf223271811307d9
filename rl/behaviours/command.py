"""`longreach behaviours RUN`: counts the four behaviours over a run's steps, draws them, and says how both counters agree."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.launch import Job
from ..config import build, override
from ..console import Console
from ..report import write_report
from .course import BehavioursConfig, count_run
from .figure import TITLES, behaviours_figure
from .responses import EVALUATION

_OF_TRAINING = ("audit", "tail", "max_wait")
_ROOM = {"max_tokens": 4096}
_PATIENCE = {"timeout": 300.0, "deadline": 900.0}
"""A list of instances is longer than a verdict, and so is the reading."""


def add_behaviours(commands: Any) -> None:
    """Adds the command to the parser of `longreach`."""
    command = commands.add_parser(
        "behaviours", help="count grounding, subgoals, backtracking and verification over a run", allow_abbrev=False,
        epilog="With a judge: --judge.base-url URL --judge.model NAME, or --judge.model-dir DIR, and the other keys of a "
        "recipe's [reward.judge]. Without one, words alone count.",
    )  # fmt: skip
    usual = BehavioursConfig()
    command.add_argument("run_dir", type=Path, metavar="RUN")
    command.add_argument(
        "--samples", type=int, default=usual.samples, metavar="S", help=f"responses a step ({usual.samples})"
    )
    command.add_argument(
        "--steps", type=int, default=usual.steps, metavar="N", help=f"training steps, evenly spaced ({usual.steps})"
    )
    command.add_argument(
        "--no-documents", action="store_true", help="don't read the run's data to look quotations up in"
    )
    command.set_defaults(run=run_behaviours)


def run_behaviours(known: argparse.Namespace, overrides: Sequence[tuple[str, str]], console: Console, job: Job) -> None:
    """Counts and draws; on many ranks the first one alone."""
    run_dir: Path = known.run_dir
    if not (run_dir / "recipe.toml").exists():
        raise ValueError(f"{run_dir} is not a run folder: it has no recipe.toml")
    config = read_config(known, overrides)
    if job.rank:
        return
    path = count_run(run_dir, config, os.environ, console)
    made = json.loads(path.read_text(encoding="utf-8"))
    picture = behaviours_figure(made, run_dir / "behaviours.png")
    console.say(text(made))
    console.say(f"{path}\n{picture}\n{write_report(run_dir)}")


def read_config(known: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> BehavioursConfig:
    values: dict[str, Any] = {"samples": known.samples, "steps": known.steps, "documents": not known.no_documents}
    for key, value in overrides:
        override(values, key, value)
    judge = values.get("judge")
    if isinstance(judge, dict):
        useless = [key for key in _OF_TRAINING if key in judge]
        if useless:
            raise ValueError(f"judge {', '.join(useless)} would do nothing here, it is of training: leave it out")
        values["judge"] = {**_ROOM, **(_PATIENCE if "base_url" in judge else {}), **judge}
    return build(BehavioursConfig, values)


def text(made: Mapping[str, Any]) -> str:
    """Counts per response at the beginning and the end, and the comparison, as the console shows them."""
    lines: list[str] = []
    rows = [row for row in made["points"] if row["n"]]
    trained = [row for row in rows if row["kind"] != EVALUATION] or rows
    for row in dict.fromkeys((0, len(trained) - 1)):
        lines.append(_point_line(trained[row]))
    for pair in made["comparison"] or ():
        lines.append(
            f"{TITLES[pair['behaviour']]}: {_plain(pair['lexical'])} by words, {_plain(pair['judge'])} by the judge, rank "
            f"correlation {_plain(pair['spearman'])} over {pair['n']} responses, {_plain(pair['spearman_steps'])} over {pair['steps']} steps"
        )
    return "\n".join(lines)


def _point_line(row: Mapping[str, Any]) -> str:
    counts = [
        f"{TITLES[name].lower()} {_plain(one['mean'])} ± {_plain(one['stderr'])}"
        for name, one in row["lexical"].items()
    ]
    return f"{row['stage']}, step {row['step']}, per response of {row['n']} by words: {', '.join(counts)}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
