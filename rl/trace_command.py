"""`longreach trace RUN`: the run's time line as a file that ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.checkpoint import write_atomically
from ..engine.launch import Job
from .console import Console
from .run import RunFolder
from .timeline import read_timeline, trace, within


def add_trace(commands: Any) -> None:
    """Adds the command to the parser of `longreach`."""
    command = commands.add_parser(
        "trace", help="write a run's time line for ui.perfetto.dev: generation, judge, training", allow_abbrev=False
    )
    command.add_argument("run_dir", type=Path, metavar="RUN")
    command.add_argument("--out", type=Path, metavar="JSON", help="the file to write (default: RUN/trace.json)")
    command.add_argument("--first", type=int, default=0, metavar="STEP", help="the first step of it (default: all)")
    command.add_argument("--last", type=int, metavar="STEP", help="the last step of it")
    command.set_defaults(run=run_trace)


def run_trace(known: argparse.Namespace, overrides: Sequence[tuple[str, str]], console: Console, job: Job) -> None:
    if overrides:
        raise ValueError(f"trace takes no recipe keys, but got --{overrides[0][0]}")
    folder = RunFolder(known.run_dir)
    if not folder.timeline_file.is_file():
        raise ValueError(f"{folder.timeline_file} is missing: give the folder of a run that has made a step")
    lines = within(read_timeline(folder.timeline_file), known.first, known.last)
    if not lines:
        raise ValueError(f"{folder.timeline_file} has nothing of steps {known.first} to {known.last or 'the end'}")
    path = known.out or known.run_dir / "trace.json"
    if job.rank == 0:
        write_atomically(path, json.dumps(trace(lines, known.run_dir.resolve().name), ensure_ascii=False))
    console.say(f"{path} ({len(lines)} lines; open it in ui.perfetto.dev)")
