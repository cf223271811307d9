"""Proof of one kernel without a GPU: `python -m longreach.kernels.check linear_logprob`, in less than a minute.

Four parts: its numbers in Triton's interpreter against fp64, its compiled code for three GPU architectures, the least
time its work takes, and mutants, faults that the first part must catch. What it can't show: races, bf16 arithmetic and
speed, which take a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checks import load, names, table
from .checks.case import Description
from .checks.compilation import ARCHITECTURES, SHARED_LIMIT
from .checks.floor import TERABYTES, TFLOPS, floor
from .checks.worker import Job, read

PARTS = ("numerics", "compile", "floor", "mutants")
TITLES = {
    "numerics": "Numbers, in the interpreter; Gluon on a simulated machine (three-way rule: 1.00 is all that is allowed)",
    "compile": "Compiled code (bytes; counts of instructions)",
    "mutants": "Mutants (each must be caught; errors in units of the allowed one)",
}
PRINT = {"numerics": table.numerics, "compile": table.compilation, "mutants": table.mutants}


def _size(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not value.isdigit() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it as N=8192")
    return name, int(value)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longreach.kernels.check", description="Proves one kernel without a GPU.", allow_abbrev=False
    )
    parser.add_argument("name", nargs="?", help="the op whose kernels are checked (see --list)")
    parser.add_argument("--list", action="store_true", help="list the ops and stop")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=ARCHITECTURES, help="compute capabilities"
    )
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    parser.add_argument(
        "--shape", type=_size, nargs="+", default=[], metavar="N=8192", help="sizes at which the floor is shown"
    )
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="ceiling: 1e12 operations a second (%(default)s)")
    parser.add_argument("--terabytes", type=float, default=TERABYTES, help="ceiling: 1e12 bytes a second (%(default)s)")
    given = parser.parse_args(arguments)
    if not given.list and given.name is None:
        parser.error(f"which kernel? Known: {', '.join(names())}")
    if set(given.skip) == set(PARTS):
        parser.error("every part is skipped: nothing would be checked")
    return given


def _floor(description: Description, given: argparse.Namespace) -> str:
    shape = dict(description.SHAPE)
    for name, value in given.shape:
        if name not in shape:
            raise ValueError(f"{given.name} has no size {name!r}: choose from {', '.join(shape)}")
        shape[name] = value
    floors = [floor(work, given.tflops, given.terabytes) for work in description.work(shape)]
    sizes = " ".join(f"{name}={value}" for name, value in shape.items())
    return f"Floor at {sizes}, {given.tflops:g} TFLOP/s, {given.terabytes:g} TB/s\n{table.floors(floors)}"


def _jobs(given: argparse.Namespace) -> list[Job]:
    """What runs side by side: a process a part, and one an architecture for the compiler, which takes longest."""
    jobs = [Job("compile", (arch,)) for arch in given.arch] + [Job("mutants"), Job("numerics")]
    return [job for job in jobs if job.part not in given.skip]


def _report(part: str, jobs: Sequence[Job]) -> int:
    """Waits for a part's processes, prints its rows and returns how many failed."""
    codes = [job.wait() for job in jobs]
    rows: list[Any] = [row for job in jobs for row in read(part, job.into)]
    print(f"\n{TITLES[part]}\n{PRINT[part](rows)}", flush=True)
    failed = sum(not row.ok for row in rows)
    for code in filter(None, codes):
        print(f"FAILED: {part} ended with exit code {code}")
        failed += 1
    if not rows and not any(codes):
        print(f"FAILED: {part} has no case")
        failed += 1
    return failed


def _run(given: argparse.Namespace, description: Description) -> int:
    """Runs the parts side by side and prints each as soon as those before it are done; returns what failed."""
    if "floor" not in given.skip:
        print(_floor(description, given), flush=True)
    jobs, failed = _jobs(given), 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            for index, job in enumerate(jobs):
                job.start(given.name, Path(folder) / str(index))
            for part in PRINT:
                mine = [job for job in jobs if job.part == part]
                failed += _report(part, mine) if mine else 0
        finally:
            for job in jobs:
                job.stop()
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 if all is well, 1 if a check failed, 2 for a wrong argument."""
    given = _parse(arguments)
    if given.list:
        print("\n".join(names()))
        return 0
    try:
        failed = _run(given, load(given.name))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{given.name}: " + (f"{failed} failed" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
