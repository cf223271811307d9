"""`python -m bench [NAMES]`: measure, print the table, draw the plot; or `--compare A B`.

Exit status: 0 done, 1 one of our own contenders failed or a regression was found, 2 wrong input, 3 time ran out before
every case was measured (the same command goes on).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from . import compare, ops, plot, results, table
from .case import DTYPES
from .runner import Plan, Report, Runner

FAILED, WRONG, UNFINISHED = 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.compare:
            return compare.main(*options.compare, threshold=options.threshold)
        return measure(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return WRONG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longreach bench",
        description="Measure kernels beside their peers, print the table and draw the plot; or compare two runs.",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ops.NAMES)}; all unless given")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU if there is one")
    parser.add_argument("--shapes", choices=ops.SHAPES, default="default")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="only this one (repeatable)")
    parser.add_argument("--out", type=Path, help="file of rows (bench/results/cpu.json or cuda.json)")
    parser.add_argument("--plot", type=Path, help="picture to draw, .png or .svg (beside the file of rows)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of rounds per case and pass (default 10)")
    parser.add_argument("--budget", type=float, help="begin no case after so many seconds; a second run goes on")
    parser.add_argument("--fresh", action="store_true", help="measure again what stands for these sources")
    parser.add_argument("--commit", help="what to write as commit where git can't be asked")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="files of rows: is B slower than A?")
    parser.add_argument("--threshold", type=float, default=compare.THRESHOLD, help="of --compare (default 0.05)")
    return parser


def measure(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device: leave out --device cuda")
    path = options.out or results.FOLDER / f"{device}.json"
    names = options.names or ops.NAMES
    asked = [(op, ops.cases(op, name, device, options.shapes, options.dtype)) for name in names
             for op in [ops.load_op(name)]]  # fmt: skip
    plan = Plan(seconds=options.seconds, deadline=deadline(options.budget))
    conditions = results.conditions(device, options.commit)
    runner = Runner(path, device, conditions, plan, fresh=options.fresh, say=lambda line: print(line, flush=True))
    try:
        for op, cases in asked:
            runner.run(op, cases)
    except torch.AcceleratorError as error:
        print(f"the device is lost ({str(error).splitlines()[0]}): the same command goes on past that contender")
        return UNFINISHED
    rows = [row for row in results.load(path) if row["op"] in names]
    table.show(rows)
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib isn't installed")
    elif any(row["status"] == "measured" for row in rows):
        draw = getattr(asked[0][0], "draw", plot.draw) if len(asked) == 1 else plot.draw
        print(f"picture: {draw(rows, options.plot or path.with_suffix('.png'))}")
    print(f"{runner.report.written} rows written to {path}, {runner.report.standing} stood already")
    return status(runner.report)


def deadline(budget: float | None) -> float:
    return float("inf") if budget is None else time.monotonic() + budget


def status(report: Report) -> int:
    if report.left:
        print(f"time ran out: {report.left} cases are left; the same command goes on with them")
        return UNFINISHED
    if report.failed:
        print(f"{report.failed} contenders of ours failed: see their gap rows")
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
